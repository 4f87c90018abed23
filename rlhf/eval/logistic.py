"""Logistic regression on a handful of features, for baselines: Newton's method, standardised, lightly regularised."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhf.eval.intervals import FloatArray

_RIDGE, _NUM_STEPS = 1e-3, 50


@dataclass(frozen=True)
class Logistic:
    """sigma(intercept + slopes . (x - mean) / scale)."""

    mean_F: FloatArray
    scale_F: FloatArray
    intercept: float
    slopes_F: FloatArray

    def probabilities(self, features_NF: FloatArray) -> FloatArray:
        """P(label is True) of every row."""
        return _sigmoid(self.intercept + (features_NF - self.mean_F) / self.scale_F @ self.slopes_F)


def fit_logistic(features_NF: FloatArray, labels_N: FloatArray) -> Logistic:
    """Minimise the summed log-loss against labels in [0, 1] plus ridge / 2 |slopes|^2, to the end."""
    mean_F, scale_F = features_NF.mean(axis=0), features_NF.std(axis=0)
    scale_F = np.where(scale_F > 0, scale_F, 1.0)  # a feature that never changes says nothing
    design = np.concatenate([np.ones((len(features_NF), 1)), (features_NF - mean_F) / scale_F], axis=1)
    penalty = _RIDGE * np.eye(design.shape[1])
    penalty[0, 0] = 1e-9  # the intercept is free; this keeps it finite where all labels are equal
    weights = np.zeros(design.shape[1])
    for _ in range(_NUM_STEPS):
        p = _sigmoid(design @ weights)
        gradient = design.T @ (p - labels_N) + penalty @ weights
        curvature = design.T @ (design * (p * (1 - p)).clip(1e-9)[:, None]) + penalty
        step = np.linalg.solve(curvature, gradient)
        weights = weights - step.clip(-5, 5)  # a full step overshoots where the classes are nearly apart
        if np.abs(step).max() < 1e-10:
            break
    return Logistic(mean_F, scale_F, float(weights[0]), weights[1:])


def _sigmoid(values: FloatArray) -> FloatArray:
    result: FloatArray = 1 / (1 + np.exp(-np.clip(values, -60, 60)))
    return result
