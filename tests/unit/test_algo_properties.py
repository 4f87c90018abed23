"""The algorithms against independent loops, scipy and torch.distributions; their invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.signal import lfilter
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

from rlhf.algo import logprobs as logprobs_module
from rlhf.algo.advantages import gae
from rlhf.algo.kl import KLConfig, KLController, clamped_share, exact_kl, k1, k2, k3
from rlhf.algo.logprobs import (
    entropy_of,
    logprobs_from_hidden,
    statistics_from_hidden,
    statistics_from_logits,
    token_logprobs,
)
from rlhf.algo.masked import masked_mean, masked_sum, masked_var, masked_whiten
from rlhf.algo.ppo_loss import entropy_loss, kl_from_old, policy_loss, value_loss
from rlhf.algo.preference_loss import PairLogRatios, dpo_loss
from rlhf.algo.reward_loss import bradley_terry_loss, compute_preference_loss
from rlhf.algo.sft_loss import sft_loss

LENGTHS = (7, 3, 1, 5)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ragged_mask(width: int = 7) -> Tensor:
    return torch.arange(width) < torch.tensor(LENGTHS).unsqueeze(1)


def padded(values: Tensor, fill: float, columns: int = 3) -> Tensor:
    """Put columns of rubbish behind every row."""
    return torch.nn.functional.pad(values, (0, columns), value=fill)


# ---------------------------------------------------------------- advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.97, 0.8), (1.0, 1.0), (0.9, 0.0)])
def test_gae_is_a_linear_filter_of_the_td_errors_run_backwards(gamma: float, lam: float) -> None:
    rewards, values, mask = random(4, 7, seed=1), random(4, 7, seed=2), ragged_mask()
    result = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(LENGTHS):
        r, v = rewards[row, :length].numpy(), values[row, :length].numpy()
        deltas = r + gamma * np.append(v[1:], 0.0) - v
        expected = lfilter([1.0], [1.0, -gamma * lam], deltas[::-1])[::-1]
        np.testing.assert_allclose(result.advantages_BR[row, :length].numpy(), expected, atol=1e-12)
        np.testing.assert_allclose(result.returns_BR[row, :length].numpy(), expected + v, atol=1e-12)
        assert not result.advantages_BR[row, length:].any()


def test_lambda_one_is_return_minus_value_and_lambda_zero_the_td_error() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, 0.25, 0.125]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert gae(rewards, values, mask, gamma=0.5, lam=1.0).advantages_BR.tolist() == [[2.5, 3.75, 3.875]]
    assert gae(rewards, values, mask, gamma=0.5, lam=1.0).returns_BR.tolist() == [[3.0, 4.0, 4.0]]
    assert gae(rewards, values, mask, gamma=0.5, lam=0.0).advantages_BR.tolist() == [[0.625, 1.8125, 3.875]]


def test_V3_a_cut_off_answer_can_go_on_with_the_value_behind_it() -> None:
    rewards, values = random(4, 7, seed=3), random(4, 7, seed=4)
    behind = torch.tensor([0.7, -0.3, 2.0, 0.0], dtype=torch.float64)
    result = gae(rewards, values, ragged_mask(), gamma=0.9, lam=0.8, bootstrap_values_B=behind)
    for row, length in enumerate(LENGTHS):
        advantage, after = 0.0, float(behind[row])
        for t in reversed(range(length)):
            value = float(values[row, t])
            advantage = float(rewards[row, t]) + 0.9 * after - value + 0.9 * 0.8 * advantage
            after = value
            assert float(result.advantages_BR[row, t]) == pytest.approx(advantage, abs=1e-12)


def test_no_gradient_flows_through_advantages() -> None:
    values = random(4, 7).requires_grad_(True)
    result = gae(random(4, 7, seed=1), values, ragged_mask())
    assert not result.advantages_BR.requires_grad and not result.returns_BR.requires_grad


# ---------------------------------------------------------------- masked reductions


def test_V6_masked_reductions_against_numpy() -> None:
    values, mask = random(4, 7), ragged_mask()
    counted = np.concatenate([values[row, :length].numpy() for row, length in enumerate(LENGTHS)])
    assert float(masked_sum(values, mask)) == pytest.approx(counted.sum())
    assert float(masked_mean(values, mask)) == pytest.approx(counted.mean())
    assert float(masked_var(values, mask)) == pytest.approx(counted.var(ddof=1))
    assert float(masked_var(values, mask, unbiased=False)) == pytest.approx(counted.var())
    whitened = masked_whiten(values, mask)[mask].numpy()
    assert whitened.mean() == pytest.approx(0, abs=1e-12)
    assert whitened.std(ddof=1) == pytest.approx(1, abs=1e-6)


def test_masked_reductions_of_few_values() -> None:
    one = torch.tensor([[False, True, False]])
    values = torch.tensor([[math.nan, 3.0, math.inf]])
    assert float(masked_sum(values, one)) == 3.0
    assert float(masked_var(values, one)) == 0.0
    assert masked_whiten(values, one).tolist() == [[0.0, 0.0, 0.0]]
    assert masked_whiten(values, one, subtract_mean=False).tolist() == [[0.0, 3.0, 0.0]]
    assert float(masked_sum(values, torch.zeros_like(one))) == 0.0
    with pytest.raises(ValueError, match="no position counts"):
        masked_mean(values, torch.zeros_like(one))
    with pytest.raises(ValueError, match="expected a bool mask"):
        masked_mean(values, one.float())


def test_V2_padding_leaves_every_result_bit_for_bit_the_same() -> None:
    ratio, advantages, values, old, returns = (random(4, 7, seed=seed).float() for seed in range(5))
    entropy, mask, count = random(4, 7, seed=5).float().abs(), ragged_mask(), sum(LENGTHS)
    wide_mask = padded(mask, False)
    for fill in (0.0, 1e4, math.nan):
        wide = [padded(tensor, fill) for tensor in (ratio, advantages, values, old, returns, entropy)]
        narrow = [ratio, advantages, values, old, returns, entropy]

        def losses(tensors: list[Tensor], counts: Tensor) -> list[Tensor]:
            r, a, v, o, g, h = tensors
            clipped = [policy_loss(r, a, counts, count), value_loss(v, o, g, counts, count)]
            single = [entropy_loss(h, counts, count), kl_from_old(r, counts, count), masked_var(r, counts)]
            return [part for one in clipped for part in (one.loss, one.clip_fraction)] + single

        for narrow_loss, wide_loss in zip(losses(narrow, mask), losses(wide, wide_mask), strict=True):
            assert torch.equal(narrow_loss, wide_loss)
        assert torch.equal(masked_whiten(wide[1], wide_mask)[:, :7], masked_whiten(advantages, mask))
        with_padding, without = gae(wide[0], wide[2], wide_mask), gae(ratio, values, mask)
        assert torch.equal(with_padding.advantages_BR[:, :7], without.advantages_BR)
        assert torch.equal(with_padding.returns_BR[:, :7], without.returns_BR)
        assert not with_padding.returns_BR[:, 7:].any()


def test_padding_takes_no_gradient_even_where_it_is_not_a_number() -> None:
    ratio = padded(random(4, 7), math.nan).requires_grad_(True)
    policy_loss(ratio, padded(random(4, 7, seed=1), 0.0), padded(ragged_mask(), False), 16).loss.backward()
    assert ratio.grad is not None
    assert ratio.grad.isfinite().all()
    assert not ratio.grad[:, 7:].any()


# ---------------------------------------------------------------- KL


def test_exact_kl_and_entropy_against_torch_distributions() -> None:
    policy, reference = 3 * random(5, 11), 3 * random(5, 11, seed=1)
    expected = kl_divergence(Categorical(logits=policy), Categorical(logits=reference))
    torch.testing.assert_close(exact_kl(policy, reference), expected)
    torch.testing.assert_close(entropy_of(policy), Categorical(logits=policy).entropy())
    assert exact_kl(policy, policy).abs().max() == 0
    assert float(entropy_of(torch.zeros(4))) == pytest.approx(math.log(4))


def test_P7_estimators_have_the_mean_that_their_definition_says() -> None:
    policy, reference = random(9), random(9, seed=1)
    p, log_ratio = policy.softmax(-1), policy.log_softmax(-1) - reference.log_softmax(-1)
    exact = float(exact_kl(policy, reference))
    assert float((p * k1(log_ratio)).sum()) == pytest.approx(exact)
    assert float((p * k3(log_ratio)).sum()) == pytest.approx(exact)
    assert float((p * k2(log_ratio)).sum()) == pytest.approx(0.5 * float((p * log_ratio**2).sum()))
    assert bool((k3(log_ratio) >= 0).all())


def test_P7_k3_stays_finite_for_tokens_far_outside_the_reference() -> None:
    log_ratio = torch.tensor([-1000.0, -21.0, 0.5, 1000.0])
    expected = [math.exp(20) - 1 - 1000, math.exp(20) - 22, math.exp(-0.5) - 0.5, 999.0]
    assert k3(log_ratio).tolist() == pytest.approx(expected)
    assert float(clamped_share(log_ratio, torch.tensor([True, True, True, False]))) == pytest.approx(2 / 3)


def test_early_stop_measure_is_the_kl_of_the_old_policy_from_the_new() -> None:
    old, new = random(9), random(9, seed=1)
    p_old, log_ratio = old.softmax(-1), new.log_softmax(-1) - old.log_softmax(-1)
    # Every token as often as the old policy draws it: the mean over them is the expectation.
    counts = (p_old * 100_000).round().long()
    tokens = log_ratio.repeat_interleave(counts).unsqueeze(0)
    measured = kl_from_old(tokens, torch.ones_like(tokens, dtype=torch.bool), tokens.numel())
    assert float(measured) == pytest.approx(float(exact_kl(old, new)), rel=1e-3)


def test_controllers() -> None:
    fixed = KLController(0.1)
    assert fixed.updated(100.0, 64) == fixed
    named = KLController.from_config(KLConfig(coefficient=0.1, controller="fixed", target=6.0))
    assert named.updated(100.0, 64) == named and named.coefficient == 0.1
    adaptive = KLController(0.1, target=6.0, horizon=1000.0)
    assert adaptive.updated(6.0, 100).coefficient == 0.1
    assert adaptive.updated(1e9, 100).coefficient == pytest.approx(0.1 * 1.02)  # the error is clipped to 0.2
    assert adaptive.updated(0.0, 100).coefficient == pytest.approx(0.1 * 0.98)


# ---------------------------------------------------------------- log-probabilities


def test_token_statistics_against_torch_distributions() -> None:
    logits, tokens = 3 * random(2, 6, 13), torch.arange(12).view(2, 6)
    for temperature in (1.0, 0.7, 2.0):
        distribution = Categorical(logits=logits / temperature)
        torch.testing.assert_close(
            token_logprobs(logits, tokens, temperature=temperature), distribution.log_prob(tokens)
        )
        torch.testing.assert_close(entropy_of(logits, temperature=temperature), distribution.entropy())
        flat = statistics_from_logits(logits.view(12, 13), tokens.view(12), temperature)
        torch.testing.assert_close(flat.logprobs_M, distribution.log_prob(tokens).view(12))
        torch.testing.assert_close(flat.entropy_M, distribution.entropy().view(12))


def test_statistics_from_hidden_states_are_those_of_the_heads_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weights, tokens = random(12, 5), 3 * random(13, 5, seed=1), torch.arange(12)
    for temperature in (1.0, 0.7, 2.0):
        distribution = Categorical(logits=hidden @ weights.T / temperature)
        for limit in (10**6, 5 * 13):
            monkeypatch.setattr(logprobs_module, "MAX_LOGITS", limit)
            both = statistics_from_hidden(lambda h: h @ weights.T, hidden, tokens, 13, temperature)
            alone = logprobs_from_hidden(lambda h: h @ weights.T, hidden, tokens, 13, temperature)
            torch.testing.assert_close(both.logprobs_M, distribution.log_prob(tokens))
            torch.testing.assert_close(both.entropy_M, distribution.entropy())
            torch.testing.assert_close(alone, distribution.log_prob(tokens))


def test_half_precision_logits_are_widened_before_the_softmax() -> None:
    logits = (8 * random(3, 50)).bfloat16()
    measured = token_logprobs(logits, torch.tensor([0, 1, 2]))
    assert measured.dtype == torch.float32
    torch.testing.assert_close(measured, logits.float().log_softmax(-1)[range(3), range(3)])


def test_temperature_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        token_logprobs(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), temperature=0.0)


def test_chunks_give_the_same_values_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, tokens = random(23, 6), torch.arange(23) % 11
    torch.manual_seed(0)
    head = nn.Linear(6, 11).double()

    def results(chunk_rows: int) -> list[Tensor]:
        monkeypatch.setattr(logprobs_module, "MAX_LOGITS", 11 * chunk_rows)
        head.zero_grad()
        leaf = hidden.clone().requires_grad_(True)
        found = statistics_from_hidden(head, leaf, tokens, 11, 0.7)
        (found.logprobs_M.sum() + 0.3 * (found.entropy_M * tokens).sum()).backward()
        assert leaf.grad is not None and head.weight.grad is not None
        with torch.no_grad():
            again = statistics_from_hidden(head, hidden, tokens, 11, 0.7)
        torch.testing.assert_close(again.logprobs_M, found.logprobs_M.detach())
        return [found.logprobs_M.detach(), found.entropy_M.detach(), leaf.grad, head.weight.grad.clone()]

    whole = results(23)
    for rows in (1, 4, 22):
        for one, other in zip(results(rows), whole, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


def test_logits_at_once_never_pass_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs_module, "MAX_LOGITS", 40)
    sizes: list[int] = []

    def head(hidden: Tensor) -> Tensor:
        sizes.append(hidden.shape[0] * 11)
        return hidden.new_zeros(hidden.shape[0], 11)

    found = statistics_from_hidden(head, torch.zeros(10, 2), torch.zeros(10, dtype=torch.long), 11)
    assert sizes == [33, 33, 33, 11]
    assert found.logprobs_M.tolist() == pytest.approx([-math.log(11)] * 10)


# ---------------------------------------------------------------- losses


def test_policy_loss_against_a_loop() -> None:
    ratio, advantages, mask = 0.3 * random(4, 7), random(4, 7, seed=1), ragged_mask()
    total, outside = 0.0, 0
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            rho, a = math.exp(float(ratio[row, t])), float(advantages[row, t])
            total -= min(rho * a, min(max(rho, 0.9), 1.3) * a)
            outside += rho < 0.9 or rho > 1.3
    found = policy_loss(ratio, advantages, mask, 16, clip_low=0.1, clip_high=0.3)
    assert float(found.loss) == pytest.approx(total / 16)
    assert float(found.clip_fraction) == pytest.approx(outside / 16)
    assert outside > 0


def test_a_ratio_beyond_all_bounds_stays_a_number() -> None:
    far = torch.tensor([[1000.0, -1000.0]], dtype=torch.float64)
    mask = torch.ones(1, 2, dtype=torch.bool)
    found = policy_loss(far, torch.tensor([[-1.0, 1.0]]), mask, 1)
    assert float(found.loss) == pytest.approx(math.exp(20) - math.exp(-20), rel=1e-12)
    assert float(found.clip_fraction) == 2.0  # both tokens, divided by the one that the caller counted


def test_losses_of_parts_add_up_to_the_loss_of_the_whole() -> None:
    ratio, advantages, old, returns = (random(4, 7, seed=seed) for seed in range(4))
    mask, count = ragged_mask(), 16

    def losses(rows: slice) -> list[float]:
        part = [tensor[rows] for tensor in (ratio, advantages, old, returns, mask)]
        r, a, o, g, m = part
        found = [policy_loss(r, a, m, count), value_loss(r, o, g, m, count), value_loss(r, o, g, m, count, None)]
        single = [entropy_loss(r, m, count), kl_from_old(r, m, count), sft_loss(r[m], count)]
        return [float(number) for one in found for number in (one.loss, one.clip_fraction)] + [float(x) for x in single]

    first, second, whole = losses(slice(0, 1)), losses(slice(1, 4)), losses(slice(0, 4))
    assert [a + b for a, b in zip(first, second, strict=True)] == pytest.approx(whole)


def test_entropy_loss_is_minus_the_mean_over_the_tokens_counted_by_the_caller() -> None:
    entropy, mask = torch.tensor([[1.0, 2.0, 99.0], [4.0, 99.0, 99.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert float(entropy_loss(entropy, mask, 3)) == pytest.approx(-7 / 3)
    assert float(entropy_loss(entropy, mask, 10)) == pytest.approx(-0.7)


def test_policy_gradient_at_the_start_is_minus_the_advantage() -> None:
    ratio, advantages = torch.zeros(4, 7, dtype=torch.float64, requires_grad=True), random(4, 7)
    policy_loss(ratio, advantages, ragged_mask(), 16).loss.backward()
    torch.testing.assert_close(ratio.grad, torch.where(ragged_mask(), -advantages / 16, 0.0))


def test_value_loss_against_literals() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    values, old, returns = torch.tensor([[1.0, 0.1, -2.0]]), torch.zeros(1, 3), torch.tensor([[2.0, 2.0, 0.0]])
    free = value_loss(values, old, returns, mask, 3, None)
    assert float(free.loss) == pytest.approx(0.5 * (1.0 + 3.61 + 4.0) / 3)
    assert float(free.clip_fraction) == 0.0
    # 1.0 is held at 0.2, which is further from 2; 0.1 is inside the range; -2.0 held at -0.2 would hide its error.
    clipped = value_loss(values, old, returns, mask, 3, 0.2)
    assert float(clipped.loss) == pytest.approx(0.5 * (3.24 + 3.61 + 4.0) / 3)
    assert float(clipped.clip_fraction) == pytest.approx(1 / 3)


def test_preference_losses_against_literals() -> None:
    chosen, rejected = torch.tensor([2.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 0.0], dtype=torch.float64)
    plain = [math.log(1 + math.exp(-2)), math.log(2)]
    assert bradley_terry_loss(chosen, rejected).tolist() == pytest.approx(plain)
    margins = torch.tensor([2.0, 1.0], dtype=torch.float64)
    with_margins = [math.log(2), math.log(1 + math.e)]
    assert bradley_terry_loss(chosen, rejected, margins).tolist() == pytest.approx(with_margins)
    assert dpo_loss(PairLogRatios(chosen, rejected), 1.0).tolist() == pytest.approx(plain)
    far = torch.tensor([-1000.0], dtype=torch.float64)
    assert bradley_terry_loss(far, -far).tolist() == [2000.0]  # no overflow


def test_metrics_of_pairs_against_literals() -> None:
    chosen, rejected = torch.tensor([2.0, 1.0, 0.0, 3.0]), torch.tensor([0.0, 1.0, 1.0, 2.5])
    loss, metrics = compute_preference_loss(chosen, rejected)
    # Differences 2, 0, -1, 0.5: two pairs in order and a tie that counts half.
    expected = sum(math.log(1 + math.exp(-d)) for d in (2, 0, -1, 0.5)) / 4
    assert float(loss) == pytest.approx(expected)
    assert metrics == pytest.approx(
        {"loss": expected, "accuracy": 2.5 / 4, "margin": 0.375, "chosen_reward": 1.5, "rejected_reward": 1.125}
    )
    with_margins, same = compute_preference_loss(chosen, rejected, torch.tensor([1.0, 0.0, 0.0, 2.0]))
    assert float(with_margins) == pytest.approx(sum(math.log(1 + math.exp(-d)) for d in (1, 0, -1, -1.5)) / 4)
    assert same["margin"] == pytest.approx(0.375)  # what the model says, not what was asked of it


def test_sft_loss_does_not_depend_on_the_split() -> None:
    logprobs = random(10)
    whole = sft_loss(logprobs, 10)
    parts = sft_loss(logprobs[:3], 10) + sft_loss(logprobs[3:], 10)
    assert float(parts) == pytest.approx(float(whole))
    assert float(whole) == pytest.approx(-float(logprobs.mean()))
