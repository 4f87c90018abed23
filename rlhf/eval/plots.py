"""Plots as inline SVG that takes its colours from the page, so that they are right in light and in dark.

Matplotlib is imported when the first plot is drawn. Text, axes and grid carry placeholder colours that are replaced by
CSS variables with fallbacks; the same files therefore also stand alone.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.eval.intervals import FloatArray
from rlhf.eval.panels import SHORT, Panel, panels_of
from rlhf.eval.report_data import Report
from rlhf.eval.reward_accuracy import RewardAccuracy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart in light and dark and with the common colour-vision deficiencies (Okabe and Ito, middle tones).
COLOURS = ("#7f8790", "#2f7fc1", "#d98a00", "#129575", "#c2578f", "#8a63c9", "#b5502f", "#5aa3d8")
INK, _GRID = "#010203", "#040506"
_THEME = {INK: "var(--ink, #3b4249)", _GRID: "var(--rule, #d5dade)"}
_DASHES = ("-", "--", "-.", ":")
_SIZE = (3.5, 2.15)
_MAX_POINTS = 240


@dataclass(frozen=True)
class Chart:
    """One plot: a name usable in file names and ids, its title, the SVG, and a sentence that says what it shows.

    `unit` is that of the vertical axis where it is not written on it. `tall` plots take two rows of the page's grid.
    """

    name: str
    title: str
    svg: str
    description: str
    unit: str = ""
    tall: bool = False


def training_charts(stage: str, rows: Sequence[Mapping[str, float]]) -> list[Chart]:
    """Plot a stage's log over its steps: every group of metrics for PPO-like stages, the losses of the offline ones."""
    online = any(re.search(r"(^|/)kl|entropy", key) for row in rows[:1] for key in row)
    panels = panels_of(rows, None if online else SHORT)
    steps = np.array([row.get("step", index) for index, row in enumerate(rows)], dtype=np.float64)
    with chart_style():
        return [_panel_chart(stage, number, panel, steps, rows) for number, panel in enumerate(panels)]


def report_charts(report: Report) -> list[Chart]:
    """Plot the comparison of the models: parts of the gold score, distributions of score and length, win-rates."""
    with chart_style():
        charts = [_win_rates(report), _gold_parts(report), _scores(report), _lengths(report)]
    return [chart for chart in charts if chart is not None]


def reward_charts(found: RewardAccuracy, margins: Sequence[float]) -> list[Chart]:
    """Plot a reward model's accuracy by family, its calibration and the distribution of its margins."""
    with chart_style():
        return [_family_accuracy(found), _calibration(found), _margins(margins)]


def diagnostics_png(rows: Sequence[Mapping[str, float]], path: Path, title: str = "") -> None:
    """Write every panel of a training log into one PNG, for documents that cannot hold SVG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = panels_of(rows)
    steps = np.array([row.get("step", index) for index, row in enumerate(rows)], dtype=np.float64)
    columns = 4
    height = math.ceil(len(panels) / columns)
    with rc_context({"font.size": 8, "text.parse_math": False}):
        figure = Figure(figsize=(columns * _SIZE[0], height * _SIZE[1] + 0.4), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        if title:
            figure.suptitle(title)
        for number, panel in enumerate(panels, start=1):
            axes = figure.add_subplot(height, columns, number)
            axes.set_title(f"{panel.title} ({panel.unit})" if panel.unit else panel.title)
            axes.grid(True, linewidth=0.5, alpha=0.4)
            _draw_panel(axes, panel, steps, rows)
        figure.savefig(path)


def _panel_chart(
    stage: str, number: int, panel: Panel, steps: FloatArray, rows: Sequence[Mapping[str, float]]
) -> Chart:
    figure, axes = new_axes("step", "")
    said = _draw_panel(axes, panel, steps, rows)
    chart = as_chart(f"{stage}-{number}-{panel.title}", panel.title, figure, f"{stage}, {panel.title}: {said}")
    return replace(chart, unit=panel.unit)


def _draw_panel(axes: Axes, panel: Panel, steps: FloatArray, rows: Sequence[Mapping[str, float]]) -> str:
    """Draw a panel's lines and return what they do in words: each from its first to its last value."""
    said = []
    labels = _labels(panel.keys)
    for number, key in enumerate(panel.keys):
        values = np.array([row.get(key, math.nan) for row in rows], dtype=np.float64)
        known = np.isfinite(values)
        if not known.any():
            said.append(f"{key} has no finite value")
            continue
        x, y = _thinned(steps[known], values[known])
        marker = "o" if len(x) < 3 else None
        colour = COLOURS[(number + 1) % len(COLOURS)]
        axes.plot(x, y, color=colour, linestyle=_DASHES[number % 4], marker=marker, markersize=3, label=labels[number])
        said.append(f"{key} from {values[known][0]:.4g} to {values[known][-1]:.4g}")
    if len(panel.keys) > 3:  # so many lines leave no room between them
        longest = max(map(len, labels))
        _legend_above(axes, 3 if longest < 14 else 2 if longest < 27 else 1, fontsize=6.2 if longest > 19 else 7.5)
    elif len(panel.keys) > 1:
        axes.legend(fontsize=7)
    return "; ".join(said)


