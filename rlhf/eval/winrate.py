"""Pairwise win-rates: two models answered the same prompts, a judge scores each answer, ties count one half."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.eval.intervals import Interval, mean_interval, wilson
from rlhf.eval.length_control import length_controlled
from rlhf.eval.samples import Sample
from rlhf.eval.significance import sign_test
from rlhf.infra.errors import UserError

Judge = Callable[[Sample], "float | None"]


@dataclass(frozen=True)
class Comparison:
    """One answer against another: preference for the first (1 better, 0.5 alike, 0 worse), lengths in characters."""

    prompt_id: str
    preference: float
    length_first: float
    length_second: float


@dataclass(frozen=True)
class WinRate:
    """How often `first` beats `second`.

    `rate` is the mean over prompts of (wins + ties / 2) / comparisons with its 95 % bootstrap interval over prompts,
    `wilson` the same with Wilson's interval, which does not shrink to a point where every prompt is won. `wins`, `ties`
    and `losses` count comparisons from the first model's side; `num_unpaired` counts prompts that only one of the two
    answered or whose answers the judge gave no score. `length_controlled` is the rate at equal length
    (see `length_control`), `p_value` that of a sign test over prompts.
    """

    first: str
    second: str
    judge: str
    wins: int
    ties: int
    losses: int
    rate: Interval
    wilson: Interval
    num_unpaired: int
    length_controlled: Interval
    p_value: float


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
    comparisons = [
        Comparison(prompt, _preference(a - b, tie_margin), length_a, length_b)
        for prompt in shared
        for a, length_a in one[prompt]
        for b, length_b in two[prompt]
    ]
    return win_rate(comparisons, names, judge, len(set(one) | set(two)) - len(shared), seed)


def win_rate(
    comparisons: Sequence[Comparison],
    names: tuple[str, str],
    judge: str = "judge",
    num_unpaired: int = 0,
    seed: int = 0,
) -> WinRate:
    """The win-rate that comparisons amount to; those of one prompt count as one unit. Raises UserError without any."""
    if not comparisons:
        raise UserError(
            f"judge {judge} gave no verdict on any answer of {names[0]} and {names[1]}; nothing can be said"
        )
    prompts = {prompt: place for place, prompt in enumerate(dict.fromkeys(one.prompt_id for one in comparisons))}
    places = [prompts[one.prompt_id] for one in comparisons]
    counts = np.bincount(places, minlength=len(prompts))

    def means(values: Sequence[float]) -> np.ndarray:
        return np.bincount(places, weights=values, minlength=len(prompts)) / counts

    preferences = means([one.preference for one in comparisons])
    lengths = [means([one.length_first for one in comparisons]), means([one.length_second for one in comparisons])]
    return WinRate(
        first=names[0],
        second=names[1],
        judge=judge,
        wins=sum(one.preference > 0.5 for one in comparisons),
        ties=sum(one.preference == 0.5 for one in comparisons),
        losses=sum(one.preference < 0.5 for one in comparisons),
        rate=mean_interval(preferences, seed),
        wilson=wilson(float(preferences.sum()), len(preferences)),
        num_unpaired=num_unpaired,
        length_controlled=length_controlled(preferences, *lengths, seed=seed).rate,
        p_value=sign_test(int((preferences > 0.5).sum()), int((preferences < 0.5).sum())),
    )


def _scores_by_prompt(samples: Iterable[Sample], judge: Judge) -> dict[str, list[tuple[float, int]]]:
    """(score, length in characters) of every scored answer."""
    scores: dict[str, list[tuple[float, int]]] = {}
    for sample in samples:
        of_prompt = scores.setdefault(sample.prompt_id, [])
        score = judge(sample)
        if score is not None and not np.isnan(score):
            of_prompt.append((score, len(sample.response)))
    return scores


def _preference(gap: float, tie_margin: float) -> float:
    return 0.5 if abs(gap) <= tie_margin else float(gap > 0)


JUDGES: dict[str, Judge] = {"gold": gold_score, "reward": reward_score, "brevity": brevity}
