"""Agreement of judges and tests for paired outcomes, against scikit-learn, statsmodels and SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.inter_rater import aggregate_raters
from statsmodels.stats.inter_rater import fleiss_kappa as statsmodels_fleiss

from rlhf.eval.agreement import cohen_kappa, fleiss_kappa
from rlhf.eval.judge_figures import TURNED
from rlhf.eval.significance import mcnemar, paired_bootstrap, sign_test
from rlhf.infra.errors import UserError

OUTCOMES = ["first", "tie", "second"]


def ratings(num: int, raters: int, seed: int, noise: float = 0.4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    truth = rng.choice(OUTCOMES, num, p=[0.5, 0.2, 0.3])
    guesses = rng.choice(OUTCOMES, (num, raters))
    return np.where(rng.random((num, raters)) < noise, guesses, truth[:, None])


@pytest.mark.parametrize("seed", range(4))
def test_cohens_kappa_is_scikit_learns(seed: int) -> None:
    both = ratings(60, 2, seed)
    first, second = both[:, 0].tolist(), both[:, 1].tolist()
    found = cohen_kappa(first, second)
    assert found.estimate == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)
    assert found.low < found.estimate < found.high
    assert found.num == 60


@pytest.mark.parametrize("raters", [2, 4])
def test_items_that_count_both_ways_are_all_items_and_their_mirror_images(raters: int) -> None:
    table = ratings(60, raters, 5)
    whole = np.vstack([table, np.vectorize(TURNED.get)(table)])
    found = fleiss_kappa(table.tolist(), turned=TURNED)
    assert found.estimate == pytest.approx(statsmodels_fleiss(aggregate_raters(whole)[0]), abs=1e-12)
    two = cohen_kappa(table[:, 0].tolist(), table[:, 1].tolist(), turned=TURNED)
    assert two.estimate == pytest.approx(cohen_kappa_score(whole[:, 0], whole[:, 1]), abs=1e-12)
    assert two.num == 60  # no more certain than there are items


def test_a_file_whose_better_answer_stands_first_is_no_rater_to_agree_with() -> None:
    said = ["first"] * 8 + ["second"] * 2
    assert cohen_kappa(said, ["first"] * 10).estimate == 0.0
    assert cohen_kappa(said, ["first"] * 10, turned=TURNED).estimate == pytest.approx(2 * 0.8 - 1)
    turned = [TURNED[one] if n % 2 else one for n, one in enumerate(said)]
    labels = ["second" if n % 2 else "first" for n in range(10)]
    assert cohen_kappa(turned, labels, turned=TURNED).estimate == pytest.approx(0.6)


def test_the_interval_of_kappa_is_that_of_resampled_items() -> None:
    both = ratings(80, 2, 7)
    found = cohen_kappa(both[:, 0].tolist(), both[:, 1].tolist())
    rng = np.random.default_rng(11)
    drawn = [both[rng.integers(0, 80, 80)] for _ in range(250)]
    low, high = np.quantile([cohen_kappa_score(rows[:, 0], rows[:, 1]) for rows in drawn], (0.025, 0.975))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.07)


@pytest.mark.parametrize(("raters", "seed"), [(2, 0), (3, 1), (6, 2)])
def test_fleiss_kappa_is_statsmodels(raters: int, seed: int) -> None:
    table = ratings(50, raters, seed)
    counts, _ = aggregate_raters(table)
    found = fleiss_kappa(table.tolist())
    assert found.estimate == pytest.approx(statsmodels_fleiss(counts), abs=1e-12)
    assert found.low < found.estimate < found.high


def test_kappa_at_its_ends() -> None:
    assert cohen_kappa(["first", "second"] * 5, ["first", "second"] * 5).estimate == 1.0
    assert cohen_kappa(["first", "second"] * 5, ["second", "first"] * 5).estimate == -1.0
    # Who always says the same agrees no better than chance would.
    assert math.isnan(cohen_kappa(["first"] * 4, ["first"] * 4).estimate)
    assert math.isnan(fleiss_kappa([["tie", "tie"]] * 3).estimate)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 5), (8, 2), (0, 12), (64, 36), (700, 610), (3000, 2700)])
def test_the_sign_test_is_scipys(wins: int, losses: int) -> None:
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)
    assert sign_test(losses, wins) == sign_test(wins, losses)


def test_mcnemar_is_statsmodels() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.random(90) < 0.7, rng.random(90) < 0.55
    table = [[(first & second).sum(), (first & ~second).sum()], [(~first & second).sum(), (~first & ~second).sum()]]
    expected = statsmodels_mcnemar(table, exact=True).pvalue
    assert mcnemar(first.tolist(), second.tolist()) == pytest.approx(expected, rel=1e-9)
    assert mcnemar([True, False], [True, False]) == 1.0


def test_the_paired_bootstrap_sees_the_pairing() -> None:
    rng = np.random.default_rng(4)
    base = rng.normal(scale=5, size=200)
    better = paired_bootstrap(base + 0.2 + rng.normal(scale=0.1, size=200), base)
    assert better.difference.low > 0.15
    assert better.p_value == pytest.approx(2 / 2001)
    same = paired_bootstrap(base, base)
    assert (same.difference.estimate, same.p_value) == (0.0, 1.0)


def test_the_paired_bootstraps_p_value_is_fair_under_no_difference() -> None:
    rng = np.random.default_rng(5)
    found = [paired_bootstrap(rng.normal(size=80), rng.normal(size=80), seed=0).p_value for _ in range(300)]
    assert 0.02 < np.mean([p < 0.05 for p in found]) < 0.10
    assert 0.42 < np.mean([p < 0.5 for p in found]) < 0.58


def test_bad_input_is_told_in_a_sentence() -> None:
    with pytest.raises(UserError, match="got 1 and 2 ratings"):
        cohen_kappa(["tie"], ["tie", "tie"])
    with pytest.raises(UserError, match=r"got \[1, 2\]"):
        fleiss_kappa([["tie"], ["tie", "tie"]])
    with pytest.raises(UserError, match="got -1 and 3"):
        sign_test(-1, 3)
    with pytest.raises(UserError, match="got 1 and 0"):
        mcnemar([True], [])
    with pytest.raises(UserError, match="got 1 and 2"):
        paired_bootstrap([1.0], [1.0, 2.0])
