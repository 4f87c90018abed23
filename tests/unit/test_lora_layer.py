"""One LoRA layer: shapes of document 001, arithmetic by hand, precision, and PEFT's layer as the oracle."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhf.models.lora_layer import LoRALinear


def test_001_init_gives_the_paper_shapes() -> None:
    lora = LoRALinear(nn.Linear(4096, 4096), r=16)
    assert lora.A.shape == (16, 4096)
    assert lora.B.shape == (4096, 16)
    assert not lora.B.any()
    assert 0.99 / 64 < lora.A.abs().max() <= 1 / 64  # uniform within 1 / sqrt(4096), as PEFT


def test_001_fresh_layer_equals_its_base_exactly() -> None:
    base = nn.Linear(64, 48)
    lora = LoRALinear(base, r=16)
    x = torch.randn(2, 128, 64)
    assert lora(x).shape == (2, 128, 48)
    assert torch.equal(lora(x), base(x))


def test_forward_by_hand() -> None:
    base = nn.Linear(2, 2, bias=False)
    base.weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    lora = LoRALinear(base, r=1, alpha=3)
    lora.A.data = torch.tensor([[1.0, 1.0]])
    lora.B.data = torch.tensor([[1.0], [-1.0]])
    # base (2, 6); A x = 5; scaling 3 / 1; so + 15 * (1, -1)
    assert lora(torch.tensor([2.0, 3.0])).tolist() == [17.0, -9.0]


def test_conv1d_forward_and_merge_by_hand() -> None:
    base = Conv1D(3, 2)  # three outputs, two inputs, weight stored (in, out)
    base.weight.data = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    lora = LoRALinear(base, r=1, alpha=2)
    lora.A.data = torch.tensor([[1.0, -1.0]])
    lora.B.data = torch.tensor([[1.0], [0.0], [3.0]])
    x = torch.tensor([[4.0, 1.0]])
    assert lora(x).tolist() == [[10.0, 1.0, 26.0]]  # (4, 1, 8) + 2 * 3 * (1, 0, 3)
    lora.merge()
    assert base.weight.tolist() == [[3.0, 0.0, 8.0], [-2.0, 1.0, -6.0]]
    assert lora(x).tolist() == [[10.0, 1.0, 26.0]]


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 2.0), (True, 4.0)])
def test_scaling(use_rslora: bool, scaling: float) -> None:
    lora = LoRALinear(nn.Linear(3, 3), r=4, alpha=8, use_rslora=use_rslora)
    assert lora.settings["default"].scaling == scaling


def test_generation_without_autograd_gives_the_same_bits() -> None:
    lora = LoRALinear(nn.Linear(8, 6), r=2)
    lora.B.data.normal_()
    x = torch.randn(4, 5, 8)
    before = x.clone()
    with torch.no_grad():
        without = lora(x)
    assert torch.equal(without, lora(x))
    assert torch.equal(x, before)


def test_inputs_of_any_rank_and_layout() -> None:
    lora = LoRALinear(nn.Linear(8, 6), r=2)
    lora.B.data.normal_()
    x = torch.randn(5, 4, 8).transpose(0, 1)
    expected = torch.stack([torch.stack([lora(x[i, j]) for j in range(5)]) for i in range(4)])
    torch.testing.assert_close(lora(x), expected)
    assert lora(torch.empty(0, 8)).shape == (0, 6)


def test_dropout_acts_on_the_adapter_only_and_only_in_training() -> None:
    torch.manual_seed(0)
    lora = LoRALinear(nn.Linear(32, 8), r=4, dropout=0.5)
    x = torch.randn(16, 32)
    assert torch.equal(lora.train()(x), lora.base(x))  # B is zero: dropout on the input of the base would show
    lora.B.data.normal_()
    assert not torch.equal(lora(x), lora(x))
    lora.eval()
    assert torch.equal(lora(x), lora(x))
    expected = lora.base(x) + lora.settings["default"].scaling * x @ lora.A.T @ lora.B.T
    torch.testing.assert_close(lora(x), expected)


def test_a_fresh_layer_takes_the_mode_of_its_base() -> None:
    assert LoRALinear(nn.Linear(2, 2).train()).training
    assert not LoRALinear(nn.Linear(2, 2).eval()).training


def test_adapter_stays_fp32_on_a_bf16_base_and_follows_autocast() -> None:
    lora = LoRALinear(nn.Linear(8, 6, dtype=torch.bfloat16), r=2)
    lora.B.data.normal_()
    assert lora.A.dtype == lora.B.dtype == torch.float32
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    out = lora(x)
    assert out.dtype == torch.bfloat16
    exact = lora.base(x).float() + 2 * x.float() @ lora.A.T @ lora.B.T
    assert torch.equal(out, exact.to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = lora(x.float())
        mixed.sum().backward()
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed, out, atol=0.1, rtol=0.02)
    assert lora.A.grad is not None and lora.A.grad.dtype == torch.float32


def test_merging_in_bf16_restores_the_bits_too() -> None:
    lora = LoRALinear(nn.Linear(64, 64, dtype=torch.bfloat16), r=4)
    lora.B.data.normal_()
    before = lora.weight.clone()
    lora.merge()
    assert lora.weight.dtype == torch.bfloat16 and not torch.equal(lora.weight, before)
    lora.unmerge()
    assert torch.equal(lora.weight, before)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_layer_equals_peft(kind: str, dtype: torch.dtype, use_rslora: bool) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is the oracle")
    torch.manual_seed(0)
    base = (nn.Linear(6, 5) if kind == "linear" else Conv1D(5, 6)).to(dtype)
    ours = LoRALinear(copy.deepcopy(base), r=3, alpha=7, use_rslora=use_rslora)
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["0"], use_rslora=use_rslora, fan_in_fan_out=kind == "conv1d"
    )
    theirs = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    ours.B.data.normal_()
    theirs.lora_A["default"].weight.data.copy_(ours.A)
    theirs.lora_B["default"].weight.data.copy_(ours.B)

    x = torch.randn(4, 6, dtype=dtype)
    out, expected = ours(x), theirs(x)
    torch.testing.assert_close(out, expected)
    out.float().square().sum().backward()
    expected.float().square().sum().backward()
    torch.testing.assert_close(ours.A.grad, theirs.lora_A["default"].weight.grad)
    torch.testing.assert_close(ours.B.grad, theirs.lora_B["default"].weight.grad)
    ours.merge()
    theirs.merge()
    torch.testing.assert_close(ours.base.weight, theirs.base_layer.weight)
