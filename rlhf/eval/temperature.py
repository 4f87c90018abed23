"""One number that makes a reward model's confidence honest: the temperature its margins are divided by.

P(chosen is better) = sigmoid(margin / T). T is fitted on one part of the pairs by maximum likelihood and judged on the
other; a T above 1 says that the model was too sure (arXiv:1706.04599 section 4.2, for two classes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.eval.intervals import FloatArray, Interval, paired_difference
from rlhf.eval.reward_accuracy import calibration_bins
from rlhf.infra.errors import UserError

_SMALLEST, _LARGEST = 1e-3, 1e3


@dataclass(frozen=True)
class TemperatureFit:
    """The fitted temperature and what it changes on pairs that had no part in the fit.

    `ece_*`, `brier_*` and `log_loss_*` are before and after, on those pairs; `log_loss_change` is the paired change per
    pair with its bootstrap interval (negative is better). `chance_ece` is the calibration error that a perfectly honest
    model would show on so few pairs.
    """

    temperature: float
    num_fitted: int
    num_held_out: int
    ece_before: float
    ece_after: float
    chance_ece: float
    brier_before: float
    brier_after: float
    log_loss_before: float
    log_loss_after: float
    log_loss_change: Interval


def fit_temperature(margins: Sequence[float] | FloatArray) -> float:
    """The T that maximises sum log sigmoid(margin / T) over pairs; margins are score(chosen) - score(rejected).

    Found by bisection of the derivative in 1 / T, in which the log-loss is convex. Where every pair is ordered right,
    or no more than half of them by weight, the best T lies at an end: 0.001 or 1000 is returned. Raises UserError for
    no pairs.
    """
    array = np.asarray(margins, dtype=np.float64)
    if array.size == 0:
        raise UserError("a temperature needs at least one pair to be fitted on; got none")

    def slope(log_scale: float) -> float:
        # d/dw of the mean log-loss at w = 1 / T: -mean(m sigmoid(-m w)).
        return -float(np.mean(array * _sigmoid(-array * math.exp(log_scale))))

    low, high = math.log(1 / _LARGEST), math.log(1 / _SMALLEST)
    if slope(low) >= 0:
        return _LARGEST
    if slope(high) <= 0:
        return _SMALLEST
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return math.exp(-(low + high) / 2)


def temperature_report(fitted: Sequence[float], held_out: Sequence[float], seed: int = 0) -> TemperatureFit:
    """Fit on the first margins, judge on the second."""
    before = np.asarray(held_out, dtype=np.float64)
    if before.size == 0:
        raise UserError("a fitted temperature needs pairs to be judged on; got none")
    temperature = fit_temperature(fitted)
    after = before / temperature
    losses = [-np.log(_sigmoid(margins)) for margins in (after, before)]
    return TemperatureFit(
        temperature=temperature,
        num_fitted=len(fitted),
        num_held_out=len(before),
        ece_before=expected_calibration_error(before),
        ece_after=expected_calibration_error(after),
        chance_ece=chance_calibration_error(after, seed),
        brier_before=_brier(before),
        brier_after=_brier(after),
        log_loss_before=float(losses[1].mean()),
        log_loss_after=float(losses[0].mean()),
        log_loss_change=paired_difference(losses[0], losses[1], seed),
    )


def expected_calibration_error(margins: FloatArray) -> float:
    """Mean gap between stated confidence and accuracy over ten bins, weighted by pairs (arXiv:1706.04599 eq. 3)."""
    return sum(b.num * abs(b.confidence - b.accuracy) for b in calibration_bins(margins)) / len(margins)


def chance_calibration_error(margins: FloatArray, seed: int = 0, num_draws: int = 200) -> float:
    """The error that would be measured if every stated confidence were exactly right: finite bins are never even."""
    rng = np.random.default_rng(seed)
    sizes = np.abs(margins)
    signs = np.where(rng.random((num_draws, len(sizes))) < _sigmoid(sizes), 1.0, -1.0)
    return float(np.mean([expected_calibration_error(sizes * row) for row in signs]))


def _brier(margins: FloatArray) -> float:
    return float(np.mean((1 - _sigmoid(margins)) ** 2))


def _sigmoid(values: FloatArray) -> FloatArray:
    result: FloatArray = 1 / (1 + np.exp(-np.clip(values, -700, 700)))
    return result
