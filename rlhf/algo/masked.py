"""Reductions over the positions that count.

Every function takes a bool mask of the values' shape, True = counts. Values under a False are never read, so whatever a
padded position holds (zeros, NaN from a softmax over nothing) changes neither the result nor its gradient, and adding
padded columns leaves the result bit for bit the same: the counted values are gathered first, in row order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the counted values; 0 where none counts."""
    return values[mask].sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the counted values.

    Raises:
        ValueError: no value counts, so there is no mean.
    """
    return _counted(values, mask).mean()


def masked_var(values: Tensor, mask: Tensor, *, unbiased: bool = True) -> Tensor:
    """Variance of the counted values: Bessel's correction when `unbiased`, else divided by the count.

    A single counted value has variance 0 under both, where the corrected formula would be 0 / 0.
    """
    counted = _counted(values, mask)
    if counted.numel() == 1:
        return torch.zeros_like(counted[0])
    return counted.var(correction=1 if unbiased else 0)


def masked_whiten(
    values: Tensor, mask: Tensor, *, subtract_mean: bool = True, unbiased: bool = True, epsilon: float = 1e-8
) -> Tensor:
    """Scale the counted values to unit variance; `subtract_mean` says whether they are centred as well.

    Returns values of the input's shape, 0 where the mask is False: (x - mean) / sqrt(var + epsilon), plus the mean
    again when it is not to be subtracted (arXiv:1909.08593 whitens rewards so). OpenAI's code divides by the biased
    variance, TRL's and verl's by the corrected one (`unbiased`, our default).
    """
    mean = masked_mean(values, mask)
    scaled = (values - mean) * torch.rsqrt(masked_var(values, mask, unbiased=unbiased) + epsilon)
    return torch.where(mask, scaled if subtract_mean else scaled + mean, torch.zeros_like(values))


def _counted(values: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool or mask.shape != values.shape:
        raise ValueError(f"expected a bool mask of shape {tuple(values.shape)}, got {mask.dtype} {tuple(mask.shape)}")
    counted = values[mask]
    if counted.numel() == 0:
        raise ValueError("no position counts: the mask is False everywhere")
    return counted
