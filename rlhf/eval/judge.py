"""Judges: whatever says which of two answers is better. A pair goes in, a preference in both orders comes out.

A judge that scores one answer at a time (a reward model, the gold scorer, a rule) cannot tell the order. One that sees
both at once (an LLM, a function of two answers) can be swayed by it, so it is always asked twice, with places swapped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlhf.data.rows import Prompt
from rlhf.infra.errors import UserError


@dataclass(frozen=True)
class Pair:
    """One prompt with two answers. `label` is a person's preference for the first: 1 better, 0.5 alike, 0 worse.

    Pairs of one `prompt_id` count as one unit. `group` is the set that the pair belongs to. `columns` is what the row
    held beside prompt and answers; `first_columns` and `second_columns` are about one answer, such as a score.
    """

    prompt_id: str
    prompt: Prompt
    first: str
    second: str
    label: float | None = None
    group: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    first_columns: Mapping[str, Any] = field(default_factory=dict)
    second_columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """What a judge said of a pair: its preference for the first answer when that stood in front, and when it did not.

    1 is better, 0.5 alike, 0 worse, and None is no verdict that could be read. `replies` are the judge's words for
    either order. `is_asked` is False where nothing was asked because the answers are the same text. `scores` are those
    of the first and the second answer, where the judge scores one at a time.
    """

    in_front: float | None
    behind: float | None
    replies: tuple[str, str] = ("", "")
    is_asked: bool = True
    scores: tuple[float | None, float | None] | None = field(default=None, compare=False)

    @property
    def is_whole(self) -> bool:
        """Whether there is a verdict for both orders; one order alone would favour a place."""
        return self.in_front is not None and self.behind is not None


@dataclass(frozen=True)
class Watch:
    """How a judge tells that it gets on, by the number of pairs, and learns that it is to stop."""

    advance: Callable[[int], None] = lambda number: None
    should_stop: Callable[[], bool] = lambda: False


class JudgingStopped(Exception):  # noqa: N818 - not an error: it was asked for
    """Judging was asked to stop; what was judged is kept where the judge keeps it."""


class Judge(Protocol):
    """Judges many pairs at once. `sees_order` says whether places could matter to it."""

    name: str
    sees_order: bool

    def __call__(self, pairs: Sequence[Pair], watch: Watch = ...) -> list[Judgement]: ...


# ---------------------------------------------------------------------- from two orders to one preference


def averaged(judgement: Judgement) -> float | None:
    """The mean of both orders: a verdict that goes with the place ends at one half."""
    if judgement.in_front is None or judgement.behind is None:
        return None
    return (judgement.in_front + judgement.behind) / 2


def agreed(judgement: Judgement) -> float | None:
    """A win only where both orders say so, else a tie: MT-bench's rule (arXiv:2306.05685, section 3.4)."""
    mean = averaged(judgement)
    return mean if mean is None or judgement.in_front == judgement.behind else 0.5


RULES: dict[str, Callable[[Judgement], float | None]] = {"averaged": averaged, "agreed": agreed}


# ---------------------------------------------------------------------- judges that need no server


ScoreFunction = Callable[..., Sequence["float | None"]]


class ScoreJudge:
    """Prefers the answer with the higher score; scores closer than `tie_margin` are alike.

    `score` is a reward function `f(prompts, completions, **columns)`; a None or NaN among its scores is no verdict.
    """

    sees_order = False

    def __init__(self, name: str, score: ScoreFunction, tie_margin: float = 1e-9) -> None:
        self.name, self.score, self.tie_margin = name, score, tie_margin

    def __call__(self, pairs: Sequence[Pair], watch: Watch = Watch()) -> list[Judgement]:
        if watch.should_stop():
            raise JudgingStopped
        firsts = self._scores(pairs, [pair.first for pair in pairs], [pair.first_columns for pair in pairs])
        seconds = self._scores(pairs, [pair.second for pair in pairs], [pair.second_columns for pair in pairs])
        watch.advance(len(pairs))
        return [self._judgement(*scores) for scores in zip(firsts, seconds, strict=True)]

    def _scores(
        self, pairs: Sequence[Pair], answers: Sequence[str], own: Sequence[Mapping[str, Any]]
    ) -> Sequence[float | None]:
        columns = _gathered([{**pair.columns, **of_answer} for pair, of_answer in zip(pairs, own, strict=True)])
        returned = list(self.score([pair.prompt for pair in pairs], list(answers), **columns))
        if len(returned) != len(pairs):
            raise UserError(f"judge '{self.name}' returned {len(returned)} scores for {len(pairs)} answers")
        return [_score(value, self.name) for value in returned]

    def _judgement(self, first: float | None, second: float | None) -> Judgement:
        if first is None or second is None:
            return Judgement(None, None, scores=(first, second))
        gap = first - second
        preference = 0.5 if abs(gap) <= self.tie_margin else float(gap > 0)
        return Judgement(preference, preference, scores=(first, second))


