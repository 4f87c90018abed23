"""Measures of step scores against scikit-learn and loops, baselines, and intervals that draw whole questions."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from sklearn import metrics
from sklearn.linear_model import LogisticRegression

from rlhf.eval.intervals import grouped_intervals, mean_interval
from rlhf.eval.logistic import fit_logistic
from rlhf.eval.step_accuracy import METRICS, JudgedSolution, baseline_scores, step_accuracy
from rlhf.eval.step_metrics import accuracy, area_under_curve, balanced_accuracy, first_error, log_loss
from rlhf.infra.errors import UserError

RNG = np.random.default_rng(0)
SCORES = RNG.integers(1, 20, 60) / 20  # with ties, and with some at exactly one half
LABELS = RNG.random(60) < SCORES
ONES = np.ones(60)
COUNTS = RNG.integers(0, 4, 60).astype(float)


# ---------------------------------------------------------------- measures


@pytest.mark.parametrize("weights", [ONES, COUNTS], ids=["once", "weighted"])
def test_measures_are_scikit_learns(weights: np.ndarray) -> None:
    assert area_under_curve(SCORES, LABELS, weights) == pytest.approx(
        metrics.roc_auc_score(LABELS, SCORES, sample_weight=weights)
    )
    assert log_loss(SCORES, LABELS, weights) == pytest.approx(metrics.log_loss(LABELS, SCORES, sample_weight=weights))
    keep = SCORES != 0.5
    rest = SCORES[keep], LABELS[keep], weights[keep]
    assert accuracy(*rest) == pytest.approx(
        metrics.accuracy_score(LABELS[keep], SCORES[keep] > 0.5, sample_weight=weights[keep])
    )
    assert balanced_accuracy(*rest) == pytest.approx(
        metrics.balanced_accuracy_score(LABELS[keep], SCORES[keep] > 0.5, sample_weight=weights[keep])
    )


def test_a_weight_is_as_good_as_copies() -> None:
    copies = np.repeat(np.arange(60), COUNTS.astype(int))
    for measure in (accuracy, balanced_accuracy, area_under_curve, log_loss):
        expected = measure(SCORES[copies], LABELS[copies], np.ones(len(copies)))
        assert measure(SCORES, LABELS, COUNTS) == pytest.approx(expected)


def test_measures_by_hand_and_at_the_edges() -> None:
    scores, labels = np.array([0.5, 0.9, 0.2, 0.5]), np.array([True, False, False, True])
    once = np.ones(4)
    assert accuracy(scores, labels, once) == 0.5  # half, wrong, right, half
    assert balanced_accuracy(scores, labels, once) == 0.5
    assert area_under_curve(scores, labels, once) == 0.5
    assert math.isnan(area_under_curve(scores, np.ones(4, dtype=bool), once))
    assert math.isnan(balanced_accuracy(scores, np.zeros(4, dtype=bool), once))
    assert log_loss(np.array([0.0]), np.array([True]), np.ones(1)) == pytest.approx(-math.log(1e-12))
    assert [first_error(row) for row in ([0.9, 0.4, 0.1], [0.5, 0.9], [0.1])] == [1, None, 0]


# ---------------------------------------------------------------- baselines


def test_logistic_regression_is_scikit_learns() -> None:
    features = RNG.normal(size=(300, 3)) * [1, 20, 0.01] + [5, -3, 0]
    labels = RNG.random(300) < 1 / (1 + np.exp(-(features[:, 0] - 5 + 0.05 * features[:, 1])))
    found = fit_logistic(features, labels.astype(float))
    scaled = (features - features.mean(axis=0)) / features.std(axis=0)
    peer = LogisticRegression(C=1000, tol=1e-10, max_iter=1000).fit(scaled, labels)
    np.testing.assert_allclose(found.probabilities(features), peer.predict_proba(scaled)[:, 1], atol=1e-5)


def test_logistic_regression_at_the_edges() -> None:
    apart = np.linspace(-1, 1, 40)[:, None]
    p = fit_logistic(apart, (apart[:, 0] > 0).astype(float)).probabilities(apart)
    assert p[0] < 1e-3 and p[-1] > 1 - 1e-3 and np.isfinite(p).all()
    constant = fit_logistic(np.ones((5, 2)), np.array([1.0, 1, 1, 0, 0.25])).probabilities(np.ones((1, 2)))
    assert constant[0] == pytest.approx(0.65, abs=1e-6)
    assert fit_logistic(apart, np.ones(40)).probabilities(apart).min() > 0.99


def solution(question: int, labels: list[float | None], lengths: list[int] | None = None) -> JudgedSolution:
    return JudgedSolution(f"question {question}", 10, lengths or [5] * len(labels), labels)


def test_baselines_are_fitted_on_the_judged_steps_of_training_alone() -> None:
    rng = Random(0)
    # Long steps are wrong, short ones right; a fifth of the labels says otherwise, and every fourth is not judged.
    train = []
    for number in range(200):
        lengths = [rng.choice([3, 30]) for _ in range(3)]
        labels = [float((length == 3) != (rng.random() < 0.2)) for length in lengths]
        train.append(solution(number, [None if rng.random() < 0.25 else label for label in labels], lengths))
    judged = [label for one in train for label in one.labels if label is not None]
    held = [solution(1000, [1.0, 0.0], [3, 30])]
    found = baseline_scores(train, held)
    assert found["constant"] == [[pytest.approx(sum(judged) / len(judged))] * 2]
    assert found["position"][0][0] > 0.7 and found["position"][0][1] < 0.3
    assert found == baseline_scores(train, [solution(1000, [0.0, 1.0], [3, 30])])


# ---------------------------------------------------------------- the whole


def test_a_model_that_knows_leads_and_one_that_does_not_does_not() -> None:
    rng = Random(1)

    def drawn(first: int, count: int) -> list[JudgedSolution]:
        return [solution(q // 2, [float(rng.random() < 0.7) for _ in range(4)]) for q in range(first, first + count)]

    held, train = drawn(0, 120), drawn(1000, 120)
    knows = [[0.9 if label else 0.1 for label in one.labels] for one in held]
    guesses = [[rng.random() for _ in one.labels] for one in held]
    sure = step_accuracy(held, knows, train, {"min": [min(row) for row in knows]})
    assert (sure.num_questions, sure.num_solutions, sure.num_steps) == (60, 120, 480)
    assert {name: sure.model[name].estimate for name in METRICS if name != "log_loss"} == {
        "accuracy": 1, "balanced_accuracy": 1, "auc": 1, "first_error": 1
    }  # fmt: skip
    assert sure.model["log_loss"].estimate == pytest.approx(-math.log(0.9))
    assert sure.solutions["min"].estimate == 1
    for lead in (sure.lead_over_constant, sure.lead_over_position):
        assert all(one.low > 0 for one in lead.values())
    assert sure.constant["auc"].estimate == 0.5
    assert sure.constant["accuracy"].estimate == pytest.approx(sure.share_right)
    blind = step_accuracy(held, guesses, train)
    assert blind.lead_over_constant["auc"].low < 0 < blind.lead_over_constant["auc"].high
    assert blind.lead_over_constant["log_loss"].high < 0
    assert blind.solutions == {}


def test_steps_that_nobody_judged_take_no_part() -> None:
    train = [solution(9, [1.0, 0.0])]
    held = [solution(0, [None, 1.0, 0.25]), solution(1, [1.0, None])]
    scores = [[0.1, 0.8, 0.3], [0.9, 0.2]]
    found = step_accuracy(held, scores, train)
    assert found.num_steps == 3 and found.share_right == pytest.approx(2 / 3)
    assert found.model["accuracy"].estimate == 1 and found.model["first_error"].estimate == 1
    expected = -(math.log(0.8) + math.log(0.7) + math.log(0.9)) / 3
    assert found.model["log_loss"].estimate == pytest.approx(expected)


def test_what_cannot_be_measured_is_told() -> None:
    one = [solution(0, [1.0])]
    with pytest.raises(UserError, match="got 0 and 1"):
        step_accuracy([], [], one)
    with pytest.raises(UserError, match="not finite"):
        step_accuracy(one, [[math.nan]], one)


# ---------------------------------------------------------------- intervals


def test_whole_groups_are_drawn() -> None:
    # Ten questions with the same value throughout: the interval is that of ten values, not of a thousand.
    values = np.repeat(np.arange(10.0), 100)
    groups = np.repeat(np.arange(10), 100).tolist()
    (found,) = grouped_intervals(groups, lambda weights: [float((values * weights).sum() / weights.sum())])
    alone = mean_interval(np.arange(10.0))
    assert (found.estimate, found.num) == (4.5, 10)
    assert found.low == pytest.approx(alone.low, abs=0.25) and found.high == pytest.approx(alone.high, abs=0.25)
    assert found.high - found.low > 3 * (mean_interval(values).high - mean_interval(values).low)


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    groups, hits = np.repeat(np.arange(40), 5).tolist(), 0
    for seed in range(100):
        values = np.repeat(rng.normal(size=40), 5) + 0.3 * rng.normal(size=200)
        (found,) = grouped_intervals(
            groups, lambda weights, values=values: [float((values * weights).sum() / weights.sum())], seed=seed,
            num_resamples=300,
        )  # fmt: skip
        hits += found.low <= 0 <= found.high
    assert 87 <= hits <= 99


def test_numbers_that_some_resamples_lack() -> None:
    groups = list(range(30))
    rare = np.zeros(30)
    rare[:12] = 1

    def share(weights: np.ndarray) -> list[float]:
        return [1.0 if (rare * weights).sum() else math.nan, 1.0 if weights[0] else math.nan]

    often, seldom = grouped_intervals(groups, share)
    assert often.has_bounds and not seldom.has_bounds
    with pytest.raises(UserError, match="at least one unit"):
        grouped_intervals([], share)
