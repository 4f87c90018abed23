"""Dense fp32 products on a CPU, by the library that uses the whole of the processor.

PyTorch hands fp32 products to MKL, which takes AVX-512 on Intel's processors alone: on others that have it, half of
every vector register stays empty. oneDNN, which PyTorch carries for its 16-bit products, asks the processor instead of
its maker; it is reached through the operator that torch's compiler emits. Both compute in fp32 and differ by rounding.
Elsewhere (other formats, devices, makers) these functions are PyTorch's own.

Suffixes: N rows, I in, O out.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

_CPUINFO = Path("/proc/cpuinfo")
_INTEL = "GenuineIntel"


def _leaves_lanes_empty() -> bool:
    """Whether MKL multiplies in half-filled registers here: AVX-512 by another maker than Intel."""
    libraries: tuple[Any, Any] = torch.backends.mkl, torch.backends.mkldnn
    return (
        all(library.is_available() for library in libraries)
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and _maker() not in ("", _INTEL)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _maker() -> str:
    """The processor's maker as it names itself, or nothing."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor().rpartition(" ")[2]
    return next((line.rpartition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


# Asked once: a compiled function takes it for a constant.
BLAS_LEAVES_LANES_EMPTY = _leaves_lanes_empty()
if BLAS_LEAVES_LANES_EMPTY:
    # oneDNN compiles kernels for every shape that it meets and keeps those of the last 1,024 calls that differed: half
    # a gigabyte in a run over rows of many lengths. Those of a pass are some thirty, the same in every layer. It reads
    # this at its first product.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


def product(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x W' + b`` (N, O), outside of autograd; either side may be a transposed view."""
    if not _by_onednn(x_NI, weight_OI):
        return functional.linear(x_NI, weight_OI, bias_O)
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, bias_O, "none", [], "")
    return made


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` for x (..., I): the same gradients, for whatever asks for one."""
    if torch.is_autocast_enabled(x.device.type) or not _by_onednn(x, weight_OI):
        return functional.linear(x, weight_OI, bias_O)
    flat = x.reshape(-1, x.shape[-1])
    of_rows: Any = _Linear.apply if torch.is_grad_enabled() else product
    made: Tensor = of_rows(flat, weight_OI, bias_O).view(*x.shape[:-1], weight_OI.shape[0])
    return made


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and BLAS_LEAVES_LANES_EMPTY
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        # As PyTorch's own: a frozen weight needs no input kept, an input without a gradient no weight.
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x_NI if wants_weight else None, weight_OI if wants_x else None)
        return product(x_NI, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI = ctx.saved_tensors
        grad_x = product(grad_NO, weight_OI.t()) if ctx.needs_input_grad[0] else None
        grad_weight = product(grad_NO.t(), x_NI.t()) if ctx.needs_input_grad[1] else None
        grad_bias = grad_NO.sum(dim=0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias
