"""Starting and resuming a stage: what can be refused is refused before anything is written.

A disk that takes no more ends a stage with one sentence, wherever it happens; the newest checkpoint stays good.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from rlhf.infra.config import Config, refuse_idle_keys
from rlhf.infra.determinism import seed_everything
from rlhf.infra.device import resolve_device, set_num_threads
from rlhf.infra.durable import disk_errors_named
from rlhf.infra.experiment import Run, RunConfig
from rlhf.infra.interrupt import Stopped
from rlhf.infra.profiling import memory_used, peak_memory_mb, reset_peak_memory, where_time_went
from rlhf.recipes.lineage import fingerprints, refuse_changed
from rlhf.recipes.supervised import Progress

Parts = TypeVar("Parts")
REJECTED_ROWS = "rejected_rows"


ConfigT = TypeVar("ConfigT", bound=Config)


def launch(
    recipe: str,
    config: ConfigT,
    prepare: Callable[[ConfigT, torch.device, Path], Parts],
    train: Callable[[ConfigT, Run, Parts], tuple[int, int]],
    *,
    settings: RunConfig,
    lineage: Mapping[str, str] | None = None,
    data_files: Iterable[Path] = (),
    resume: Path | None = None,
) -> Run:
    """Run one stage: `prepare` loads models and data and may refuse them, `train` returns (optimizer steps, tokens).

    `prepare` gets a path for rows that cannot be read; it lies beside the run folder until the run has one. Seconds,
    tokens, steps and peak memory are kept in `run.json` under `cost`.

    Raises:
        UserError: models, data or settings cannot serve, or, on resuming, are not those of the start; nothing was
            written (bad rows excepted). Also when the disk takes no more: then the checkpoints are as they were.
        Stopped: Ctrl-C; a checkpoint was written.
    """
    refuse_idle_keys(config)
    device = resolve_device(settings.device)
    set_num_threads(settings.num_threads)
    reset_peak_memory(device)
    started = time.perf_counter()
    prefix = f"{settings.name or recipe}."
    for left_over in _rejected_rows(settings.output_dir, prefix):  # of a start that was killed or refused
        left_over.unlink()
    seed_everything(settings.seed)  # models may start from random weights
    parts = prepare(config, device, settings.output_dir / f"{prefix}{REJECTED_ROWS}.jsonl")
    found, files = fingerprints(lineage or {}, settings.output_dir), list(data_files)
    if resume is not None:
        refuse_changed(resume, found, files)
        run = Run.open(resume)
    else:
        run = Run.create(recipe, config, settings, lineage, files, found)
    with run, disk_errors_named(f"run '{run.folder}' could not write", f"; mend that and go on: {run.resume_command}"):
        run.timer.add("load", time.perf_counter() - started)
        for rows in _rejected_rows(settings.output_dir, prefix):
            rows.replace(run.folder / rows.name.removeprefix(prefix))
        steps, tokens = train(config, run, parts)
        run.profiler.close()
        _say_where_time_went(run)
        earlier = run.info.get("cost", {}) if resume is not None else {}
        run.info["cost"] = {
            "seconds": time.perf_counter() - started + earlier.get("seconds", 0.0),
            "tokens": tokens,
            "optimizer_steps": steps,
            "peak_memory_mb": max(peak_memory_mb(device), earlier.get("peak_memory_mb", 0.0)),
        }
    if run.stop_reason == "interrupted":
        raise Stopped(run.resume_command)
    return run


def _say_where_time_went(run: Run) -> None:
    """One sentence, and the same numbers in `run.json`, those of earlier parts of a resumed run included."""
    run.logger.info(f"where the time went, {where_time_went(run.timer.totals())}; {memory_used(run.device)}")
    run.info["seconds_by_phase"] = run.seconds_by_phase()


def stage_cost(progress: Progress) -> tuple[int, int]:
    """(optimizer steps, tokens) of a supervised stage."""
    return progress.step, progress.tokens


def _rejected_rows(folder: Path, prefix: str) -> list[Path]:
    """The lists of rows that could not be read, of training and of validation data, that lie beside the run folders."""
    return sorted(folder.glob(f"{prefix}{REJECTED_ROWS}*.jsonl"))
