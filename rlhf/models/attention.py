"""Attention for short rows on a CPU: plain products and one softmax where torch's fused kernel is the slower one.

The fused kernel (`sdpa`) is made for long rows. On rows of a few hundred tokens, in bf16 and for the single query of a
decoding step, its set-up costs more than the products. Longer rows go to it all the same: their (T, T) scores would
fill the memory.

Legend: B rows, H heads, Q query positions, K key positions, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

SHORT_ROWS = "short_rows"
# Key positions up to which the scores are written out.
MAX_SHORT = 512


def prefer_short_rows(model: PreTrainedModel) -> None:
    """Take this attention in a model that would run the fused kernel; others have scores of their own kind."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(SHORT_ROWS, attention_forward)
        AttentionMaskInterface.register(SHORT_ROWS, attention_mask)
        model.set_attn_implementation(SHORT_ROWS)


def attention_forward(
    module: nn.Module,
    query_BHQD: Tensor,
    key_BHKD: Tensor,
    value_BHKD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,  # transformers' convention: what one kind of attention does not know, another may
) -> tuple[Tensor, None]:
    """Attend as `sdpa` does; returns (B, Q, H, D). A mask that adds (see `attention_mask`) marks short rows.

    Rows of several answers bring such a mask of their own, at any length; the long ones go to the fused kernel too.
    """
    is_short = attention_mask is not None and attention_mask.is_floating_point() and key_BHKD.shape[-2] <= MAX_SHORT
    if not is_short or dropout > 0:
        return sdpa_attention_forward(
            module, query_BHQD, key_BHKD, value_BHKD, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = query_BHQD.shape[1] // key_BHKD.shape[1]
    key_BHKD, value_BHKD = repeat_kv(key_BHKD, groups), repeat_kv(value_BHKD, groups)
    scaled_BHQD = query_BHQD * (query_BHQD.shape[-1] ** -0.5 if scaling is None else scaling)
    # Scaling the queries and adding in place spare two passes over the scores.
    weights_BHQK = torch.matmul(scaled_BHQD, key_BHKD.transpose(-1, -2)).add_(attention_mask).softmax(dim=-1)
    return torch.matmul(weights_BHQK, value_BHKD).transpose(1, 2), None


def attention_mask(*, kv_length: int, **kwargs: Any) -> Tensor | None:
    """Transformers' mask that adds (0 or the lowest number) for short rows, its boolean one or None for long ones."""
    make = eager_mask if kv_length <= MAX_SHORT else sdpa_mask
    mask: Tensor | None = make(kv_length=kv_length, **kwargs)
    return mask
