"""Where the time and the memory of a run go."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from pathlib import Path

import torch
from torch.profiler import record_function

BYTES_PER_MB = 2**20
OTHER = "other"  # time in no phase
_CLOCK: ContextVar[Callable[[], float]] = ContextVar("clock of new timers", default=time.perf_counter)


class PhaseTimer:
    """Adds up wall-clock seconds by phase: `with timer("generate"): ...`.

    Phases may nest, a phase in itself too; the time of the inner one counts for the inner one only, so that the phases
    add up to the time covered. On a GPU both ends of a phase wait for the work queued so far. Not for several threads.
    `annotated`: phases also become named ranges in a trace that is being recorded.
    """

    def __init__(self, device: torch.device | None = None, clock: Callable[[], float] | None = None) -> None:
        """`clock` is what is added up; by default the seconds, or what `measured_by` names."""
        self.annotated = False
        self._device = device
        self._clock = clock or _CLOCK.get()
        self._seconds: dict[str, float] = {}
        self._earlier: dict[str, float] = {}  # of the laps before this one
        self._open_phases: list[str] = []
        self._last_change = self._lap_start = self._clock()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._charge_current()
        self._open_phases.append(phase)
        try:
            with record_function(phase) if self.annotated else nullcontext():
                yield
        finally:
            self._charge_current()
            self._open_phases.pop()

    def seconds(self) -> dict[str, float]:
        """Seconds by phase since the last reset, in order of first use."""
        self._charge_current()
        return dict(self._seconds)

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the last reset, what lay in no phase under `other`, and a reset."""
        lap = self._with_other()
        self.reset()
        return lap

    def totals(self) -> dict[str, float]:
        """Seconds by phase, `other` among them, over all laps."""
        return _summed(self._earlier, self._with_other())

    def add(self, phase: str, seconds: float) -> None:
        """Count time that was measured elsewhere into the totals."""
        self._earlier = _summed(self._earlier, {phase: seconds})

    def reset(self) -> None:
        """Start again from zero; phases that are open go on from here."""
        self._earlier = self.totals()
        self._seconds.clear()
        self._lap_start = self._last_change

    def _with_other(self) -> dict[str, float]:
        self._charge_current()
        other = self._last_change - self._lap_start - sum(self._seconds.values())
        return self._seconds | {OTHER: self._seconds.get(OTHER, 0.0) + max(0.0, other)}

    def _charge_current(self) -> None:
        """Charge the time since the last change to the innermost open phase."""
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = self._clock()
        if self._open_phases:
            phase = self._open_phases[-1]
            self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last_change
        self._last_change = now


@contextmanager
def measured_by(clock: Callable[[], float]) -> Iterator[None]:
    """Timers made inside the block add up this instead of seconds: anything that only grows, such as a count."""
    token = _CLOCK.set(clock)
    try:
        yield
    finally:
        _CLOCK.reset(token)


def where_time_went(seconds: Mapping[str, float]) -> str:
    """Phases by what they took, the longest first: `12.0 s: update 9.0 s (75%), load 3.0 s (25%)`."""
    total = sum(seconds.values())
    parts = [
        f"{phase} {value:.1f} s ({value / total:.0%})"
        for phase, value in sorted(seconds.items(), key=lambda item: -item[1])
        if total > 0 and value >= total / 1000
    ]
    return f"{total:.1f} s: {', '.join(parts) or 'nothing was measured'}"


def _summed(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    return {name: first.get(name, 0.0) + second.get(name, 0.0) for name in dict.fromkeys([*first, *second])}


def padding_share(num_tokens: int, num_through: int) -> float:
    """Share of padding among the tokens that went through a model, all but `num_tokens`; 0 where none did."""
    return 1 - num_tokens / num_through if num_through > 0 else 0.0


def per_second(count: float, seconds: float) -> float:
    """A rate such as tokens per second; 0 when no time has passed."""
    return count / seconds if seconds > 0 else 0.0


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_mb` start again from what is in use now (on Linux and CUDA; elsewhere the peak is for life)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # Other systems and some containers do not allow it: there the peak stays that of the whole process.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: torch.device) -> float:
    """Most memory in use so far in MiB: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / BYTES_PER_MB
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / BYTES_PER_MB
    return peak_resident_mb()


def peak_resident_mb() -> float:
    """Most memory of this process that was in the machine's own memory at once, in MiB, whatever the device."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return _peak_resident_mb()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) / 1024 if found else _peak_resident_mb()


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Peaks so far for a line of the log: of the device, of this process, and of what a GPU's allocator holds."""
    metrics = {"memory/peak_mb": peak_memory_mb(device), "memory/peak_rss_mb": peak_resident_mb()}
    if device.type == "cuda":
        metrics["memory/peak_reserved_mb"] = torch.cuda.max_memory_reserved(device) / BYTES_PER_MB
    return metrics


def memory_used(device: torch.device) -> str:
    """The peaks so far in words."""
    process = f"{peak_resident_mb():.0f} MB"
    if device.type == "cpu":
        return f"peak memory {process}"
    return f"peak memory {peak_memory_mb(device):.0f} MB on the device, {process} in the process"


def _peak_resident_mb() -> float:
    """Peak resident memory where there is no /proc; 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / BYTES_PER_MB  # macOS counts bytes
