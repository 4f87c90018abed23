"""Write an evaluation report: `EVAL_REPORT.md`, a self-contained `report.html`, and `report.json` with every number."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.eval.cautions import run_checks
from rlhf.eval.failures import failures_of
from rlhf.eval.hacking_plot import hacking_charts
from rlhf.eval.markdown import render_markdown
from rlhf.eval.page import Charts, render_page
from rlhf.eval.plots import charts_by_stage, report_charts, reward_charts
from rlhf.eval.report_data import Report, ReportInput, build_report
from rlhf.eval.tables import Table as Cells
from rlhf.eval.tables import summary_of
from rlhf.infra.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

_FORMAT = 1
_PLOTS = "plots"
_NOT_NUMBERS = ("samples", "histories", "reward_pairs")


@dataclass(frozen=True)
class ReportPaths:
    """Where a report was written, and the report itself."""

    markdown: Path
    html: Path
    data: Path
    plots: Path
    report: Report


def write_report(folder: Path, source: ReportInput) -> ReportPaths:
    """Compute and write a report into `folder`, which is made when missing.

    Raises UserError when there is nothing to report on or the folder cannot be written.
    """
    report = build_report(source)
    checks = run_checks(report)
    charts = Charts(
        comparison=report_charts(report),
        reward_model=reward_charts(report.reward_model, [pair.margin for pair in report.reward_pairs])
        if report.reward_model is not None
        else [],
        training=charts_by_stage(report.histories.items()),
        hacking=hacking_charts(report.hacking),
    )
    failures = failures_of(report, checks)
    paths = ReportPaths(
        markdown=folder / "EVAL_REPORT.md",
        html=folder / "report.html",
        data=folder / "report.json",
        plots=folder / _PLOTS,
        report=report,
    )
    numbers = report_numbers(report) | {
        "checks": [dataclasses.asdict(check) for check in checks],
        "failures": dataclasses.asdict(failures),
    }
    try:
        paths.plots.mkdir(parents=True, exist_ok=True)
        for chart in charts.all():
            (paths.plots / f"{chart.name}.svg").write_text(chart.svg, encoding="utf-8")
        paths.markdown.write_text(render_markdown(report, checks, failures, charts, _PLOTS), encoding="utf-8")
        paths.html.write_text(render_page(report, checks, failures, charts), encoding="utf-8")
        paths.data.write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the report into {folder}: {error.strerror}; choose another folder") from error
    return paths


def report_numbers(report: Report) -> dict[str, Any]:
    """Return every number of a report as JSON types; what is not a finite number becomes null."""
    # The raw samples and logs have files of their own, and copying them here would take longer than all the rest.
    without_raw = dataclasses.replace(report, samples={}, histories={}, reward_pairs=())
    numbers = {name: value for name, value in dataclasses.asdict(without_raw).items() if name not in _NOT_NUMBERS}
    jsonable: dict[str, Any] = _jsonable(numbers)
    return {"format": _FORMAT} | jsonable


def summary_table(report: Report, intervals_below: bool = False) -> Table:
    """Return the main summary as a rich table for the console; narrow ones do better with the intervals below."""
    return console_table(summary_of(report, report.main_view), intervals_below)


def console_table(source: Cells, intervals_below: bool = False) -> Table:
    """Return any table of a report as a rich table for the console."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(
        title=source.title, caption=source.caption or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    gap = "\n" if intervals_below else " "
    for number, column in enumerate(source.columns):
        table.add_column(Text(column), justify="left" if number == 0 else "right")
    for name, cells in source.rows:
        texts = [
            Text(found.text) + Text(gap + found.interval if found.interval else "", style="dim") for found in cells
        ]
        table.add_row(Text(name), *texts)
    return table


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
