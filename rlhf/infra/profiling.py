"""Where the time and the memory of a run go."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

BYTES_PER_MB = 2**20


class PhaseTimer:
    """Adds up wall-clock seconds by phase: `with timer("generate"): ...`.

    Phases may nest, a phase in itself too; the time of the inner one counts for the inner one only, so that the phases
    add up to the time covered. On a GPU both ends of a phase wait for the work queued so far. Not for several threads.
    """

    def __init__(self, device: torch.device | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device = device
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._open_phases: list[str] = []
        self._last_change = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._charge_current()
        self._open_phases.append(phase)
        try:
            yield
        finally:
            self._charge_current()
            self._open_phases.pop()

    def seconds(self) -> dict[str, float]:
        """Seconds by phase since the last reset, in order of first use."""
        self._charge_current()
        return dict(self._seconds)

    def reset(self) -> None:
        """Start again from zero; phases that are open go on from here."""
        self._charge_current()
        self._seconds.clear()

    def _charge_current(self) -> None:
        """Charge the time since the last change to the innermost open phase."""
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = self._clock()
        if self._open_phases:
            phase = self._open_phases[-1]
            self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last_change
        self._last_change = now


def per_second(count: float, seconds: float) -> float:
    """A rate such as tokens per second; 0 when no time has passed."""
    return count / seconds if seconds > 0 else 0.0


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_mb` start again from what is in use now (on Linux and CUDA; elsewhere the peak is for life)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Other systems and some containers do not allow it: there the peak stays that of the whole process.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: torch.device) -> float:
    """Most memory in use so far in MiB: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / BYTES_PER_MB
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / BYTES_PER_MB
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return _peak_resident_mb()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) / 1024 if found else _peak_resident_mb()


def _peak_resident_mb() -> float:
    """Peak resident memory where there is no /proc; 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / BYTES_PER_MB  # macOS counts bytes


@contextmanager
def profiled_steps(folder: Path | None, num_steps: int = 3) -> Iterator[Callable[[], None]]:
    """Record `num_steps` training steps with torch.profiler; call what it yields after each step.

    The first step is left out as warm-up. The trace, `trace.json` in the folder, opens in chrome://tracing or Perfetto;
    `operators.txt` beside it lists the most expensive operators. Does nothing without a folder.
    """
    if folder is None:
        yield lambda: None
        return
    folder.mkdir(parents=True, exist_ok=True)

    def save(profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(folder / "trace.json"))
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30)
        (folder / "operators.txt").write_text(table, encoding="utf-8")

    schedule = torch.profiler.schedule(wait=0, warmup=1, active=num_steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=save, record_shapes=True) as profiler:
        yield profiler.step
