"""Where the limit on memory is read from, on made-up systems; and memory that goes back when it is freed."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.infra.allocator import LARGE_MODEL, return_freed_memory
from rlhf.infra.memory_limit import framework_bytes, memory_limit

KB_IN_ALL = 4_000_000


def system(folder: Path, cgroup: str, limits: dict[str, str]) -> tuple[Path, Path]:
    """/proc and /sys/fs/cgroup of a machine with 4 GB; `limits` maps a file of the latter to its content."""
    (folder / "proc" / "self").mkdir(parents=True)
    meminfo = f"MemTotal:        {KB_IN_ALL} kB\nMemFree:          100 kB\n"
    (folder / "proc" / "meminfo").write_text(meminfo)
    (folder / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, content in limits.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder / "proc", folder / "cgroup"


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected"),
    [
        ("0::/\n", {}, 1024 * KB_IN_ALL),
        ("0::/\n", {"memory.max": "max\n"}, 1024 * KB_IN_ALL),
        ("0::/\n", {"memory.max": "1000000000\n"}, 10**9),
        # Limits above the group hold too; the lowest decides.
        ("0::/slice/unit\n", {"slice/unit/memory.max": "3000000000\n", "slice/memory.max": "2000000000\n"}, 2 * 10**9),
        # In a container of version 1 the path is the host's, and the limit stands at the root.
        ("4:memory:/docker/abc\n0::/\n", {"memory/memory.limit_in_bytes": "500000000\n"}, 5 * 10**8),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 1024 * KB_IN_ALL),
        ("4:cpu,memory:/a\n", {"memory/a/memory.limit_in_bytes": "700000000\n"}, 7 * 10**8),
        ("0::/\n", {"memory.max": "9000000000000\n"}, 1024 * KB_IN_ALL),
    ],
)
def test_the_lowest_limit_on_main_memory_counts(
    tmp_path: Path, cgroup: str, limits: dict[str, str], expected: int
) -> None:
    found = memory_limit("cpu", *system(tmp_path, cgroup, limits))
    assert found is not None and found.num_bytes == expected
    assert found.origin.startswith("main memory" if expected == 1024 * KB_IN_ALL else "limit of the control group")


def test_this_machine_has_a_limit_and_this_process_is_below_it() -> None:
    found = memory_limit("cpu")
    assert found is not None and 50 * 10**6 < framework_bytes() < found.num_bytes


PEAK = """
import json, re, sys
import torch
from rlhf.infra.allocator import return_freed_memory
large = sys.argv[1] == "large"
done = return_freed_memory(2**30 if large else 2**20)
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
# 20 MiB blocks with small ones that live on between them; freeing a large block first raises the threshold by itself.
torch.ones(8 * 2**20)
start, kept = resident(), []
for _ in range(3):
    blocks = []
    for _ in range(10):
        blocks.append(torch.ones(5 * 2**20))
        kept.append(torch.ones(2**14))
    del blocks
print(json.dumps({"done": done, "held": resident() - start}))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what it was told here")
def test_freed_blocks_go_back_between_small_ones_that_stay() -> None:
    def held(size: str) -> tuple[bool, float]:
        command = [sys.executable, "-c", PEAK, size]
        told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return told["done"], told["held"]

    done, tight = held("large")
    assert done and tight < 20
    done, loose = held("small")
    assert not done and loose > 60


def test_small_models_are_left_alone() -> None:
    assert return_freed_memory(LARGE_MODEL - 1) is False
