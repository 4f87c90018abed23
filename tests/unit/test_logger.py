from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf.infra import logger as logger_module
from rlhf.infra.errors import UserError
from rlhf.infra.logger import RunLogger, read_metrics


def lines(folder: Path) -> list[str]:
    return (folder / "logs" / "train.jsonl").read_text(encoding="utf-8").splitlines()


def terminal_of(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> io.StringIO:
    """Replace the terminal by text in memory."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=is_terminal, width=120, soft_wrap=True, highlight=False)
    monkeypatch.setattr(logger_module, "terminal", lambda: console)
    return shown


def test_one_json_object_per_step(tmp_path: Path) -> None:
    with RunLogger(tmp_path, console=False) as logger:
        logger.log(1, {"train/loss": 1 / 3, "train/num_tokens": 7})
        assert lines(tmp_path) == ['{"step": 1, "train/loss": 0.3333333333333333, "train/num_tokens": 7}']  # at once
        logger.log(2, {"train/loss": 0.25})
        assert logger.last_step == 2
    assert lines(tmp_path)[1] == '{"step": 2, "train/loss": 0.25}'


def test_what_is_not_finite_stays_visible_and_valid(tmp_path: Path) -> None:
    with RunLogger(tmp_path, console=False) as logger:
        logger.log(1, {"a": float("nan"), "b": float("inf"), "c": float("-inf")})
    assert lines(tmp_path) == ['{"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}']
    (row,) = read_metrics(tmp_path / "logs" / "train.jsonl")
    assert row["a"] != row["a"] and row["b"] == float("inf") and row["c"] == float("-inf")


def test_numbers_of_tensors_and_numpy_are_taken(tmp_path: Path) -> None:
    import numpy as np
    import torch

    with RunLogger(tmp_path, console=False) as logger:
        logger.log(1, {"a": torch.tensor(0.5), "b": np.float32(0.25), "c": True})  # type: ignore[dict-item]
    assert lines(tmp_path) == ['{"step": 1, "a": 0.5, "b": 0.25, "c": true}']


def test_tensorboard_has_the_same_points(tmp_path: Path) -> None:
    with RunLogger(tmp_path, console=False) as logger:
        for step in (1, 2, 3):
            logger.log(step, {"train/loss": step / 4})
    with RunLogger(tmp_path, console=False, resume_step=2) as logger:
        logger.log(3, {"train/loss": 9.0})
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert points == [(1, 0.25), (2, 0.5), (3, 9.0)]  # the abandoned third point is gone


def test_resuming_cuts_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    with RunLogger(tmp_path, console=False) as logger:
        logger.info("begin")
        for step in (1, 2, 3):
            logger.log(step, {"train/loss": float(step)})
            logger.info(f"did {step}\nin two lines")
    path = tmp_path / "logs" / "train.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "train/lo')  # killed in the middle of a line
    with RunLogger(tmp_path, console=False, resume_step=2) as logger:
        assert logger.last_step == 2
        logger.log(3, {"train/loss": 30.0})
    assert [json.loads(line)["train/loss"] for line in lines(tmp_path)] == [1.0, 2.0, 30.0]
    sentences = (tmp_path / "logs" / "train.log").read_text().splitlines()
    assert [line.partition(" | ")[2] for line in sentences] == [
        "begin",
        "did 1",
        "in two lines",
        "did 2",
        "in two lines",
    ]


def test_what_tensorboard_shows_survives_a_kill_at_once(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path, console=False)
    logger.log(1, {"train/loss": 0.5})
    events = EventAccumulator(str(tmp_path / "tb"))  # the logger is neither synced nor closed
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.5)]
    logger.close()


def test_sentences_of_a_step_that_was_under_way_are_cut_by_their_place(tmp_path: Path) -> None:
    with RunLogger(tmp_path, console=False) as logger:
        logger.log(1, {"a": 1.0})
        logger.info("before the checkpoint: ä")
        place = logger.sync()
        assert place == (tmp_path / "logs" / "train.log").stat().st_size
        logger.info("after it, still in step 1")
    with RunLogger(tmp_path, console=False, resume_step=1, resume_bytes=place) as logger:
        logger.info("resumed")
    text = (tmp_path / "logs" / "train.log").read_text(encoding="utf-8")
    assert [line.partition(" | ")[2] for line in text.splitlines()] == ["before the checkpoint: ä", "resumed"]
    assert lines(tmp_path) == ['{"step": 1, "a": 1.0}']


@pytest.mark.parametrize("file", ["train.jsonl", "train.log", "tb"])
def test_a_disk_that_takes_no_more_is_one_clear_sentence(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no device here that is always full")
    logger = RunLogger(tmp_path, console=False)
    logger.log(1, {"a": 1.0})
    full = Path("/dev/full")
    if file == "tb":
        logger._sinks[0]._records._writer = full.open("wb")  # type: ignore[attr-defined]
        logger._sinks[0]._file = logger._sinks[0]._records._writer  # type: ignore[attr-defined]
    elif file == "train.log":
        logger._text_file = full.open("w")
    else:
        logger._metrics_file = full.open("w")
    with pytest.raises(UserError, match=r"the logs in '.*' could not be written: No space left on device; the check"):
        logger.info("x") if file == "train.log" else logger.log(2, {"a": 2.0})
    with pytest.raises(UserError, match="No space left on device"):
        logger.close()  # the buffers still hold what the disk refused
    assert logger._metrics_file.closed and logger._text_file.closed


def test_a_log_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"could not be written: Not a directory"):
        RunLogger(tmp_path / "file", console=False)


def test_resuming_from_the_start_cuts_everything_that_has_a_step(tmp_path: Path) -> None:
    with RunLogger(tmp_path, console=False) as logger:
        logger.log(1, {"a": 1.0})
    with RunLogger(tmp_path, console=False, resume_step=0):
        pass
    assert lines(tmp_path) == []


def test_sentences_go_to_the_file_and_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = terminal_of(monkeypatch, is_terminal=False)
    with RunLogger(tmp_path) as logger:
        logger.log(12, {})
        logger.info("kept 3 of 5 rows [1, 2] [bold]")
    assert shown.getvalue() == "kept 3 of 5 rows [1, 2] [bold]\n"  # brackets are text, not markup
    line = (tmp_path / "logs" / "train.log").read_text()
    assert line.endswith(" step 12 | kept 3 of 5 rows [1, 2] [bold]\n")


def test_progress_is_silent_off_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = terminal_of(monkeypatch, is_terminal=False)
    with RunLogger(tmp_path) as logger, logger.progress("PPO", 3) as advance:
        advance(2, reward=0.5)
    assert shown.getvalue() == ""


def test_progress_shows_values_and_may_nest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = terminal_of(monkeypatch, is_terminal=True)
    with RunLogger(tmp_path) as logger:
        with logger.progress("PPO", 3) as advance, logger.progress("scoring", None) as advance_inner:
            advance_inner(5)
            logger.info("a sentence between bars")
            advance(3, reward=0.12345, phase="update")
        with logger.progress("again", 1) as advance:
            advance()
    text = shown.getvalue()
    for part in ("PPO", "scoring", "3/3", "reward 0.123", "phase update", "a sentence between bars", "again"):
        assert part in text


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path, console=False)
    logger.close()
    logger.close()


def test_wandb_is_named_when_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'rlhf\[wandb\]'"):
        RunLogger(tmp_path, wandb=True, console=False)


def test_wandb_gets_config_and_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class FakeRun:
        def log(self, metrics: dict[str, float], step: int) -> None:
            calls.append((step, metrics))

        def finish(self) -> None:
            calls.append("finish")

    def init(project: str, id: str, name: str, dir: str, config: dict[str, Any], resume: str) -> FakeRun:
        calls.append((project, id, config, resume))
        return FakeRun()

    module = types.ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: module)
    folder = tmp_path / "ppo-1"
    folder.mkdir()
    (folder / "config.yaml").write_text("learning_rate: 0.5\n")
    with RunLogger(folder, wandb=True, console=False) as logger:
        logger.log(1, {"train/loss": 0.5})
    assert calls == [("rlhf", "ppo-1", {"learning_rate": 0.5}, "allow"), (1, {"train/loss": 0.5}), "finish"]
