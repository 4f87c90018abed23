"""What the tokens of an answer weigh in the loss of a batch, where that is not the plain mean over all its tokens.

A loss is the sum of w_i * x_t over all counted tokens, divided by their number (`rlhf.algo.ppo_loss`); the functions
here return w (B,) for the B answers at hand, from counts over the whole optimizer step: any split of a batch into
micro-batches has the same weights, and so the same gradient. Three papers, three means:

    token_mean        sum over all tokens / number of all tokens       every token counts the same
    sequence_mean     mean over answers of the mean over their tokens   every answer counts the same
    constant_length   sum over all tokens / (answers * a constant)      a token's weight depends on no answer's length
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def token_mean(lengths_B: Tensor, num_tokens: int | Tensor, num_sequences: int, max_length: int) -> Tensor:
    """1 for every answer: the mean over all tokens of the batch (DAPO, arXiv:2503.14476 section 3.3)."""
    return torch.ones_like(lengths_B, dtype=torch.float32)


def sequence_mean(lengths_B: Tensor, num_tokens: int | Tensor, num_sequences: int, max_length: int) -> Tensor:
    """Of every answer the mean over its own tokens, and the mean of those (GRPO, arXiv:2402.03300 eq. 3).

    A token of a long answer counts less than one of a short answer.
    """
    return num_tokens / (num_sequences * lengths_B).float()


def constant_length(lengths_B: Tensor, num_tokens: int | Tensor, num_sequences: int, max_length: int) -> Tensor:
    """Of every answer the sum over its tokens, divided by `max_length` (Dr. GRPO, arXiv:2503.20783 section 3.2).

    `max_length` is a constant, the longest answer that sampling allows, and scales the loss; with `max_length` 1 it is
    the mean over answers of sums over tokens, in which one answer is one action (RLOO, arXiv:2402.14740).
    """
    return torch.full_like(lengths_B, 1.0, dtype=torch.float32) * num_tokens / (num_sequences * max_length)


LOSS_WEIGHTS: dict[str, Callable[[Tensor, int | Tensor, int, int], Tensor]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant_length": constant_length,
}
