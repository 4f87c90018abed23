"""One figure of a comparison of methods: score against KL, with what each cost."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from rlhf.eval.intervals import FloatArray
from rlhf.eval.plots import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rlhf.eval.ablation_report import Ablation, Summary

MARKERS = "osD^vPpXH<>d"
SMALLEST, LARGEST = 55.0, 260.0  # area of a marker in square points: without sampling, and for nothing but that


def ablation_png(found: Ablation, path: Path) -> None:
    """Write score against KL to SFT: seeds small, means large with the 95 % interval over seeds of the gain.

    The larger a marker, the more of the time went into sampling and scoring; the legend has seconds.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    start = fmean(one.score.estimate for one in found.baselines)
    with rc_context({"font.size": 9, "text.parse_math": False}):
        height = max(4.8, 1.3 + 0.31 * len(found.summaries))  # what the legend takes
        figure = Figure(figsize=(9.5, height), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.axhline(start, color=COLOURS[0], linewidth=0.9, linestyle="--")
        axes.plot(0, start, marker="o", color=COLOURS[0], linestyle="none", label="SFT, where all begin")
        for place, summary in enumerate(found.summaries):
            _draw(axes, summary, start, place)
        # Gains grow with the root of the KL at first, and one method that went far must not press the others together.
        axes.set_xscale("function", functions=(_root, _square))
        axes.set_xlabel("KL to SFT, nats per response (square-root scale)")
        axes.set_ylabel(f"{found.measure} score on held-out prompts")
        axes.grid(True, linewidth=0.5, alpha=0.4)
        axes.legend(
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            frameon=False,
            labelspacing=1.1,
            title="seconds of training (sampling and scoring)\nlarger marker: more of it sampling",
        )
        figure.savefig(path)


def _root(kl: FloatArray) -> FloatArray:
    return np.sign(kl) * np.sqrt(np.abs(kl))  # an estimate near 0 may lie below it


def _square(root: FloatArray) -> FloatArray:
    return np.sign(root) * np.square(root)


def _draw(axes: Axes, summary: Summary, start: float, place: int) -> None:
    colour, marker = COLOURS[1 + place % (len(COLOURS) - 1)], MARKERS[place % len(MARKERS)]
    kls, gains = [one.kl for one in summary.outcomes], [one.gain.estimate for one in summary.outcomes]
    sampling = summary.mean(lambda one: one.spent.sampling)
    label = f"{summary.method}: {summary.mean(lambda one: one.spent.training):.0f} s ({sampling:.0f})"
    axes.scatter(kls, [start + gain for gain in gains], s=9, color=colour, alpha=0.6, marker=marker, linewidths=0)
    share, gain = sampling / summary.mean(lambda one: one.spent.training), summary.gain
    area = SMALLEST + (LARGEST - SMALLEST) * share
    if gain.has_bounds:
        bounds = [[gain.estimate - gain.low], [gain.high - gain.estimate]]
        axes.errorbar(
            fmean(kls), start + gain.estimate, yerr=bounds, color=colour, capsize=2, linewidth=1, linestyle="none"
        )
    axes.scatter(
        fmean(kls),
        start + gain.estimate,
        s=area,
        color=colour,
        marker=marker,
        edgecolors="white",
        zorder=3,
        label=label,
    )
