"""The gradient of every loss, estimator and reduction against central differences, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.algo import logprobs as logprobs_module
from rlhf.algo.kl import exact_kl, k1, k2, k3
from rlhf.algo.kto_loss import kto_kl, kto_loss
from rlhf.algo.logprobs import (
    entropy_of,
    logprobs_from_hidden,
    statistics_from_hidden,
    statistics_from_logits,
    token_logprobs,
)
from rlhf.algo.masked import masked_mean, masked_sum, masked_var, masked_whiten
from rlhf.algo.ppo_loss import entropy_loss, kl_from_old, policy_loss, value_loss
from rlhf.algo.preference_loss import PREFERENCE_LOSSES, LossSettings, PairLogRatios, odds_ratio_term
from rlhf.algo.process_loss import last, minimum, product, step_loss
from rlhf.algo.reward_loss import bradley_terry_loss, compute_preference_loss
from rlhf.algo.sft_loss import sft_loss

MASK = torch.arange(5) < torch.tensor([[5], [2], [3]])
IDS = torch.tensor([[0, 5, 2, 2, 1], [3, 3, 0, 4, 5], [1, 0, 5, 4, 2]])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GRID, SECOND, THIRD = random(3, 5, seed=1), random(3, 5, seed=2), random(3, 5, seed=3)
WEIGHTS = random(6, 4, seed=4)


def slopes(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    """(f(x + h e_i) - f(x - h e_i)) / 2h for every entry, f summed to one number."""
    found = torch.empty_like(at)
    for place in range(at.numel()):
        moved = torch.zeros_like(at).view(-1)
        moved[place] = step
        up, down = (function(at + sign * moved.view_as(at)).sum() for sign in (1, -1))
        found.view(-1)[place] = (up - down) / (2 * step)
    return found


FIVE = torch.arange(1.0, 6.0, dtype=torch.float64)  # every row counts differently


def head(hidden: Tensor) -> Tensor:
    return hidden @ WEIGHTS.T


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "policy_loss": (lambda x: policy_loss(x, GRID, MASK, 10, clip_low=0.1, clip_high=0.3).loss, 0.3 * SECOND),
    "policy_loss at the start": (lambda x: policy_loss(x, GRID, MASK, 10).loss, torch.zeros_like(GRID)),
    "value_loss": (lambda x: value_loss(x, GRID, SECOND, MASK, 10, 0.4).loss, THIRD),
    "value_loss without a clip": (lambda x: value_loss(x, GRID, SECOND, MASK, 10, None).loss, THIRD),
    "entropy_loss": (lambda x: entropy_loss(x, MASK, 10), GRID),
    "entropy_loss of logits": (lambda x: entropy_loss(entropy_of(x), MASK, 10), random(3, 5, 6)),
    "step_loss": (lambda x: step_loss(x, SECOND.sigmoid(), MASK, 10), GRID),
    "minimum": (lambda x: minimum(x, MASK), GRID),
    "product": (lambda x: product(x, MASK), GRID),
    "last": (lambda x: last(x, MASK), GRID),
    "k1": (k1, GRID),
    "k2": (k2, GRID),
    "k3": (k3, GRID),
    "exact_kl": (lambda x: exact_kl(x, random(3, 6, seed=9)), random(3, 6)),
    "exact_kl of the reference": (lambda x: exact_kl(random(3, 6), x), random(3, 6, seed=9)),
    "sft_loss": (lambda x: sft_loss(token_logprobs(x, IDS, temperature=0.8)[MASK], 10), random(3, 5, 6)),
    "statistics_from_logits": (
        lambda x: statistics_from_logits(x, IDS[0], 0.8).logprobs_M + statistics_from_logits(x, IDS[0]).entropy_M,
        random(5, 6),
    ),
    "logprobs_from_hidden": (lambda x: logprobs_from_hidden(head, x, IDS[0], 6, 0.8) * FIVE, random(5, 4)),
    "statistics_from_hidden": (
        lambda x: (found := statistics_from_hidden(head, x, IDS[0], 6, 0.8)).logprobs_M * FIVE + found.entropy_M / FIVE,
        random(5, 4),
    ),
    "bradley_terry_loss": (lambda x: bradley_terry_loss(x[0], x[1], x[2]), GRID),
    "compute_preference_loss": (lambda x: compute_preference_loss(x[0], x[1])[0], GRID),
    **{
        # Log-probabilities per token for those that are defined on them, which are below 0.
        f"{name} preference": (
            lambda x, loss=loss: loss.of(PairLogRatios(x[0], x[1]), LossSettings(0.5, 0.2, 0.7)),
            GRID if loss.has_reference else -GRID.abs() - 0.01,
        )
        for name, loss in PREFERENCE_LOSSES.items()
    },
    "odds_ratio_term": (lambda x: odds_ratio_term(PairLogRatios(x[0], x[1])), -GRID.abs() - 0.01),
    "kto_loss": (lambda x: kto_loss(x[0], MASK[1], torch.tensor(0.3), 0.5, 1.5, 0.7), GRID),
    "masked_sum": (lambda x: masked_sum(x * x, MASK), GRID),
    "masked_mean": (lambda x: masked_mean(x * x, MASK), GRID),
    "masked_var": (lambda x: masked_var(x, MASK), GRID),
    "masked_var, biased": (lambda x: masked_var(x, MASK, unbiased=False), GRID),
    "masked_whiten": (lambda x: masked_whiten(x, MASK) * SECOND, GRID),
    "masked_whiten, mean kept": (lambda x: masked_whiten(x, MASK, subtract_mean=False) * SECOND, GRID),
}


CHUNKED = [(name, 12) for name in FUNCTIONS if "from_hidden" in name]


@pytest.mark.parametrize(("name", "max_logits"), [*((name, 10**6) for name in FUNCTIONS), *CHUNKED])
def test_gradient_equals_central_differences(name: str, max_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs_module, "MAX_LOGITS", max_logits)
    function, at = FUNCTIONS[name]
    leaf = at.clone().requires_grad_(True)
    function(leaf).sum().backward()
    assert leaf.grad is not None and bool(leaf.grad.any())
    torch.testing.assert_close(leaf.grad, slopes(function, at), atol=1e-7, rtol=1e-6)


def test_the_head_takes_its_gradient_too() -> None:
    def loss(weights: Tensor) -> Tensor:
        return logprobs_from_hidden(lambda h: h @ weights.T, random(5, 4), IDS[0], 6)

    leaf = WEIGHTS.clone().requires_grad_(True)
    loss(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, slopes(loss, WEIGHTS), atol=1e-7, rtol=1e-6)


def test_what_only_measures_takes_no_gradient() -> None:
    leaf = GRID.clone().requires_grad_(True)
    assert not kl_from_old(leaf, MASK, 10).requires_grad
    assert not kto_kl(leaf.abs()).requires_grad
    assert not policy_loss(leaf, GRID, MASK, 10).clip_fraction.requires_grad
    assert not value_loss(leaf, GRID, SECOND, MASK, 10).clip_fraction.requires_grad
