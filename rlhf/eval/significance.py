"""Tests for paired outcomes: could this difference be chance? Exact where that is possible, two-sided throughout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.eval.intervals import FloatArray, Interval, bootstrap
from rlhf.infra.errors import UserError


@dataclass(frozen=True)
class PairedDifference:
    """A mean difference over the same units with its bootstrap interval and two-sided p-value."""

    difference: Interval
    p_value: float


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of `wins` against `losses` under equal chances, ties left out; 1 where nothing was decided.

    Exact (binomial), summed in logarithms. Source: Dixon and Mood (1946).
    """
    if wins < 0 or losses < 0:
        raise UserError(f"a sign test counts wins and losses; got {wins} and {losses}")
    num = wins + losses
    if wins == losses:
        return 1.0
    logs = [math.lgamma(num + 1) - math.lgamma(k + 1) - math.lgamma(num - k + 1) for k in range(min(wins, losses) + 1)]
    largest = max(logs)
    tail = math.exp(largest - num * math.log(2)) * sum(math.exp(value - largest) for value in logs)
    return min(1.0, 2 * tail)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided exact p-value that two judges, right or wrong on the same items, are right equally often.

    Only items on which one is right and the other wrong count. Source: McNemar (1947), with the binomial distribution.
    """
    if len(first) != len(second):
        raise UserError(f"McNemar's test needs both judges on the same items; got {len(first)} and {len(second)}")
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    return sign_test(only_first, only_second)


def paired_bootstrap(
    first: Sequence[float] | FloatArray, second: Sequence[float] | FloatArray, seed: int = 0, level: float = 0.95
) -> PairedDifference:
    """Mean of first - second over the same units, its percentile interval, and the p-value that belongs to it.

    The p-value is twice the share of resamples on the far side of zero, one resample added to either count, so that it
    is never zero: the level at which the interval would just touch zero. Source: Efron and Tibshirani (1993), ch. 13.
    """
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != two.shape or one.ndim != 1 or one.size == 0:
        raise UserError(f"a paired test needs equally many values, at least one; got {one.size} and {two.size}")
    gaps, seen = one - two, []

    def means(weights: FloatArray) -> FloatArray:
        seen.append(weights @ gaps / len(gaps))
        return seen[-1]

    difference = bootstrap(float(gaps.mean()), len(gaps), means, seed, level)
    resampled = np.concatenate(seen)
    share = min((resampled <= 0).sum(), (resampled >= 0).sum()) + 1
    return PairedDifference(difference, min(1.0, 2 * float(share) / (len(resampled) + 1)))
