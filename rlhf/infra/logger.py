"""The record of a run: `logs/train.jsonl` and TensorBoard always, W&B when asked, `logs/train.log` for sentences.

Metric names have a section: `train/loss`, `reward/mean`, `kl/mean`. What depends on the clock or on the machine stands
under `time/`, `rate/` or `memory/` only, so that everything else is equal for equal seeds.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlhf.infra.durable import disk_errors_named, write_text
from rlhf.infra.errors import UserError

Metrics = Mapping[str, float]
_LINE_STEP = re.compile(r"^\S+ \S+ step (\d+) \| ")


class Advance(Protocol):
    """Moves a progress bar on by `n` and shows the named values beside it."""

    def __call__(self, n: int = 1, **shown: float | str) -> None: ...


class MetricSink(Protocol):
    """A further place for metrics; NaN and infinities arrive as they are."""

    def log(self, step: int, metrics: Metrics) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


@functools.cache
def terminal() -> Console:
    """The one console of this process: a progress bar and a printed line do not get into each other's way."""
    return Console(soft_wrap=True, highlight=False)


class RunLogger:
    """Writes the metrics and the sentences of one run.

    `folder` is the run's. With `resume_step` everything that was logged after that step is cut first, and all sentences
    beyond `resume_bytes` of `train.log` where that is known. `console` switches sentences and progress bars on the
    terminal. Raises `UserError` when W&B is asked for but not installed, and when the disk takes no more.
    """

    def __init__(
        self,
        folder: str | Path,
        wandb: bool = False,
        console: bool = True,
        resume_step: int | None = None,
        resume_bytes: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        logs = self.folder / "logs"
        metrics_path, text_path = logs / "train.jsonl", logs / "train.log"
        with self._disk_errors_named():
            logs.mkdir(parents=True, exist_ok=True)
            if resume_step is not None:
                cut_metrics_after(metrics_path, resume_step)
                cut_text_after(text_path, resume_step, resume_bytes)
            self.last_step = resume_step or 0
            self._sinks: list[MetricSink] = [TensorBoardSink(self.folder / "tb", resume_step)]
            if wandb:
                self._sinks.append(WandbSink(self.folder))
            self._metrics_file = metrics_path.open("a", encoding="utf-8")
            self._text_file = text_path.open("a", encoding="utf-8")
        self._to_console = console
        self._progress: Progress | None = None

    def log(self, step: int, metrics: Metrics) -> None:
        """Record the metrics of a step, once per step and in rising order; a kill after this loses nothing of them."""
        row = {"step": step} | {name: _json_number(value) for name, value in metrics.items()}
        with self._disk_errors_named():
            self._metrics_file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            self._metrics_file.flush()
            self.last_step = step
            for sink in self._sinks:
                sink.log(step, metrics)

    def info(self, text: str) -> None:
        """Record a sentence in `logs/train.log` with the time and the last logged step, and show it."""
        moment = datetime.now().isoformat(sep=" ", timespec="seconds")
        with self._disk_errors_named():
            for line in text.splitlines() or [""]:
                self._text_file.write(f"{moment} step {self.last_step} | {line}\n")
            self._text_file.flush()
        if self._to_console:
            terminal().print(text, markup=False)

    def sync(self) -> int:
        """Wait until all that was logged is on the disk, whatever happens to the machine; the bytes of `train.log`.

        To be called before a checkpoint is written: a checkpoint must not be ahead of the logs that lead to it.
        """
        with self._disk_errors_named():
            for file in (self._metrics_file, self._text_file):
                os.fsync(file.fileno())
            for sink in self._sinks:
                sink.sync()
            return os.fstat(self._text_file.fileno()).st_size

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[Advance]:
        """A progress bar on a terminal, nothing elsewhere: `with logger.progress("PPO", 200) as advance: advance()`.

        A bar inside another one stands below it. `advance(1, reward=0.31)` shows values beside the bar.
        """
        if not (self._to_console and terminal().is_terminal):
            yield _advance_nothing
            return
        is_outermost = self._progress is None
        bars = self._progress = self._progress or _new_progress()
        if is_outermost:
            bars.start()
        task = bars.add_task(description, total=total, shown="")

        def advance(n: int = 1, **shown: float | str) -> None:
            bars.update(task, advance=n, shown=_shown_text(shown))

        try:
            yield advance
        finally:
            if is_outermost:
                bars.stop()
                self._progress = None
            else:
                bars.remove_task(task)

    def close(self) -> None:
        """Flush and close everything; closing twice is harmless."""
        with self._disk_errors_named(), ExitStack() as closing:  # each is closed even where another one cannot be
            for sink in self._sinks:
                closing.callback(sink.close)
            closing.callback(self._metrics_file.close)
            closing.callback(self._text_file.close)
            self._sinks = []

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _disk_errors_named(self) -> AbstractContextManager[None]:
        return disk_errors_named(
            f"the logs in '{self.folder}' could not be written",
            "; the checkpoints are untouched, so mend that and resume the run",
        )


class TensorBoardSink:
    """Scalars for TensorBoard; on resume the points after the checkpoint disappear from its plots.

    TensorBoard's own writer would leave the records to a thread that may keep them for two minutes: a kill would lose
    points from before the checkpoint, and nobody would hear of a full disk in time.
    """

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        folder.mkdir(parents=True, exist_ok=True)
        # Files are read in the order of their names, and "." comes before a digit: a later file, longer name or not.
        self._file = (folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}").open("wb")
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if resume_step is not None:  # readers drop what they have from this step on
            self._write(
                Event(wall_time=time.time(), step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))
            )

    def log(self, step: int, metrics: Metrics) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._file.flush()


