"""From per-token rewards and values to advantages and returns.

Legend: B sequences, R response tokens. Column t of `values_BR` is the value of the state before token t is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Advantages:
    """Advantages and returns, both (B, R), 0 where the mask is False; returns = raw advantage + value."""

    advantages_BR: Tensor
    returns_BR: Tensor


def gae(
    rewards_BR: Tensor,
    values_BR: Tensor,
    mask_BR: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_values_B: Tensor | None = None,
) -> Advantages:
    """Generalised advantage estimation (arXiv:1506.02438 eq. 16) over right-padded responses.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}. After a row's last counted token the
    value is 0 (the answer is over), or `bootstrap_values_B` for rows that were cut off and are to be treated as going
    on. lam = 1 gives return minus value, lam = 0 the TD error. No gradient flows through the result.
    """
    with torch.no_grad():
        num_rows, length = rewards_BR.shape
        after_last = torch.zeros_like(rewards_BR[:, 0]) if bootstrap_values_B is None else bootstrap_values_B
        next_value, next_advantage = after_last, torch.zeros_like(after_last)
        columns = []
        for t in reversed(range(length)):
            counts = mask_BR[:, t]
            delta = rewards_BR[:, t] + gamma * next_value - values_BR[:, t]
            advantage = delta + gamma * lam * next_advantage
            columns.append(torch.where(counts, advantage, torch.zeros_like(advantage)))
            # A padded column hands on what came from its right untouched: the row's end is at its last counted token.
            next_value = torch.where(counts, values_BR[:, t], next_value)
            next_advantage = torch.where(counts, advantage, next_advantage)
        advantages_BR = torch.stack(columns[::-1], dim=1) if columns else rewards_BR.new_zeros(num_rows, 0)
        returns_BR = torch.where(mask_BR, advantages_BR + values_BR, torch.zeros_like(values_BR))
        return Advantages(advantages_BR, returns_BR)
