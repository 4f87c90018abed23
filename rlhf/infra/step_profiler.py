"""A trace of chosen steps, by torch.profiler: which operators ran when, on what shapes, and what they allocated.

<run>/profile/
    steps_2-3.trace.json    for https://ui.perfetto.dev or chrome://tracing
    steps_2-3.txt           the costliest operators, by name and by name and shape
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function

from rlhf.infra.durable import disk_errors_named, write_text
from rlhf.infra.profiling import PhaseTimer

ROWS = 30
_NAME_WIDTH, _SHAPES_WIDTH = 48, 72


class StepProfiler:
    """Records the steps `first` to `last` of a run: `with profiler(step): ...` around every step, counted from 1.

    The step before `first` is recorded too and thrown away, since starting up costs time that is not the step's; a run
    that begins (or is taken up) inside the range has no such step. Does nothing without a folder.
    """

    def __init__(
        self,
        folder: Path | None,
        steps: tuple[int, int],
        timer: PhaseTimer,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        """`timer` marks its phases in the trace; `say` is told where the trace is."""
        self.folder, (self.first, self.last) = folder, steps
        self._timer, self._device, self._say = timer, device, say
        self._profiler: profile | None = None
        self._recorded: list[int] = []
        self._last_seen = 0

    @contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        if self.folder is None:
            yield
            return
        self._last_seen = step
        if not self.first - 1 <= step <= self.last:
            yield
            return
        if self._profiler is None:
            self._profiler = self._started(step)
        if step >= self.first:
            self._recorded.append(step)
        with record_function(f"step {step}"):
            yield
        if step == self.last:
            self._stop()
        else:
            self._profiler.step()

    def close(self) -> None:
        """Write down what an error or the end of the run left of the steps asked for; say so where there is nothing."""
        self._stop()
        if self.folder is not None and self._last_seen and not self._recorded:
            self._say(
                f"run.profile_steps asks for steps {self.first} to {self.last}, but none of them ran; "
                f"the last one was {self._last_seen}, so there is no profile"
            )

    def _started(self, step: int) -> profile:
        warm_up = step < self.first
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])
        profiler = profile(
            activities=activities,
            schedule=lambda count: ProfilerAction.WARMUP if warm_up and count == 0 else ProfilerAction.RECORD,
            on_trace_ready=self._write,
            record_shapes=True,
            profile_memory=True,
            acc_events=True,
        )
        profiler.start()
        self._timer.annotated = True
        return profiler

    def _stop(self) -> None:
        if self._profiler is not None:
            self._timer.annotated = False
            profiler, self._profiler = self._profiler, None
            with self._timer("profile"):  # making sense of what was recorded takes longer than the steps
                profiler.stop()

    def _write(self, profiler: profile) -> None:
        assert self.folder is not None
        if not self._recorded:  # the run ended behind the warm-up
            return
        with disk_errors_named(f"the profile in '{self.folder}' could not be written"):
            self._write_to(self.folder, profiler)

    def _write_to(self, folder: Path, profiler: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        place = folder / f"steps_{self._recorded[0]}-{self._recorded[-1]}"
        trace = place.with_suffix(".trace.json")
        aside = trace.with_suffix(".partial")  # a run killed while it writes must not leave half a trace
        profiler.export_chrome_trace(str(aside))
        aside.replace(trace)
        write_text(place.with_suffix(".txt"), costliest_operators(profiler, self._device))
        self._say(f"profile of steps {self._recorded[0]} to {self._recorded[-1]}: {trace} (open it in ui.perfetto.dev)")


def costliest_operators(profiler: profile, device: torch.device) -> str:
    """Two tables by the operators' own time, on the GPU where there is one: by name, and by name and shapes."""
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    tables = []
    for heading, by_shape in (("Costliest operators", False), ("Costliest operators by shapes of their inputs", True)):
        table = profiler.key_averages(group_by_input_shape=by_shape).table(
            sort_by=key,
            row_limit=ROWS,
            max_name_column_width=_NAME_WIDTH,
            max_shapes_column_width=_SHAPES_WIDTH,
        )
        tables.append(f"{heading}, by {key}\n\n{table}\n")
    return "\n".join(tables)
