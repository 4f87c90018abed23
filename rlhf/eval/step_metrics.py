"""How well scores tell right steps from wrong ones: plain functions of scores, labels and weights.

Legend: N judged steps. Scores are probabilities that a step is right; labels are bool, True = right; weights say how
often a step counts, so that a bootstrap needs no copies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf.eval.intervals import FloatArray

BoolArray = NDArray[np.bool_]


def accuracy(scores_N: FloatArray, labels_N: BoolArray, weights_N: FloatArray) -> float:
    """Share of steps on the right side of one half; a score of exactly one half counts half."""
    return float((_credits(scores_N, labels_N) * weights_N).sum() / weights_N.sum())


def balanced_accuracy(scores_N: FloatArray, labels_N: BoolArray, weights_N: FloatArray) -> float:
    """Mean of the accuracies on right and on wrong steps; NaN where there is only one kind."""
    credits = _credits(scores_N, labels_N) * weights_N
    right, wrong = float(weights_N[labels_N].sum()), float(weights_N[~labels_N].sum())
    if right == 0 or wrong == 0:
        return math.nan
    return float(credits[labels_N].sum() / right + credits[~labels_N].sum() / wrong) / 2


def area_under_curve(
    scores_N: FloatArray, labels_N: BoolArray, weights_N: FloatArray, places_N: NDArray[np.intp] | None = None
) -> float:
    """Probability that a right step scores above a wrong one, ties half; NaN where there is only one kind.

    `places_N` is the rank of every score (`ranks`), for callers that ask again with other weights.
    """
    right, wrong = float(weights_N[labels_N].sum()), float(weights_N[~labels_N].sum())
    if right == 0 or wrong == 0:
        return math.nan
    places_N = ranks(scores_N) if places_N is None else places_N
    num = int(places_N.max()) + 1
    right_U = np.bincount(places_N, weights_N * labels_N, num)
    wrong_U = np.bincount(places_N, weights_N * ~labels_N, num)
    below_U = np.cumsum(wrong_U) - wrong_U
    return float((right_U * (below_U + wrong_U / 2)).sum() / (right * wrong))


def ranks(scores_N: FloatArray) -> NDArray[np.intp]:
    """Place of every score among the distinct ones, from 0."""
    return np.unique(scores_N, return_inverse=True)[1]


def log_loss(scores_N: FloatArray, labels_N: BoolArray, weights_N: FloatArray) -> float:
    """Mean of -log of the probability given to what was true, in nats."""
    given_N = np.where(labels_N, scores_N, 1 - scores_N).clip(1e-12)
    return float(-(np.log(given_N) * weights_N).sum() / weights_N.sum())


def first_error(scores: Sequence[float]) -> int | None:
    """Index of the first step that is thought wrong (below one half), None where there is none."""
    return next((place for place, score in enumerate(scores) if score < 0.5), None)


def _credits(scores_N: FloatArray, labels_N: BoolArray) -> FloatArray:
    return np.where(scores_N == 0.5, 0.5, ((scores_N > 0.5) == labels_N).astype(np.float64))
