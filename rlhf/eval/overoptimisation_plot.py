"""Gold and proxy against KL with the fitted curves, one column per curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlhf.eval.overoptimisation import START_KL, CurveFit, Fit
from rlhf.eval.plots import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 4
_INK = "#1b1f23"


def overoptimisation_png(fits: Sequence[CurveFit], path: Path) -> None:
    """Write a panel of gold above one of the proxy for every curve: points, fit with its 95 % band, and gold's peak.

    The axis of KL is drawn in its root, d, the distance that the law is about. Runs that start from different levels
    are moved to the mean of them, as the fit sees them.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(fits))
    blocks = math.ceil(len(fits) / columns)
    with rc_context({"font.size": 8, "text.parse_math": False}):
        figure = Figure(figsize=(1.2 + columns * 3.1, blocks * 4.6), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        for place, fit in enumerate(fits):
            block, column = divmod(place, columns)
            for row, what in enumerate(("gold", "proxy")):
                axes = figure.add_subplot(2 * blocks, columns, (2 * block + row) * columns + column + 1)
                _panel(axes, fit, what)
        figure.savefig(path)


def _panel(axes: Axes, fit: CurveFit, what: str) -> None:
    one: Fit = fit.gold if what == "gold" else fit.proxy
    axes.set_xscale("function", functions=(_root, np.square))
    for number, (track, level) in enumerate(zip(fit.curve.tracks, one.levels_S, strict=True)):
        values_M = track.gold_M if what == "gold" else track.proxy_M
        moved_M = values_M - level + one.levels_S.mean()
        colour = COLOURS[(number + 1) % len(COLOURS)]
        axes.plot(track.distances_M**2, moved_M, ".", color=colour, markersize=5, alpha=0.75, label=track.name)
    axes.plot(one.grid_kl, one.grid, color=_INK, linewidth=1.6)
    axes.fill_between(one.grid_kl, one.grid_low, one.grid_high, color=_INK, alpha=0.15, linewidth=0)
    if what == "gold":
        axes.set_title(f"{fit.curve.name}: {_mark_peak(axes, fit)}")
        axes.legend(fontsize=6, loc="best", frameon=False)
    axes.set_xlim(0, fit.curve.max_kl * 1.04)
    ticks = _ticks(fit.curve.max_kl)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylabel(what)
    axes.set_xlabel("KL, nats (axis in its root)")
    axes.grid(True, linewidth=0.5, alpha=0.4)


def _mark_peak(axes: Axes, fit: CurveFit) -> str:
    """A line at the peak and a bar for its interval, as far as they lie in the measured range; returns words for it."""
    peak, best, furthest = fit.gold.peak_kl, fit.gold.best.estimate, fit.curve.max_kl
    if peak.estimate < START_KL:
        return "falls from the start"
    if peak.estimate > furthest:
        return "no peak in range"
    axes.axvline(peak.estimate, color="#b3261e", linewidth=1, linestyle="--")
    axes.plot([peak.low, min(peak.high, furthest)], [best, best], color="#b3261e", linewidth=2.5, alpha=0.6)
    axes.plot([peak.estimate], [best], "o", color="#b3261e", markersize=5)
    return f"peak at {peak.estimate:.2g} nats"


def _root(values: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(values, 0.0))


def _ticks(furthest: float) -> list[float]:
    """Round KLs that lie evenly in the root."""
    step = 10.0 ** math.floor(math.log10(furthest))
    unit = next(size * step for size in (0.5, 1, 2, 5, 10) if size * step * 2.0 > furthest or size == 10)
    return [0.0] + [share * unit for share in (0.02, 0.1, 0.25, 0.5, 1, 2, 4) if share * unit <= furthest]
