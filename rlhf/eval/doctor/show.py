"""Findings as lines: in colour and in columns on a terminal, as one plain line each elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf.eval.doctor.finding import Finding


def show(console: Console, finding: Finding, stage: str = "") -> None:
    """Print a finding; what a fault breaks and the fix stand behind it where there is something to mend."""
    what = f"{finding.title}: {finding.seen.rstrip('.')}"
    if finding.level != "green":
        what += f". It would break: {finding.breaks}. Fix: {finding.fix.rstrip('.')}"
    if not console.is_terminal:
        columns = [f"{stage:<8}"] * bool(stage) + [f"{finding.level:<6}", f"{finding.id:<5}", what]
        console.print("  ".join(columns), markup=False)
        return
    grid = Table.grid(padding=(0, 2))
    cells = [Text(finding.level, style=finding.level), Text(finding.id), Text(what)]
    for width in ([8] if stage else []) + [6, 5]:
        grid.add_column(width=width)
    grid.add_column(overflow="fold")
    grid.add_row(*([Text(stage, style="dim")] if stage else []), *cells)
    console.print(grid, soft_wrap=False)
