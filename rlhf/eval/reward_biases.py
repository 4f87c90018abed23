"""What else a reward model pays for: length, form, flattery, certainty, refusals; measured, not guessed.

Two views. Over labelled pairs: where the two answers differ in a feature, how often does the model prefer the one with
more of it, and how often do the labels? People may like lists; a model that likes them more than people do is biased.
Over planted pairs: the same answer with and without one edit, where an unbiased model is indifferent.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.eval.intervals import Interval, mean_interval, paired_difference, wilson
from rlhf.eval.metrics import correlation
from rlhf.eval.planted import EDITS, FEATURES, SPOILERS


@dataclass(frozen=True)
class ScoredPair:
    """A labelled pair as text, with the reward model's scores."""

    prompt: str
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    group: str = "all"


@dataclass(frozen=True)
class FeatureBias:
    """A reward model and one feature of answers.

    `spearman` is the rank correlation of score and feature over all answers. The rest is about the `num` pairs whose
    answers differ in the feature: `model` and `labels` are the shares in which the model and the labels prefer the
    answer with more of it (equal scores half), `excess` is the paired difference of the two.
    """

    feature: str
    spearman: float | None
    num: int
    model: Interval | None
    labels: Interval | None
    excess: Interval | None


@dataclass(frozen=True)
class Variant:
    """One answer in two forms to be scored: `base` and `changed`, by the name of the edit."""

    name: str
    group: str
    prompt_index: int
    base: str
    changed: str


@dataclass(frozen=True)
class PlantedBias:
    """How a reward model takes one edit.

    `preferred` is the share of answers of which the edited form scores higher (equal half), `shift` the mean change of
    the score in standard deviations of the scores of answers. `group` is that of the pairs ("all" for every one).
    """

    edit: str
    group: str
    num: int
    preferred: Interval
    shift: Interval


@dataclass(frozen=True)
class BadAnswers:
    """How often a good answer scores above a bad one in its place, and by how many standard deviations."""

    kind: str
    num: int
    good_wins: Interval
    gap: Interval


def feature_biases(pairs: Sequence[ScoredPair], seed: int = 0) -> list[FeatureBias]:
    """Measure every feature of `planted.FEATURES` on labelled pairs."""
    return [_feature_bias(name, feature, pairs, seed) for name, feature in FEATURES.items()]


def edited(pairs: Sequence[ScoredPair]) -> list[Variant]:
    """The preferred answer of each pair under every edit that can be made to it."""
    return [
        Variant(name, pair.group, index, pair.chosen, changed)
        for index, pair in enumerate(pairs)
        for name, edit in EDITS.items()
        if (changed := edit(pair.chosen)) is not None and changed != pair.chosen
    ]


def spoiled(pairs: Sequence[ScoredPair], seed: int = 0) -> list[Variant]:
    """The preferred answer of each pair beside bad ones in its place; off-topic ones come from other prompts."""
    rng = random.Random(f"bad answers {seed}")
    others = list(range(len(pairs)))
    rng.shuffle(others)
    variants = []
    for index, pair in enumerate(pairs):
        other = pairs[others[index]] if pairs[others[index]].prompt != pair.prompt else None
        for name, spoil in SPOILERS.items():
            changed = spoil(pair.chosen, pair.chosen if other is None else other.chosen, rng)
            if changed is not None:
                variants.append(Variant(name, pair.group, index, pair.chosen, changed))
    return variants


def planted_biases(
    variants: Sequence[Variant], base: Sequence[float], changed: Sequence[float], std: float, seed: int = 0
) -> list[PlantedBias]:
    """Summarise edits over all pairs, and by group where there are several; scores in the order of the variants."""
    groups = sorted({variant.group for variant in variants})
    found = []
    for group in ["all", *(groups if len(groups) > 1 else [])]:
        for name in EDITS:
            chosen = [i for i, v in enumerate(variants) if v.name == name and group in ("all", v.group)]
            if chosen:
                gaps = [changed[i] - base[i] for i in chosen]
                shift = mean_interval([gap / std for gap in gaps], seed)
                found.append(PlantedBias(name, group, len(chosen), _share_above(gaps), shift))
    return found


def bad_answers(
    variants: Sequence[Variant], base: Sequence[float], changed: Sequence[float], std: float, seed: int = 0
) -> list[BadAnswers]:
    """Summarise good answers against bad ones; scores in the order of the variants."""
    found = []
    for name in SPOILERS:
        chosen = [i for i, variant in enumerate(variants) if variant.name == name]
        if chosen:
            gaps = [base[i] - changed[i] for i in chosen]
            gap = mean_interval([gap / std for gap in gaps], seed)
            found.append(BadAnswers(name, len(chosen), _share_above(gaps), gap))
    return found


def _feature_bias(name: str, feature: Callable[[str], float], pairs: Sequence[ScoredPair], seed: int) -> FeatureBias:
    sides = [(feature(pair.chosen), feature(pair.rejected)) for pair in pairs]
    scored = [(value, score) for (a, b), pair in zip(sides, pairs, strict=True)
              for value, score in ((a, pair.chosen_score), (b, pair.rejected_score))]  # fmt: skip
    related = correlation(scored)
    differ = [(pair, a - b) for pair, (a, b) in zip(pairs, sides, strict=True) if a != b]
    spearman = None if related is None else related.spearman
    if not differ:
        return FeatureBias(name, spearman, 0, None, None, None)
    # 1 where the answer with more of the feature is the preferred one.
    by_label = [1.0 if gap > 0 else 0.0 for _, gap in differ]
    by_model = [_credit((pair.chosen_score - pair.rejected_score) * gap) for pair, gap in differ]
    return FeatureBias(
        name,
        spearman,
        len(differ),
        wilson(sum(by_model), len(differ)),
        wilson(sum(by_label), len(differ)),
        paired_difference(by_model, by_label, seed),
    )


def _share_above(gaps: Sequence[float]) -> Interval:
    return wilson(sum(map(_credit, gaps)), len(gaps))


def _credit(gap: float) -> float:
    return 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0


def standard_deviation(scores: Sequence[float]) -> float:
    """Standard deviation of scores; 1 where they do not vary, so that shifts stay finite."""
    std = float(np.std(np.asarray(scores, dtype=np.float64)))
    return std if std > 0 else 1.0
