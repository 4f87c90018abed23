"""Run untrusted Python functions in a separate process, without network and under hard limits.

One worker process (see `sandbox_worker.py`) forks for every job, so hundreds of small jobs take about a second; jobs
that cannot interfere with each other (see `pure_code.py`) share a fork. The worker starts in its own session, in an
empty folder, with an empty environment. A job gets code and call arguments and
gives back values; expected values stay in this process, so code cannot find out or forge a verdict.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import Field

from rlhf.infra.config import Config
from rlhf.infra.errors import UserError
from rlhf.infra.pure_code import cannot_interfere

_WORKER = Path(__file__).with_name("sandbox_worker.py")
# What the parent grants beyond a job's own wall time before it takes the worker itself for lost.
_GRACE_SECONDS = 5.0
_START_SECONDS = 20.0
_JOBS_PER_PROCESS = 50
STATUSES = ("ok", "error", "timeout", "memory", "killed")


class SandboxLimits(Config):
    """What one job may use; a job that goes beyond is ended and the others go on."""

    wall_seconds: float = Field(default=1.0, gt=0, le=600, description="wall-clock time of one job in seconds")
    cpu_seconds: float = Field(default=1.0, gt=0, le=600, description="processor time of one job, in whole seconds")
    memory_mb: int = Field(default=256, ge=64, le=65536, description="address space of one job in MiB")
    output_bytes: int = Field(default=65536, ge=256, le=1 << 26, description="largest result of one job as JSON")
    code_bytes: int = Field(default=65536, ge=1, le=1 << 24, description="longest code and arguments accepted")


@dataclass(frozen=True)
class SandboxJob:
    """Code, the name of the function in it, and one list of JSON-able arguments per call."""

    code: str
    entry: str
    calls: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class CallOutput:
    """What one call gave: a JSON value, or the kind and message of what it raised."""

    value: Any = None
    error: str | None = None


@dataclass(frozen=True)
class SandboxResult:
    """How a job ended, and one output per call when `status` is "ok" (else none).

    `status`: ok (the code was loaded; single calls may still have raised), error (the code could not be loaded, or the
    result was too large), timeout, memory, killed (it ended itself or was ended by a signal without a result).
    """

    status: str
    outputs: tuple[CallOutput, ...] = ()
    detail: str = ""


class Sandbox:
    """Runs jobs one after the other in a worker process that is started on first use and stopped by `close`."""

    def __init__(self, limits: SandboxLimits | None = None) -> None:
        self.limits = limits or SandboxLimits()
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    def run(self, jobs: Sequence[SandboxJob]) -> list[SandboxResult]:
        """Run the jobs and return their results in order; a job never raises here, whatever its code does."""
        with self._lock:
            return self._run_all(jobs)

    @property
    def isolation(self) -> tuple[str, ...]:
        """The layers that hold on this system: "system-call filter" (Linux), "limits", "audit hook", "no network".

        Without the first (macOS) hostile code is hindered by limits and Python's audit events only.
        """
        with self._lock:
            return self._running().layers

    def close(self) -> None:
        """Stop the worker with everything it started; the next `run` starts a new one."""
        with self._lock:
            self._discard()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _run_all(self, jobs: Sequence[SandboxJob]) -> list[SandboxResult]:
        results: dict[int, SandboxResult] = {}
        harmless = [index for index, job in enumerate(jobs) if cannot_interfere(job.code)]
        for start in range(0, len(harmless), _JOBS_PER_PROCESS):
            batch = harmless[start : start + _JOBS_PER_PROCESS]
            together = self._run_together([jobs[index] for index in batch])
            # What ends or floods the shared process (2 ** 10 ** 9, say) is found by running each on its own.
            if len(together) == len(batch):
                results.update(zip(batch, together, strict=True))
        return [results[index] if index in results else self._run_together([job])[0] for index, job in enumerate(jobs)]

    def _run_together(self, jobs: Sequence[SandboxJob]) -> list[SandboxResult]:
        """Run jobs in one process; one result per job, or a single one when the process gave none for each."""
        functions = [[job.code, job.entry, [list(call) for call in job.calls]] for job in jobs]
        frame = json.dumps({"functions": functions, "limits": self.limits.model_dump()}).encode()
        if len(frame) > self.limits.code_bytes:
            return [SandboxResult("error", detail="the code is too large")]
        worker = self._running()
        try:
            ending, data = worker.ask(frame, self.limits.wall_seconds + _GRACE_SECONDS)
        except (OSError, EOFError, TimeoutError) as error:
            self._discard()
            return [SandboxResult("killed", detail=f"the worker was lost: {error}")]
        results = _read_results(ending, data, [len(job.calls) for job in jobs])
        if results[0].status in ("timeout", "killed") and not worker.filtered:
            # Without the filter a job may have left processes behind; they share the worker's process group.
            self._discard()
        return results

    def _running(self) -> _Worker:
        if self._worker is None or not self._worker.usable():
            self._discard()
            self._worker = _Worker()
        return self._worker

    def _discard(self) -> None:
        if self._worker is not None:
            self._worker.stop()
            self._worker = None


class _Worker:
    """One worker process and the framed pipes to it."""

    def __init__(self) -> None:
        folder = tempfile.mkdtemp(prefix="sandbox-")
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _stop_process, self._process, folder, self._owner)
        try:
            self.layers: tuple[str, ...] = tuple(json.loads(self._read_frame(time.monotonic() + _START_SECONDS)))
        except (EOFError, TimeoutError) as error:
            self.stop()
            raise UserError(
                f"The sandbox worker did not start ({error}); expected '{sys.executable} -I -S' to run the standard "
                "library on this machine."
            ) from error
        self.filtered = "system-call filter" in self.layers

    def usable(self) -> bool:
        """Tell whether the worker lives and belongs to this process (a forked copy must start its own)."""
        return self._owner == os.getpid() and self._process.poll() is None

    def ask(self, frame: bytes, seconds: float) -> tuple[str, bytes]:
        """Send one job and return how its process ended and what it wrote."""
        assert self._process.stdin is not None
        self._process.stdin.write(len(frame).to_bytes(4, "big") + frame)
        self._process.stdin.flush()
        deadline = time.monotonic() + seconds
        return self._read_frame(deadline).decode(), self._read_frame(deadline)

    def stop(self) -> None:
        """Kill the worker's process group and remove its folder."""
        self._finalizer()

    def _read_frame(self, deadline: float) -> bytes:
        return self._read(int.from_bytes(self._read(4, deadline), "big"), deadline)

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        data = b""
        while len(data) < size:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("no answer in time")
            chunk = os.read(descriptor, size - len(data))
            if not chunk:
                raise EOFError("it ended")
            data += chunk
        return data


