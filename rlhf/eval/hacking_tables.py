"""Signs of reward hacking as plain cells: one table for each policy and time of looking."""

from __future__ import annotations

from rlhf.eval.hacking import SIGNS, Verdict
from rlhf.eval.hacking_record import HackingRecord
from rlhf.eval.tables import Cell, Table


def hacking_of(record: HackingRecord) -> Table:
    """One row per sign: how far it went, its threshold, the verdict."""
    rows = tuple(
        (
            _label(verdict),
            (
                Cell(SIGNS[verdict.sign].number(verdict.change.size), _interval(verdict)),
                Cell(f"{SIGNS[verdict.sign].scale * verdict.threshold:.3g}"),
                Cell(_said(record, verdict), bad=verdict.caught),
            ),
        )
        for verdict in record.verdicts
    )
    return Table(_heading(record), ("", "Found", "Threshold", "Verdict"), rows, _caption(record), one_line=True)


def _heading(record: HackingRecord) -> str:
    return f"{record.title}: {len(record.caught)} of {len(record.verdicts)} signs"


def _label(verdict: Verdict) -> str:
    sign = SIGNS[verdict.sign]
    return sign.label + (f", {sign.unit.strip()}" if sign.unit else "")


def _interval(verdict: Verdict) -> str:
    number = SIGNS[verdict.sign].number
    return f"[{number(verdict.change.low)}, {number(verdict.change.high)}]"


def _said(record: HackingRecord, verdict: Verdict) -> str:
    if not verdict.caught:
        return "clean"
    return "caught" if record.after_training else f"caught at {verdict.step}"


def _caption(record: HackingRecord) -> str:
    said = (
        "Held-out answers against the reference's."
        if record.after_training
        else f"Looked at in iterations {_steps(record)}; each against the first."
    )
    off = [name for name in SIGNS if name in record.settings and record.settings[name] is None]
    seen = {verdict.sign for verdict in record.verdicts}
    without = [name for name in SIGNS if name not in seen and name not in off]
    if without:
        said += f" No figures for: {_names(without)}."
    if off:
        said += f" Left out by the settings: {_names(off)}."
    action = record.settings.get("action", "warn")
    return said if record.after_training or action == "warn" else f"{said} On a sign: {action}."


def _steps(record: HackingRecord) -> str:
    steps = [str(look.step) for look in record.looks]
    return ", ".join(steps) if len(steps) <= 8 else f"{', '.join(steps[:3])} to {steps[-1]} ({len(steps)} looks)"


def _names(signs: list[str]) -> str:
    return ", ".join(SIGNS[name].label.split(",")[0].lower() for name in signs)
