"""How fast this machine multiplies matrices: the ceiling that a run's own rate is held against."""

from __future__ import annotations

import time

import torch

from rlhf.infra.products import product
from rlhf.infra.profiling import per_second

GIGA = 1e9
# Edge of the square matrices: on a CPU three of them fit its last cache, on a GPU every multiprocessor has work.
EDGE = {"cpu": 1024, "mps": 2048, "cuda": 8192}
LEAST_PRODUCTS = 5


def measure_matmul_rate(
    dtype: torch.dtype, device: torch.device | None = None, *, edge: int | None = None, seconds: float = 1.0
) -> float:
    """GFLOP/s (2 n^3 per product of n x n matrices) of dense products in this format, with PyTorch's threads as set.

    They are made as `rlhf` makes its own (`infra.products`). The fastest product of about `seconds` counts: whatever
    else runs on the machine can only slow one down. A format without arithmetic of its own on this machine is measured
    as it is emulated.
    """
    device = device or torch.device("cpu")
    n = edge or EDGE.get(device.type, 1024)
    generator = torch.Generator().manual_seed(0)  # of its own: measuring must not move a run's random numbers
    left, right = (torch.randn(n, n, generator=generator).to(device, dtype) for _ in range(2))

    def one() -> float:
        started = time.perf_counter()
        product(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter() - started

    one()  # the first call loads kernels and starts threads
    taken: list[float] = []
    while len(taken) < LEAST_PRODUCTS or sum(taken) < seconds:
        taken.append(one())
    return per_second(2 * n**3 / GIGA, min(taken))
