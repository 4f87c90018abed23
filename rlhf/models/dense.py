"""A model's own dense layers, multiplied by `infra.products`: classes in place of PyTorch's, with nothing else changed.

Weights, names, hooks and what is saved stay as they are, since each layer remains the object that it was.
"""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf.infra import products
from rlhf.infra.products import linear


class FastLinear(nn.Linear):
    """`nn.Linear` by the faster library."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return linear(x, self.weight, self.bias)


class FastConv1D(Conv1D):  # type: ignore[misc]  # transformers' classes are untyped
    """GPT-2's `Conv1D`, whose weight lies (in, out), by the faster library."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return linear(x, self.weight.t(), self.bias)


_FAST: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FastLinear, Conv1D: FastConv1D}


def is_dense(layer: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether a layer is a plain product, and no kind of its own made out of one (quantised, never called)."""
    return type(layer) in _FAST or type(layer) in _FAST.values()


def use_fast_products(model: nn.Module) -> None:
    """Let the model's dense layers take the faster library, on a machine where there is one."""
    if products.BLAS_LEAVES_LANES_EMPTY:
        for module in model.modules():
            module.__class__ = _FAST.get(type(module), type(module))
