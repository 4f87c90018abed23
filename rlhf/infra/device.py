"""Which processor a run uses, in which number format, with how many threads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from rlhf.infra.errors import UserError

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
DtypeName = Literal["fp32", "bf16", "fp16"]

_DTYPES: dict[DtypeName, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device_name(text: str) -> DeviceName:
    """The text as the name of a device, present or not. Raises `UserError` for anything else."""
    names: dict[str, DeviceName] = {"auto": "auto", "cpu": "cpu", "cuda": "cuda", "mps": "mps"}
    if text not in names:
        raise UserError(f"device must be auto, cpu, cuda or mps, got '{text}'")
    return names[text]


def resolve_device(name: DeviceName) -> torch.device:
    """The device of that name; `auto` takes CUDA, then MPS, then the CPU. Raises `UserError` for one that is absent."""
    has_cuda = torch.cuda.is_available()
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "mps" if has_mps else "cpu")
    if name not in ("cpu", "cuda", "mps"):
        raise UserError(f"device must be auto, cpu, cuda or mps, got '{name}'")
    if (name == "cuda" and not has_cuda) or (name == "mps" and not has_mps):
        raise UserError(
            f"device: {name} was asked for, but PyTorch finds none on this machine; use device: auto or cpu"
        )
    return torch.device(name)


def torch_dtype(name: DtypeName) -> torch.dtype:
    """The torch dtype behind `fp32`, `bf16` or `fp16`."""
    if name not in _DTYPES:
        raise UserError(f"dtype must be {', '.join(_DTYPES)}, got '{name}'")
    return _DTYPES[name]


def autocast(device: torch.device, dtype_name: DtypeName) -> AbstractContextManager[object]:
    """Context in which matrix products run in that format; does nothing for fp32."""
    dtype = torch_dtype(dtype_name)
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device_type=device.type, dtype=dtype)


def check_dtype(device: torch.device, dtype_name: DtypeName) -> None:
    """Raise `UserError` when the device can only emulate the format (bf16 on NVIDIA cards before Ampere)."""
    needs_bf16 = torch_dtype(dtype_name) == torch.bfloat16
    if needs_bf16 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise UserError(
            f"dtype: bf16 is not supported by {torch.cuda.get_device_name(device)}; use dtype: fp16 or fp32"
        )


def set_num_threads(num_threads: int | None) -> int:
    """Set the CPU threads of PyTorch's operators (None leaves them) and return the number in force."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return torch.get_num_threads()


def to_floats(scalars: Sequence[Tensor]) -> list[float]:
    """The values of one-element tensors. Those of one device and format come over together.

    On a GPU every `float(...)` waits until all that was asked of it before is done; here that is one wait for all.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, scalar in enumerate(scalars):
        groups.setdefault((scalar.device, scalar.dtype), []).append(place)
    values = [0.0] * len(scalars)
    for places in groups.values():
        together = torch.stack([scalars[place].reshape(()) for place in places]).tolist()
        for place, value in zip(places, together, strict=True):
            values[place] = float(value)
    return values
