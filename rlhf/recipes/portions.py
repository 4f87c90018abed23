"""Work that fills a file row by row, in portions: interrupted anywhere, it goes on with the next and ends up the same.

Each portion is a function of its number. Its rows are on the disk before it counts as done; what a process wrote behind
its last checkpoint is cut off and comes again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.infra.durable import sync_file, sync_folder
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run
from rlhf.infra.profiling import memory_metrics, per_second


@dataclass(frozen=True)
class Portion:
    """Rows of the file, the tokens they took, and the portion's line of the log."""

    rows: Sequence[dict[str, Any]]
    num_tokens: int
    metrics: dict[str, float]


@dataclass
class PortionProgress:
    """Portions done, tokens of all, and the length of the file then; all of it goes into a checkpoint."""

    step: int = 0
    tokens: int = 0
    num_bytes: int = 0


def fill_in_portions(run: Run, name: str, total: int, what: str, work: Callable[[int], Portion]) -> PortionProgress:
    """Write `<run>/<name>` with the rows of portions 0 to `total` - 1; it has its name when it is whole.

    Raises:
        UserError: what an interrupted run had written is not there any more.
    """
    progress = PortionProgress(**run.resumed_from.state["progress"]) if run.resumed_from else PortionProgress()
    final = run.folder / name
    if final.exists():  # killed between the file's name and the run's end
        return progress
    partial = _taken_up(run.folder / f"{name}.partial", progress.num_bytes)
    with run.logger.progress(what, total) as advance:
        advance(progress.step)
        while progress.step < total:
            with run.profiler(progress.step + 1), run.timer("work"):
                portion = work(progress.step)
            with run.timer("save"):
                with partial.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in portion.rows)
                sync_file(partial)
            progress.step += 1
            progress.tokens += portion.num_tokens
            progress.num_bytes = partial.stat().st_size
            run.logger.log(progress.step, portion.metrics | _speed(run, portion.num_tokens))
            advance(1)
            done = progress.step == total
            stopping = not done and run.should_stop()
            if stopping or done or run.checkpoint_due(progress.step):
                with run.timer("save"):
                    run.save(progress.step, {}, {"progress": asdict(progress)})
            if stopping:
                return progress
    os.replace(partial, final)
    sync_folder(run.folder)
    return progress


def _speed(run: Run, num_tokens: int) -> dict[str, float]:
    seconds = run.timer.lap()
    line = {f"time/{phase}": value for phase, value in seconds.items()}
    line["rate/tokens_per_second"] = per_second(num_tokens, seconds["work"])
    return line | memory_metrics(run.device)


def _taken_up(partial: Path, num_bytes: int) -> Path:
    """Leave the file as it was at the checkpoint."""
    partial.touch()
    if partial.stat().st_size < num_bytes:
        raise UserError(
            f"'{partial}' holds less than the {num_bytes} bytes that were written to it; start a new run, which finds "
            "what was sampled in its cache"
        )
    os.truncate(partial, num_bytes)
    return partial