class PairFunctionJudge:
    """A user's function of both answers, `f(prompts, firsts, seconds, **columns)`.

    It returns one number per pair: 1 when the answer in front is better, 0 when the other is, 0.5 when they are alike,
    anything in between, and None for no verdict.
    """

    sees_order = True

    def __init__(self, name: str, function: ScoreFunction) -> None:
        self.name, self.function = name, function

    def __call__(self, pairs: Sequence[Pair], watch: Watch = Watch()) -> list[Judgement]:
        if watch.should_stop():
            raise JudgingStopped
        firsts, seconds = [pair.first for pair in pairs], [pair.second for pair in pairs]
        in_front, behind = self._asked(pairs, firsts, seconds), self._asked(pairs, seconds, firsts)
        watch.advance(len(pairs))
        turned = [None if value is None else 1 - value for value in behind]
        return [Judgement(front, back) for front, back in zip(in_front, turned, strict=True)]

    def _asked(self, pairs: Sequence[Pair], front: Sequence[str], back: Sequence[str]) -> list[float | None]:
        columns = _gathered([pair.columns for pair in pairs])
        returned = list(self.function([pair.prompt for pair in pairs], list(front), list(back), **columns))
        if len(returned) != len(pairs):
            raise UserError(f"judge '{self.name}' returned {len(returned)} preferences for {len(pairs)} pairs")
        values = [_score(value, self.name) for value in returned]
        wrong = next((value for value in values if value is not None and not 0 <= value <= 1), None)
        if wrong is not None:
            raise UserError(f"judge '{self.name}' returned {wrong:g}; expected a preference between 0 and 1")
        return values


def longer(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """Score by length in characters: no judge of quality but the baseline that shows how far length alone decides."""
    return [float(len(text)) for text in completions]


def shorter(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """The opposite of `longer`."""
    return [-float(len(text)) for text in completions]


def column_score(name: str) -> ScoreFunction:
    """A score that the rows bring along, such as `gold` in the answers that an evaluation wrote."""

    def score(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        if name not in columns:
            there = ", ".join(sorted(columns)) or "none"
            raise UserError(f"the answers have no column '{name}' to be judged by; their columns are: {there}")
        return list(columns[name])

    return score


def panel(judges: Sequence[Sequence[Judgement]]) -> list[Judgement]:
    """Several judges as one: the mean of their preferences in either order, no verdict where one of them has none."""
    joined = []
    for of_pair in zip(*judges, strict=True):
        fronts, backs = [one.in_front for one in of_pair], [one.behind for one in of_pair]
        joined.append(Judgement(_mean(fronts), _mean(backs), is_asked=any(one.is_asked for one in of_pair)))
    return joined


def distinct_names(names: Iterable[str]) -> list[str]:
    """The names in order; a second one of the same name is called `name_2`."""
    counts: Counter[str] = Counter()
    found = []
    for name in names:
        counts[name] += 1
        found.append(name if counts[name] == 1 else f"{name}_{counts[name]}")
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _gathered(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _score(value: Any, judge: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"judge '{judge}' returned {value!r}; expected a number, or None for no verdict") from None
    return None if math.isnan(number) else number
