"""A plan as text: one table per stage, a verdict, and what to change where it does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rlhf.infra.memory_limit import GB, MemoryLimit
from rlhf.recipes.plan_advice import Advice
from rlhf.recipes.plan_predict import Machine, StagePlan
from rlhf.recipes.plan_trace import FILE, PARTS


def stage_lines(plan: StagePlan, machine: Machine) -> Iterator[str]:
    """Heading, table in GB (10^9 bytes) and verdict of a stage."""
    yield (
        f"{plan.name}: {plan.base}, {plan.num_parameters:,} parameters (shape from {plan.shape_origin}), "
        f"{plan.num_trained:,} train"
    )
    shown = [part for part in PARTS if any(phase.parts.get(part, 0) >= 0.005 * GB for phase in plan.phases)]
    rows = [["phase", *shown, "peak"]]
    for phase in plan.phases:
        rows.append([phase.name, *(_gb(phase.parts.get(part, 0)) for part in shown), _gb(phase.num_bytes)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield "  ".join(["  " + first.ljust(widths[0]), *cells])
    mapped = max(phase.parts.get(FILE, 0) for phase in plan.phases)
    if mapped:
        yield f"  {_gb(mapped)} GB of the load are the file, mapped: the system takes it back where memory is short"
    yield f"  {verdict_line(plan, machine)}"
    if plan.verdict(machine.limit) == "does not fit":
        yield "  looking for what to change; every change is planned again ..."


def verdict_line(plan: StagePlan, machine: Machine) -> str:
    """The peak beside what there is."""
    peak = f"peak {_gb(plan.peak.needed_bytes)} GB in {plan.peak.name}"
    if machine.limit is None:
        return f"{peak}; this machine has no {machine.device} device: say how much it has with --memory-gb"
    words = {
        "fits": "fits",
        "tight": "fits, but tightly: predictions were found up to 15 % off",
        "does not fit": "does not fit",
    }
    return f"{peak}, {limit_words(machine.limit)} on {machine.device}: {words[plan.verdict(machine.limit)]}"


def limit_words(limit: MemoryLimit) -> str:
    return f"{_gb(limit.num_bytes)} GB ({limit.origin})"


def advice_lines(advice: Sequence[Advice], machine: Machine) -> Iterator[str]:
    """What to change, one line per choice."""
    assert machine.limit is not None
    limit = machine.limit
    enough = [one for one in advice if one.is_enough]
    if not advice:
        yield "  nothing that could be set lower would help: take a smaller base, or more memory"
    for one in enough or advice:
        settings, prices = " ".join(one.settings), ", ".join(dict.fromkeys(one.prices))
        if one.is_enough:
            yield f"  change: {settings}  -> {_gb(one.num_bytes)} GB ({prices})"
        else:
            yield (
                f"  even {settings} comes to {_gb(one.num_bytes)} GB, more than {_gb(limit.num_bytes)}: take a smaller "
                "base, or more memory"
            )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / GB:.2f}"
