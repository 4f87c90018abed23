"""The terms of the PPO objective, each a sum over counted tokens divided by `num_tokens`. All are minimised.

Legend: B sequences, R response tokens; masks are bool, True = counts. `num_tokens` is counted by the caller over the
whole optimizer step, so that any split into micro-batches gives the same gradient. `weights_B1` makes another mean of
the mean over tokens (see `rlhf.algo.loss_weights`); None is that mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.algo.kl import MAX_LOG_RATIO, k3
from rlhf.algo.masked import masked_sum


@dataclass(frozen=True)
class ClippedLoss:
    """A loss with the share of counted tokens that its clip acts on."""

    loss: Tensor
    clip_fraction: Tensor


def policy_loss(
    log_ratio_BR: Tensor,
    advantages_BR: Tensor,
    mask_BR: Tensor,
    num_tokens: int | Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    weights_B1: Tensor | None = None,
) -> ClippedLoss:
    """max(-A rho, -A clip(rho, 1 - low, 1 + high)) per token (arXiv:1707.06347 eq. 7, with the sign turned).

    `log_ratio_BR` is log pi - log pi_old and carries the gradient. The clip fraction counts the tokens whose ratio is
    outside the band, whether or not the clipped branch is the one that was taken; each counts once, whatever it weighs.
    """
    ratio = torch.exp(log_ratio_BR.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    per_token = torch.maximum(-advantages_BR * ratio, -advantages_BR * clipped)
    with torch.no_grad():
        outside = (ratio < 1.0 - clip_low) | (ratio > 1.0 + clip_high)
        clip_fraction = masked_sum(outside.float(), mask_BR) / num_tokens
    return ClippedLoss(masked_sum(_weighed(per_token, weights_B1), mask_BR) / num_tokens, clip_fraction)


def value_loss(
    values_BR: Tensor,
    old_values_BR: Tensor,
    returns_BR: Tensor,
    mask_BR: Tensor,
    num_tokens: int | Tensor,
    clip_range: float | None = 0.2,
) -> ClippedLoss:
    """Half the squared error to the returns; with a clip range, the larger of that and of the clipped value's error.

    Taking the larger one keeps the step of the value small without ever hiding an error (arXiv:1506.02438's trust
    region in the form of OpenAI's `lm-human-preferences`). The clip fraction counts where the clipped error is larger.
    """
    error = (values_BR - returns_BR).square()
    if clip_range is None:
        return ClippedLoss(0.5 * masked_sum(error, mask_BR) / num_tokens, torch.zeros_like(error[:0].sum()))
    near = torch.minimum(torch.maximum(values_BR, old_values_BR - clip_range), old_values_BR + clip_range)
    clipped_error = (near - returns_BR).square()
    with torch.no_grad():
        clip_fraction = masked_sum((clipped_error > error).float(), mask_BR) / num_tokens
    return ClippedLoss(0.5 * masked_sum(torch.maximum(error, clipped_error), mask_BR) / num_tokens, clip_fraction)


def entropy_loss(
    entropy_BR: Tensor, mask_BR: Tensor, num_tokens: int | Tensor, weights_B1: Tensor | None = None
) -> Tensor:
    """Minus the mean entropy: minimising it, times a positive coefficient, keeps the policy from collapsing."""
    return -masked_sum(_weighed(entropy_BR, weights_B1), mask_BR) / num_tokens


def reference_kl_loss(
    log_ratio_BR: Tensor,
    mask_BR: Tensor,
    num_tokens: int | Tensor,
    estimator: Callable[[Tensor], Tensor] = k3,
    weights_B1: Tensor | None = None,
) -> Tensor:
    """Mean estimate of KL(pi || pi_ref) per token, to be added to the loss times beta (arXiv:2402.03300 eq. 3 and 4).

    `log_ratio_BR` is log pi - log pi_ref on the sampled tokens and carries the gradient, which for k3 is that of
    KL(pi_ref || pi), for k2 that of KL(pi || pi_ref), and for k1 zero on average (see `rlhf.algo.kl`).
    """
    return masked_sum(_weighed(estimator(log_ratio_BR), weights_B1), mask_BR) / num_tokens


def kl_from_old(log_ratio_BR: Tensor, mask_BR: Tensor, num_tokens: int | Tensor) -> Tensor:
    """Mean k3 estimate of KL(pi_old || pi) on tokens that pi_old sampled: the measure that ends an inner epoch early.

    The samples come from the old policy, so its log-ratio, log pi_old - log pi, is the one k3 is unbiased for.
    """
    with torch.no_grad():
        return masked_sum(k3(-log_ratio_BR), mask_BR) / num_tokens


def _weighed(per_token_BR: Tensor, weights_B1: Tensor | None) -> Tensor:
    return per_token_BR if weights_B1 is None else per_token_BR * weights_B1
