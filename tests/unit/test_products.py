"""Products by either library: the same numbers, gradients and layers, and which machine takes which."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from rlhf.infra import products
from rlhf.infra.products import linear, product
from rlhf.models.dense import FastConv1D, FastLinear, is_dense, use_fast_products

LIBRARIES = ("mkl", "onednn")


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both libraries in turn, whatever the machine would take."""
    if request.param == "onednn" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(products, "BLAS_LEAVES_LANES_EMPTY", request.param == "onednn")
    return str(request.param)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x,
    "a transposed view": lambda x: x.t().contiguous().t(),
    "columns of a wider one": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "every second row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "one number seen everywhere": lambda x: x[:1, :1].expand_as(x),
    "no rows": lambda x: x[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_rows", [1, 7, 64])
def test_product_is_the_sum_over_inputs(library: str, layout: str, num_rows: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = LAYOUTS[layout](torch.randn(num_rows, 12)), torch.randn(9, 12), torch.randn(9)
    wanted = (x.double().unsqueeze(1) * weight.double()).sum(dim=-1)
    torch.testing.assert_close(product(x, weight).double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product(x, weight, bias).double(), wanted + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "no rows"])
def test_either_side_may_lie_in_any_way(library: str, layout: str) -> None:
    """The backward pass multiplies by transposed inputs and by gradients that one number is spread over."""
    torch.manual_seed(0)
    x, weight = torch.randn(7, 12), LAYOUTS[layout](torch.randn(9, 12))
    wanted = (x.double().unsqueeze(1) * weight.double()).sum(dim=-1)
    torch.testing.assert_close(product(x, weight).double(), wanted, rtol=1e-5, atol=1e-5)
    sums = x.double().sum(dim=0).unsqueeze(1).expand(12, 9)
    torch.testing.assert_close(product(x.t(), torch.ones(1, 1).expand(9, 7)).double(), sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (0, 12)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_has_the_gradients_of_torch(library: str, shape: tuple[int, ...], with_bias: bool) -> None:
    torch.manual_seed(1)
    weight = torch.randn(9, 12, requires_grad=True)
    bias = torch.randn(9, requires_grad=True) if with_bias else None
    x = torch.randn(shape, requires_grad=True)
    leaves = [x, weight, *([] if bias is None else [bias])]
    mine, theirs = linear(x, weight, bias), functional.linear(x, weight, bias)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    probe = torch.randn_like(theirs)
    for got, wanted in zip(
        torch.autograd.grad((mine * probe).sum(), leaves),
        torch.autograd.grad((theirs * probe).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_other_formats_and_autocast_are_left_to_torch(library: str) -> None:
    torch.manual_seed(2)
    for dtype in (torch.bfloat16, torch.float64):
        x, weight = torch.randn(5, 12, dtype=dtype), torch.randn(9, 12, dtype=dtype)
        assert torch.equal(linear(x, weight), functional.linear(x, weight))
    x, weight = torch.randn(5, 12), torch.randn(9, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear(x, weight), functional.linear(x, weight))
        assert linear(x, weight).dtype == torch.bfloat16


def kept_bytes(x: Tensor, weight: Tensor) -> int:
    """What `linear` keeps for the backward pass."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear(x, weight)
    return sum(tensor.nbytes for tensor in kept)


def test_only_what_a_gradient_needs_is_kept(library: str) -> None:
    x, weight = torch.randn(50, 12), torch.randn(9, 12)
    asked = {
        (True, False): weight.nbytes,  # a frozen layer
        (False, True): x.nbytes,  # the first one of a model
        (True, True): weight.nbytes + x.nbytes,
        (False, False): 0,
    }
    for (wants_x, wants_weight), num_bytes in asked.items():
        leaves = x.clone().requires_grad_(wants_x), weight.clone().requires_grad_(wants_weight)
        assert kept_bytes(*leaves) == num_bytes
        assert linear(*leaves).requires_grad == (wants_x or wants_weight)
        if any(leaf.requires_grad for leaf in leaves):
            linear(*leaves).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [wants_x, wants_weight]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), Conv1D(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


def test_a_models_layers_stay_what_they_were(library: str) -> None:
    torch.manual_seed(3)
    model = Model()
    nn.init.normal_(model.second.weight)
    x, names = torch.randn(2, 3, 6), list(model.state_dict())
    with torch.no_grad():
        before = model(x)
        use_fast_products(model)
        assert isinstance(model.first, FastLinear) == isinstance(model.second, FastConv1D) == (library == "onednn")
        assert isinstance(model.first, nn.Linear) and isinstance(model.second, Conv1D)
        assert list(model.state_dict()) == names
        for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(same(x), before, rtol=1e-5, atol=1e-5)
    assert is_dense(model.first) and is_dense(model.second)


def test_kinds_made_out_of_a_linear_layer_are_not_taken_for_one() -> None:
    inner = nn.MultiheadAttention(4, 2).out_proj  # reads its weight, is never called
    assert not is_dense(inner)
    model = nn.Sequential(inner)
    use_fast_products(model)
    assert type(model[0]) is type(inner)


@pytest.mark.parametrize(
    ("cpuinfo", "capability", "wanted"),
    [
        ("processor : 0\nvendor_id : AuthenticAMD\n", "AVX512", True),
        ("processor : 0\nvendor_id : AuthenticAMD\n", "AVX2", False),
        ("processor : 0\nvendor_id\t: GenuineIntel\n", "AVX512", False),
        ("processor : 0\n", "AVX512", False),
    ],
)
def test_the_other_library_is_for_avx512_by_other_makers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpuinfo: str, capability: str, wanted: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(products, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products._leaves_lanes_empty() is wanted


def test_where_there_is_no_cpuinfo_the_platform_names_the_maker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_CPUINFO", tmp_path / "missing")
    monkeypatch.setattr("platform.processor", lambda: "AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD")
    assert products._maker() == "AuthenticAMD"
