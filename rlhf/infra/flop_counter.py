"""PyTorch's counter of matrix-product flops, with the products that its own list lacks."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Shape = Sequence[int]


def flop_counter() -> FlopCounterMode:
    """Counts every product as it is carried out: `with flop_counter() as counter: ...; counter.get_total_flops()`.

    Products of (m, k) with (k, n) are 2 m k n; fused attention counts its products, those that it makes a second time
    in the backward pass among them. Kernels of other libraries (4-bit products) are not seen. Slow: every operator
    passes through Python.
    """
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    mapping = {torch.ops.aten.addmm_: _addmm, attention: _attention, attention_backward: _attention_backward}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # see `infra.products`
        mapping[torch.ops.mkldnn._linear_pointwise] = _linear
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


class _NoModules:
    """Stands where the counter tells modules apart: nobody asks, and its hooks refuse `torch.autograd.grad`."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        return


def _addmm(total: Shape, left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(x) * weight[0]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(grad_out: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad_out, query, key, value))  # type: ignore[no-untyped-call]
