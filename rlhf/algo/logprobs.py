"""Log-probabilities and entropies of tokens, from logits or straight from hidden states.

Legend: M positions (any leading shape flattened), V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Above this many logits at once the head runs in chunks that are recomputed in the backward pass: 64 MiB in fp32.
MAX_LOGITS = 16 * 1024 * 1024


@dataclass(frozen=True)
class TokenStatistics:
    """What one distribution says of the token drawn from it: log-probability and entropy, both (M,), in nats."""

    logprobs_M: Tensor
    entropy_M: Tensor


def token_logprobs(logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token under the logits at its place.

    Args:
        logits: (..., V); `logits[..., t, :]` must already be the distribution of `token_ids[..., t]` (shift before).
        token_ids: (...) long.
        temperature: divides the logits, as in sampling; > 0.

    Returns:
        (...) float32 or wider: half-precision logits are raised first, a log-softmax in bf16 loses two digits.
    """
    wide = _widened(logits, temperature)
    # The library's fused loss: half the passes over V that a log-softmax with a gather makes.
    nll = functional.cross_entropy(wide.reshape(-1, wide.shape[-1]), token_ids.reshape(-1), reduction="none")
    return -nll.view(token_ids.shape)


def entropy_of(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of each distribution: log Z - sum p * logit; shape (...) from logits (..., V)."""
    wide = _widened(logits, temperature)
    return wide.logsumexp(dim=-1) - (wide.softmax(dim=-1) * wide).sum(dim=-1)


def statistics_from_logits(logits_MV: Tensor, token_ids_M: Tensor, temperature: float = 1.0) -> TokenStatistics:
    """Log-probability and entropy from one log-softmax; both (M,)."""
    log_p_MV = _widened(logits_MV, temperature).log_softmax(dim=-1)
    picked_M = log_p_MV.gather(-1, token_ids_M.unsqueeze(-1)).squeeze(-1)
    return TokenStatistics(picked_M, -(log_p_MV.exp() * log_p_MV).sum(dim=-1))


def statistics_from_hidden(
    head: Callable[[Tensor], Tensor], hidden_MD: Tensor, token_ids_M: Tensor, vocab_size: int, temperature: float = 1.0
) -> TokenStatistics:
    """Log-probabilities and entropies without ever holding (M, V) logits when that would be large.

    `head` maps (m, D) to (m, V). Chunks of at most `MAX_LOGITS` logits are computed one after another and, when a
    gradient is wanted, again in the backward pass: memory is one chunk, time one more head product.
    """

    def of_chunk(hidden_mD: Tensor, ids_m: Tensor) -> tuple[Tensor, Tensor]:
        statistics = statistics_from_logits(head(hidden_mD), ids_m, temperature)
        return statistics.logprobs_M, statistics.entropy_M

    return TokenStatistics(*_in_chunks(of_chunk, hidden_MD, token_ids_M, vocab_size))


def logprobs_from_hidden(
    head: Callable[[Tensor], Tensor], hidden_MD: Tensor, token_ids_M: Tensor, vocab_size: int, temperature: float = 1.0
) -> Tensor:
    """Log-probabilities (M,) alone, in the same chunks: without the entropy's passes over V."""

    def of_chunk(hidden_mD: Tensor, ids_m: Tensor) -> tuple[Tensor]:
        return (token_logprobs(head(hidden_mD), ids_m, temperature=temperature),)

    return _in_chunks(of_chunk, hidden_MD, token_ids_M, vocab_size)[0]


def _in_chunks(
    of_chunk: Callable[[Tensor, Tensor], tuple[Tensor, ...]], hidden_MD: Tensor, token_ids_M: Tensor, vocab_size: int
) -> tuple[Tensor, ...]:
    size = max(1, MAX_LOGITS // vocab_size)
    if hidden_MD.shape[0] <= size:
        return of_chunk(hidden_MD, token_ids_M)
    found = []
    for start in range(0, hidden_MD.shape[0], size):
        chunk = hidden_MD[start : start + size], token_ids_M[start : start + size]
        found.append(checkpoint(of_chunk, *chunk, use_reentrant=False) if torch.is_grad_enabled() else of_chunk(*chunk))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _widened(logits: Tensor, temperature: float) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}: score greedy samples at temperature 1")
    wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    return wide if temperature == 1.0 else wide / temperature
