from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlhf.infra.profiling import PhaseTimer, peak_memory_mb, per_second, profiled_steps, reset_peak_memory


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_phases_add_up(clock: FakeClock) -> None:
    timer = PhaseTimer(clock=clock)
    for seconds in (1.0, 2.0):
        with timer("generate"):
            clock.now += seconds
        clock.now += 50  # between phases nothing counts
        with timer("update"):
            clock.now += 10
    assert timer.seconds() == {"generate": 3.0, "update": 20.0}
    timer.reset()
    assert timer.seconds() == {}


def test_inner_phases_do_not_count_twice(clock: FakeClock) -> None:
    timer = PhaseTimer(clock=clock)
    with timer("step"):
        clock.now += 1
        with timer("generate"):
            clock.now += 2
            with timer("generate"):  # in itself
                clock.now += 4
        clock.now += 8
    assert timer.seconds() == {"step": 9.0, "generate": 6.0}


def test_an_error_closes_the_phase(clock: FakeClock) -> None:
    timer = PhaseTimer(clock=clock)
    with pytest.raises(RuntimeError), timer("outer"):
        clock.now += 1
        with timer("inner"):
            clock.now += 2
            raise RuntimeError
    clock.now += 10
    assert timer.seconds() == {"outer": 1.0, "inner": 2.0}


def test_reading_and_resetting_inside_a_phase(clock: FakeClock) -> None:
    timer = PhaseTimer(clock=clock)
    with timer("step"):
        clock.now += 3
        assert timer.seconds() == {"step": 3.0}
        timer.reset()
        clock.now += 4
    assert timer.seconds() == {"step": 4.0}


def test_rates() -> None:
    assert per_second(10, 4) == 2.5
    assert per_second(10, 0) == 0.0


def test_peak_memory_sees_an_allocation_and_can_be_reset() -> None:
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    before = peak_memory_mb(cpu)
    block = torch.ones(64 * 2**20 // 4)
    assert peak_memory_mb(cpu) - before > 50
    assert 10 < before < 100_000
    del block


def test_a_trace_is_written_when_a_folder_is_given(tmp_path: Path) -> None:
    with profiled_steps(tmp_path / "profile", num_steps=1) as next_step:
        for _ in range(3):
            torch.ones(8, 8) @ torch.ones(8, 8)
            next_step()
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::matmul" for event in events)
    assert "aten::matmul" in (tmp_path / "profile" / "operators.txt").read_text()
    with profiled_steps(None) as next_step:
        next_step()
