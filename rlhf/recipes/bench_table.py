"""A comparison of two configurations as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rlhf.recipes.bench import LEFT_OUT, Comparison, SideResult, Spread
from rlhf.recipes.bench_sides import SIDES


def table(found: Comparison) -> str:
    """What was compared, both sides beside each other, and the ratio; amounts are medians with their range."""
    rows = [("", *SIDES), *_rows(found.sides)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(SIDES) + 1)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*_heading(found), "", *lines, "", *_conclusion(found)])


def _heading(found: Comparison) -> list[str]:
    rates = ", ".join(f"{name} {rate:,.0f} GFLOP/s" for name, rate in found.matmul_gflops_per_second.items())
    lines = [
        f"{found.recipe}: {found.num_pairs} pairs of runs of {found.num_steps} optimizer steps; of every run the first "
        f"{_steps(found.num_warmup)} left out as warm-up, and everywhere the time of {', '.join(LEFT_OUT)}",
        f"this machine multiplies matrices at {rates} ({found.num_threads} threads)",
    ]
    differing = [f"  {name}: A {a}, B {b}" for name, (a, b) in found.differing_keys.items()]
    lines += ["settings that differ:", *differing] if differing else ["A and B have the same settings"]
    if found.differing_work:
        lines.append(f"the work is not the same: {'; '.join(found.differing_work)}")
    return lines


def _rows(sides: Mapping[str, SideResult]) -> list[tuple[str, str, str]]:
    def row(name: str, shown: Callable[[SideResult], str]) -> tuple[str, str, str]:
        return name, shown(sides["A"]), shown(sides["B"])

    rows = [
        row("seconds per step", lambda side: _ranged(side.seconds_per_step)),
        row("tokens per second", lambda side: _ranged(side.tokens_per_second)),
        row("peak memory, MB", lambda side: _ranged(side.peak_memory_mb)),
        row("products, GFLOP per step", lambda side: f"{side.gflops_per_step:.4g}"),
        row("products, GFLOP/s", lambda side: f"{side.gflops_per_second:.4g}"),
        row("share of the machine's rate", lambda side: f"{side.share:.1%} of {side.dtype}"),
        row("last loss", lambda side: f"{side.last_loss:.6g}"),
    ]
    for phase in dict.fromkeys(name for side in sides.values() for name in side.seconds_by_phase):
        note = " (left out)" if phase in LEFT_OUT else ""
        rows.append(_phase_row(phase, note, sides))
    return rows


def _phase_row(phase: str, note: str, sides: Mapping[str, SideResult]) -> tuple[str, str, str]:
    amounts = [f"{sides[label].seconds_by_phase.get(phase, 0.0):.4g}" for label in SIDES]
    return f"  {phase}, s per step{note}", amounts[0], amounts[1]


def _conclusion(found: Comparison) -> list[str]:
    same = (
        "the losses are equal, bit for bit"
        if found.largest_loss_difference == 0
        else (f"the losses differ by at most {found.largest_loss_difference:.2g}")
    )
    lines = [f"B / A in seconds per step: {_ranged(found.ratio, 3)} over {found.num_pairs} pairs; {same}"]
    if found.differing_work:
        lines.append(f"B / A in seconds per token: {_ranged(found.per_token, 3)}")
    return lines


def _ranged(value: Spread, digits: int | None = None) -> str:
    def shown(number: float) -> str:
        return f"{number:.4g}" if digits is None else f"{number:.{digits}f}"

    return f"{shown(value.median)} ({shown(value.low)} to {shown(value.high)})"


def _steps(count: int) -> str:
    return "step is" if count == 1 else f"{count} steps are"
