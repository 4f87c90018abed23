"""Step labels made by sampling beside the truth, where it is known: how often they agree, by question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.eval.intervals import FloatArray, Interval, grouped_intervals
from rlhf.eval.step_metrics import accuracy, area_under_curve, balanced_accuracy, ranks
from rlhf.infra.errors import UserError


@dataclass(frozen=True)
class LabelledSolution:
    """One solution: the share of right completions of each step, and whether the step is right in truth."""

    question: str
    values: list[float]
    truth: list[bool]


@dataclass(frozen=True)
class LabelAgreement:
    """Labels against truth over all steps; intervals are bootstrapped by question.

    `auc` is that of the shares (soft labels) for the truth; `hard_*` take a step for right where any completion was,
    `majority_*` where half of them or more were. `missed_right` is the share of right steps without a right completion,
    `saved_wrong` that of wrong steps with one: the two ways in which hard labels are wrong.
    """

    num_questions: int
    num_solutions: int
    num_steps: int
    share_right: float
    auc: Interval
    hard_accuracy: Interval
    hard_balanced: Interval
    majority_accuracy: Interval
    majority_balanced: Interval
    missed_right: Interval
    saved_wrong: Interval


def label_agreement(solutions: Sequence[LabelledSolution]) -> LabelAgreement:
    """Compare; raises UserError without solutions."""
    if not solutions:
        raise UserError("labels are compared with the truth of at least one solution; got none")
    numbers = {question: place for place, question in enumerate(dict.fromkeys(one.question for one in solutions))}
    groups_N = [numbers[one.question] for one in solutions for _ in one.values]
    values_N = np.array([value for one in solutions for value in one.values], dtype=np.float64)
    truth_N = np.array([is_right for one in solutions for is_right in one.truth])
    hard_N, majority_N = (values_N > 0).astype(np.float64), (values_N >= 0.5).astype(np.float64)
    ranks_N = ranks(values_N)

    def numbers_of(weights_N: FloatArray) -> list[float]:
        right, wrong = weights_N * truth_N, weights_N * ~truth_N
        with np.errstate(invalid="ignore"):
            missed, saved = (right * (1 - hard_N)).sum() / right.sum(), (wrong * hard_N).sum() / wrong.sum()
        return [
            area_under_curve(values_N, truth_N, weights_N, ranks_N),
            accuracy(hard_N, truth_N, weights_N),
            balanced_accuracy(hard_N, truth_N, weights_N),
            accuracy(majority_N, truth_N, weights_N),
            balanced_accuracy(majority_N, truth_N, weights_N),
            float(missed),
            float(saved),
        ]

    found = grouped_intervals(groups_N, numbers_of)
    return LabelAgreement(len(numbers), len(solutions), len(values_N), float(truth_N.mean()), *found)
