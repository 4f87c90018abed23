"""What a comparison of training methods says: for every method and seed the gain over SFT beside its price.

The measure is gold where it is known, else the reward model's own score, which the methods that sample have learnt to
please. Plain data in, a table, sentences and files out.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rlhf.eval.intervals import Interval, mean_interval, paired_difference, student_interval
from rlhf.eval.samples import Sample
from rlhf.eval.tables import NONE, Cell, Table, cell
from rlhf.eval.winrate import compare

TABLE_FILE, NUMBERS_FILE, FIGURE_FILE = "ablation.md", "ablation.json", "ablation.png"
CLOCKS = {"wall": "by the clock on the wall", "cpu": "those of one processor"}
MAX_OFF_BUDGET = 0.2  # of the seconds given, above which the comparison is not one of equal time


@dataclass(frozen=True)
class Spent:
    """Seconds of a method's runs: updates and what belongs to them, sampling and scoring, reading and writing."""

    learning: float
    sampling: float
    start_up: float

    @property
    def training(self) -> float:
        """What methods are given alike: everything but start-up."""
        return self.learning + self.sampling

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.learning + other.learning, self.sampling + other.sampling, self.start_up + other.start_up)


@dataclass(frozen=True)
class Outcome:
    """A method with one seed.

    `gain` is its score less SFT's on the same prompts, `score` its own, both by `measure`; `win_rate` against SFT with
    ties one half. `reward_gain` is the same by the reward model, None without one. `kl` to SFT in nats per response,
    `length` in tokens. `steps` says how long it trained, in words.
    """

    method: str
    seed: int
    measure: str
    steps: str
    gain: Interval
    score: Interval
    win_rate: Interval
    reward_gain: Interval | None
    kl: float
    length: float
    spent: Spent

    @property
    def is_above(self) -> bool:
        """Whether the whole interval of the gain lies above zero."""
        return self.gain.low > 0


@dataclass(frozen=True)
class Baseline:
    """The SFT policy on the prompts of a seed."""

    seed: int
    measure: str
    score: Interval
    length: float


@dataclass(frozen=True)
class Summary:
    """A method over its seeds: the gain with Student's interval over seeds (no bounds for a single one), and means."""

    method: str
    outcomes: tuple[Outcome, ...]

    def mean(self, of: Callable[[Outcome], float]) -> float:
        return fmean(of(one) for one in self.outcomes)

    @property
    def gain(self) -> Interval:
        return student_interval([one.gain.estimate for one in self.outcomes])

    @property
    def is_above(self) -> bool:
        """Above SFT with every seed and, where there are several, over seeds."""
        every_seed = all(one.is_above for one in self.outcomes)
        return every_seed and (len(self.outcomes) == 1 or self.gain.low > 0)


@dataclass(frozen=True)
class Ablation:
    """Everything that was measured; a method has no outcome with a seed with which it diverged.

    `seconds` is what each was given (None: lengths were given), `clock` whether seconds are those of the clock on the
    wall or of one processor (`cpu`).
    """

    seconds: float | None
    methods: tuple[str, ...]
    baselines: tuple[Baseline, ...]
    outcomes: tuple[Outcome, ...]
    clock: str = "wall"

    @property
    def measure(self) -> str:
        return self.baselines[0].measure

    @property
    def summaries(self) -> list[Summary]:
        """Methods with an outcome, those that gained most first."""
        found = [Summary(name, self.of(name)) for name in self.methods if self.of(name)]
        return sorted(found, key=lambda one: -one.gain.estimate)

    def of(self, method: str) -> tuple[Outcome, ...]:
        """The outcomes of a method, seed by seed."""
        return tuple(one for one in self.outcomes if one.method == method)


def baseline(seed: int, sft: Sequence[Sample]) -> Baseline:
    """What the methods start from."""
    measure, values = _measured(sft)
    return Baseline(seed, measure, mean_interval(values), fmean(sample.num_tokens for sample in sft))


