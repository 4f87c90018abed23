"""From rewards to advantages: per token with a critic's values (`gae`), per answer or step by comparison in its group.

Legend: B sequences, R response tokens. Column t of `values_BR` is the value of the state before token t is chosen.
N prompts, G answers to each: row n of `scores_NG` is a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Scores of a group that are no further apart than this count as equal: what is between them is the rounding of whoever
# scored, and dividing by the deviation would make advantages of it.
MIN_SPREAD = 1e-5


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


def has_spread(scores_NG: Tensor) -> Tensor:
    """Which groups (N,) have scores that differ, by more than `MIN_SPREAD`: the others say nothing about an answer.

    Raises:
        ValueError: the groups have one answer each, or there are no groups.
    """
    if scores_NG.ndim != 2 or scores_NG.shape[1] < 2:
        raise ValueError(f"expected scores (N, G) of at least 2 answers per prompt, got {tuple(scores_NG.shape)}")
    return scores_NG.amax(dim=1) - scores_NG.amin(dim=1) > MIN_SPREAD


def group_relative(scores_NG: Tensor, *, epsilon: float = 1e-6) -> Tensor:
    """(r - mean) / (deviation + epsilon) within each group (GRPO, arXiv:2402.03300 section 4.1.2); (N, G).

    The deviation has Bessel's correction, as in TRL and verl; verl's epsilon is 1e-6 like ours, TRL's 1e-4. 0 in groups
    without spread.
    """
    centred_NG = group_centred(scores_NG)
    return centred_NG / (scores_NG.std(dim=1, correction=1, keepdim=True) + epsilon)


def leave_one_out(scores_NG: Tensor) -> Tensor:
    """r minus the mean of the others in its group (RLOO, arXiv:2402.14740); (N, G), 0 in groups without spread.

    The same as G / (G - 1) times r minus the mean of all.
    """
    differs_N1 = has_spread(scores_NG).unsqueeze(1)
    others_NG = (scores_NG.sum(dim=1, keepdim=True) - scores_NG) / (scores_NG.shape[1] - 1)
    return torch.where(differs_N1, scores_NG - others_NG, torch.zeros_like(scores_NG))


def group_centred(scores_NG: Tensor) -> Tensor:
    """r minus the mean of its group (Dr. GRPO, arXiv:2503.20783 section 3.2); (N, G), 0 in groups without spread.

    Not divided by the deviation, which would weigh a prompt more the less its answers differ.
    """
    differs_N1 = has_spread(scores_NG).unsqueeze(1)
    centred_NG = scores_NG - scores_NG.mean(dim=1, keepdim=True)
    return torch.where(differs_N1, centred_NG, torch.zeros_like(scores_NG))


def process_advantages(rewards_BR: Tensor, ends_BR: Tensor, group_size: int, *, epsilon: float = 1e-6) -> Tensor:
    """Advantages (B, R) of rewards paid at the ends of steps: GRPO with process supervision (arXiv:2402.03300 4.1.3).

    The rewards of all steps of all answers of a group get mean 0 and deviation 1; a token's advantage is the sum of
    those of the steps that end at it or later. `ends_BR` is True where a step ends; rows are group after group. 0 where
    the steps of a group have no spread (see `has_spread`), and behind the last step.
    """
    steps_NM, ends_NM = (tensor.reshape(-1, group_size * rewards_BR.shape[1]) for tensor in (rewards_BR, ends_BR))
    counts_N1 = ends_NM.sum(dim=1, keepdim=True)
    mean_N1 = torch.where(ends_NM, steps_NM, 0.0).sum(dim=1, keepdim=True) / counts_N1.clamp(min=1)
    centred_NM = torch.where(ends_NM, steps_NM - mean_N1, torch.zeros_like(steps_NM))
    deviation_N1 = (centred_NM.square().sum(dim=1, keepdim=True) / (counts_N1 - 1).clamp(min=1)).sqrt()
    spread_N1 = centred_NM.amax(dim=1, keepdim=True) - centred_NM.amin(dim=1, keepdim=True)
    differs_N1 = (counts_N1 > 1) & (spread_N1 > MIN_SPREAD)
    scaled_NM = torch.where(differs_N1, centred_NM / (deviation_N1 + epsilon), torch.zeros_like(centred_NM))
    return scaled_NM.view_as(rewards_BR).flip(1).cumsum(dim=1).flip(1)


GROUP_ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "group_relative": group_relative,
    "leave_one_out": leave_one_out,
    "group_centred": group_centred,
}
