"""Starting a stage: bad rows find their run, and what the disk refuses inside it is one sentence."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from rlhf.infra.config import Config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run, RunConfig
from rlhf.recipes.launch import launch


class Settings(Config):
    run: RunConfig = RunConfig()


def start(output_dir: Path, bad_rows: str = "", error: Exception | None = None, resume: Path | None = None) -> Run:
    def prepare(config: Settings, device: torch.device, rejected: Path) -> None:
        if bad_rows:
            rejected.parent.mkdir(exist_ok=True)
            rejected.write_text(bad_rows)
            rejected.with_name(f"{rejected.stem}_validation.jsonl").write_text(f"held {bad_rows}")

    def train(config: Settings, run: Run, parts: None) -> tuple[int, int]:
        run.save(1, {}, {})
        if error is not None:
            raise error
        return 7, 70

    config = Settings(run=RunConfig(output_dir=output_dir, name="a", device="cpu"))
    return launch("sft", config, prepare, train, settings=config.run, resume=resume)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_rows_that_cannot_be_read_end_up_in_the_run(tmp_path: Path) -> None:
    run = start(tmp_path / "runs", "bad")
    assert names(tmp_path / "runs") == {"a"}
    assert (run.folder / "rejected_rows.jsonl").read_text() == "bad"
    assert (run.folder / "rejected_rows_validation.jsonl").read_text() == "held bad"
    assert run.info["cost"]["optimizer_steps"] == 7 and run.info["cost"]["tokens"] == 70


def test_bad_rows_of_a_start_that_was_killed_are_not_those_of_the_next(tmp_path: Path) -> None:
    (tmp_path / "a.rejected_rows.jsonl").write_text("of another time")
    (tmp_path / "a.b.rejected_rows.jsonl").write_text("of another run")
    run = start(tmp_path)
    assert not (run.folder / "rejected_rows.jsonl").exists()
    assert names(tmp_path) == {"a", "a.b.rejected_rows.jsonl"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["system", "safetensors"],
)
def test_a_full_disk_anywhere_in_a_stage_is_one_sentence(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(UserError) as caught:
        start(tmp_path, error=error)
    folder = tmp_path / "a"
    assert str(caught.value) == (
        f"run '{folder}' could not write: No space left on device; mend that and go on: rlhf resume {folder}"
    )
    info = json.loads((folder / "run.json").read_text())
    assert info["status"] == "failed" and "No space left" in info["error"]
    assert start(tmp_path, resume=folder).info["status"] == "finished"


def test_errors_that_are_not_the_disks_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError):
        start(tmp_path, error=ConnectionResetError(errno.ECONNRESET, "reset"))