def outcome(
    method: str,
    seed: int,
    steps: str,
    spent: Spent,
    ours: Sequence[Sample],
    sft: Sequence[Sample],
) -> Outcome:
    """A method's answers against SFT's to the same prompts."""
    by_prompt = {sample.prompt_id: sample for sample in sft}
    theirs = [by_prompt[sample.prompt_id] for sample in ours]
    measure, values = _measured(ours)
    rewards = [[sample.reward for sample in samples if sample.reward is not None] for samples in (ours, theirs)]
    has_reward = len(rewards[0]) == len(rewards[1]) == len(ours)
    return Outcome(
        method=method,
        seed=seed,
        measure=measure,
        steps=steps,
        gain=paired_difference(values, _measured(theirs)[1]),
        score=mean_interval(values),
        win_rate=compare(ours, theirs, measure, (method, "sft")).rate,
        reward_gain=paired_difference(*rewards) if has_reward else None,
        kl=fmean(sample.kl or 0.0 for sample in ours),
        length=fmean(sample.num_tokens for sample in ours),
        spent=spent,
    )


def brief_table(found: Ablation) -> Table:
    """One row per method, for a console; the whole table is in the file."""

    def cells(one: Summary) -> tuple[Cell, ...]:
        kl, spent = one.mean(lambda each: each.kl), one.mean(lambda each: each.spent.training)
        seeds = f"{sum(each.is_above for each in one.outcomes)}/{len(one.outcomes)}"
        return (cell(one.gain, 3, sign=True), Cell(seeds), cell(kl, 2), cell(spent, 1))

    columns = ("method", f"{found.measure}, change", "above SFT", "KL", "seconds")
    rows = tuple((one.method, cells(one)) for one in found.summaries)
    return Table("Against SFT, means over seeds", columns, rows, one_line=True)


def table_of(found: Ablation) -> Table:
    """Every method over its seeds, and below it seed by seed."""
    rows = []
    for summary in found.summaries:
        of_all = summary.mean
        rows.append(
            (
                summary.method,
                (
                    Cell("all" if len(summary.outcomes) > 1 else str(summary.outcomes[0].seed)),
                    cell(summary.gain if len(summary.outcomes) > 1 else summary.outcomes[0].gain, 3, sign=True),
                    cell(of_all(lambda one: one.win_rate.estimate), 1, 100),
                    _reward_cell([one.reward_gain for one in summary.outcomes]),
                    *_plain_cells(of_all),
                    Cell(summary.outcomes[0].steps),
                ),
            )
        )
        if len(summary.outcomes) > 1:
            rows += [(summary.method, _seed_cells(one)) for one in summary.outcomes]
    for start in found.baselines:
        empty = (Cell(),) * 3
        cells = (Cell(str(start.seed)), *empty, Cell("0"), cell(start.length, 1), *empty, Cell())
        rows.append(("sft", cells))
    columns = (
        *("method", "seed", f"{found.measure}, change against SFT", "win-rate, %", "reward-model score, change"),
        *("KL, nats", "length, tokens", "seconds of training", "of these sampling", "start-up", "trained"),
    )
    scores = ", ".join(f"{start.score.estimate:.3f}" for start in found.baselines)
    caption = (
        f"SFT's own {found.measure}: {scores}. Intervals are 95 %: with a seed bootstrapped over prompts, over seeds "
        "Student's. Win-rates against SFT, ties half; KL to SFT per response. Seconds were measured, "
        f"{CLOCKS[found.clock]}."
    )
    return Table("Methods on equal terms", columns, tuple(rows), caption, one_line=True)


def sentences(found: Ablation) -> list[str]:
    """What can be said: who gained most at what price, who is not shown to gain, and where terms were not equal."""
    summaries, said = found.summaries, []
    if not summaries:
        return ["Every method diverged; nothing can be compared."]
    first = summaries[0]
    said.append(
        f"{first.method} gained most: {first.gain.estimate:+.3f} {found.measure} at a KL of "
        f"{first.mean(lambda one: one.kl):.2f} nats, in {first.mean(lambda one: one.spent.training):.1f} s, "
        f"{first.mean(lambda one: one.spent.sampling):.1f} of them sampling and scoring."
    )
    said.append(f"Not beaten both in {found.measure} and in KL by another: {', '.join(_frontier(summaries))}.")
    above = [one.method for one in summaries if one.is_above]
    below = [one for one in summaries if not one.is_above]
    said.append(f"Above SFT with every seed and over seeds: {', '.join(above) or 'none'}.")
    for one in below:
        count = sum(each.is_above for each in one.outcomes)
        said.append(f"{one.method} is not shown to be above SFT: {count} of {len(one.outcomes)} seeds are.")
    return said + _cautions(found)


