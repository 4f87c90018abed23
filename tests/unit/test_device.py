from __future__ import annotations

import pytest
import torch

from rlhf.infra.device import autocast, check_dtype, resolve_device, set_num_threads, to_floats, torch_dtype
from rlhf.infra.errors import UserError


def test_auto_prefers_cuda_then_mps_then_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    has = {"cuda": True, "mps": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has["mps"])
    assert resolve_device("auto").type == "cuda"
    has["cuda"] = False
    assert resolve_device("auto").type == "mps"
    has["mps"] = False
    assert resolve_device("auto").type == "cpu"
    assert resolve_device("cpu").type == "cpu"


def test_an_absent_device_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"cuda was asked for.*use device: auto or cpu"):
        resolve_device("cuda")
    with pytest.raises(UserError, match="got 'tpu'"):
        resolve_device("tpu")  # type: ignore[arg-type]


def test_autocast_changes_the_format_of_products_only_when_asked() -> None:
    cpu, a = torch.device("cpu"), torch.ones(2, 2)
    with autocast(cpu, "fp32"):
        assert (a @ a).dtype == torch.float32
    with autocast(cpu, "bf16"):
        assert (a @ a).dtype == torch.bfloat16
    assert torch_dtype("fp16") == torch.float16
    with pytest.raises(UserError, match="fp32, bf16, fp16"):
        torch_dtype("fp8")  # type: ignore[arg-type]


def test_old_cards_are_told_to_use_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UserError, match=r"Tesla T4; use dtype: fp16"):
        check_dtype(torch.device("cuda"), "bf16")
    check_dtype(torch.device("cuda"), "fp16")
    check_dtype(torch.device("cpu"), "bf16")


def test_threads() -> None:
    before = torch.get_num_threads()
    assert set_num_threads(None) == before
    try:
        assert set_num_threads(1) == 1
    finally:
        torch.set_num_threads(before)


def test_scalars_of_all_formats_keep_their_order_and_their_bits() -> None:
    scalars = [
        torch.tensor(0.1),
        torch.tensor(0.1, dtype=torch.float64),
        torch.tensor([0.3]),
        torch.tensor(2**53 - 1),
        torch.tensor(0.1, dtype=torch.bfloat16),
        torch.tensor(True),
        torch.tensor(float("inf")),
    ]
    assert to_floats(scalars) == [float(scalar) for scalar in scalars]
    assert all(type(value) is float for value in to_floats(scalars))
    assert to_floats([]) == []
    with pytest.raises(RuntimeError):
        to_floats([torch.zeros(2)])
