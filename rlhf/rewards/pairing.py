"""From answers to one prompt to preference pairs: which are compared, and what becomes of each comparison.

A comparison is settled without asking anybody where both answers say the same, or where one was cut off and the other
was not; what is left is decided by scores, or by a judge.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

CutOff = Literal["worst", "leave_out", "as_it_is"]
Outcome = Literal["kept", "alike", "identical", "cut_off", "no_verdict"]
OUTCOMES: tuple[Outcome, ...] = ("kept", "alike", "identical", "cut_off", "no_verdict")


@dataclass(frozen=True)
class Answer:
    """One sampled answer as text. `finished` is False where it was cut off; `score` is None where nobody scored it."""

    text: str
    finished: bool
    score: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Two answers (places in their group). `preference` for the first: 1 better, 0 worse, None: somebody must say."""

    first: int
    second: int
    preference: float | None = None
    outcome: Outcome | None = None


def compare(answers: Sequence[Answer], choose: str, cut_off: CutOff, min_gap: float = 0.0) -> list[Comparison]:
    """The comparisons within one group, decided as far as texts, ends and scores decide them.

    Args:
        choose: a name in `CHOICES`.
        cut_off: an answer that was cut off is worse than every finished one, is compared with none, or counts as if it
            had ended there.
        min_gap: scores that differ by no more than this are alike.

    Answers without any text are compared with none: there is nothing in them to learn from.
    """
    if cut_off == "as_it_is":
        answers = [replace(answer, finished=True) for answer in answers]
    usable = [
        place for place, answer in enumerate(answers) if answer.text.strip() and (answer.finished or cut_off == "worst")
    ]
    ranks = [_rank(answers[place]) for place in usable]
    return [_settled(usable[first], usable[second], answers, min_gap) for first, second in CHOICES[choose](ranks)]


def decided(comparison: Comparison, preference: float | None) -> Comparison:
    """The comparison with a judge's word on it: above one half the first is better, None is no verdict."""
    if preference is None:
        return Comparison(comparison.first, comparison.second, None, "no_verdict")
    outcome: Outcome = "alike" if preference == 0.5 else "kept"
    return Comparison(comparison.first, comparison.second, preference, outcome)


def counted(comparisons: Sequence[Comparison]) -> dict[Outcome, int]:
    """How many comparisons came to what."""
    counts = Counter(comparison.outcome for comparison in comparisons)
    return {outcome: counts[outcome] for outcome in OUTCOMES}


def best_and_worst(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """The best answer against the worst (arXiv:2401.10020 section 2.4); of equal ones the first, all alike: 0 and 1."""
    if len(ranks) < 2:
        return []
    best, worst = ranks.index(max(ranks)), ranks.index(min(ranks))
    return [(best, worst) if best != worst else (0, 1)]


def neighbours(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """The first answer against the second, the third against the fourth: no score is asked, no answer used twice."""
    return [(place, place + 1) for place in range(0, len(ranks) - 1, 2)]


def all_pairs(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """Every answer against every other one."""
    return [(first, second) for first in range(len(ranks)) for second in range(first + 1, len(ranks))]


def _rank(answer: Answer) -> float:
    if not answer.finished:
        return -math.inf
    return 0.0 if answer.score is None else answer.score


def _settled(first: int, second: int, answers: Sequence[Answer], min_gap: float) -> Comparison:
    one, other = answers[first], answers[second]
    if one.text.strip() == other.text.strip():
        return Comparison(first, second, 0.5, "identical")
    if not one.finished and not other.finished:
        return Comparison(first, second, 0.5, "cut_off")
    if one.finished != other.finished:
        return Comparison(first, second, float(one.finished), "kept")
    if one.score is None or other.score is None:
        return Comparison(first, second)
    gap = one.score - other.score
    if abs(gap) <= min_gap:
        return Comparison(first, second, 0.5, "alike")
    return Comparison(first, second, float(gap > 0), "kept")


CHOICES: dict[str, Callable[[Sequence[float]], list[tuple[int, int]]]] = {
    "best_and_worst": best_and_worst,
    "neighbours": neighbours,
    "all_pairs": all_pairs,
}
