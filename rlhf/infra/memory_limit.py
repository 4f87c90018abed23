"""How much memory a run may use on this machine, and what the interpreter with its libraries takes of it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf.infra.device import DeviceName

GB = 10**9
# What a limit that is none looks like in cgroup v1: the largest number of whole pages.
_NO_LIMIT = 2**62
# Python with torch, transformers and this package, where the system does not tell.
_TYPICAL_FRAMEWORK = 450_000_000


@dataclass(frozen=True)
class MemoryLimit:
    """Bytes that a run may use in all, and what sets the limit."""

    num_bytes: int
    origin: str


def memory_limit(
    device: DeviceName, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> MemoryLimit | None:
    """The memory of the device (`auto`: the one a run would take); None where this machine has no such device.

    On a CPU it is the main memory, or the limit of the control group (container) where that is lower; `proc` and
    `cgroups` are where the system tells.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" or (device == "auto" and has_cuda):
        if not has_cuda:
            return None
        name = torch.cuda.get_device_name()
        return MemoryLimit(int(torch.cuda.get_device_properties(0).total_memory), f"memory of the {name}")
    if device == "mps" or (device == "auto" and torch.backends.mps.is_available()):
        if not torch.backends.mps.is_available():
            return None
        return MemoryLimit(int(torch.mps.recommended_max_memory()), "memory that Metal recommends to use")
    found = [limit for limit in (_main_memory(proc), _group_limit(proc, cgroups)) if limit is not None]
    return min(found, key=lambda limit: limit.num_bytes) if found else None


def framework_bytes() -> int:
    """Resident memory of this process now: called before any tensor is made, the interpreter and its libraries."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return _TYPICAL_FRAMEWORK
    return pages * os.sysconf("SC_PAGE_SIZE")


def _main_memory(proc: Path) -> MemoryLimit | None:
    try:
        found = re.search(r"^MemTotal:\s+(\d+) kB$", (proc / "meminfo").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return _main_memory_elsewhere()
    return MemoryLimit(1024 * int(found[1]), "main memory") if found else None


def _main_memory_elsewhere() -> MemoryLimit | None:
    """macOS and other Unixes tell it through sysconf, Windows not at all."""
    try:
        return MemoryLimit(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "main memory")
    except (AttributeError, ValueError, OSError):
        return None


def _group_limit(proc: Path, cgroups: Path) -> MemoryLimit | None:
    """The lowest limit on the way from this process's control group to the root, of either version."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = root / path.lstrip("/")
        # Inside a container the path is that of the host and does not exist; the limit then stands at the root.
        for place in (*(f for f in (folder, *folder.parents) if f.is_relative_to(root)), root):
            value = _number(place / name)
            if value is not None and value < _NO_LIMIT:
                limits.append(value)
    return MemoryLimit(min(limits), "limit of the control group (container)") if limits else None


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max" is no limit
        return None