def write_ablation(folder: Path, found: Ablation) -> None:
    """The table and what it says (`ablation.md`), all numbers (`ablation.json`), the figure (`ablation.png`)."""
    from rlhf.eval.ablation_plot import ablation_png
    from rlhf.eval.markdown import plain, table_text

    notes = "\n".join(f"- {plain(sentence)}" for sentence in sentences(found))
    text = f"{table_text(table_of(found))}\n\n{notes}\n\n![{found.measure} against KL]({FIGURE_FILE})\n"
    (folder / TABLE_FILE).write_text(text, encoding="utf-8")
    numbers = dataclasses.asdict(found) | {"said": sentences(found)}
    (folder / NUMBERS_FILE).write_text(json.dumps(_finite(numbers), indent=1) + "\n", encoding="utf-8")
    ablation_png(found, folder / FIGURE_FILE)


def _measured(samples: Sequence[Sample]) -> tuple[str, list[float]]:
    """What answers are measured by, and the values."""
    golds = [sample.gold for sample in samples if sample.gold is not None]
    if len(golds) == len(samples):
        return "gold", golds
    return "reward", [math.nan if sample.reward is None else sample.reward for sample in samples]


def _frontier(summaries: Sequence[Summary]) -> list[str]:
    """Methods for which no other has both a higher gain and a lower KL; the smallest KL first."""
    points = sorted((one.mean(lambda each: each.kl), -one.gain.estimate, one.method) for one in summaries)
    kept, best = [], math.inf
    for _, loss, name in points:
        if loss < best:
            kept.append(name)
            best = loss
    return kept


def _cautions(found: Ablation) -> list[str]:
    said = []
    of_all = len(found.baselines)
    missing = {name: of_all - len(found.of(name)) for name in found.methods}
    said += [f"{name} diverged with {count} of {of_all} seeds." for name, count in missing.items() if count]
    if found.seconds is not None:
        off = {
            one.method: f"{one.method} {one.mean(lambda each: each.spent.training):.1f} s"
            for one in found.summaries
            if abs(one.mean(lambda each: each.spent.training) / found.seconds - 1) > MAX_OFF_BUDGET
        }
        if off:
            said.append(
                f"Not of equal time: {', '.join(off.values())} instead of {found.seconds:g} s. Whole rounds do not fit "
                "exactly, and a machine that is busy tells the wrong time; `lengths` sets them by hand."
            )
    if found.measure == "reward":
        said.append("The measure is the score that methods which sample were trained to raise: it flatters them.")
    return said


def _seed_cells(one: Outcome) -> tuple[Cell, ...]:
    return (
        Cell(str(one.seed)),
        cell(one.gain, 3, sign=True),
        cell(one.win_rate.estimate, 1, 100),
        _reward_cell([one.reward_gain]),
        *_plain_cells(lambda of: of(one)),
        Cell(one.steps),
    )


def _plain_cells(number: Callable[[Callable[[Outcome], float]], float]) -> tuple[Cell, ...]:
    return (
        cell(number(lambda one: one.kl), 2),
        cell(number(lambda one: one.length), 1),
        cell(number(lambda one: one.spent.training), 1),
        cell(number(lambda one: one.spent.sampling), 1),
        cell(number(lambda one: one.spent.start_up), 1),
    )


def _reward_cell(gains: Sequence[Interval | None]) -> Cell:
    known = [gain.estimate for gain in gains if gain is not None]
    return cell(fmean(known), 2, sign=True) if known else Cell(NONE)


def _finite(value: object) -> object:
    """The same with null in place of bounds that are not there."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
