"""How long methods train: what a run took, and the length at which a method takes the seconds that all are given.

A budget of seconds becomes a number of steps before training begins, instead of a clock that ends it: schedules of the
learning rate then come to their end, every seed makes the same steps, and with the same lengths a run is repeated bit
for bit on any machine. What a run did take is measured and told beside its result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from rlhf.eval.ablation_report import Spent
from rlhf.infra.run_folder import RUN_INFO, read_run_info

START_UP = ("load", "save")
SAMPLING = ("generate", "score", "work", "judge")
TIMED_SHARE = 1 / 3  # of the seconds, for the longest of the runs that are timed


def seconds_spent(folders: list[Path]) -> Spent:
    """What finished runs took, those inside them included."""
    total = Spent(0.0, 0.0, 0.0)
    for folder in folders:
        for info in sorted(folder.rglob(RUN_INFO)):
            total = total + _by_kind(read_run_info(info.parent).get("seconds_by_phase", {}))
    return total


def fitting_length(seconds: float, trial: int, time_of: Callable[[int], float]) -> int:
    """The length at which a method takes so many seconds, by runs that are timed; at least 1.

    `time_of` runs a method at a length and returns its seconds. Runs grow until one takes a third of the budget; the
    line through the first and the last tells what both have in common (a pass of the reference over all pairs, say)
    from what grows.
    """
    first = time_of(trial)
    length, last = trial, first
    while length == trial or last < TIMED_SHARE * seconds:
        length = max(2 * length, round(TIMED_SHARE * seconds * length / last))
        last = time_of(length)
    each = (last - first) / (length - trial)
    if each <= 0:  # chance outweighed what the longer run had more to do
        return max(1, round(length * seconds / last))
    fixed = max(0.0, last - each * length)
    return max(1, round((seconds - fixed) / each))


def _by_kind(phases: Mapping[str, float]) -> Spent:
    sampling = sum(phases.get(name, 0.0) for name in SAMPLING)
    start_up = sum(phases.get(name, 0.0) for name in START_UP)
    return Spent(sum(phases.values()) - sampling - start_up, sampling, start_up)
