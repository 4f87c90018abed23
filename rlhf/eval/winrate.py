"""Pairwise win-rates: two models answered the same prompts, a judge scores each answer, ties count one half."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from rlhf.eval.intervals import Interval, mean_interval
from rlhf.eval.samples import Sample
from rlhf.infra.errors import UserError

Judge = Callable[[Sample], "float | None"]


@dataclass(frozen=True)
class WinRate:
    """How often `first` beats `second`.

    `rate` is the mean over prompts of (wins + ties / 2) / comparisons with its 95 % bootstrap interval over prompts.
    `wins`, `ties` and `losses` count comparisons from the first model's side; `num_unpaired` counts prompts that only
    one of the two answered or whose answers the judge gave no score.
    """

    first: str
    second: str
    judge: str
    wins: int
    ties: int
    losses: int
    rate: Interval
    num_unpaired: int


def gold_score(sample: Sample) -> float | None:
    """Judge by the gold scorer's score."""
    return sample.gold


def reward_score(sample: Sample) -> float | None:
    """Judge by the reward model's score."""
    return sample.reward


def brevity(sample: Sample) -> float:
    """Prefer the shorter answer: not a judge of quality but the baseline that shows how far length alone decides."""
    return -float(sample.num_tokens)


def compare(
    first: Iterable[Sample],
    second: Iterable[Sample],
    judge: str = "gold",
    names: tuple[str, str] = ("first", "second"),
    tie_margin: float = 1e-9,
    seed: int = 0,
) -> WinRate:
    """Compare two models' answers prompt by prompt.

    A prompt with several answers is compared in all pairs and counts once. Scores closer than `tie_margin` tie. Raises
    UserError when the judge is unknown or no prompt was answered and scored on both sides.
    """
    if judge not in JUDGES:
        raise UserError(f"no judge named {judge!r}; expected one of {', '.join(JUDGES)}")
    one, two = _scores_by_prompt(first, JUDGES[judge]), _scores_by_prompt(second, JUDGES[judge])
    shared = [prompt for prompt, scores in one.items() if scores and two.get(prompt)]
    if not shared:
        raise UserError(
            f"{names[0]} and {names[1]} share no prompt that the {judge} judge scored on both sides; evaluate both "
            "models on the same prompts with that judge"
        )
    counts = np.zeros(3, dtype=np.int64)
    outcomes = []
    for prompt in shared:
        wins, ties, losses = _outcomes(one[prompt], two[prompt], tie_margin)
        counts += (wins, ties, losses)
        outcomes.append((wins + ties / 2) / (wins + ties + losses))
    return WinRate(
        first=names[0],
        second=names[1],
        judge=judge,
        wins=int(counts[0]),
        ties=int(counts[1]),
        losses=int(counts[2]),
        rate=mean_interval(outcomes, seed),
        num_unpaired=len(set(one) | set(two)) - len(shared),
    )


def _scores_by_prompt(samples: Iterable[Sample], judge: Judge) -> dict[str, list[float]]:
    scores: dict[str, list[float]] = {}
    for sample in samples:
        of_prompt = scores.setdefault(sample.prompt_id, [])
        score = judge(sample)
        if score is not None and not np.isnan(score):
            of_prompt.append(score)
    return scores


def _outcomes(first: list[float], second: list[float], tie_margin: float) -> tuple[int, int, int]:
    gaps = [a - b for a in first for b in second]
    wins = sum(gap > tie_margin for gap in gaps)
    losses = sum(gap < -tie_margin for gap in gaps)
    return wins, len(gaps) - wins - losses, losses


JUDGES: dict[str, Judge] = {"gold": gold_score, "reward": reward_score, "brevity": brevity}