class WandbSink:
    """Metrics for Weights & Biases, under the run folder's name; a resumed run goes on in the same place."""

    def __init__(self, folder: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "wandb: true was asked for, but wandb is not installed; pip install 'rlhf[wandb]'"
            ) from None
        config_path = folder / "config.yaml"
        config = yaml.safe_load(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
        self._run = wandb.init(
            project="rlhf", id=folder.name, name=folder.name, dir=str(folder), config=config, resume="allow"
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def sync(self) -> None:
        """Its points are on their way to a server, which keeps the first it got for a step."""

    def close(self) -> None:
        self._run.finish()


def check_wandb_installed() -> None:
    """Raise `UserError` when W&B cannot be used."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("wandb: true was asked for, but wandb is not installed; pip install 'rlhf[wandb]'")


def cut_metrics_after(path: Path, step: int) -> None:
    """Drop the lines of later steps from a JSONL log, and a last line that a kill left half-written."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            is_past = int(json.loads(line)["step"]) <= step
        except (ValueError, KeyError, TypeError):
            is_past = False
        if is_past and line.endswith("\n"):
            kept.append(line)
    write_text(path, "".join(kept))


def cut_text_after(path: Path, step: int, num_bytes: int | None = None) -> None:
    """Drop the sentences of later steps from `train.log`, and whatever lies beyond its first bytes."""
    if not path.is_file():
        return
    content = path.read_bytes()[:num_bytes]
    lines = content.decode("utf-8", errors="ignore").splitlines(keepends=True)
    steps = [int(match[1]) if (match := _LINE_STEP.match(line)) else 0 for line in lines]
    write_text(path, "".join(line for line, at in zip(lines, steps, strict=True) if at <= step and line.endswith("\n")))


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a `train.jsonl`, with "NaN" and the infinities as floats again."""
    rows = []
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            rows.append({name: float(value) if isinstance(value, str) else value for name, value in row.items()})
    return rows


def _json_number(value: float) -> float | int | str:
    """The number itself, or its name where JSON has no number for it."""
    if isinstance(value, int):
        return value
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _new_progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
        console=terminal(),
    )


def _shown_text(shown: Mapping[str, float | str]) -> str:
    return "  ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
    )


def _advance_nothing(n: int = 1, **shown: float | str) -> None:
    pass