def _gold_parts(report: Report) -> Chart | None:
    metrics = report.main_view.metrics
    parts = sorted({part for measured in metrics.values() for part in measured.gold_parts})
    if not parts:
        return None
    figure, axes = new_axes("", "mean")
    width = 0.8 / len(metrics)
    for number, (name, measured) in enumerate(metrics.items()):
        found = [measured.gold_parts.get(part) for part in parts]
        places = np.arange(len(parts)) + (number - (len(metrics) - 1) / 2) * width
        heights = [part.estimate if part else math.nan for part in found]
        reach = [
            [part.estimate - part.low if part and part.has_bounds else 0.0 for part in found],
            [part.high - part.estimate if part and part.has_bounds else 0.0 for part in found],
        ]
        axes.bar(places, heights, width * 0.92, color=_model_colour(report, name), label=name)
        axes.errorbar(places, heights, np.clip(reach, 0, None), fmt="none", ecolor=INK, elinewidth=0.8)
    axes.set_xticks(np.arange(len(parts)), [part.replace("_", " ").replace(" ", "\n", 1) for part in parts], fontsize=7)
    _legend_above(axes, len(metrics))
    said = f"mean of each part with 95 % intervals, {report.main_view.title.lower()}"
    return as_chart("gold-parts", "Parts of the gold score", figure, said)


def _scores(report: Report) -> Chart | None:
    judge = report.judge
    if judge is None:
        return None
    values = {
        name: [v for s in _main_samples(report, name) if (v := s.gold if judge == "gold" else s.reward) is not None]
        for name in report.main_view.metrics
    }
    title = "Gold score" if judge == "gold" else "Reward-model score"
    return _histogram(report, "scores", title, title.lower(), values)


def _lengths(report: Report) -> Chart | None:
    values = {name: [float(s.num_tokens) for s in _main_samples(report, name)] for name in report.main_view.metrics}
    return _histogram(report, "lengths", "Length of responses", "tokens", values)


def _histogram(report: Report, name: str, title: str, unit: str, values: Mapping[str, Sequence[float]]) -> Chart | None:
    present = {model: of_model for model, of_model in values.items() if of_model}
    if not present:
        return None
    low = min(min(of_model) for of_model in present.values())
    high = max(max(of_model) for of_model in present.values())
    edges = np.linspace(low, high if high > low else low + 1, 25)
    figure, axes = new_axes(unit, "share of responses")
    for model, of_model in present.items():
        share = np.histogram(of_model, bins=edges)[0] / len(of_model)
        axes.stairs(share, edges, color=_model_colour(report, model), label=model, linewidth=1.3)
    _legend_above(axes, len(present))
    middle = "; ".join(f"{model} median {float(np.median(of_model)):.3g}" for model, of_model in present.items())
    return as_chart(name, title, figure, f"distribution of {title.lower()}: {middle}")


def _win_rates(report: Report) -> Chart | None:
    wins = [(view, win) for view in report.views for win in view.win_rates if view.mode == "sampled"]
    if not wins:
        return None
    figure, axes = new_axes(
        "win-rate, ties half", "", (_SIZE[0], max(_SIZE[1], 0.5 + 0.27 * len(wins))), long_labels=True
    )
    for place, (_, win) in enumerate(reversed(wins)):
        colour = _model_colour(report, win.first)
        axes.plot([win.rate.low, win.rate.high], [place, place], color=colour, linewidth=2)
        axes.plot([win.rate.estimate], [place], marker="o", markersize=4.5, color=colour)
    axes.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(wins)), [f"{w.first} : {w.second}\n({v.split})" for v, w in reversed(wins)], fontsize=7)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.6, len(wins) - 0.4)
    said = "; ".join(
        f"{w.first} against {w.second} on {v.split} {w.rate.estimate:.2f} [{w.rate.low:.2f}, {w.rate.high:.2f}]"
        for v, w in wins
    )
    return as_chart("win-rates", "Win-rates with 95 % intervals", figure, said, len(wins) > 6)


def _family_accuracy(found: RewardAccuracy) -> Chart:
    rates = {**found.by_family, "all": found.accuracy}
    figure, axes = new_axes("accuracy", "", (_SIZE[0], max(_SIZE[1], 0.6 + 0.3 * len(rates))), long_labels=True)
    for place, (name, rate) in enumerate(reversed(rates.items())):
        colour = COLOURS[0] if name == "all" else COLOURS[1]
        axes.plot([rate.low, rate.high], [place, place], color=colour, linewidth=2)
        axes.plot([rate.estimate], [place], marker="o", markersize=4.5, color=colour)
    best = max(found.longer_wins.estimate, found.shorter_wins.estimate)
    axes.axvline(best, color=COLOURS[2], linewidth=1, linestyle="--", label="better length rule")
    axes.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rates)), list(reversed(rates)))
    axes.set_xlim(min(0.4, *(rate.low for rate in rates.values())), 1)
    _legend_above(axes, 1)
    said = "; ".join(f"{name} {rate.estimate:.2f}" for name, rate in rates.items())
    return as_chart("rm-families", "Reward-model accuracy by family", figure, f"{said}; better length rule {best:.2f}")


