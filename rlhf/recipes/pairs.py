"""Preference pairs of a policy's own answers: sample several to every prompt, compare them, keep what differs.

Rewards score the answers, or judges compare them two by two. The pairs are in `<run>/pairs.jsonl`, in the form that
`rlhf dpo`, `rlhf rm` and the others read; all answers with their scores are in `<run>/answers.jsonl`, one line to a
prompt, and `<run>/pairs_report.json` says what became of the comparisons. What is drawn is a function of weights, seed
and prompt, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlhf.data.formats import FORMATS
from rlhf.data.rows import Columns, Prompt
from rlhf.eval.judge import RULES, Judge, JudgingStopped, Pair, panel
from rlhf.infra.durable import write_json, write_text
from rlhf.infra.experiment import Run
from rlhf.recipes.judge_pairs import judge_all
from rlhf.recipes.judging import build_judges
from rlhf.recipes.launch import launch
from rlhf.recipes.pairs_config import PairsConfig
from rlhf.recipes.portions import Portion, fill_in_portions
from rlhf.recipes.rollouts import Answers, OnlineParts, announce_online, prepare_online
from rlhf.rewards.pairing import Answer, Comparison, compare, counted, decided

PAIRS, ANSWERS, REPORT = "pairs.jsonl", "answers.jsonl", "pairs_report.json"
# Columns that would make another format of a pair, or say of its answers what was said of others.
_TAKEN = {name for known in FORMATS for name in (*known.columns, *known.also_used)}
_OF_OTHER_ANSWERS = ("_chosen", "_rejected")


@dataclass(frozen=True)
class SampledAnswer(Answer):
    """An answer with each reward's own value, its length in tokens, and sum of log pi - log pi_ref over it in nats."""

    terms: dict[str, float] = field(default_factory=dict)
    num_tokens: int = 0
    kl: float | None = None


@dataclass(frozen=True)
class Group:
    """A prompt with the columns of its row, and its answers."""

    prompt: Prompt
    columns: Columns
    answers: list[SampledAnswer]

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Group:
        """Read a row of `answers.jsonl`, which is `asdict` of a group."""
        return cls(row["prompt"], row["columns"], [SampledAnswer(**answer) for answer in row["answers"]])


@dataclass(frozen=True)
class PairsParts:
    """What samples, loaded and found usable, and who compares what was sampled, if it is not its rewards."""

    online: OnlineParts
    judges: Sequence[Judge] = ()


@dataclass(frozen=True)
class Block:
    """Prompts that are answered at once: `count` of them from `start` on, all of one epoch over the prompt set."""

    start: int
    count: int
    epoch: int


def run_pairs(config: PairsConfig, resume: Path | None = None) -> Run:
    """Sample, score or judge, and pair; the pairs are in `<run>/pairs.jsonl`."""
    return launch(
        "pairs",
        config,
        prepare,
        make,
        settings=config.run,
        lineage=config.lineage | ({"reference": config.reference} if config.reference is not None else {}),
        data_files=config.data.files(),
        resume=resume,
    )


def prepare(config: PairsConfig, device: torch.device, rejected_rows: Path) -> PairsParts:
    """Policy and reference on one base, the prompts, and the rewards or the judges."""
    if not config.judges:
        return PairsParts(prepare_online(config, device, rejected_rows, reference=config.reference))
    judges = build_judges(config.judges, config.run.output_dir, device, config.run.dtype)
    unscored = config.model_copy(update={"rewards": []})
    return PairsParts(prepare_online(unscored, device, rejected_rows, reference=config.reference), judges)


