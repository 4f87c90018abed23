"""Reward-model losses on pairs. Legend: B pairs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(chosen_B: Tensor, rejected_B: Tensor, margins_B: Tensor | None = None) -> Tensor:
    """-log sigma(r_chosen - r_rejected - margin) per pair, (B,) (arXiv:2203.02155 eq. 1, arXiv:2307.09288 eq. 2).

    The caller sums and divides by the pairs of the whole optimizer step.
    """
    difference = chosen_B - rejected_B
    return -logsigmoid(difference if margins_B is None else difference - margins_B)


def compute_preference_loss(
    chosen_rewards: Tensor, rejected_rewards: Tensor, margins: Tensor | None = None
) -> tuple[Tensor, dict[str, float]]:
    """Mean Bradley-Terry loss of a batch of pairs, with its accuracy, margin and mean rewards as plain numbers.

    A tie counts as half right: it is what a coin would make of it.
    """
    loss = bradley_terry_loss(chosen_rewards, rejected_rewards, margins).mean()
    with torch.no_grad():
        difference = chosen_rewards - rejected_rewards
        accuracy = (difference > 0).float() + 0.5 * (difference == 0).float()
        metrics = {
            "loss": loss.item(),
            "accuracy": accuracy.mean().item(),
            "margin": difference.mean().item(),
            "chosen_reward": chosen_rewards.mean().item(),
            "rejected_reward": rejected_rewards.mean().item(),
        }
    return loss, metrics