def _calibration(found: RewardAccuracy) -> Chart:
    figure, axes = new_axes("stated confidence", "share right")
    axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=0.8, linestyle=":")
    largest = max(b.num for b in found.calibration)
    axes.plot([b.confidence for b in found.calibration], [b.accuracy for b in found.calibration], color=COLOURS[1])
    axes.scatter(
        [b.confidence for b in found.calibration],
        [b.accuracy for b in found.calibration],
        s=[6 + 60 * b.num / largest for b in found.calibration],
        color=COLOURS[1],
    )
    axes.set_ylim(min(0.3, *(b.accuracy for b in found.calibration)) - 0.03, 1.04)
    said = f"share of pairs ordered right by stated confidence; expected calibration error {found.ece:.3f}"
    return as_chart("rm-calibration", "Reward-model calibration", figure, said)


def _margins(margins: Sequence[float]) -> Chart:
    figure, axes = new_axes("score of chosen minus rejected", "pairs")
    counts, edges = np.histogram(margins, bins=30)
    axes.stairs(counts, edges, fill=True, color=COLOURS[1], alpha=0.75)
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    wrong = float(np.mean(np.asarray(margins) < 0))
    return as_chart("rm-margins", "Reward-model margins", figure, f"{100 * wrong:.1f} % of the margins are below zero")


def _main_samples(report: Report, name: str) -> list[Any]:
    view = report.main_view
    return [s for s in report.samples[name] if (s.split, s.mode) == (view.split, view.mode)]


def _model_colour(report: Report, name: str) -> str:
    return COLOURS[report.models.index(name) % len(COLOURS)]


def _legend_above(axes: Axes, columns: int, fontsize: float = 7.5) -> None:
    columns = min(columns, 4)
    num_rows = math.ceil(len(axes.get_legend_handles_labels()[1]) / columns)
    if axes.figure.get_layout_engine() is None:
        axes.figure.subplots_adjust(top=0.94 - 0.06 * num_rows)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 0.99), ncols=columns, fontsize=fontsize)


def new_axes(
    xlabel: str, ylabel: str, size: tuple[float, float] = _SIZE, long_labels: bool = False
) -> tuple[Figure, Axes]:
    """A figure of the page's size and its axes."""
    from matplotlib.figure import Figure

    # Constrained layout draws everything twice; it is worth that only where labels have no known width.
    figure = Figure(figsize=size, layout="constrained" if long_labels else None)
    axes = figure.add_subplot()
    if not long_labels:
        figure.subplots_adjust(left=0.155, right=0.985, bottom=0.2, top=0.92)
    axes.locator_params(nbins=5)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


_STYLE: Any = {
    "font.size": 8,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 4),
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": _GRID,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.3,
    "svg.fonttype": "none",
    # Ids that do not change from run to run; names come from users, so a dollar sign is a dollar sign.
    "svg.hashsalt": "rlhf",
    "text.parse_math": False,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "legend.columnspacing": 1.2,
}


def chart_style() -> AbstractContextManager[None]:
    """What plots of a report are drawn under."""
    from matplotlib import rc_context

    return rc_context(_STYLE)


def as_chart(name: str, title: str, figure: Figure, description: str, tall: bool = False) -> Chart:
    """A drawn figure as SVG that takes its colours from the page."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Chart(slug, title, _clean_svg(target.getvalue(), slug), description, tall=tall)


def _clean_svg(text: str, slug: str) -> str:
    """Cut the XML head, make ids unique on a page that holds many plots, and hand colours and fonts to the page."""
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{slug}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{slug}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{slug}-\1)", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    for placeholder, variable in _THEME.items():
        svg = svg.replace(placeholder, variable)
    return re.sub(r"\n\s*", "\n", svg)


def _thinned(x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Average neighbouring points of long histories, so that a page of plots stays small."""
    if len(x) <= _MAX_POINTS:
        return x, y
    groups = np.array_split(np.arange(len(x)), _MAX_POINTS)
    return np.array([x[g].mean() for g in groups]), np.array([y[g].mean() for g in groups])


def _labels(keys: Sequence[str]) -> list[str]:
    """What stands after the first slash, or the whole key where that would be the same for two of them."""
    short = [key.split("/", 1)[-1].replace("_", " ") for key in keys]
    return short if len(set(short)) == len(short) else list(keys)


def charts_by_stage(histories: Iterable[tuple[str, Sequence[Mapping[str, float]]]]) -> dict[str, list[Chart]]:
    """Plot every stage that has a log, in the order given."""
    return {stage: training_charts(stage, rows) for stage, rows in histories if rows}
