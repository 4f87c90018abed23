"""The one-node form of a LoRA layer: values and gradients against the plain expression, and when it is used."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhf.infra import products
from rlhf.models.lora_layer import LoRALinear, _LowRankLinear


def test_gradients_agree_with_finite_differences() -> None:
    torch.manual_seed(0)
    x, down, up = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 4), (2, 4), (3, 2)))
    weight, bias = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, a, b: _LowRankLinear.apply(x, weight, bias, a, b, 1.5), (x, down, up))


@pytest.mark.parametrize("kind", ["linear", "no_bias", "conv1d"])
@pytest.mark.parametrize("input_needs_grad", [True, False])
def test_layer_equals_the_written_out_sum(kind: str, input_needs_grad: bool) -> None:
    torch.manual_seed(1)
    base = Conv1D(5, 6) if kind == "conv1d" else nn.Linear(6, 5, bias=kind == "linear")
    layer = LoRALinear(base, r=2, alpha=3.0)
    nn.init.normal_(layer.B)
    x = torch.randn(2, 4, 6, requires_grad=input_needs_grad)
    wanted_inputs = [layer.A, layer.B, *([x] if input_needs_grad else [])]
    probe = torch.randn(2, 4, 5)
    found = layer(x)
    dense = base.weight if kind == "conv1d" else base.weight.t()
    written_out = x @ dense + (0 if base.bias is None else base.bias) + 1.5 * (x @ layer.A.t()) @ layer.B.t()
    torch.testing.assert_close(found, written_out)
    grads = torch.autograd.grad((found * probe).sum(), wanted_inputs)
    wanted = torch.autograd.grad((written_out * probe).sum(), wanted_inputs)
    for mine, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("is_slow_blas", [True, False])
def test_a_gradient_that_is_one_number_everywhere(monkeypatch: pytest.MonkeyPatch, is_slow_blas: bool) -> None:
    monkeypatch.setattr(products, "BLAS_LEAVES_LANES_EMPTY", is_slow_blas)
    torch.manual_seed(2)
    layer, x = LoRALinear(nn.Linear(6, 5), r=2, alpha=3.0), torch.randn(7, 6, requires_grad=True)
    nn.init.normal_(layer.B)
    written_out = x @ layer.base.weight.t() + layer.base.bias + 1.5 * (x @ layer.A.t()) @ layer.B.t()
    leaves = (x, layer.A, layer.B)
    for mine, theirs in zip(
        torch.autograd.grad(layer(x).sum(), leaves), torch.autograd.grad(written_out.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_the_frozen_weight_is_the_only_one_that_may_be_passed_over() -> None:
    layer = LoRALinear(nn.Linear(4, 3), r=2)
    nn.init.normal_(layer.B)
    layer.base.weight.requires_grad_(True)  # someone trains the base as well: then it must get its gradient
    layer(torch.randn(2, 4)).sum().backward()
    assert layer.base.weight.grad is not None and layer.A.grad is not None
