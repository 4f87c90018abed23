"""Many scores of one answer made into one: the members of an ensemble, or rewards with different aims.

Members of an ensemble judge the same thing, so their spread says how far any of them is to be believed. A policy that
climbs a reward finds answers unlike those that the reward was learnt on, where members differ; the lowest score, or the
mean less its variance, is worth less there.

Legend: K members of an ensemble or rewards to combine, B answers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# From scores and the weight of their variance, which only one of them needs, to a score.
EnsembleRule = Callable[[Tensor, float], Tensor]


def mean_score(scores_KB: Tensor, penalty: float) -> Tensor:
    """Mean over the members (B,); `penalty` plays no part (arXiv:2310.02743)."""
    return scores_KB.mean(dim=0)


def worst_score(scores_KB: Tensor, penalty: float) -> Tensor:
    """The lowest member's score (B,); `penalty` plays no part (arXiv:2310.02743, WCO)."""
    return scores_KB.amin(dim=0)


def penalised_score(scores_KB: Tensor, penalty: float) -> Tensor:
    """Mean less `penalty` times the variance over the members (B,) (arXiv:2310.02743, UWO).

    The variance is that of the members as they are, divided by K; of one member it is 0.
    """
    return mean_score(scores_KB, penalty) - penalty * scores_KB.var(dim=0, correction=0)


def disagreement(scores_KB: Tensor) -> Tensor:
    """Standard deviation over the members (B,), the root of what `penalised_score` subtracts; 0 of one member."""
    return scores_KB.std(dim=0, correction=0)


def weighted_sum(scores_KB: Tensor, weights_K: Tensor) -> Tensor:
    """Sum of rewards (B,), each times its weight."""
    return (weights_K.unsqueeze(1) * scores_KB).sum(dim=0)


def lowest_weighted(scores_KB: Tensor, weights_K: Tensor) -> Tensor:
    """The lowest of the weighted rewards (B,): a good one cannot make up for a bad one."""
    return (weights_K.unsqueeze(1) * scores_KB).amin(dim=0)


def gated_score(scores_B: Tensor, gate_scores_B: Tensor, threshold: float, always_B: Tensor) -> Tensor:
    """`gate_scores_B` where they lie below the threshold or `always_B` is True, else `scores_B` (B,).

    So an unsafe answer earns its safety score however helpful it is (arXiv:2307.09288 section 3.2.3).
    """
    return torch.where(always_B | (gate_scores_B < threshold), gate_scores_B, scores_B)


ENSEMBLE_RULES: dict[str, EnsembleRule] = {
    "mean": mean_score,
    "worst": worst_score,
    "penalised": penalised_score,
}
