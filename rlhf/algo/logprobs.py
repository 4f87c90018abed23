"""Log-probabilities and entropies of tokens, from logits or straight from hidden states.

Legend: M positions (any leading shape flattened), V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# The head runs in chunks of at most this many logits: 64 MiB in fp32.
MAX_LOGITS = 16 * 1024 * 1024
# On a CPU the softmax of a chunk is read several times, so it should still lie in the cache; fewer rows than these
# would make slow products.
CPU_CHUNK_ROWS = 256


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
    head: Callable[[Tensor], Tensor],
    hidden_MD: Tensor,
    token_ids_M: Tensor,
    vocab_size: int,
    temperature: float = 1.0,
    *,
    entropy_gradient: bool = True,
) -> TokenStatistics:
    """Log-probabilities and entropies without ever holding (M, V) logits when that would be large.

    `head` maps (m, D) to (m, V), row by row. It runs in chunks of at most `MAX_LOGITS` logits. `entropy_gradient` is
    False where the entropy is only measured, which saves a head product per chunk.
    """
    if _is_frozen(head, hidden_MD):
        return TokenStatistics(*_frozen_head(hidden_MD, token_ids_M, head, temperature, vocab_size, entropy_gradient))

    def of_chunk(hidden_mD: Tensor, ids_m: Tensor) -> tuple[Tensor, Tensor]:
        statistics = statistics_from_logits(head(hidden_mD), ids_m, temperature)
        return statistics.logprobs_M, statistics.entropy_M

    return TokenStatistics(*_in_chunks(of_chunk, hidden_MD, token_ids_M, vocab_size))


def logprobs_from_hidden(
    head: Callable[[Tensor], Tensor], hidden_MD: Tensor, token_ids_M: Tensor, vocab_size: int, temperature: float = 1.0
) -> Tensor:
    """Log-probabilities (M,) alone, in the same chunks: without the entropy's passes over V."""
    if _is_frozen(head, hidden_MD):
        return _frozen_head(hidden_MD, token_ids_M, head, temperature, vocab_size, None)[0]

    def of_chunk(hidden_mD: Tensor, ids_m: Tensor) -> tuple[Tensor]:
        return (token_logprobs(head(hidden_mD), ids_m, temperature=temperature),)

    return _in_chunks(of_chunk, hidden_MD, token_ids_M, vocab_size)[0]


def _frozen_head(
    hidden_MD: Tensor,
    token_ids_M: Tensor,
    head: Callable[[Tensor], Tensor],
    temperature: float,
    vocab_size: int,
    entropy_gradient: bool | None,
) -> tuple[Tensor, Tensor]:
    apply: Any = _FrozenHead.apply
    logprobs_M, entropy_M = apply(hidden_MD, token_ids_M, head, temperature, vocab_size, entropy_gradient)
    return logprobs_M, entropy_M


