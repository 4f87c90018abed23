"""How well a reward model orders preference pairs: accuracy beside what length alone achieves, margins, calibration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.eval.intervals import FloatArray, Interval, paired_difference, wilson
from rlhf.infra.errors import UserError

_NUM_BINS = 10


@dataclass(frozen=True)
class RewardPair:
    """One held-out pair as labelled, with the reward model's two scores.

    Lengths are in tokens. `gold_chosen` and `gold_rejected` are gold scores where there is a gold scorer.
    """

    family: str
    chosen_score: float
    rejected_score: float
    chosen_length: int
    rejected_length: int
    gold_chosen: float | None = None
    gold_rejected: float | None = None

    @property
    def margin(self) -> float:
        """Score of the chosen answer minus that of the rejected one."""
        return self.chosen_score - self.rejected_score

    @property
    def gold_gap(self) -> float | None:
        """Gold score of the chosen answer minus that of the rejected one; None without gold scores."""
        if self.gold_chosen is None or self.gold_rejected is None:
            return None
        return self.gold_chosen - self.gold_rejected


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs whose stated confidence lies between `low` and `high`: how sure the model was, how often it was right."""

    low: float
    high: float
    num: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class RewardAccuracy:
    """A reward model on held-out pairs.

    Accuracies count equal scores one half. `longer_wins` and `shorter_wins` are the accuracies of choosing by length.
    `lead` is the accuracy minus that of the better length baseline, on the same pairs. `against_gold` is the accuracy
    against the order of the gold scores (pairs with equal gold left out), `labels_against_gold` that of the labels
    themselves: the ceiling the noise leaves. `ece` is the expected calibration error of sigmoid(|margin|), `brier` the
    Brier score of sigmoid(margin).
    """

    num_pairs: int
    accuracy: Interval
    by_family: dict[str, Interval]
    longer_wins: Interval
    shorter_wins: Interval
    lead: Interval
    against_gold: Interval | None
    labels_against_gold: Interval | None
    margin_mean: float
    margin_std: float
    score_quantiles: dict[str, float]
    score_mean: float
    score_std: float
    ece: float
    brier: float
    calibration: tuple[CalibrationBin, ...]
    ms_per_sample: float | None


def reward_accuracy(pairs: Sequence[RewardPair], ms_per_sample: float | None = None) -> RewardAccuracy:
    """Measure a reward model on labelled pairs; raises UserError without pairs or when a score is not finite."""
    if not pairs:
        raise UserError("reward-model accuracy needs at least one held-out pair; got none")
    scores = np.array([(pair.chosen_score, pair.rejected_score) for pair in pairs], dtype=np.float64)
    if not np.isfinite(scores).all():
        bad = int((~np.isfinite(scores)).any(axis=1).sum())
        raise UserError(f"{bad} of {len(pairs)} pairs have a score that is not finite; the reward model has diverged")
    margins = scores[:, 0] - scores[:, 1]
    longer = [float(pair.chosen_length - pair.rejected_length) for pair in pairs]
    longer_wins, shorter_wins = _share_positive(longer), _share_positive([-gap for gap in longer])
    baseline = longer if longer_wins.estimate >= shorter_wins.estimate else [-gap for gap in longer]
    ordered = [(pair.margin, pair.gold_gap) for pair in pairs if pair.gold_gap]
    quantiles = np.quantile(scores, (0.01, 0.25, 0.5, 0.75, 0.99))
    bins = calibration_bins(margins)
    return RewardAccuracy(
        num_pairs=len(pairs),
        accuracy=_share_positive(margins),
        by_family={
            family: _share_positive([pair.margin for pair in pairs if pair.family == family])
            for family in sorted({pair.family for pair in pairs})
        },
        longer_wins=longer_wins,
        shorter_wins=shorter_wins,
        lead=paired_difference(_credits(margins), _credits(baseline)),
        against_gold=_share_positive(m * gap for m, gap in ordered if gap) if ordered else None,
        labels_against_gold=_share_positive(gap for _, gap in ordered if gap) if ordered else None,
        margin_mean=float(margins.mean()),
        margin_std=float(margins.std()),
        score_quantiles=dict(zip(("p1", "p25", "p50", "p75", "p99"), map(float, quantiles), strict=True)),
        score_mean=float(scores.mean()),
        score_std=float(scores.std()),
        ece=sum(b.num * abs(b.confidence - b.accuracy) for b in bins) / len(pairs),
        brier=float(np.mean((1 - _sigmoid(margins)) ** 2)),
        calibration=bins,
        ms_per_sample=ms_per_sample,
    )


def calibration_bins(margins: FloatArray, num_bins: int = _NUM_BINS) -> tuple[CalibrationBin, ...]:
    """Group pairs by stated confidence sigmoid(|margin|) in equal steps from 0.5 to 1; empty bins are left out."""
    confidence = _sigmoid(np.abs(margins))
    correct = np.where(margins == 0, 0.5, (margins > 0).astype(np.float64))
    edges = np.linspace(0.5, 1.0, num_bins + 1)
    index = np.clip(np.digitize(confidence, edges) - 1, 0, num_bins - 1)
    return tuple(
        CalibrationBin(
            low=float(edges[b]),
            high=float(edges[b + 1]),
            num=int(inside.sum()),
            confidence=float(confidence[inside].mean()),
            accuracy=float(correct[inside].mean()),
        )
        for b in range(num_bins)
        if (inside := index == b).any()
    )


def _share_positive(gaps: Iterable[float]) -> Interval:
    credits = _credits(gaps)
    return wilson(sum(credits), len(credits))


def _credits(gaps: Iterable[float]) -> list[float]:
    """1 for a gap in the right direction, one half for none, 0 for the wrong direction."""
    return [1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps]


def _sigmoid(values: FloatArray) -> FloatArray:
    result: FloatArray = 1 / (1 + np.exp(-np.clip(values, -60, 60)))
    return result
