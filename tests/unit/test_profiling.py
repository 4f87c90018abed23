from __future__ import annotations

from mmap import mmap

import pytest
import torch

from rlhf.infra.profiling import (
    PhaseTimer,
    measured_by,
    memory_metrics,
    memory_used,
    padding_share,
    peak_memory_mb,
    per_second,
    reset_peak_memory,
    where_time_went,
)


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


def test_laps_leave_nothing_out_and_add_up(clock: FakeClock) -> None:
    timer = PhaseTimer(clock=clock)
    timer.add("load", 7.0)
    clock.now += 1  # in no phase
    with timer("generate"):
        clock.now += 2
    assert timer.lap() == {"generate": 2.0, "other": 1.0}
    with timer("update"):
        clock.now += 4
    with timer("generate"):
        clock.now += 8
        assert timer.totals() == {"load": 7.0, "generate": 10.0, "other": 1.0, "update": 4.0}
    assert timer.lap() == {"update": 4.0, "generate": 8.0, "other": 0.0}
    clock.now += 16
    timer.reset()  # what was in no phase is not lost to the totals either
    assert timer.lap() == {"other": 0.0}
    assert timer.totals() == {"load": 7.0, "generate": 10.0, "other": 17.0, "update": 4.0}


def test_a_lap_in_the_middle_of_a_phase(clock: FakeClock) -> None:
    timer = PhaseTimer(clock=clock)
    with timer("update"):
        clock.now += 1
        assert timer.lap() == {"update": 1.0, "other": 0.0}
        clock.now += 2
    clock.now += 4
    assert timer.lap() == {"update": 2.0, "other": 4.0}


def test_anything_that_grows_can_be_added_up_by_phase() -> None:
    count = 0
    with measured_by(lambda: count):
        timer = PhaseTimer()
    seconds = PhaseTimer()
    with timer("update"), seconds("update"):
        count += 5
    assert timer.lap() == {"update": 5, "other": 0}
    assert seconds.lap()["update"] < 5


def test_where_the_time_went_is_told_from_the_longest_phase_down() -> None:
    told = where_time_went({"load": 2.0, "update": 7.0, "save": 0.001, "other": 1.0})
    assert told == "10.0 s: update 7.0 s (70%), load 2.0 s (20%), other 1.0 s (10%)"  # a thousandth says nothing
    assert where_time_went({}) == "0.0 s: nothing was measured"


def test_padding_is_a_share_of_what_went_through() -> None:
    assert padding_share(75, 100) == 0.25
    assert padding_share(0, 0) == 0.0


def test_memory_is_that_of_the_device_and_of_the_process() -> None:
    metrics = memory_metrics(torch.device("cpu"))
    assert metrics.keys() == {"memory/peak_mb", "memory/peak_rss_mb"}
    assert metrics["memory/peak_mb"] == metrics["memory/peak_rss_mb"] > 10
    assert memory_used(torch.device("cpu")) == f"peak memory {peak_memory_mb(torch.device('cpu')):.0f} MB"


def test_rates() -> None:
    assert per_second(10, 4) == 2.5
    assert per_second(10, 0) == 0.0


def test_peak_memory_sees_an_allocation_and_can_be_reset() -> None:
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    before = peak_memory_mb(cpu)
    with mmap(-1, 64 * 2**20) as block:  # a tensor could come from memory that was freed but not given back
        for page in range(0, len(block), 4096):
            block[page] = 1
        assert peak_memory_mb(cpu) - before > 50
    assert 10 < before < 100_000
