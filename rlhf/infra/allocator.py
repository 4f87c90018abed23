"""Memory that was freed goes back to the system: what keeps a large model's run from holding half as much again.

The C library's allocator serves blocks up to a threshold from one heap, which can shrink only at its end. The threshold
rises by itself to 32 MiB, above most activations; a few small tensors that live on, gradients and optimizer state, then
hold the memory of all that was freed between them. Measured on a model of 149 M parameters: 2.5 GB instead of 1.7.
"""

from __future__ import annotations

import ctypes
import platform

# Models below this size are made of blocks that are below the threshold anyway, and asking the system for each block
# would cost them a few per cent of their time.
LARGE_MODEL = 128 * 2**20
_M_MMAP_THRESHOLD = -3  # from malloc.h
_THRESHOLD = 2**20


def return_freed_memory(num_bytes_of_model: int) -> bool:
    """Have blocks of 1 MiB and more given back to the system as they are freed; returns whether that is now so.

    Nothing happens for small models, nor where the C library is not glibc.
    """
    if num_bytes_of_model < LARGE_MODEL or platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _THRESHOLD))
