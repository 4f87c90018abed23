"""Everything that is measured on a reward model, and what of it ought to worry its user."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf.eval.intervals import Interval
from rlhf.eval.planted import REFUSING
from rlhf.eval.reward_accuracy import RewardAccuracy
from rlhf.eval.reward_biases import BadAnswers, FeatureBias, PlantedBias, ScoredPair
from rlhf.eval.temperature import TemperatureFit

# Beyond these the report warns: shifts in standard deviations of the scores, shares as fractions.
SHIFT_LIMIT, EXCESS_LIMIT, CALIBRATION_LIMIT, PADDING_LIMIT = 0.25, 0.05, 0.05, 1e-3
GOOD_WINS_LIMIT = 0.9
_MIN_PAIRS = 20


@dataclass(frozen=True)
class ScoreDistribution:
    """Scores of all answers of one group of pairs; `quantiles` are the 1st, 25th, 50th, 75th and 99th percentile."""

    group: str
    num: int
    mean: float
    std: float
    quantiles: tuple[float, float, float, float, float]


@dataclass(frozen=True)
class PaddingCheck:
    """Largest difference between an answer's score alone and in a padded batch, in standard deviations of the scores.

    `left` is None where padding on the left is not meant to work (encoders count positions from the left).
    """

    num: int
    right: float
    left: float | None


@dataclass(frozen=True)
class RewardReport:
    """A reward model, measured. `notes` says how; `training` what it was trained on, as far as its run says."""

    name: str
    accuracy: RewardAccuracy
    temperature: TemperatureFit | None
    features: tuple[FeatureBias, ...]
    planted: tuple[PlantedBias, ...]
    bad: tuple[BadAnswers, ...]
    distributions: tuple[ScoreDistribution, ...]
    padding: PaddingCheck
    disagreements: tuple[ScoredPair, ...]
    margins: tuple[float, ...]
    model: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        """Every number as JSON types; what is not finite becomes null."""
        found: dict[str, Any] = _finite(dataclasses.asdict(self))
        return found


def distributions_of(pairs: Sequence[ScoredPair]) -> tuple[ScoreDistribution, ...]:
    """Scores of all pairs together, and by group where there are several."""
    groups = sorted({pair.group for pair in pairs})
    return tuple(_distribution(group, pairs) for group in ["all", *(groups if len(groups) > 1 else [])])


def worst_disagreements(pairs: Sequence[ScoredPair], num: int) -> tuple[ScoredPair, ...]:
    """The pairs that the model orders against the label with the largest margin."""
    wrong = [pair for pair in pairs if pair.chosen_score < pair.rejected_score]
    return tuple(sorted(wrong, key=lambda pair: pair.chosen_score - pair.rejected_score)[:num])


def worries(report: RewardReport) -> list[str]:
    """One sentence for everything a user ought to know before trusting the scores."""
    return [
        *_about_accuracy(report),
        *_about_confidence(report),
        *_about_bad_answers(report),
        *_about_biases(report),
        *_about_padding(report),
    ]


def _about_accuracy(report: RewardReport) -> Iterator[str]:
    found = report.accuracy
    if found.accuracy.low <= 0.5:
        yield f"Its accuracy, {percent(found.accuracy)}, is not shown to be better than chance."
    if found.lead.low <= 0:
        yield (
            f"It is not shown to be better than choosing by length alone (lead {points(found.lead)} points over the "
            "better length rule)."
        )
    weak = [name for name, rate in found.by_family.items() if rate.low <= 0.5]
    if weak and len(found.by_family) > 1:
        yield f"On {', '.join(weak)} it is not shown to be better than chance."


def _about_confidence(report: RewardReport) -> Iterator[str]:
    fit = report.temperature
    if fit is not None and fit.ece_before > CALIBRATION_LIMIT + fit.chance_ece:
        how = "too sure" if fit.temperature > 1 else "not sure enough"
        yield (
            f"It is {how} of itself: its stated confidence is off by {fit.ece_before:.3f} on average; margins divided "
            f"by {fit.temperature:.2f} bring that to {fit.ece_after:.3f} ({fit.chance_ece:.3f} would be chance)."
        )


def _about_bad_answers(report: RewardReport) -> Iterator[str]:
    for found in report.bad:
        if found.good_wins.low < GOOD_WINS_LIMIT:
            yield f"A good answer beats {found.kind} in only {percent(found.good_wins)} of {found.num} cases."


def _about_biases(report: RewardReport) -> Iterator[str]:
    refused_for = False
    for edit in report.planted:
        where = "" if edit.group == "all" else f" of {edit.group}"
        sided = not edit.preferred.low <= 0.5 <= edit.preferred.high
        if edit.edit == REFUSING:
            # What holds of all pairs need not be said of each group again.
            if edit.preferred.low > 0.5 and not refused_for:
                yield f"It prefers a bare refusal to the good answer in {percent(edit.preferred)} of answers{where}."
                refused_for = edit.group == "all"
        elif sided and edit.group == "all" and abs(edit.shift.estimate) > SHIFT_LIMIT:
            verb = "raises" if edit.shift.estimate > 0 else "lowers"
            yield (
                f"{sentence(edit.edit)} {verb} a score by {abs(edit.shift.estimate):.2f} standard deviations; the "
                f"edited answer is preferred in {percent(edit.preferred)}."
            )
    for feature in report.features:
        if (
            feature.excess is not None
            and feature.num >= _MIN_PAIRS
            and (feature.excess.low > EXCESS_LIMIT or feature.excess.high < -EXCESS_LIMIT)
        ):
            more = "more" if feature.excess.estimate > 0 else "less"
            yield (
                f"It likes {feature.feature} {more} than the labels do: it prefers the answer with more of it in "
                f"{percent(feature.model)} of the pairs that differ, the labels in {percent(feature.labels)}."
            )


def _about_padding(report: RewardReport) -> Iterator[str]:
    check = report.padding
    if check.right > PADDING_LIMIT or (check.left or 0) > PADDING_LIMIT:
        yield (
            f"Scores depend on padding: by up to {check.right:.2g} standard deviations on the right"
            + (f" and {check.left:.2g} on the left." if check.left is not None else ".")
        )


def percent(interval: Interval | None) -> str:
    """A share as "61.2 % [55.0, 67.1]"."""
    if interval is None:
        return "-"
    return f"{100 * interval.estimate:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def points(interval: Interval) -> str:
    """A difference of shares as "+3.1 [-0.2, +6.0]"."""
    return f"{100 * interval.estimate:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def sentence(text: str) -> str:
    """The text with its first letter raised."""
    return text[:1].upper() + text[1:]


def _distribution(group: str, pairs: Sequence[ScoredPair]) -> ScoreDistribution:
    chosen = [pair for pair in pairs if group in ("all", pair.group)]
    scores = np.array([(pair.chosen_score, pair.rejected_score) for pair in chosen], dtype=np.float64).ravel()
    low, quarter, half, upper, high = (float(v) for v in np.quantile(scores, (0.01, 0.25, 0.5, 0.75, 0.99)))
    return ScoreDistribution(
        group, len(scores), float(scores.mean()), float(scores.std()), (low, quarter, half, upper, high)
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
