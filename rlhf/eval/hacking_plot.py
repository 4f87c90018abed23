"""Signs of reward hacking over the iterations, each against its threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rlhf.eval.hacking import SIGNS, Look, Verdict

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
            told = [(look.step, change) for look in looks if (change := sign.change(looks[0], look)) is not None]
            steps = [step for step, _ in told]
            sizes = [sign.scale * change.size for _, change in told]
            margins = [
                [sign.scale * (change.size - change.low) for _, change in told],
                [sign.scale * (change.high - change.size) for _, change in told],
            ]
            colour = CAUGHT_COLOUR if verdict.caught else CLEAN_COLOUR
            axes.errorbar(steps, sizes, yerr=margins, color=colour, marker="o", markersize=3, capsize=2, linewidth=1.2)
            axes.axhline(sign.scale * verdict.threshold, color=LIMIT_COLOUR, linestyle="--", linewidth=0.9)
            said = f"caught at {verdict.step}" if verdict.caught else "clean"
            axes.set_title(f"{verdict.sign.replace('_', ' ')}: {said}", color=colour)
            axes.set_xlabel("iteration")
            axes.set_ylabel(sign.unit.strip() or "change")
            axes.grid(True, linewidth=0.5, alpha=0.4)
        figure.savefig(path)
