"""One run of one recipe: its folder, and everything that must be on disk before step 1.

runs/<name>/
    config.yaml    the resolved configuration and which keys the user set
    run.json       recipe, seed, versions, commit, threads, data hashes, lineage, status
    logs/  tb/     see rlhf.infra.logger
    checkpoints/   see rlhf.infra.checkpoint
    profile/       see rlhf.infra.step_profiler
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from pydantic import Field, field_validator
from torch import Tensor

from rlhf.infra.checkpoint import Checkpoint, CheckpointStore
from rlhf.infra.config import Config, to_yaml
from rlhf.infra.determinism import seed_everything
from rlhf.infra.device import DeviceName, DtypeName, check_dtype, resolve_device, set_num_threads
from rlhf.infra.durable import disk_errors_named, write_json, write_text
from rlhf.infra.errors import UserError
from rlhf.infra.interrupt import InterruptFlag
from rlhf.infra.logger import RunLogger, check_wandb_installed
from rlhf.infra.profiling import PhaseTimer
from rlhf.infra.run_folder import (
    CONFIG,
    OVERWRITTEN,
    RUN_INFO,
    FolderLock,
    clear_run,
    data_hashes,
    git_commit,
    package_versions,
    read_run_info,
    refuse_taken,
    utc_now,
)
from rlhf.infra.step_profiler import StepProfiler

Status = Literal["running", "finished", "interrupted", "failed"]
StopReason = Literal["interrupted", "max_minutes", "reward_hacking"]

MINUTES_BETWEEN_CHECKPOINTS = 5.0
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class RunConfig(Config):
    """Where a run is kept and on what it runs: the same section in every recipe."""

    name: str | None = Field(None, pattern=_NAME, description="folder name of the run; default <recipe>-<time>")
    output_dir: Path = Field(Path("runs"), description="folder that holds the runs")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything random in the run")
    device: DeviceName = Field("auto", description="auto takes CUDA, then MPS, then the CPU")
    dtype: DtypeName = Field("fp32", description="format of matrix products; fp16 trains with loss scaling")
    num_threads: int | None = Field(None, ge=1, description="CPU threads; default PyTorch's own choice")
    max_minutes: float | None = Field(None, gt=0, description="time budget; the run ends cleanly after the step")
    save_every_steps: int | None = Field(None, ge=1, description="steps between checkpoints; null: five minutes")
    keep_checkpoints: int = Field(2, ge=1, description="how many of the newest checkpoints stay on disk")
    wandb: bool = Field(False, description="also log to Weights & Biases (extra 'wandb')")
    overwrite: bool = Field(False, description="replace an existing run of the same name")
    profile: bool = Field(False, description="trace some steps with torch.profiler into <run>/profile")
    profile_steps: tuple[int, int] = Field(
        (2, 3), description="first and last step (PPO, GRPO: iteration) traced, counted from 1 as in the log"
    )

    @field_validator("profile_steps")
    @classmethod
    def _is_a_range(cls, steps: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= steps[0] <= steps[1]:
            raise ValueError(f"got {list(steps)}, expected the first and the last step, counted from 1, such as [2, 3]")
        return steps

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        idle = {} if self.profile else {"profile_steps": "run.profile is false"}
        if self.overwrite and self.name is None:
            idle["overwrite"] = "without run.name the run gets a folder that is not there yet"
        return idle


class Run:
    """A run in progress; use it as a context manager, which catches Ctrl-C and records how the run ended.

    Make one with `create` or `open`. Both pick the device, set the threads and seed everything.
    """

    def __init__(self, folder: Path, lock: FolderLock, info: dict[str, Any], resumed_from: Checkpoint | None) -> None:
        """For `create` and `open`, which have prepared the folder."""
        self.folder = folder
        self.info = info
        self.config = RunConfig.model_validate(info["run"])
        self.device = resolve_device(self.config.device)
        self.checkpoints = CheckpointStore(folder / "checkpoints", keep=self.config.keep_checkpoints)
        self.resumed_from = resumed_from
        self.stop_reason: StopReason | None = None
        self._lock = lock
        self._interrupt = InterruptFlag()
        self._started = self._last_saved = time.monotonic()
        state = {} if resumed_from is None else resumed_from.state
        self.logger = RunLogger(
            folder, wandb=self.config.wandb, resume_step=self._resume_step(), resume_bytes=state.get("log_bytes")
        )
        self.timer = PhaseTimer(self.device)
        traces = folder / "profile" if self.config.profile else None
        self.profiler = StepProfiler(traces, self.config.profile_steps, self.timer, self.device, self.logger.info)

    @classmethod
    def create(
        cls,
        recipe: str,
        config: Config,
        run: RunConfig,
        lineage: Mapping[str, str] | None = None,
        data_files: Iterable[str | Path] = (),
        fingerprints: Mapping[str, str] | None = None,
    ) -> Run:
        """Start a new run of a recipe; its whole record is on disk when this returns.

        `lineage` names what the run starts from (`{"sft": "runs/sft-1"}`), `fingerprints` are the hashes of that;
        `data_files` are hashed. Raises `UserError`, with nothing written, when the device is absent, a data file is
        unreadable or the folder is already taken.
        """
        info = _describe(recipe, run, lineage or {}, data_files) | {"fingerprints": dict(fingerprints or {})}
        folder = _folder_for(recipe, run)
        with disk_errors_named(f"run folder '{folder}' cannot be made"):
            refuse_taken(folder, run.overwrite)
            folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder)
        try:
            refuse_taken(folder, run.overwrite)  # another process may have been here since
            with disk_errors_named(f"run folder '{folder}' could not be emptied"):
                clear_run(folder)
            info["name"] = folder.name
            write_text(folder / CONFIG, to_yaml(config))
            write_json(folder / RUN_INFO, info)
            (folder / OVERWRITTEN).unlink(missing_ok=True)
            seed_everything(run.seed)
            return cls(folder, lock, info, resumed_from=None)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Take up an existing run at its newest good checkpoint, `resumed_from` (None: from the start).

        Logs past the checkpoint are cut. When the checkpoint's state has the key `logged_step`, that is the last step
        whose metrics count as written, otherwise the checkpoint's own step.
        """
        folder = Path(folder)
        config = RunConfig.model_validate(read_run_info(folder)["run"])
        check_dtype(resolve_device(config.device), config.dtype)
        lock = FolderLock(folder)
        try:
            info = read_run_info(folder)  # again: whoever held the folder until now may have written it
            with warnings.catch_warnings(record=True) as damaged:
                warnings.simplefilter("always")
                checkpoint = CheckpointStore(folder / "checkpoints", keep=config.keep_checkpoints).latest()
            # The thread count decides the order of sums, so it is part of what the run is.
            set_num_threads(info["num_threads"])
            seed_everything(config.seed)
            entry = {"at": utc_now(), "step": checkpoint.step if checkpoint else 0}
            if checkpoint and checkpoint.part:
                entry["part"] = checkpoint.part
            info["resumed"] = [*info.get("resumed", []), entry]
            info |= {"status": "running", "ended": None, "stop_reason": None, "error": None}
            write_json(folder / RUN_INFO, info)
            run = cls(folder, lock, info, checkpoint)
        except BaseException:
            lock.release()
            raise
        for warning in damaged:
            run.logger.info(str(warning.message))
        origin = f"the checkpoint of {checkpoint.place}" if checkpoint else "the start: there is no good checkpoint"
        run.logger.info(f"resuming from {origin}")
        return run

    @property
    def resume_command(self) -> str:
        """The command that takes the run up again."""
        return f"rlhf resume {self.folder}"

    def should_stop(self) -> bool:
        """Whether the run must end after this step: Ctrl-C, its time budget, or a reason that the recipe has set.

        `stop_reason` tells which.
        The budget counts from `create` or `open`: a resumed run has all of it again.
        """
        if self._interrupt.seen:
            self.stop_reason = "interrupted"
        elif self.config.max_minutes is not None and time.monotonic() - self._started > 60 * self.config.max_minutes:
            self.stop_reason = "max_minutes"
        return self.stop_reason is not None

    def checkpoint_due(self, step: int) -> bool:
        """Whether this step ends with a checkpoint: by `save_every_steps`, or since the last one is minutes old."""
        every = self.config.save_every_steps
        if every is not None:
            return step % every == 0
        return time.monotonic() - self._last_saved > 60 * MINUTES_BETWEEN_CHECKPOINTS

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], part: int = 0
    ) -> Path:
        """Write a checkpoint (see `CheckpointStore.save`) once the logs that lead to it are on the disk.

        It also holds what was spent so far: a run that is killed forgets the seconds behind its checkpoint, as it does
        the steps.
        """
        more = {"log_bytes": self.logger.sync(), "seconds_by_phase": self.seconds_by_phase()}
        folder = self.checkpoints.save(step, tensors, {**state, **more}, part)
        self._last_saved = time.monotonic()
        return folder

    def seconds_by_phase(self) -> dict[str, float]:
        """What the run took so far by phase, with what led to the checkpoint that it was taken up from."""
        checkpoint, here = self.resumed_from, self.timer.totals()
        earlier = {} if checkpoint is None else checkpoint.state.get("seconds_by_phase", {})
        return {phase: earlier.get(phase, 0.0) + here.get(phase, 0.0) for phase in dict.fromkeys([*earlier, *here])}

    def finish(self, status: Status = "finished", error: str | None = None) -> None:
        """Record how the run ended, close its logs and let go of its folder; only the first call counts."""
        if self.info["status"] != "running":
            return
        self.info |= {"status": status, "ended": utc_now(), "stop_reason": self.stop_reason, "error": error}
        with ExitStack() as closing:  # each is done even where another one cannot be
            closing.callback(self._lock.release)
            closing.callback(write_json, self.folder / RUN_INFO, self.info)
            closing.callback(self.logger.close)
            closing.callback(self.profiler.close)

    def __enter__(self) -> Run:
        self._interrupt.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._interrupt.__exit__(kind, error, trace)
        if error is None:
            self.finish("interrupted" if self.stop_reason == "interrupted" else "finished")
            return
        interrupted = isinstance(error, KeyboardInterrupt)
        # A disk that is full takes no record of that either: the error on its way out is the one to be told.
        with suppress(UserError):
            self.finish(
                "interrupted" if interrupted else "failed", None if interrupted else f"{type(error).__name__}: {error}"
            )

    def _resume_step(self) -> int | None:
        """Last step whose log lines stay; None for a new run, which has none to cut."""
        if self.resumed_from is not None:
            return int(self.resumed_from.state.get("logged_step", self.resumed_from.step))
        return 0 if self.info.get("resumed") else None


def _describe(
    recipe: str, run: RunConfig, lineage: Mapping[str, str], data_files: Iterable[str | Path]
) -> dict[str, Any]:
    """The content of `run.json` at the start; raises before anything is written."""
    device = resolve_device(run.device)
    check_dtype(device, run.dtype)
    if run.wandb:
        check_wandb_installed()
    return {
        "recipe": recipe,
        "name": run.name,
        "status": "running",
        "started": utc_now(),
        "ended": None,
        "stop_reason": None,
        "error": None,
        "seed": run.seed,
        "device": str(device),
        "num_threads": set_num_threads(run.num_threads),
        "num_cpus": os.cpu_count(),
        "versions": package_versions(),
        "git": git_commit(),
        "lineage": dict(lineage),
        "data": data_hashes(data_files),
        "run": run.model_dump(mode="json"),
    }


def _folder_for(recipe: str, run: RunConfig) -> Path:
    """The named folder, or a new one named by recipe and time."""
    if run.name is not None:
        return run.output_dir / run.name
    stem = f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}"
    folder, count = run.output_dir / stem, 1
    while folder.exists():
        count += 1
        folder = run.output_dir / f"{stem}-{count}"
    return folder