@dataclass(frozen=True)
class _Chunk:
    """Of m rows: log-probabilities, entropies where wanted, and the slopes of both along the hidden states."""

    logprobs_m: Tensor
    entropy_m: Tensor | None
    slopes_mD: Tensor
    entropy_slopes_mD: Tensor | None


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities and entropies of a head that takes no gradient of its own.

    Every output belongs to one row of hidden states, so its slope with respect to that row can be taken while the
    chunk's logits are at hand: with p the distribution and H its entropy,

        d logprob / d logits = (onehot - p) / temperature
        d entropy / d logits = -p (log p + H) / temperature

    and the head's transpose carries them to (m, D). The backward pass is then one product with a number per row:
    nothing of width V is kept, and nothing is computed twice. With `entropy_gradient` None there is no entropy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        token_ids_M: Tensor,
        head: Callable[[Tensor], Tensor],
        temperature: float,
        vocab_size: int,
        entropy_gradient: bool | None,
    ) -> tuple[Tensor, Tensor | None]:
        size = _chunk_rows(hidden_MD.device, vocab_size)
        parts = []
        for start in range(0, len(hidden_MD), size):
            chunk = hidden_MD[start : start + size], token_ids_M[start : start + size]
            parts.append(_chunk_with_slopes(head, *chunk, temperature, entropy_gradient))
        logprobs_M = torch.cat([part.logprobs_m for part in parts])
        slopes_MD = torch.cat([part.slopes_mD for part in parts])
        entropy_M = _joined([part.entropy_m for part in parts])
        ctx.save_for_backward(slopes_MD, _joined([part.entropy_slopes_mD for part in parts]))
        if entropy_M is not None and not entropy_gradient:
            ctx.mark_non_differentiable(entropy_M)
        return logprobs_M, entropy_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs_M: Tensor, grad_entropy_M: Tensor | None) -> tuple[Tensor | None, ...]:
        slopes_MD, entropy_slopes_MD = ctx.saved_tensors
        grad_hidden_MD = slopes_MD * grad_logprobs_M.unsqueeze(-1).to(slopes_MD.dtype)
        if entropy_slopes_MD is not None and grad_entropy_M is not None:
            grad_hidden_MD.addcmul_(entropy_slopes_MD, grad_entropy_M.unsqueeze(-1).to(slopes_MD.dtype))
        return grad_hidden_MD, None, None, None, None, None


def _chunk_with_slopes(
    head: Callable[[Tensor], Tensor],
    hidden_mD: Tensor,
    ids_m: Tensor,
    temperature: float,
    entropy_gradient: bool | None,
) -> _Chunk:
    """Log-probabilities, entropies, and the slope of each with respect to the hidden states it came from."""
    with torch.enable_grad():
        leaf_mD = hidden_mD.detach().requires_grad_(True)
        logits_mV = head(leaf_mD)
    log_p_mV = _widened(logits_mV.detach(), temperature).log_softmax(dim=-1)
    logprobs_m = log_p_mV.gather(-1, ids_m.unsqueeze(-1)).squeeze(-1)
    entropy_m = entropy_slopes_mD = None
    if entropy_gradient is None:
        p_mV = log_p_mV.exp_()
    else:
        p_mV = log_p_mV.exp()
        entropy_m = -torch.linalg.vecdot(p_mV, log_p_mV)
    if entropy_gradient:
        assert entropy_m is not None
        slopes_mV = log_p_mV.add_(entropy_m.unsqueeze(-1)).mul_(p_mV).div_(-temperature)
        (entropy_slopes_mD,) = torch.autograd.grad(logits_mV, leaf_mD, slopes_mV.to(logits_mV.dtype), retain_graph=True)
    slopes_mV = p_mV.div_(-temperature)
    slopes_mV.scatter_add_(-1, ids_m.unsqueeze(-1), slopes_mV.new_full((len(ids_m), 1), 1 / temperature))
    (slopes_mD,) = torch.autograd.grad(logits_mV, leaf_mD, slopes_mV.to(logits_mV.dtype))
    return _Chunk(logprobs_m, entropy_m, slopes_mD, entropy_slopes_mD)


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _is_frozen(head: Callable[[Tensor], Tensor], hidden_MD: Tensor) -> bool:
    """Whether a gradient is wanted that ends at the hidden states: found by asking the head for one row."""
    if not (torch.is_grad_enabled() and hidden_MD.requires_grad and len(hidden_MD)):
        return False
    return not head(hidden_MD[:1].detach()).requires_grad


def _chunk_rows(device: torch.device, vocab_size: int) -> int:
    rows = max(1, MAX_LOGITS // vocab_size)
    return min(rows, CPU_CHUNK_ROWS) if device.type == "cpu" else rows


def _in_chunks(
    of_chunk: Callable[[Tensor, Tensor], tuple[Tensor, ...]], hidden_MD: Tensor, token_ids_M: Tensor, vocab_size: int
) -> tuple[Tensor, ...]:
    """The chunks one after another and, when a gradient is wanted, again in the backward pass."""
    size = _chunk_rows(hidden_MD.device, vocab_size)
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
