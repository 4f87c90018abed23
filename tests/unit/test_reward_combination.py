"""Scores of many members, or of many aims, made into one: against literals and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhf.algo.reward_combination import (
    ENSEMBLE_RULES,
    disagreement,
    gated_score,
    lowest_weighted,
    mean_score,
    penalised_score,
    weighted_sum,
    worst_score,
)

# Three members; the second answer is the better one on average, and the one they differ about.
SCORES_KB = torch.tensor([[1.0, 4.0, 0.0], [2.0, 1.0, 0.0], [3.0, 4.0, 0.0]])


def test_the_three_rules_by_hand() -> None:
    assert mean_score(SCORES_KB, 9.0).tolist() == [2.0, 3.0, 0.0]
    assert worst_score(SCORES_KB, 9.0).tolist() == [1.0, 1.0, 0.0]
    # Variances 2/3, 2 and 0, divided by the number of members.
    assert penalised_score(SCORES_KB, 1.5).tolist() == pytest.approx([1.0, 0.0, 0.0])
    assert disagreement(SCORES_KB).tolist() == pytest.approx([(2 / 3) ** 0.5, 2**0.5, 0.0])


def test_against_numpy_over_many_members() -> None:
    scores = torch.randn(7, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    array = scores.numpy()
    np.testing.assert_allclose(ENSEMBLE_RULES["mean"](scores, 0.3), np.mean(array, axis=0))
    np.testing.assert_allclose(ENSEMBLE_RULES["worst"](scores, 0.3), np.min(array, axis=0))
    np.testing.assert_allclose(
        ENSEMBLE_RULES["penalised"](scores, 0.3), np.mean(array, axis=0) - 0.3 * np.var(array, axis=0)
    )
    np.testing.assert_allclose(disagreement(scores), np.std(array, axis=0))


@pytest.mark.parametrize("name", list(ENSEMBLE_RULES))
def test_an_ensemble_of_one_is_its_member(name: str) -> None:
    scores_1B = torch.tensor([[0.5, -2.0]])
    assert ENSEMBLE_RULES[name](scores_1B, 0.7).tolist() == [0.5, -2.0]
    assert disagreement(scores_1B).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", list(ENSEMBLE_RULES))
def test_the_order_of_members_plays_no_part_and_a_shift_of_all_is_a_shift(name: str) -> None:
    rule = ENSEMBLE_RULES[name]
    torch.testing.assert_close(rule(SCORES_KB.flip(0), 0.5), rule(SCORES_KB, 0.5))
    torch.testing.assert_close(rule(SCORES_KB + 3, 0.5), rule(SCORES_KB, 0.5) + 3)


def test_rules_over_several_aims_by_hand() -> None:
    rewards_KB = torch.tensor([[1.0, -1.0, 0.5], [-2.0, 3.0, 0.5]])
    weights_K = torch.tensor([0.75, 0.25])
    assert weighted_sum(rewards_KB, weights_K).tolist() == [0.25, 0.0, 0.5]
    assert lowest_weighted(rewards_KB, weights_K).tolist() == [-0.5, -0.75, 0.125]


def test_the_gate_closes_below_its_threshold_and_where_it_is_told_to() -> None:
    helpful_B, safe_B = torch.tensor([5.0, 5.0, 5.0, 5.0]), torch.tensor([-2.0, -1.0, 1.0, 1.0])
    always_B = torch.tensor([False, False, False, True])
    assert gated_score(helpful_B, safe_B, -1.0, always_B).tolist() == [-2.0, 5.0, 5.0, 1.0]
