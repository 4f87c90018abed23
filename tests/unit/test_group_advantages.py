"""Advantages within groups and the means a loss can be: against NumPy, loops, a bandit's gradient, and each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.algo.advantages import (
    GROUP_ADVANTAGES,
    group_centred,
    group_relative,
    has_spread,
    leave_one_out,
    process_advantages,
)
from rlhf.algo.kl import exact_kl, k1, k2, k3
from rlhf.algo.loss_weights import LOSS_WEIGHTS, constant_length, sequence_mean, token_mean
from rlhf.algo.ppo_loss import entropy_loss, policy_loss, reference_kl_loss
from rlhf.rewards.shaping import soft_overlong_penalty

LENGTHS = (7, 3, 1, 5)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.arange(7) < torch.tensor(LENGTHS).unsqueeze(1)


# ---------------------------------------------------------------- advantages


def test_V6_scores_are_divided_by_numpys_deviation_of_the_group() -> None:
    scores = 50 + random(6, 5, seed=1)  # a deviation about zero would be another number
    found = group_relative(scores).numpy()
    for row, group in enumerate(scores.numpy()):
        expected = (group - group.mean()) / (np.std(group, ddof=1) + 1e-6)
        np.testing.assert_allclose(found[row], expected, atol=1e-12)


def test_leave_one_out_by_leaving_each_out() -> None:
    scores = random(3, 4, seed=2)
    found = leave_one_out(scores)
    for row in range(3):
        for place in range(4):
            others = [float(scores[row, other]) for other in range(4) if other != place]
            assert float(found[row, place]) == pytest.approx(float(scores[row, place]) - sum(others) / 3, abs=1e-12)


def test_leave_one_out_is_the_centred_score_times_g_over_g_minus_one() -> None:
    for size in (2, 3, 8):
        scores = random(5, size, seed=size)
        torch.testing.assert_close(leave_one_out(scores), group_centred(scores) * size / (size - 1))


def test_advantages_of_two_answers_by_hand() -> None:
    scores = torch.tensor([[1.0, 0.0]])
    assert group_centred(scores).tolist() == [[0.5, -0.5]]
    assert leave_one_out(scores).tolist() == [[1.0, -1.0]]
    assert group_relative(scores)[0, 0] == pytest.approx(1 / math.sqrt(2), abs=1e-5)


def test_the_expected_gradient_of_a_bandit_is_that_of_its_mean_reward() -> None:
    """Summed over every pair of draws: with the leave-one-out baseline it is the true one, with the mean half of it."""
    logits, values = random(4, seed=3), random(4, seed=4)
    p = logits.softmax(dim=0)
    expected = p * (values - (p * values).sum())  # d/d logits of sum p * value
    for advantage, factor in ((leave_one_out, 1.0), (group_centred, 0.5)):
        found = torch.zeros(4, dtype=torch.float64)
        for first in range(4):
            for second in range(4):
                drawn = torch.tensor([first, second])
                slopes = torch.eye(4, dtype=torch.float64)[drawn] - p  # of log p of each draw
                found += p[first] * p[second] * (advantage(values[drawn].view(1, 2)).view(2, 1) * slopes).mean(dim=0)
        torch.testing.assert_close(found, factor * expected)


@pytest.mark.parametrize("name", GROUP_ADVANTAGES)
def test_V5_equal_scores_have_the_advantage_zero_and_nothing_that_is_not_finite(name: str) -> None:
    equal = torch.tensor([[0.1] * 7, [0.0] * 7, [-3e8] * 7, [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    found = GROUP_ADVANTAGES[name](equal)
    assert not found[:3].any() and bool(found.isfinite().all())
    assert float(found[3, 0]) > 0 > float(found[3, 1])
    assert has_spread(equal).tolist() == [False, False, False, True]


@pytest.mark.parametrize("name", GROUP_ADVANTAGES)
def test_V5_rounding_of_a_scorer_is_no_spread(name: str) -> None:
    """The same answer scored in two batches differs in the last digits; divided by its deviation that would be one."""
    noisy = 0.7 + 2e-7 * random(3, 8, seed=5).float()
    assert not GROUP_ADVANTAGES[name](noisy).any()
    apart = torch.tensor([[0.0, 1e-5], [0.0, 1.1e-5]], dtype=torch.float64)
    assert has_spread(apart).tolist() == [False, True]


@pytest.mark.parametrize("function", [*GROUP_ADVANTAGES.values(), has_spread])
def test_V5_a_group_of_one_is_refused(function) -> None:
    for shape in ((4, 1), (4,)):
        with pytest.raises(ValueError, match="at least 2 answers per prompt, got"):
            function(torch.ones(shape))


@pytest.mark.parametrize("name", GROUP_ADVANTAGES)
def test_groups_do_not_see_each_other_and_sum_to_nothing(name: str) -> None:
    scores = random(6, 4, seed=6)
    found = GROUP_ADVANTAGES[name](scores)
    assert torch.equal(GROUP_ADVANTAGES[name](scores[2:3]), found[2:3])
    torch.testing.assert_close(found.sum(dim=1), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)
    shifted = GROUP_ADVANTAGES[name](scores + 3)
    torch.testing.assert_close(shifted, found)


def looped_process_advantages(rewards: Tensor, ends: Tensor, size: int) -> list[list[float]]:
    found = []
    for row in range(len(rewards)):
        group = range(row // size * size, row // size * size + size)
        steps = [float(rewards[i, t]) for i in group for t in range(rewards.shape[1]) if ends[i, t]]
        mean, deviation = np.mean(steps), np.std(steps, ddof=1)
        row_steps = zip(rewards[row], ends[row], strict=True)
        scaled = [(float(r) - mean) / (deviation + 1e-6) if end else 0.0 for r, end in row_steps]
        found.append([sum(scaled[t:]) for t in range(rewards.shape[1])])
    return found


def test_rewards_of_steps_are_compared_with_all_steps_of_the_group() -> None:
    rewards, ends = random(4, 7, seed=7), (random(4, 7, seed=8) > -0.3) & MASK
    ends[0, 6] = False  # nothing is learnt of what stands behind the last step
    rewards[1, 0], ends[1, 0] = 0.0, True  # a step may be worth nothing, and still counts
    found = process_advantages(rewards, ends, 2)
    expected = torch.tensor(looped_process_advantages(rewards, ends, 2), dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    assert found[0, 6] == 0
    spoilt = torch.where(ends, rewards, 99.0)  # where no step ends there is no reward
    torch.testing.assert_close(process_advantages(spoilt, ends, 2), found)
    torch.testing.assert_close(process_advantages(rewards[2:], ends[2:], 2), found[2:])


def test_steps_without_spread_tell_nothing() -> None:
    ends = torch.zeros(6, 3, dtype=torch.bool)
    ends[0], ends[1, 0], ends[2, 1] = True, True, True  # the last group has no step, the second one of its own
    rewards = torch.where(ends, 0.7, 0.0) + 1e-7 * random(6, 3, seed=9).float()
    found = process_advantages(rewards, ends, 2)
    assert not found.any()
    rewards[0, 0] += 0.1
    found = process_advantages(rewards, ends, 2)
    assert found[0, 0] > found[0, 2] and bool(found.isfinite().all()) and not found[2:].any()


# ---------------------------------------------------------------- means


def loop_mean(name: str, values: Tensor, max_length: int) -> float:
    """The three means of the papers, written as loops over answers and tokens."""
    rows = [[float(values[row, t]) for t in range(length)] for row, length in enumerate(LENGTHS)]
    if name == "token_mean":
        return sum(map(sum, rows)) / sum(LENGTHS)
    if name == "sequence_mean":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(sum(row) / max_length for row in rows) / len(rows)


def weights_of(name: str, rows: Tensor, max_length: int = 9) -> Tensor:
    lengths = torch.tensor(LENGTHS)
    return LOSS_WEIGHTS[name](lengths[rows], int(lengths.sum()), len(LENGTHS), max_length).unsqueeze(1)


@pytest.mark.parametrize("name", LOSS_WEIGHTS)
def test_each_mean_against_loops(name: str) -> None:
    values, everything = random(4, 7, seed=7), torch.arange(4)
    weights = weights_of(name, everything)
    assert float(-entropy_loss(values, MASK, sum(LENGTHS), weights)) == pytest.approx(
        loop_mean(name, values, 9), abs=1e-6
    )
    kl = reference_kl_loss(values, MASK, sum(LENGTHS), k2, weights)
    assert float(kl) == pytest.approx(loop_mean(name, values.square() / 2, 9), abs=1e-6)
    advantages = random(4, 7, seed=8)
    surrogate = torch.maximum(-advantages * values.exp(), -advantages * values.exp().clamp(0.8, 1.2))
    policy = policy_loss(values, advantages, MASK, sum(LENGTHS), weights_B1=weights)
    assert float(policy.loss) == pytest.approx(loop_mean(name, surrogate, 9), abs=1e-5)
    # What is counted is counted once, whatever the mean.
    assert float(policy.clip_fraction) == float(policy_loss(values, advantages, MASK, sum(LENGTHS)).clip_fraction)


def test_token_mean_is_the_loss_without_weights_to_the_last_bit() -> None:
    values, advantages = random(4, 7, seed=9).float(), random(4, 7, seed=10).float()
    weights = weights_of("token_mean", torch.arange(4))
    assert torch.equal(
        policy_loss(values, advantages, MASK, 16, weights_B1=weights).loss,
        policy_loss(values, advantages, MASK, 16).loss,
    )
    assert torch.equal(entropy_loss(values, MASK, 16, weights), entropy_loss(values, MASK, 16))
    assert torch.equal(reference_kl_loss(values, MASK, 16, k3, weights), reference_kl_loss(values, MASK, 16))


@pytest.mark.parametrize("name", LOSS_WEIGHTS)
@pytest.mark.parametrize("parts", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[3], [0], [2], [1]], [[2], [0, 1, 3]]])
def test_O1_any_split_into_micro_batches_has_the_same_gradient(name: str, parts: list[list[int]]) -> None:
    log_ratio, advantages, to_reference = (0.3 * random(4, 7, seed=seed) for seed in (11, 12, 13))

    def gradient(split: list[list[int]]) -> Tensor:
        leaf = log_ratio.clone().requires_grad_(True)
        for rows in split:
            place = torch.tensor(rows)
            weights = weights_of(name, place)
            loss = policy_loss(leaf[place], advantages[place], MASK[place], 16, weights_B1=weights).loss
            kl = reference_kl_loss(leaf[place] + to_reference[place], MASK[place], 16, weights_B1=weights)
            (loss + 0.1 * kl).backward()
        assert leaf.grad is not None
        return leaf.grad

    torch.testing.assert_close(gradient(parts), gradient([[0, 1, 2, 3]]), atol=1e-9, rtol=1e-6)


def test_O9_what_a_token_weighs_in_answers_of_different_length() -> None:
    """By tokens and by a constant a token's gradient does not depend on its answer's length; by sequences it does."""
    lengths = torch.tensor([10, 2])
    assert token_mean(lengths, 12, 2, 20).tolist() == [1.0, 1.0]
    assert constant_length(lengths, 12, 2, 20).tolist() == pytest.approx([0.3, 0.3])
    assert sequence_mean(lengths, 12, 2, 20).tolist() == pytest.approx([0.6, 3.0])
    # With a constant, other answers do not change a token's weight in the end: what multiplies is divided by again.
    for others in (2, 9):
        count = 10 + others
        weight = constant_length(torch.tensor([10, others]), count, 2, 20)[0] / count
        assert float(weight) == pytest.approx(1 / 40)


@pytest.mark.parametrize(("estimator", "forward"), [(k2, True), (k3, False)])
def test_P7_the_gradient_of_the_kl_in_the_loss(estimator, forward: bool) -> None:
    """In expectation over the policy's own draws: k2's is that of KL(pi, ref), k3's that of KL(ref, pi), k1's none."""
    logits, reference = random(5, seed=14), random(5, seed=15)

    def expected_slope(of) -> Tensor:
        leaf = logits.clone().requires_grad_(True)
        log_ratio = leaf.log_softmax(dim=0) - reference.log_softmax(dim=0)
        drawn = logits.softmax(dim=0)  # weights of the draws: nothing flows through sampling
        loss = (drawn * of(log_ratio)).sum()
        loss.backward()
        assert leaf.grad is not None
        return leaf.grad

    leaf = logits.clone().requires_grad_(True)
    (exact_kl(leaf, reference) if forward else exact_kl(reference, leaf)).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(expected_slope(estimator), leaf.grad)
    torch.testing.assert_close(expected_slope(k1), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    mask = torch.ones(1, 5, dtype=torch.bool)
    log_ratio = (logits.log_softmax(0) - reference.log_softmax(0)).view(1, 5)
    assert float(reference_kl_loss(log_ratio, mask, 5, estimator)) == pytest.approx(float(estimator(log_ratio).mean()))


def test_padding_is_read_by_no_term() -> None:
    values = random(4, 7, seed=16).masked_fill(~MASK, math.nan)
    weights = weights_of("sequence_mean", torch.arange(4))
    assert math.isfinite(float(reference_kl_loss(values, MASK, 16, k3, weights)))
    assert math.isfinite(float(entropy_loss(values, MASK, 16, weights)))


# ---------------------------------------------------------------- length


def test_the_soft_penalty_by_cases() -> None:
    lengths = torch.tensor([1, 12, 13, 14, 16, 30])
    assert soft_overlong_penalty(lengths, max_length=16, buffer=4).tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    assert soft_overlong_penalty(torch.tensor([0, 5, 10]), max_length=10, buffer=10).tolist() == [0.0, -0.5, -1.0]
