"""Traces of chosen steps: which ones, what is in them, and what becomes of them when a run ends early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlhf.infra.config import load_config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run, RunConfig
from rlhf.infra.profiling import PhaseTimer
from rlhf.infra.step_profiler import StepProfiler

CPU = torch.device("cpu")


class Steps:
    """Steps of a run, each with an operator of its own shape: step n multiplies n x n matrices."""

    def __init__(self, folder: Path | None, first: int, last: int) -> None:
        self.said: list[str] = []
        self.timer = PhaseTimer()
        self.profiler = StepProfiler(folder, (first, last), self.timer, CPU, self.said.append)

    def run(self, *steps: int) -> None:
        for step in steps:
            with self.profiler(step), self.timer("update"):
                torch.ones(step, step) @ torch.ones(step, step)


def events(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return found


def sizes(path: Path) -> list[int]:
    """Rows of the matrices that were multiplied, in order of time."""
    products = [event for event in events(path) if event.get("name") == "aten::mm"]
    return [event["args"]["Input Dims"][0][0] for event in sorted(products, key=lambda event: event["ts"])]


@pytest.mark.parametrize(("first", "last", "begun"), [(2, 3, 1), (1, 2, 1), (3, 3, 1), (2, 4, 3), (2, 3, 2)])
def test_the_steps_asked_for_are_in_the_trace_and_no_others(tmp_path: Path, first: int, last: int, begun: int) -> None:
    """`begun` is the first step of this process: a run may be taken up inside the range."""
    steps = Steps(tmp_path / "profile", first, last)
    steps.run(*range(begun, 7))
    steps.profiler.close()
    start = max(first, begun)
    trace = tmp_path / "profile" / f"steps_{start}-{last}.trace.json"
    assert sizes(trace) == list(range(start, last + 1))
    assert steps.said == [f"profile of steps {start} to {last}: {trace} (open it in ui.perfetto.dev)"]
    assert sorted(path.name for path in trace.parent.iterdir()) == [
        f"steps_{start}-{last}.{e}" for e in ("trace.json", "txt")
    ]
    names = {event.get("name") for event in events(trace)}
    assert {f"step {start}", f"step {last}", "update"} <= names and f"step {last + 1}" not in names


def test_the_table_names_operators_shapes_and_memory(tmp_path: Path) -> None:
    steps = Steps(tmp_path, 1, 2)
    steps.run(1, 2, 3)
    by_name, by_shape = (tmp_path / "steps_1-2.txt").read_text(encoding="utf-8").split("by shapes of their inputs")
    assert "aten::mm" in by_name and "CPU Mem" in by_name and "[[2, 2], [2, 2]" not in by_name
    assert "[[2, 2], [2, 2]" in by_shape and "Self CPU" in by_shape
    assert any(event.get("name") == "[memory]" for event in events(tmp_path / "steps_1-2.trace.json"))


def test_a_step_that_fails_is_in_the_trace(tmp_path: Path) -> None:
    """What ran out of memory is what one wants to see."""
    steps = Steps(tmp_path, 2, 9)
    steps.run(1, 2)
    with pytest.raises(RuntimeError), steps.profiler(3):
        torch.ones(3, 3) @ torch.ones(3, 3)
        raise RuntimeError
    steps.profiler.close()
    assert sizes(tmp_path / "steps_2-3.trace.json") == [2, 3]
    steps.profiler.close()
    assert len(steps.said) == 1


def test_a_run_that_ends_before_is_told(tmp_path: Path) -> None:
    steps = Steps(tmp_path / "profile", 5, 6)
    steps.run(1, 2, 3, 4)
    steps.profiler.close()
    assert steps.said == [
        "run.profile_steps asks for steps 5 to 6, but none of them ran; the last one was 4, so there is no profile"
    ]
    assert not (tmp_path / "profile").exists()


def test_nothing_happens_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.infra.step_profiler.profile", None)
    steps = Steps(None, 1, 2)
    steps.run(1, 2, 3)
    steps.profiler.close()
    assert steps.said == []


def test_phases_are_marked_only_while_something_is_recorded(tmp_path: Path) -> None:
    steps = Steps(tmp_path, 2, 2)
    steps.run(1, 2)
    assert not steps.timer.annotated
    assert "profile" in steps.timer.totals()  # what the writing took is no part of another phase


@pytest.mark.parametrize("steps", ["[3, 2]", "[0, 1]"])
def test_a_range_that_is_none(steps: str) -> None:
    with pytest.raises(UserError, match="expected the first and the last step, counted from 1"):
        load_config(RunConfig, overrides=["profile=true", f"profile_steps={steps}"])
    with pytest.raises(ValidationError):
        RunConfig(profile=True, profile_steps=(3, 2))


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    steps = Steps(tmp_path, 1, 1)
    monkeypatch.setattr("rlhf.infra.step_profiler.write_text", full)
    with pytest.raises(UserError, match="could not be written: No space left on device"):
        steps.run(1)


def test_a_run_that_fails_keeps_its_record_whatever_becomes_of_the_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no trace")

    config = RunConfig(output_dir=tmp_path, name="run", profile=True, device="cpu")
    run = Run.create("sft", config, config)
    monkeypatch.setattr(StepProfiler, "close", broken)
    with pytest.raises(RuntimeError, match="no trace"):
        run.finish()
    assert json.loads((run.folder / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
