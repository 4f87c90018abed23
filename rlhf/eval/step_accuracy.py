"""How well a process reward model tells right steps from wrong ones, beside what needs no model at all.

Two baselines are fitted on the training rows: `constant` gives every step the share of right ones, `position` is a
logistic regression on where a step stands and how long it is. Intervals are bootstrapped by question, because steps of
one solution and solutions to one question are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.eval.intervals import FloatArray, Interval, grouped_intervals
from rlhf.eval.logistic import fit_logistic
from rlhf.eval.step_metrics import (
    accuracy,
    area_under_curve,
    balanced_accuracy,
    first_error,
    log_loss,
    ranks,
)
from rlhf.infra.errors import UserError

METRICS = ("log_loss", "accuracy", "balanced_accuracy", "auc", "first_error")


@dataclass(frozen=True)
class JudgedSolution:
    """What is known of a solution without its text: lengths in tokens, and labels in [0, 1] (None: not judged)."""

    question: str
    prompt_length: int
    step_lengths: list[int]
    labels: list[float | None]


@dataclass(frozen=True)
class StepAccuracy:
    """Step scores on held-out solutions. A label of one half or more counts as right.

    Each of `model`, `constant` and `position` holds the `METRICS`: log-loss in nats, accuracy and balanced accuracy at
    one half, area under the ROC curve, and the share of solutions whose first wrong step (or that there is none) was
    found. `lead_over_*` is how much better the model is, positive also for the log-loss. `solutions` is the area under
    the curve of each aggregated score for "every judged step is right".
    """

    num_questions: int
    num_solutions: int
    num_steps: int
    share_right: float
    model: dict[str, Interval]
    constant: dict[str, Interval]
    position: dict[str, Interval]
    lead_over_constant: dict[str, Interval]
    lead_over_position: dict[str, Interval]
    solutions: dict[str, Interval]


def step_accuracy(
    held: Sequence[JudgedSolution],
    scores: Sequence[Sequence[float]],
    train: Sequence[JudgedSolution],
    aggregated: Mapping[str, Sequence[float]] | None = None,
) -> StepAccuracy:
    """Measure probabilities of every step of held-out solutions; the baselines are fitted on `train`.

    `aggregated` holds a score per solution by the name of the aggregation.

    Raises:
        UserError: there is nothing to measure, or a score is not finite.
    """
    if not held or not train:
        raise UserError(f"step accuracy needs held-out and training solutions; got {len(held)} and {len(train)}")
    if not all(math.isfinite(score) for row in scores for score in row):
        raise UserError("a step has a score that is not finite; the process reward model has diverged")
    baselines = baseline_scores(train, held)
    measured = _Measured(held, {"model": scores, **baselines}, aggregated or {})
    names = measured.names
    found = dict(zip(names, grouped_intervals(measured.groups, measured), strict=True))
    return StepAccuracy(
        num_questions=len(set(measured.groups)),
        num_solutions=len(held),
        num_steps=measured.num_steps,
        share_right=float(measured.labels_N.mean()),
        model={metric: found["model", metric] for metric in METRICS},
        constant={metric: found["constant", metric] for metric in METRICS},
        position={metric: found["position", metric] for metric in METRICS},
        lead_over_constant={metric: found["lead_over_constant", metric] for metric in METRICS},
        lead_over_position={metric: found["lead_over_position", metric] for metric in METRICS},
        solutions={name: found["solutions", name] for name in (aggregated or {})},
    )


def baseline_scores(train: Sequence[JudgedSolution], held: Sequence[JudgedSolution]) -> dict[str, list[list[float]]]:
    """Probabilities of every held-out step by the two baselines, fitted on the judged steps of `train`."""
    features = np.concatenate([_features(solution) for solution in train])
    labels = np.array([math.nan if label is None else label for solution in train for label in solution.labels])
    judged = ~np.isnan(labels)
    position = fit_logistic(features[judged], labels[judged])
    share = float(labels[judged].mean())
    return {
        "constant": [[share] * len(solution.labels) for solution in held],
        "position": [position.probabilities(_features(solution)).tolist() for solution in held],
    }


def _features(solution: JudgedSolution) -> FloatArray:
    """Of each step: its number and the square of it, and the logarithms of its length, of all so far, of the prompt."""
    lengths = np.array(solution.step_lengths, dtype=np.float64)
    number = np.arange(1.0, len(lengths) + 1)
    prompt = np.full(len(lengths), math.log1p(solution.prompt_length))
    return np.stack([number, number**2, np.log1p(lengths), np.log1p(lengths.cumsum()), prompt], axis=1)


class _Measured:
    """All metrics of all scorers under given weights of the solutions (K); judged steps are laid end to end (N)."""

    def __init__(
        self,
        held: Sequence[JudgedSolution],
        scores: Mapping[str, Sequence[Sequence[float]]],
        aggregated: Mapping[str, Sequence[float]],
    ) -> None:
        numbers = {question: place for place, question in enumerate(dict.fromkeys(one.question for one in held))}
        self.groups = [numbers[one.question] for one in held]
        truth = [[label for label in one.labels if label is not None] for one in held]
        self.solution_N = np.array([row for row, labels in enumerate(truth) for _ in labels], dtype=np.intp)
        self.labels_N = np.array([label >= 0.5 for labels in truth for label in labels])
        self.num_steps = len(self.solution_N)
        true_first = [first_error(labels) for labels in truth]
        self.all_right_K = np.array([first is None for first in true_first])
        self.scorers = {name: _Scorer(held, rows, true_first) for name, rows in scores.items()}
        self.aggregated = [np.asarray(values, dtype=np.float64) for values in aggregated.values()]
        self.names = [(name, metric) for name in scores for metric in METRICS]
        self.names += [(f"lead_over_{name}", metric) for name in scores if name != "model" for metric in METRICS]
        self.names += [("solutions", name) for name in aggregated]

    def __call__(self, weights_K: FloatArray) -> list[float]:
        """The numbers that `names` names, in its order."""
        weights_N = weights_K[self.solution_N]
        found = {name: self._metrics(one, weights_N, weights_K) for name, one in self.scorers.items()}
        values = [value for metrics in found.values() for value in metrics]
        for name, theirs in found.items():
            if name != "model":
                gains = zip(METRICS, found["model"], theirs, strict=True)
                values += [other - own if metric == "log_loss" else own - other for metric, own, other in gains]
        return values + [area_under_curve(one, self.all_right_K, weights_K) for one in self.aggregated]

    def _metrics(self, one: _Scorer, weights_N: FloatArray, weights_K: FloatArray) -> list[float]:
        return [
            log_loss(one.scores_N, self.labels_N, weights_N),
            accuracy(one.scores_N, self.labels_N, weights_N),
            balanced_accuracy(one.scores_N, self.labels_N, weights_N),
            area_under_curve(one.scores_N, self.labels_N, weights_N, one.ranks_N),
            float((one.found_first_K * weights_K).sum() / weights_K.sum()),
        ]


class _Scorer:
    """One scorer's probabilities of the judged steps, and in which solutions it found the first wrong one."""

    def __init__(
        self, held: Sequence[JudgedSolution], rows: Sequence[Sequence[float]], true_first: Sequence[int | None]
    ) -> None:
        kept = [
            [score for score, label in zip(row, one.labels, strict=True) if label is not None]
            for row, one in zip(rows, held, strict=True)
        ]
        self.scores_N = np.array([score for row in kept for score in row], dtype=np.float64)
        self.ranks_N = ranks(self.scores_N)
        self.found_first_K = np.array(
            [float(first_error(row) == first) for row, first in zip(kept, true_first, strict=True)]
        )