def make(config: PairsConfig, run: Run, parts: PairsParts) -> tuple[int, int]:
    """Answers, block by block; then the pairs."""
    announce_online(config, run, parts.online)
    settings, source = config.pairs, Answers(config, run, parts.online, run.timer)
    at_once = max(1, config.generation.batch_size // settings.num_generations)
    blocks = blocks_of(settings.first_prompt, settings.num_prompts, len(parts.online.prompts), at_once)
    progress = fill_in_portions(run, ANSWERS, len(blocks), "answers", lambda n: portion(source, blocks[n], config))
    if run.stop_reason is None:
        groups = read_groups(run.folder / ANSWERS)
        comparisons = [compare(g.answers, settings.choose, settings.cut_off, settings.min_gap) for g in groups]
        try:
            comparisons = judged(groups, comparisons, parts.judges, config.rule, run)
        except JudgingStopped:  # Ctrl-C, or the time is spent; what was answered is kept
            return 0, progress.tokens
        write_pairs(run.folder / PAIRS, groups, comparisons)
        report(run, groups, comparisons)
    return 0, progress.tokens


def blocks_of(first: int, count: int, num_prompts: int, at_once: int) -> list[Block]:
    """The prompts `first` to `first + count` of an endless stream of epochs in blocks, none of them in two epochs."""
    blocks, start = [], first
    while start < first + count:
        epoch, place = divmod(start, num_prompts)
        size = min(at_once, num_prompts - place, first + count - start)
        blocks.append(Block(start, size, epoch))
        start += size
    return blocks


def portion(source: Answers, block: Block, config: PairsConfig) -> Portion:
    """The groups of a block, and the line of the log for them."""
    groups = answer(source, block, config)
    num_tokens = sum(answer.num_tokens for group in groups for answer in group.answers)
    return Portion([asdict(group) for group in groups], num_tokens, sampled(groups))


def read_groups(path: Path) -> list[Group]:
    """Everything in `answers.jsonl`."""
    with path.open(encoding="utf-8") as file:
        return [Group.from_row(json.loads(line)) for line in file]


def answer(source: Answers, block: Block, config: PairsConfig) -> list[Group]:
    """Sample and score the answers to the prompts of a block."""
    size = config.pairs.num_generations
    prompts = source.prompts(block.start, block.count)
    batch = [prompt for prompt in prompts for _ in range(size)]
    # The epoch, not the block, tells this draw from others: how answers are batched changes nothing but rounding.
    trajectory = source.draw(batch, block.epoch)
    scores = source.score(batch, trajectory) if source.parts.reward is not None else None
    kls: list[float | None] = [None] * len(batch)
    if config.reference is not None:
        kls = (trajectory.logprobs_BR - source.reference_logprobs(trajectory)).sum(dim=1).tolist()
    texts, lengths = source.texts(trajectory), trajectory.lengths_B.tolist()
    finished = trajectory.finished_B.tolist()

    def of_row(row: int) -> SampledAnswer:
        terms = {} if scores is None else {name: values[row] for name, values in scores.by_term.items()}
        score = None if scores is None else scores.total[row]
        return SampledAnswer(texts[row], finished[row], score, terms, lengths[row], kls[row])

    return [
        Group(prompt.prompt, dict(prompt.columns), [of_row(place * size + i) for i in range(size)])
        for place, prompt in enumerate(prompts)
    ]


def judged(
    groups: Sequence[Group], comparisons: Sequence[Sequence[Comparison]], judges: Sequence[Judge], rule: str, run: Run
) -> list[list[Comparison]]:
    """The comparisons with a word of the judges on each that nothing else has decided; several judges as a panel."""
    open_ones = [
        (place, number)
        for place, of_group in enumerate(comparisons)
        for number, comparison in enumerate(of_group)
        if comparison.outcome is None
    ]
    found = [list(of_group) for of_group in comparisons]
    if not open_ones:
        return found
    pairs = [_pair(groups[place], place, comparisons[place][number]) for place, number in open_ones]
    verdicts = [one.judgements for one in judge_all(judges, pairs, run)]
    agreed = panel(verdicts) if len(verdicts) > 1 else verdicts[0]
    for (place, number), judgement in zip(open_ones, agreed, strict=True):
        found[place][number] = decided(found[place][number], RULES[rule](judgement))
    return found


def _pair(group: Group, place: int, comparison: Comparison) -> Pair:
    first, second = group.answers[comparison.first], group.answers[comparison.second]
    return Pair(
        str(place),
        group.prompt,
        first.text,
        second.text,
        columns=group.columns,
        first_columns={"finished": first.finished},
        second_columns={"finished": second.finished},
    )


def write_pairs(path: Path, groups: Sequence[Group], comparisons: Sequence[Sequence[Comparison]]) -> None:
    """One row to every comparison that has a better side, with the columns of its prompt."""
    rows = [row for group, of_group in zip(groups, comparisons, strict=True) for row in _rows(group, of_group)]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _rows(group: Group, comparisons: Sequence[Comparison]) -> Iterator[dict[str, Any]]:
    columns = {
        name: value
        for name, value in group.columns.items()
        if name not in _TAKEN and not name.endswith(_OF_OTHER_ANSWERS)
    }
    for one in comparisons:
        if one.outcome != "kept":
            continue
        first, second = group.answers[one.first], group.answers[one.second]
        better, worse = (first, second) if (one.preference or 0.0) > 0.5 else (second, first)
        scores = {"score_chosen": better.score, "score_rejected": worse.score} if better.score is not None else {}
        yield {**columns, "prompt": group.prompt, "chosen": better.text, "rejected": worse.text, **scores}


def sampled(groups: Sequence[Group]) -> dict[str, float]:
    """What answers are like: their scores, each reward's own, lengths, ends, and the KL where it was measured."""
    answers = [answer for group in groups for answer in group.answers]
    line = {
        "length/mean": _mean([float(answer.num_tokens) for answer in answers]),
        "length/finished_share": _mean([float(answer.finished) for answer in answers]),
    }
    scores = [answer.score for answer in answers if answer.score is not None]
    if scores:
        line["reward/mean"] = _mean(scores)
        line |= {f"reward/term/{name}": _mean([a.terms[name] for a in answers]) for name in answers[0].terms}
    kls = [answer.kl for answer in answers if answer.kl is not None]
    return line | ({"kl/mean": _mean(kls)} if kls else {})


def report(run: Run, groups: Sequence[Group], comparisons: Sequence[Sequence[Comparison]]) -> None:
    """Say and keep what all answers are like, and what became of the comparisons."""
    counts = counted([one for of_group in comparisons for one in of_group])
    line = {f"pairs/{outcome}": float(count) for outcome, count in counts.items()}
    line["pairs/prompts_without_pair"] = float(sum(all(c.outcome != "kept" for c in of) for of in comparisons))
    line["pairs/empty_answers"] = float(sum(not answer.text.strip() for group in groups for answer in group.answers))
    write_json(run.folder / REPORT, line | sampled(groups))
    left_out = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if outcome != "kept" and count)
    run.logger.info(f"{counts['kept']} pairs" + (f"; left out: {left_out}" if left_out else ""))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
