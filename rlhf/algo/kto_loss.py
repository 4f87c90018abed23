"""KTO: a loss on single answers with a thumb up or down (arXiv:2402.01306). Legend: B answers, M mismatched pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def kto_kl(log_ratios_M: Tensor) -> Tensor:
    """z_0 = max(0, mean of log pi(y' | x) - log pi_ref(y' | x)), answers y' standing behind the prompts of others; ().

    arXiv:2402.01306 section 4.1: the estimate is biased, but cheap; it takes no gradient and is not below 0. The caller
    hands in the pairs of the whole optimizer step. 0 where there is none.
    """
    if log_ratios_M.numel() == 0:
        return log_ratios_M.new_zeros(())
    return log_ratios_M.detach().mean().clamp(min=0)


def kto_loss(
    log_ratios_B: Tensor,
    desirable_B: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """lambda_y - v(x, y) per answer, (B,), minimised: KTO (arXiv:2402.01306 eq. 8).

    v = lambda_D sigma(beta (h - z_0)) for a desirable answer and lambda_U sigma(beta (z_0 - h)) for an undesirable one,
    h being its summed log-ratio to the reference and z_0 the `kl`. Half the weight at the start. `desirable_B` is bool.
    """
    gain_B = beta * (log_ratios_B - kl)
    desirable = desirable_weight * (1 - torch.sigmoid(gain_B))
    undesirable = undesirable_weight * (1 - torch.sigmoid(-gain_B))
    return torch.where(desirable_B, desirable, undesirable)


def kto_balance(
    num_desirable: int, num_undesirable: int, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> float:
    """lambda_D n_D / (lambda_U n_U), which the paper wants between 1 and 3/2 (arXiv:2402.01306 section 4.2).

    Raises:
        ValueError: one of the two kinds is not there.
    """
    if not num_desirable or not num_undesirable:
        raise ValueError(f"expected answers of both kinds, got {num_desirable} desirable, {num_undesirable} not")
    return desirable_weight * num_desirable / (undesirable_weight * num_undesirable)
