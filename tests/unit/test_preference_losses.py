"""Preference losses and KTO against loops over plain floats, and what each promises of its minimum and its start."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.algo.kto_loss import kto_balance, kto_kl, kto_loss
from rlhf.algo.preference_loss import (
    PREFERENCE_LOSSES,
    LossSettings,
    PairLogRatios,
    conservative_dpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    odds_ratio_term,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(chosen: float, rejected: float) -> PairLogRatios:
    return PairLogRatios(torch.tensor([chosen], dtype=torch.float64), torch.tensor([rejected], dtype=torch.float64))


def log_sigma(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def log_odds(mean_logprob: float) -> float:
    p = math.exp(mean_logprob)
    return math.log(p / (1 - p))


# name: one pair's loss from two numbers and beta 0.4, smoothing 0.15, gamma 0.6, written down once more
LOOPS: dict[str, Callable[[float, float], float]] = {
    "sigmoid": lambda c, r: -log_sigma(0.4 * (c - r)),
    "cdpo": lambda c, r: -0.85 * log_sigma(0.4 * (c - r)) - 0.15 * log_sigma(0.4 * (r - c)),
    "robust": lambda c, r: (-0.85 * log_sigma(0.4 * (c - r)) + 0.15 * log_sigma(0.4 * (r - c))) / 0.7,
    "hinge": lambda c, r: max(0.0, 1 - 0.4 * (c - r)),
    "ipo": lambda c, r: (c - r - 1.25) ** 2,
    "ipo_summed": lambda c, r: (c - r - 1.25) ** 2,
    "simpo": lambda c, r: -log_sigma(0.4 * c - 0.4 * r - 0.6),
    "orpo": lambda c, r: -c - 0.4 * log_sigma(log_odds(c) - log_odds(r)),
}
SETTINGS = LossSettings(0.4, label_smoothing=0.15, simpo_gamma=0.6)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_each_loss_against_a_loop(name: str) -> None:
    loss = PREFERENCE_LOSSES[name]
    chosen, rejected = 3 * random(50), 3 * random(50, seed=1)
    if not loss.has_reference:
        chosen, rejected = -chosen.abs() - 1e-3, -rejected.abs() - 1e-3
    expected = [LOOPS[name](c, r) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    found = loss.of(PairLogRatios(chosen, rejected), SETTINGS)
    assert found.shape == (50,) and found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert LOOPS.keys() == PREFERENCE_LOSSES.keys()


def test_the_first_loss_of_a_policy_that_is_its_reference() -> None:
    zero = pair(0.0, 0.0)
    starts = {name: float(PREFERENCE_LOSSES[name].of(zero, SETTINGS)) for name in LOOPS if name not in ("orpo",)}
    ln_2 = pytest.approx(math.log(2))
    assert starts["sigmoid"] == starts["cdpo"] == starts["robust"] == ln_2
    assert starts["hinge"] == 1.0
    assert starts["ipo"] == starts["ipo_summed"] == pytest.approx(1 / (2 * 0.4) ** 2)
    assert float(kto_loss(torch.zeros(1), torch.tensor([True]), torch.zeros(()), 0.4)) == 0.5


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_the_gradient_raises_what_was_chosen_and_lowers_what_was_rejected(name: str) -> None:
    sides = torch.full((2, 6), -1.0, dtype=torch.float64).requires_grad_(True)
    PREFERENCE_LOSSES[name].of(PairLogRatios(sides[0], sides[1]), SETTINGS).sum().backward()
    assert sides.grad is not None
    assert bool((sides.grad[0] < 0).all()) and bool((sides.grad[1] > 0).all())


def test_smoothing_of_nothing_is_dpo() -> None:
    ratios = PairLogRatios(random(9), random(9, seed=1))
    torch.testing.assert_close(conservative_dpo_loss(ratios, 0.3, 0.0), dpo_loss(ratios, 0.3))
    torch.testing.assert_close(robust_dpo_loss(ratios, 0.3, 0.0), dpo_loss(ratios, 0.3))


def test_conservative_dpo_ends_where_the_labels_are_as_sure_as_they_can_be() -> None:
    beta, smoothing = 0.3, 0.1
    margin = torch.tensor([math.log((1 - smoothing) / smoothing) / beta], dtype=torch.float64, requires_grad=True)
    loss = conservative_dpo_loss(PairLogRatios(margin, torch.zeros(1, dtype=torch.float64)), beta, smoothing)
    loss.sum().backward()
    assert margin.grad is not None and float(margin.grad) == pytest.approx(0, abs=1e-15)
    entropy = -smoothing * math.log(smoothing) - (1 - smoothing) * math.log(1 - smoothing)
    assert float(loss.detach()) == pytest.approx(entropy)


def test_robust_dpo_over_flipped_labels_is_dpo_over_the_true_ones() -> None:
    true = PairLogRatios(2 * random(9), 2 * random(9, seed=1))
    flipped = PairLogRatios(true.rejected_B, true.chosen_B)
    mean = 0.8 * robust_dpo_loss(true, 0.3, 0.2) + 0.2 * robust_dpo_loss(flipped, 0.3, 0.2)
    torch.testing.assert_close(mean, dpo_loss(true, 0.3))
    biased = 0.8 * dpo_loss(true, 0.3) + 0.2 * dpo_loss(flipped, 0.3)
    assert float((biased - dpo_loss(true, 0.3)).abs().max()) > 0.01
    torch.testing.assert_close(conservative_dpo_loss(true, 0.3, 0.2), biased)


def test_a_hinge_leaves_pairs_alone_whose_margin_is_wide_enough() -> None:
    margins = torch.tensor([2.4, 2.6, -9.0], dtype=torch.float64, requires_grad=True)
    loss = hinge_loss(PairLogRatios(margins, torch.zeros_like(margins)), 0.4)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.04, 0.0, 4.6])
    assert margins.grad is not None and margins.grad.tolist() == pytest.approx([-0.4, 0.0, -0.4])


def minimum(loss: Callable[[Tensor], Tensor], start: float = 0.0) -> float:
    """The logit theta of an answer with probability sigma(theta) against another, where the loss is lowest."""
    theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(theta)
        value.backward()
        return value

    optimizer.step(closure)
    return float(theta.detach())


def bandit(theta: Tensor, length: int = 1) -> PairLogRatios:
    """Two answers, the first always preferred, of `length` tokens; the reference finds both equally likely."""
    logits = torch.stack([theta, -theta]) / 2
    chosen, rejected = ((logits.log_softmax(0) + math.log(2)) / length).unsqueeze(-1).unbind(0)
    return PairLogRatios(chosen, rejected)


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_o6_ipo_ends_at_its_fixed_point_where_dpo_goes_on(tau: float) -> None:
    summed = minimum(lambda theta: ipo_loss(bandit(theta), tau).sum())
    assert torch.sigmoid(torch.tensor(summed)).item() == pytest.approx(1 / (1 + math.exp(-1 / (2 * tau))), abs=1e-6)
    averaged = minimum(lambda theta: ipo_loss(bandit(theta, length=4), tau).sum())
    assert averaged == pytest.approx(4 * summed, abs=1e-5)
    gradient = torch.tensor(summed, dtype=torch.float64, requires_grad=True)
    dpo_loss(bandit(gradient), tau).sum().backward()
    assert gradient.grad is not None and float(gradient.grad) < -1e-4


def test_simpo_asks_for_a_margin_of_gamma() -> None:
    # At a difference of gamma / beta the loss is that of a coin, and a scale leaves the order of answers alone.
    assert float(simpo_loss(pair(-1.0, -1.5), 2.0, 1.0)) == pytest.approx(math.log(2))
    assert float(simpo_loss(pair(-1.0, -1.0), 2.0, 0.0)) == pytest.approx(math.log(2))
    assert float(simpo_loss(pair(-1.0, -1.5), 2.0, 0.5)) < math.log(2)


def test_orpo_is_imitation_and_a_weighted_odds_ratio() -> None:
    logprobs = PairLogRatios(-random(9).abs() - 0.01, -random(9, seed=1).abs() - 0.01)
    torch.testing.assert_close(orpo_loss(logprobs, 0.0), -logprobs.chosen_B)
    torch.testing.assert_close(orpo_loss(logprobs, 0.7) - orpo_loss(logprobs, 0.2), -0.5 * odds_ratio_term(logprobs))
    assert float(odds_ratio_term(pair(-0.7, -0.7))) == pytest.approx(-math.log(2))
    # Three to one against one to three: the odds ratio is nine.
    assert float(odds_ratio_term(pair(math.log(0.75), math.log(0.25)))) == pytest.approx(-math.log(1 + 1 / 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_stay_numbers_far_out(dtype: torch.dtype) -> None:
    far = torch.tensor([1000.0, -1000.0], dtype=dtype)
    for name, loss in PREFERENCE_LOSSES.items():
        sides = torch.stack([far, -far]) if loss.has_reference else torch.stack([-far.abs(), far.clamp(max=0.0)])
        sides.requires_grad_(True)
        value = loss.of(PairLogRatios(sides[0], sides[1]), SETTINGS)
        value.sum().backward()
        assert sides.grad is not None
        assert bool(value.isfinite().all()) and bool(sides.grad.isfinite().all()), name


def test_orpo_at_certainty_is_finite() -> None:
    """The log-probability of an answer without an alternative is 0 up to rounding, where 1 - p is 0."""
    sides = torch.tensor([[0.0, -1e-9, 0.0, -2.0], [-3.0, -1e-12, 0.0, 0.0]], requires_grad=True)
    value = orpo_loss(PairLogRatios(sides[0], sides[1]), 0.5)
    value.sum().backward()
    assert sides.grad is not None
    assert bool(value.isfinite().all()) and bool(sides.grad.isfinite().all())
    assert float(value[1].detach()) == float(value[2].detach()) == pytest.approx(0.5 * math.log(2))
    assert float(value[3].detach()) > 2 + 0.5 * 10


# ---------------------------------------------------------------- KTO


def test_kto_against_a_loop() -> None:
    ratios, desirable = 3 * random(40), torch.arange(40) % 3 == 0
    kl, beta, up, down = torch.tensor(0.3, dtype=torch.float64), 0.4, 1.5, 0.7
    expected = []
    for ratio, good in zip(ratios.tolist(), desirable.tolist(), strict=True):
        value = 1 / (1 + math.exp(-beta * (ratio - 0.3))) if good else 1 / (1 + math.exp(-beta * (0.3 - ratio)))
        expected.append(up * (1 - value) if good else down * (1 - value))
    found = kto_loss(ratios, desirable, kl, beta, up, down)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    plain = kto_loss(ratios, desirable, kl, beta)
    torch.testing.assert_close(found, torch.where(desirable, up * plain, down * plain))


def test_kto_raises_the_desirable_and_lowers_the_undesirable() -> None:
    ratios = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    kto_loss(ratios, torch.tensor([True, False]), torch.zeros(()), 0.4).sum().backward()
    assert ratios.grad is not None and ratios.grad.tolist() == pytest.approx([-0.1, 0.1])
    # Far above the reference point a desirable answer has gained enough, and far below it an undesirable one lost.
    values = kto_loss(torch.tensor([1000.0, -1000.0]), torch.tensor([True, False]), torch.zeros(()), 0.4)
    assert values.tolist() == [0.0, 0.0]


def test_o7_the_reference_point_is_a_mean_above_zero_without_a_gradient() -> None:
    ratios = torch.tensor([0.5, -0.1, 0.2], requires_grad=True)
    assert float(kto_kl(ratios)) == pytest.approx(0.2)
    assert not kto_kl(ratios).requires_grad
    assert float(kto_kl(-ratios)) == 0.0
    nothing = kto_kl(torch.zeros(0, dtype=torch.float64))
    assert float(nothing) == 0.0 and nothing.shape == () and nothing.dtype == torch.float64


def test_balance_of_labels() -> None:
    assert kto_balance(100, 400, 4.0, 1.0) == 1.0
    assert kto_balance(30, 10, 1.0, 2.0) == 1.5
    assert kto_balance(10, 20) == 0.5
    for counts in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match="expected answers of both kinds"):
            kto_balance(*counts)
