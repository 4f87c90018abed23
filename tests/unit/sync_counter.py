"""Counts the places where Python waits for a device: on a GPU each of them empties its queue.

Runs on a CPU, where nothing waits but the same calls are made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# A value that Python or the size of a result needs. `item`, `float`, `int` and `bool` all end in the first.
_NEEDS_VALUES = {
    torch.ops.aten._local_scalar_dense.default: "item",
    torch.ops.aten.equal.default: "equal",
    torch.ops.aten.nonzero.default: "nonzero",
    torch.ops.aten.masked_select.default: "masked_select",
}
# What reads memory without an operator of its own.
_READS = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.cpu: "cpu"}


class _Operators(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = _NEEDS_VALUES.get(func)
        if func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            name = "index by mask"
        if name is not None:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _READS:
            self.found[_READS[func]] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_syncs() -> Iterator[Counter[str]]:
    """How often Python waited inside the block, by the call that made it wait."""
    found: Counter[str] = Counter()
    with _Methods(found), _Operators(found):
        yield found
