"""Pairwise win-rates against hand counts, and intervals against SciPy and statsmodels."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from rlhf.eval.intervals import (
    mean_interval,
    newcombe_difference,
    newcombe_paired,
    paired_difference,
    paired_ratio,
    wilson,
)
from rlhf.eval.samples import Sample
from rlhf.eval.winrate import compare
from rlhf.infra.errors import UserError

_GOLDEN = Path(__file__).parents[1] / "golden" / "golden.json"


def answer(prompt_id: str, gold: float | None, reward: float | None = None, num_tokens: int = 5) -> Sample:
    return Sample(prompt_id, "p", "facts", "heldout", "r", num_tokens, True, gold=gold, reward=reward)


def test_counts_wins_ties_and_losses_by_prompt() -> None:
    first = [answer("a", 0.9), answer("b", 0.5), answer("c", 0.1), answer("d", 0.8), answer("only-first", 1.0)]
    second = [answer("d", 0.2), answer("c", 0.4), answer("b", 0.5), answer("a", 0.3), answer("unscored", None)]
    found = compare(first, second, names=("ppo", "sft"))
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert found.rate.estimate == 2.5 / 4
    assert found.num_unpaired == 2
    assert (found.first, found.second, found.judge) == ("ppo", "sft", "gold")


def test_a_model_against_itself_is_exactly_one_half() -> None:
    rng = random.Random(0)
    samples = [answer(f"p{i % 50}", rng.random()) for i in range(150)]
    found = compare(samples, samples)
    assert (found.rate.estimate, found.rate.low, found.rate.high) == (0.5, 0.5, 0.5)


def test_swapping_the_models_mirrors_the_rate() -> None:
    rng = random.Random(1)
    first = [answer(f"p{i}", round(rng.random(), 1)) for i in range(80)]
    second = [answer(f"p{i}", round(rng.random(), 1)) for i in range(80)]
    one, two = compare(first, second), compare(second, first)
    assert one.rate.estimate == pytest.approx(1 - two.rate.estimate)
    assert one.rate.low == pytest.approx(1 - two.rate.high)
    assert (one.wins, one.ties, one.losses) == (two.losses, two.ties, two.wins)


def test_several_answers_to_a_prompt_count_once() -> None:
    first = [answer("a", 0.9), answer("a", 0.1), answer("b", 0.0)]
    second = [answer("a", 0.5), answer("a", 0.05), answer("b", 0.7)]
    found = compare(first, second)
    assert (found.wins, found.ties, found.losses) == (3, 0, 2)
    assert found.rate.estimate == pytest.approx((3 / 4 + 0) / 2)
    assert found.rate.num == 2


def test_the_judge_chooses_the_score() -> None:
    first, second = [answer("a", 0.9, -1.0, 8)], [answer("a", 0.1, 2.0, 9)]
    assert compare(first, second, "gold").rate.estimate == 1.0
    assert compare(first, second, "reward").rate.estimate == 0.0
    assert compare(first, second, "brevity").rate.estimate == 1.0


def test_bad_input_is_told_in_a_sentence() -> None:
    with pytest.raises(UserError, match="share no prompt"):
        compare([answer("a", 1.0)], [answer("b", 1.0)])
    with pytest.raises(UserError, match="no judge named 'llm'"):
        compare([answer("a", 1.0)], [answer("a", 1.0)], "llm")


@pytest.mark.parametrize(("successes", "num"), [(64, 100), (0, 20), (20, 20), (1, 3), (399, 400)])
def test_wilson_equals_statsmodels_and_scipy(successes: int, num: int) -> None:
    found = wilson(successes, num)
    assert (found.low, found.high) == pytest.approx(proportion_confint(successes, num, method="wilson"), abs=1e-9)
    scipy_interval = binomtest(successes, num).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((scipy_interval.low, scipy_interval.high), abs=1e-9)


def test_wilson_equals_the_published_value() -> None:
    expected = json.loads(_GOLDEN.read_text(encoding="utf-8"))["expected"]["wilson_64_of_100"]
    found = wilson(64, 100)
    assert [found.low, found.high] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("counts", [(56, 70, 48, 80), (0, 10, 0, 20), (10, 10, 0, 20), (9, 10, 3, 10)])
def test_newcombe_equals_statsmodels(counts: tuple[int, int, int, int]) -> None:
    a, n, b, m = counts
    found = newcombe_difference(wilson(a, n), wilson(b, m))
    assert (found.low, found.high) == pytest.approx(
        confint_proportions_2indep(a, n, b, m, method="newcomb", compare="diff"), abs=1e-9
    )


def test_paired_newcombe_equals_a_direct_calculation() -> None:
    # A 2x2 table with 36 pairs of both, 12 and 2 discordant, 0 of neither: an example of Newcombe's paper.
    first = [True] * 48 + [False] * 2
    second = [True] * 36 + [False] * 12 + [True] * 2
    found = newcombe_paired(first, second)
    low1, high1 = proportion_confint(48, 50, method="wilson")
    low2, high2 = proportion_confint(38, 50, method="wilson")
    phi = (36 * 0 - 12 * 2) / math.sqrt(48 * 2 * 38 * 12)
    below = math.sqrt((0.96 - low1) ** 2 - 2 * phi * (0.96 - low1) * (high2 - 0.76) + (high2 - 0.76) ** 2)
    above = math.sqrt((high1 - 0.96) ** 2 - 2 * phi * (high1 - 0.96) * (0.76 - low2) + (0.76 - low2) ** 2)
    assert found.estimate == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.2 - below, 0.2 + above))
    assert (found.low, found.high) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_paired_newcombe_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        shared = rng.random(120)
        first, second = shared < 0.9, np.where(rng.random(120) < 0.7, shared < 0.8, rng.random(120) < 0.8)
        found = newcombe_paired(list(map(bool, first)), list(map(bool, second)))
        covered += found.low <= 0.1 <= found.high
    assert covered / 400 >= 0.93


def test_agreeing_everywhere_does_not_shrink_to_a_point() -> None:
    always = [True] * 300
    found = newcombe_paired(always, always)
    assert found.estimate == 0.0
    assert found.low < 0 < found.high


def test_bootstrap_of_a_mean_agrees_with_scipy() -> None:
    values = np.random.default_rng(3).gamma(2.0, size=200)
    found = mean_interval(values)
    scipy_found = bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=5).confidence_interval
    spread = scipy_found.high - scipy_found.low
    assert found.estimate == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((scipy_found.low, scipy_found.high), abs=0.06 * spread)


def test_many_values_are_resampled_in_chunks_and_give_the_large_sample_interval() -> None:
    values = np.random.default_rng(4).normal(size=3000)
    found = mean_interval(values)
    half = 1.96 * values.std() / math.sqrt(3000)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)
    assert mean_interval(values) == found
    assert mean_interval(values, seed=1) != found


def test_paired_differences_use_the_pairing() -> None:
    rng = np.random.default_rng(5)
    base = rng.normal(scale=10, size=300)
    better = base + 1 + rng.normal(scale=0.1, size=300)
    found = paired_difference(better, base)
    assert 0.98 < found.low < found.estimate < found.high < 1.02
    with pytest.raises(UserError, match="equally many"):
        paired_difference([1.0], [1.0, 2.0])


def test_relative_change() -> None:
    found = paired_ratio([12.0, 24.0, 36.0], [10.0, 20.0, 30.0])
    assert (found.estimate, found.low, found.high) == pytest.approx((0.2, 0.2, 0.2))
    with pytest.raises(UserError, match="other than zero"):
        paired_ratio([1.0, 2.0], [0.0, 0.0])


def test_one_value_has_no_interval() -> None:
    found = mean_interval([0.7])
    assert found.estimate == 0.7
    assert not found.has_bounds
    with pytest.raises(UserError, match="non-empty"):
        mean_interval([])
    with pytest.raises(UserError, match="num >= 1"):
        wilson(0, 0)
