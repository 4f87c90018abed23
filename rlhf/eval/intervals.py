"""Intervals for what evaluation reports: rates, means, differences and ratios. NumPy and the standard library only.

Rates get Wilson's score interval, which stays inside [0, 1] and is sensible at 0 and at 100 %. Means, paired
differences and ratios get a percentile bootstrap over prompts, seeded, so that a report is the same each time it is
written. Every function returns an `Interval`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from rlhf.infra.errors import UserError

FloatArray = NDArray[np.float64]
_NUM_RESAMPLES = 2000
_CACHED_CELLS = 2_000_000


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its interval and the number of independent units it rests on.

    The bounds are NaN where an interval cannot be had (a mean of fewer than two values).
    """

    estimate: float
    low: float
    high: float
    num: int

    @property
    def has_bounds(self) -> bool:
        """True when both bounds are numbers."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def scaled(self, factor: float) -> Interval:
        """Return the interval in other units, for example percent with factor 100."""
        low, high = sorted((self.low * factor, self.high * factor)) if self.has_bounds else (math.nan, math.nan)
        return Interval(self.estimate * factor, low, high, self.num)


def wilson(successes: float, num: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (no continuity correction).

    Half successes are allowed, so that ties can count one half. Raises UserError for num < 1 or successes outside
    [0, num]. Source: Wilson 1927; the `wilson` method of statsmodels' `proportion_confint`.
    """
    if num < 1 or not 0 <= successes <= num:
        raise UserError(f"a rate needs 0 <= successes <= num and num >= 1; got {successes} of {num}")
    z = _normal_quantile(level)
    rate = successes / num
    centre = (rate + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(rate * (1 - rate) / num + z * z / (4 * num * num))
    return Interval(rate, max(0.0, centre - half), min(1.0, centre + half), num)


def newcombe_difference(first: Interval, second: Interval) -> Interval:
    """Interval of `first - second` for two rates from independent samples, from their Wilson intervals.

    Source: Newcombe 1998 (Statistics in Medicine 17, 873-890), method 10.
    """
    difference = first.estimate - second.estimate
    low = difference - math.hypot(first.estimate - first.low, second.high - second.estimate)
    high = difference + math.hypot(first.high - first.estimate, second.estimate - second.low)
    return Interval(difference, low, high, min(first.num, second.num))


def newcombe_paired(first: Sequence[bool], second: Sequence[bool], level: float = 0.95) -> Interval:
    """Interval of rate(first) - rate(second) where both were observed on the same units, in the same order.

    Source: Newcombe 1998 (Statistics in Medicine 17, 2635-2650), method 10: Wilson intervals of the two rates joined
    with their correlation. Unlike a bootstrap it does not shrink to a point when the two agree everywhere by chance.
    """
    if len(first) != len(second) or not first:
        raise UserError(f"paired rates need two equally long, non-empty sequences; got {len(first)} and {len(second)}")
    num = len(first)
    both = sum(a and b for a, b in zip(first, second, strict=True))
    only_first = sum(first) - both
    only_second = sum(second) - both
    neither = num - both - only_first - only_second
    one, two = wilson(sum(first), num, level), wilson(sum(second), num, level)
    correlation = _phi(both, only_first, only_second, neither)
    difference = (only_first - only_second) / num

    def joined(first_side: float, second_side: float) -> float:
        return math.sqrt(max(0.0, first_side**2 - 2 * correlation * first_side * second_side + second_side**2))

    low = difference - joined(one.estimate - one.low, two.high - two.estimate)
    high = difference + joined(one.high - one.estimate, two.estimate - two.low)
    return Interval(difference, low, high, num)


def mean_interval(values: Sequence[float] | FloatArray, seed: int = 0, level: float = 0.95) -> Interval:
    """Percentile bootstrap interval of a mean; the values must be independent units, such as one per prompt."""
    array = _as_array(values)
    return _percentile(float(array.mean()), _resampled_means(array[:, None], seed)[:, 0], len(array), level)


def student_interval(values: Sequence[float] | FloatArray, level: float = 0.95) -> Interval:
    """Student's t interval of a mean, for few independent values such as one per seed; no bounds for a single one.

    Source: Student 1908; mean +- t * s / sqrt(n) with n - 1 degrees of freedom.
    """
    array = _as_array(values)
    num, mean = len(array), float(array.mean())
    if num < 2:
        return Interval(mean, math.nan, math.nan, num)
    half = _student_quantile(level, num - 1) * float(array.std(ddof=1)) / math.sqrt(num)
    return Interval(mean, mean - half, mean + half, num)


def paired_difference(
    first: Sequence[float] | FloatArray, second: Sequence[float] | FloatArray, seed: int = 0, level: float = 0.95
) -> Interval:
    """Bootstrap interval of mean(first - second), both measured on the same units in the same order."""
    one, two = _as_array(first), _as_array(second)
    if len(one) != len(two):
        raise UserError(f"paired values must be equally many; got {len(one)} and {len(two)}")
    return mean_interval(one - two, seed, level)


def paired_ratio(
    first: Sequence[float] | FloatArray, second: Sequence[float] | FloatArray, seed: int = 0, level: float = 0.95
) -> Interval:
    """Bootstrap interval of mean(first) / mean(second) - 1, the relative change from second to first.

    Raises UserError when the mean of `second` is zero.
    """
    one, two = _as_array(first), _as_array(second)
    if len(one) != len(two):
        raise UserError(f"paired values must be equally many; got {len(one)} and {len(two)}")
    if two.mean() == 0:
        raise UserError("a relative change needs a reference with a mean other than zero; got 0")
    means = _resampled_means(np.stack((one, two), axis=1), seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = means[:, 0] / means[:, 1] - 1
    return _percentile(float(one.mean() / two.mean() - 1), ratios, len(one), level)


def bootstrap(
    estimate: float, num: int, statistic: Callable[[FloatArray], FloatArray], seed: int = 0, level: float = 0.95
) -> Interval:
    """Percentile bootstrap interval of any statistic of `num` units that takes the weight of each unit.

    `statistic` gets the weights of some resamples, (resamples, num), each row of which sums to num, and returns its
    values, (resamples,). `estimate` is the value for the sample itself. A statistic that is not defined for some
    resample has no interval.
    """
    values = np.concatenate([statistic(weights) for weights in _weights(num, seed)])
    return _percentile(estimate, values, num, level)


def grouped_intervals(
    groups: Sequence[int],
    statistic: Callable[[FloatArray], Sequence[float]],
    seed: int = 0,
    level: float = 0.95,
    num_resamples: int = 1000,
) -> list[Interval]:
    """Bootstrap intervals of several numbers at once where units come in groups: whole groups are drawn, not units.

    `groups` is the group of each unit, 0 to G - 1; `statistic` takes a weight per unit (how often it was drawn) and
    returns the numbers. Resamples in which a number cannot be had (NaN) are left out of its interval; it has no bounds
    where these are more than a tenth. Source: the cluster bootstrap, Davison and Hinkley (1997) section 3.8.
    """
    of_unit = np.asarray(groups, dtype=np.intp)
    if of_unit.size == 0:
        raise UserError("an interval needs at least one unit; got none")
    num = int(of_unit.max()) + 1
    estimates = np.asarray(statistic(np.ones(of_unit.size)), dtype=np.float64)
    draws = _draw_counts(np.random.default_rng(seed), num_resamples, num)
    resampled = np.array([statistic(counts[of_unit]) for counts in draws], dtype=np.float64)
    found = []
    for estimate, column in zip(estimates, resampled.T, strict=True):
        finite = column[np.isfinite(column)]
        enough = len(finite) >= 0.9 * num_resamples
        found.append(_percentile(float(estimate), finite if enough else column, num, level))
    return found


def _normal_quantile(level: float) -> float:
    if not 0 < level < 1:
        raise UserError(f"a confidence level lies between 0 and 1; got {level}")
    return NormalDist().inv_cdf(0.5 + level / 2)


def _student_quantile(level: float, freedom: int) -> float:
    """The t that |T| stays below with probability `level`: Abramowitz and Stegun 26.7.3 and 26.7.4, inverted."""
    _normal_quantile(level)
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(freedom)
    for _ in range(80):
        angle = (low + high) / 2
        cosine, is_odd = math.cos(angle), freedom % 2
        term, total = cosine**is_odd, 0.0
        for power in range(2 + is_odd, freedom + 1, 2):
            total += term
            term *= cosine**2 * (power - 1) / power
        within = math.sin(angle) * total
        within = (angle + within) * 2 / math.pi if is_odd else within
        low, high = (angle, high) if within < level else (low, angle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _phi(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Correlation of two binary outcomes, a positive one pulled towards zero by n/2 as in Newcombe's method 10."""
    product = float(both * neither - only_first * only_second)
    if product > 0:
        product = max(product - (both + only_first + only_second + neither) / 2, 0.0)
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    return product / math.sqrt(margins) if margins else 0.0


def _as_array(values: Sequence[float] | FloatArray) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise UserError(f"an interval needs a non-empty list of numbers; got shape {array.shape}")
    return array


def _percentile(estimate: float, resampled: FloatArray, num: int, level: float) -> Interval:
    _normal_quantile(level)
    if num < 2 or not np.isfinite(resampled).all():
        return Interval(estimate, math.nan, math.nan, num)
    low, high = np.quantile(resampled, ((1 - level) / 2, (1 + level) / 2))
    return Interval(estimate, float(low), float(high), num)


def _resampled_means(columns: FloatArray, seed: int) -> FloatArray:
    """Means of each column of (units, columns) over resampled units: (resamples, columns)."""
    num = len(columns)
    return np.concatenate([weights @ columns / num for weights in _weights(num, seed)])


def _weights(num: int, seed: int) -> Iterator[FloatArray]:
    """The draws of all resamples, (some resamples, num) at a time."""
    per_chunk = max(1, min(_NUM_RESAMPLES, _CACHED_CELLS // num))
    if per_chunk == _NUM_RESAMPLES:
        yield _counts(num, seed)
        return
    rng = np.random.default_rng(seed)
    for start in range(0, _NUM_RESAMPLES, per_chunk):
        yield _draw_counts(rng, min(per_chunk, _NUM_RESAMPLES - start), num)


@functools.lru_cache(maxsize=6)
def _counts(num: int, seed: int) -> FloatArray:
    # One report resamples the same few numbers of prompts for dozens of metrics; drawing once makes it quick.
    return _draw_counts(np.random.default_rng(seed), _NUM_RESAMPLES, num)


def _draw_counts(rng: np.random.Generator, rows: int, num: int) -> FloatArray:
    """How often each unit is drawn in each resample: (rows, num), each row sums to num."""
    drawn = rng.integers(0, num, size=(rows, num)) + np.arange(rows)[:, None] * num
    return np.bincount(drawn.ravel(), minlength=rows * num).reshape(rows, num).astype(np.float64)
