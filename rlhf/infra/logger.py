"""The record of a run: `logs/train.jsonl` and TensorBoard always, W&B when asked, `logs/train.log` for sentences.

Metric names have a section: `train/loss`, `reward/mean`, `kl/mean`. What depends on the clock or on the machine stands
under `time/`, `rate/` or `memory/` only, so that everything else is equal for equal seeds.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Protocol

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlhf.infra.durable import write_text
from rlhf.infra.errors import UserError

Metrics = Mapping[str, float]
_LINE_STEP = re.compile(r"^\S+ \S+ step (\d+) \| ")


class Advance(Protocol):
    """Moves a progress bar on by `n` and shows the named values beside it."""

    def __call__(self, n: int = 1, **shown: float | str) -> None: ...


class MetricSink(Protocol):
    """A further place for metrics; NaN and infinities arrive as they are."""

    def log(self, step: int, metrics: Metrics) -> None: ...
    def close(self) -> None: ...


@functools.cache
def terminal() -> Console:
    """The one console of this process: a progress bar and a printed line do not get into each other's way."""
    return Console(soft_wrap=True, highlight=False)


class RunLogger:
    """Writes the metrics and the sentences of one run.

    `folder` is the run's. With `resume_step` everything that was logged after that step is cut first. `console`
    switches sentences and progress bars on the terminal. Raises `UserError` when W&B is asked for but not installed.
    """

    def __init__(
        self, folder: str | Path, wandb: bool = False, console: bool = True, resume_step: int | None = None
    ) -> None:
        self.folder = Path(folder)
        logs = self.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        metrics_path, text_path = logs / "train.jsonl", logs / "train.log"
        if resume_step is not None:
            cut_metrics_after(metrics_path, resume_step)
            cut_text_after(text_path, resume_step)
        self.last_step = resume_step or 0
        self._sinks: list[MetricSink] = [TensorBoardSink(self.folder / "tb", resume_step)]
        if wandb:
            self._sinks.append(WandbSink(self.folder))
        self._metrics_file = metrics_path.open("a", encoding="utf-8")
        self._text_file = text_path.open("a", encoding="utf-8")
        self._to_console = console
        self._progress: Progress | None = None

    def log(self, step: int, metrics: Metrics) -> None:
        """Record the metrics of a step, once per step and in rising order; on disk when this returns."""
        row = {"step": step} | {name: _json_number(value) for name, value in metrics.items()}
        self._metrics_file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._metrics_file.flush()
        self.last_step = step
        for sink in self._sinks:
            sink.log(step, metrics)

    def info(self, text: str) -> None:
        """Record a sentence in `logs/train.log` with the time and the last logged step, and show it."""
        moment = datetime.now().isoformat(sep=" ", timespec="seconds")
        for line in text.splitlines() or [""]:
            self._text_file.write(f"{moment} step {self.last_step} | {line}\n")
        self._text_file.flush()
        if self._to_console:
            terminal().print(text, markup=False)

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
        for sink in self._sinks:
            sink.close()
        self._sinks = []
        self._metrics_file.close()
        self._text_file.close()

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TensorBoardSink:
    """Scalars for TensorBoard; on resume the points after the checkpoint disappear from its plots."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)

    def close(self) -> None:
        self._writer.close()


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


def cut_text_after(path: Path, step: int) -> None:
    """Drop the sentences of later steps from `train.log`."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
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
