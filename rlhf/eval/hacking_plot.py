"""Signs of reward hacking, each against its threshold: over the iterations of a run, and model by model after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rlhf.eval.hacking import SIGNS, Change, Look, Verdict
from rlhf.eval.hacking_record import HackingRecord
from rlhf.eval.plots import COLOURS, INK, Chart, as_chart, chart_style, new_axes

AFTER = "After training"
_CLEAN, _CAUGHT = COLOURS[1], COLOURS[6]
CLEAN_COLOUR, CAUGHT_COLOUR, LIMIT_COLOUR = "#1f6f8b", "#b3261e", "#666666"


def hacking_png(looks: Sequence[Look], verdicts: Sequence[Verdict], path: Path) -> None:
    """Write one panel per verdict: the sign at every look with its 95 % interval, the threshold as a dashed line."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 4
    height = math.ceil(len(verdicts) / columns)
    with rc_context({"font.size": 8, "text.parse_math": False}):
        figure = Figure(figsize=(columns * 2.9, height * 2.1), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        for place, verdict in enumerate(verdicts, start=1):
            axes = figure.add_subplot(height, columns, place)
            sign = SIGNS[verdict.sign]
            told = _told(looks, verdict.sign)
            steps = [step for step, _ in told]
            sizes, margins = _scaled(verdict.sign, [change for _, change in told])
            colour = CAUGHT_COLOUR if verdict.caught else CLEAN_COLOUR
            axes.errorbar(steps, sizes, yerr=margins, color=colour, marker="o", markersize=3, capsize=2, linewidth=1.2)
            axes.axhline(sign.scale * verdict.threshold, color=LIMIT_COLOUR, linestyle="--", linewidth=0.9)
            said = f"caught at {verdict.step}" if verdict.caught else "clean"
            axes.set_title(f"{verdict.sign.replace('_', ' ')}: {said}", color=colour)
            axes.set_xlabel("iteration")
            axes.set_ylabel(sign.unit.strip() or "change")
            axes.grid(True, linewidth=0.5, alpha=0.4)
        figure.savefig(path)


def hacking_charts(records: Sequence[HackingRecord]) -> dict[str, list[Chart]]:
    """Plots for a report by heading: each policy's signs over its training, and those of all models after training."""
    found = {}
    with chart_style():
        for record in records:
            if not record.after_training:
                found[record.title] = [_over_training(record, verdict) for verdict in record.verdicts]
        after = [record for record in records if record.after_training]
        seen = {verdict.sign for record in after for verdict in record.verdicts}
        if after:
            found[AFTER] = [_by_model(after, name) for name in SIGNS if name in seen]
    return found


def _over_training(record: HackingRecord, verdict: Verdict) -> Chart:
    sign, told = SIGNS[verdict.sign], _told(record.looks, verdict.sign)
    figure, axes = new_axes("iteration", "")
    colour = _CAUGHT if verdict.caught else _CLEAN
    sizes, margins = _scaled(verdict.sign, [change for _, change in told])
    axes.errorbar([step for step, _ in told], sizes, yerr=margins, color=colour, marker="o", markersize=3, capsize=2)
    axes.axhline(sign.scale * verdict.threshold, color=INK, linestyle="--", linewidth=0.9)
    said = f"caught at iteration {verdict.step}" if verdict.caught else "clean"
    description = f"{record.title}, {sign.label}, with 95 % intervals and its threshold as a dashed line: {said}; "
    chart = as_chart(
        f"hacking-training-{record.policy}-{verdict.sign}",
        f"{sign.label}: {said}",
        figure,
        description + verdict.sentence,
    )
    return replace(chart, unit=sign.unit.strip())


def _by_model(records: Sequence[HackingRecord], name: str) -> Chart:
    sign = SIGNS[name]
    found = [(record.policy, v) for record in records for v in record.verdicts if v.sign == name]
    figure, axes = new_axes("", "")
    for place, (_, verdict) in enumerate(found):
        sizes, margins = _scaled(name, [verdict.change])
        colour = _CAUGHT if verdict.caught else _CLEAN
        axes.errorbar([place], sizes, yerr=margins, color=colour, marker="o", markersize=4.5, capsize=3, linestyle="")
        # Each model's own threshold: they may have been trained with different ones.
        reach, height = [place - 0.4, place + 0.4], sign.scale * verdict.threshold
        axes.plot(reach, [height, height], color=INK, linestyle="--", linewidth=0.9)
    axes.set_xticks(range(len(found)), [policy for policy, _ in found])
    axes.set_xlim(-0.6, len(found) - 0.4)
    caught = [policy for policy, verdict in found if verdict.caught]
    said = f"caught in {', '.join(caught)}" if caught else "clean"
    each = "; ".join(f"{policy}: {verdict.sentence}" for policy, verdict in found)
    description = f"after training, {sign.label}, with 95 % intervals and thresholds as dashed lines: {each}"
    chart = as_chart(f"hacking-after-{name}", f"{sign.label}: {said}", figure, description)
    return replace(chart, unit=sign.unit.strip())


def _told(looks: Sequence[Look], name: str) -> list[tuple[int, Change]]:
    """The looks that have figures for a sign, with what became of it."""
    return [(look.step, found) for look in looks if (found := SIGNS[name].change(looks[0], look)) is not None]


def _scaled(name: str, changes: Sequence[Change]) -> tuple[list[float], list[list[float]]]:
    """Sizes, and the reaches of their intervals downwards and upwards, in the unit of the sign."""
    scale = SIGNS[name].scale
    downwards = [scale * (change.size - change.low) for change in changes]
    upwards = [scale * (change.high - change.size) for change in changes]
    return [scale * change.size for change in changes], [downwards, upwards]