def _stop_process(process: subprocess.Popen[bytes], folder: str, owner: int) -> None:
    if os.getpid() != owner:
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            # A job may still be in the buffer of a dead worker.
            with contextlib.suppress(OSError):
                stream.close()
    shutil.rmtree(folder, ignore_errors=True)


def _read_results(ending: str, data: bytes, num_calls: Sequence[int]) -> list[SandboxResult]:
    if ending == "timeout":
        return [SandboxResult("timeout", detail="the time limit was reached")]
    if ending == "flood":
        return [SandboxResult("error", detail="the output is too large")]
    try:
        # These bytes come from untrusted code: believe nothing about their shape.
        reports = json.loads(data)
        results = [
            SandboxResult(str(report["status"]), tuple(map(_read_output, report["outputs"])), _text(report["detail"]))
            for report in reports
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [SandboxResult("killed", detail=f"no result ({ending})")]
    sizes = [len(result.outputs) for result in results]
    expected = [num if result.status == "ok" else 0 for num, result in zip(num_calls, results, strict=False)]
    if not results or sizes != expected or any(result.status not in ("ok", "error", "memory") for result in results):
        return [SandboxResult("killed", detail=f"no valid result ({ending})")]
    return results


def _read_output(entry: dict[str, Any]) -> CallOutput:
    return CallOutput(error=_text(entry["error"])) if "error" in entry else CallOutput(entry["value"])


def _text(said: str) -> str:
    """What the code said, short and fit to be printed; raises AttributeError or TypeError for what is no text."""
    return said[:200].encode("utf-8", "replace").decode()
