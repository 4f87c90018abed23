"""Supervised fine-tuning: negative log-likelihood of the tokens that count."""

from __future__ import annotations

from torch import Tensor


def sft_loss(logprobs_M: Tensor, num_tokens: int | Tensor) -> Tensor:
    """-sum log p / num_tokens over the trained tokens.

    `num_tokens` is counted by the caller over the whole optimizer step, so any split into micro-batches has the same
    gradient; a mean per micro-batch would weigh short ones too much.
    """
    return -logprobs_M.sum() / num_tokens
