"""Length-controlled win-rate: what the judge would say if the two answers were equally long (arXiv:2404.04475).

A logistic model explains the preference by three things: how much better the first model is, how the lengths differ,
and how hard the prompt is. Taking the length term out of the fitted model leaves the win-rate that quality alone earns.
AlpacaEval fits the difficulty of each prompt on many models beforehand and adds rows of answers that were asked to be
long or short on purpose; both are optional here, because two models of one's own have neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.eval.intervals import FloatArray, Interval, bootstrap
from rlhf.infra.errors import UserError

# Keeps coefficients finite where every comparison is won, and the length term at zero where lengths never differ. On
# AlpacaEval's 805 rows it moves the result by a thousandth of a point.
_RIDGE = 1e-3
_REGULARISER_WEIGHT = 0.1
_MAX_STEPS = 60
_TOLERANCE = 1e-6
_CELLS_AT_ONCE = 100_000


@dataclass(frozen=True)
class Regulariser:
    """Comparisons of a baseline with itself asked to be longer or shorter: what length alone does to this judge.

    `length_gap` is in standard deviations with the sign of first minus second, `preference` is that for the first.
    """

    length_gap: FloatArray
    difficulty: FloatArray
    preference: FloatArray


@dataclass(frozen=True)
class LengthControlled:
    """The win-rate at equal length, and what length does.

    `length_effect` is the coefficient of tanh(gap in standard deviations): positive where the judge favours the longer
    answer, in logits.
    """

    rate: Interval
    length_effect: float


def length_controlled(
    preferences: Sequence[float] | FloatArray,
    lengths_first: Sequence[float] | FloatArray,
    lengths_second: Sequence[float] | FloatArray,
    difficulty: Sequence[float] | FloatArray | None = None,
    regulariser: Regulariser | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> LengthControlled:
    """Fit `logit p = phi tanh(gap / std) + psi difficulty + theta` and return the mean of p without the first term.

    `preferences` in [0, 1] are those for the first answer (0.5 a tie), lengths are in characters, `difficulty` has one
    value per prompt. The interval is a percentile bootstrap over prompts that fits the model again for each resample,
    with the unit of length kept. Raises UserError when the sequences do not fit together.

    Source: arXiv:2404.04475, section 3; weights and the missing theta of regulariser rows as in AlpacaEval's code, with
    a small ridge in place of its cross-validated L1 penalty.
    """
    targets, first, second = (np.asarray(v, dtype=np.float64) for v in (preferences, lengths_first, lengths_second))
    hardness = None if difficulty is None else np.asarray(difficulty, dtype=np.float64)
    _refuse_misfits(targets, first, second, hardness)
    gaps = first - second
    spread = float(gaps.std(ddof=1)) if len(gaps) > 1 else 0.0
    length = np.tanh(gaps / spread) if spread > 0 else np.zeros_like(gaps)
    rows = np.column_stack([length, np.zeros_like(length) if hardness is None else hardness, np.ones_like(length)])
    fixed_rows, fixed_targets = _fixed(regulariser)
    columns, goals = np.vstack([rows, fixed_rows]), np.concatenate([targets, fixed_targets])

    def fitted(weights: FloatArray, start: FloatArray) -> FloatArray:
        extra = np.full((len(weights), len(fixed_rows)), _REGULARISER_WEIGHT)
        return _fit(columns, goals, np.hstack([weights, extra]), start)

    def rates_from(weights: FloatArray, coefficients: FloatArray) -> FloatArray:
        without_length = _sigmoid(coefficients[:, 1:] @ rows[:, 1:].T)
        return np.asarray((weights * without_length).sum(axis=1) / weights.sum(axis=1))

    def rates(weights: FloatArray) -> FloatArray:
        step = max(1, _CELLS_AT_ONCE // len(columns))
        parts = [weights[start : start + step] for start in range(0, len(weights), step)]
        return np.concatenate([rates_from(part, fitted(part, whole)) for part in parts])

    once = np.ones((1, len(targets)))
    whole = fitted(once, np.zeros((1, 3)))  # resamples start from there, a few steps from their own optimum
    estimate = float(rates_from(once, whole)[0])
    return LengthControlled(bootstrap(estimate, len(targets), rates, seed, level), float(whole[0, 0]))


def _fixed(regulariser: Regulariser | None) -> tuple[FloatArray, FloatArray]:
    """Rows and targets of the regulariser; a model against itself has no theta."""
    if regulariser is None:
        return np.empty((0, 3)), np.empty(0)
    gap, difficulty, preference = regulariser.length_gap, regulariser.difficulty, regulariser.preference
    if not len(gap) == len(difficulty) == len(preference):
        raise UserError(
            f"a regulariser needs as many gaps as difficulties and preferences; got {len(gap)}, {len(difficulty)} and "
            f"{len(preference)}"
        )
    return np.column_stack([np.tanh(gap), difficulty, np.zeros_like(gap)]), preference


def _fit(rows: FloatArray, targets: FloatArray, weights: FloatArray, start: FloatArray) -> FloatArray:
    """Ridge-logistic coefficients (resamples, 3) for each row of weights (resamples, rows), by Newton's method."""
    size = rows.shape[1]
    products = (rows[:, :, None] * rows[:, None, :]).reshape(len(rows), size * size)
    coefficients = np.repeat(start, len(weights), axis=0)
    for _ in range(_MAX_STEPS):
        means = _sigmoid(coefficients @ rows.T)
        gradient = (weights * (targets - means)) @ rows - _RIDGE * coefficients
        curvature = ((weights * means * (1 - means)) @ products).reshape(-1, size, size) + _RIDGE * np.eye(size)
        step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
        # Far from the optimum the curvature is nearly flat, and a whole step would overshoot.
        step *= np.minimum(1.0, 4.0 / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-300))
        coefficients = coefficients + step
        if np.abs(step).max() < _TOLERANCE:  # the next step would be about the square of this one
            return coefficients
    return np.where(np.abs(step).max(axis=1, keepdims=True) < _TOLERANCE, coefficients, np.nan)


def _sigmoid(values: FloatArray) -> FloatArray:
    # The one form that neither overflows nor loses digits on either side.
    return 0.5 * (1.0 + np.tanh(0.5 * values))


def _refuse_misfits(targets: FloatArray, first: FloatArray, second: FloatArray, difficulty: FloatArray | None) -> None:
    counts = {"preferences": targets, "lengths of the first": first, "lengths of the second": second}
    counts |= {} if difficulty is None else {"difficulties": difficulty}
    if len({values.shape for values in counts.values()}) != 1 or targets.ndim != 1 or targets.size == 0:
        told = ", ".join(f"{values.size} {name}" for name, values in counts.items())
        raise UserError(f"length control needs one value of each kind per comparison; got {told}")
    if not all(np.isfinite(values).all() for values in counts.values()):
        raise UserError("length control needs finite numbers; leave comparisons out that were not judged")
    if targets.min() < 0 or targets.max() > 1:
        raise UserError(f"preferences lie between 0 and 1; got {targets.min():g} to {targets.max():g}")
