"""The report as one self-contained HTML page; every text that comes from data is escaped here."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template

from rlhf.eval.cautions import Check
from rlhf.eval.examples_page import examples_of
from rlhf.eval.failures import Failures
from rlhf.eval.hacking_plot import AFTER
from rlhf.eval.hacking_tables import hacking_of
from rlhf.eval.intervals import Interval
from rlhf.eval.judge_tables import judges_of
from rlhf.eval.plots import Chart
from rlhf.eval.report_data import Report
from rlhf.eval.tables import (
    Cell,
    Table,
    cell,
    costs_of,
    families_of,
    gold_parts_of,
    refusals_of,
    reward_families_of,
    reward_model_of,
    summary_of,
    taxes_of,
    win_rates_of,
)
from rlhf.eval.wording import HOW_HACKING_IS_JUDGED, NO_CAUTION, NOTHING_FAILED, how_measured, subtitle_of

_FEW_CHARTS = 6
_FEW_COLUMNS = 5
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


@dataclass(frozen=True)
class Charts:
    """The plots of a report by where they belong: models side by side, the reward model, each training stage, signs of
    reward hacking by heading."""

    comparison: Sequence[Chart]
    reward_model: Sequence[Chart]
    training: dict[str, list[Chart]]
    hacking: dict[str, list[Chart]]

    def all(self) -> list[Chart]:
        """Every plot."""
        by_heading = [chart for charts in (self.training, self.hacking) for found in charts.values() for chart in found]
        return [*self.comparison, *self.reward_model, *by_heading]


def render_page(report: Report, checks: Sequence[Check], failures: Failures, charts: Charts) -> str:
    """Return the whole page as HTML text."""
    sections = [
        ("summary", "Summary", _summary(report)),
        ("comparison", "Side by side", _figures(charts.comparison)),
        ("failed", "What failed", _failures(failures)),
        ("wary", "What to be wary of", _cautions(checks)),
        ("hacking", "Signs of reward hacking", _hacking(report, charts)),
        ("families", "By family", _families(report)),
        ("win-rates", "Win-rates", _table(win_rates_of(report), heading=False)),
        ("judges", "Judges", "".join(_table(table) for table in judges_of(report))),
        ("refusals", "Refusals", _table(refusals_of(report), heading=False) if report.refusals else ""),
        ("tax", "Alignment tax", _table(taxes_of(report), heading=False) if report.taxes else ""),
        ("reward-model", "Reward model", _reward_model(report, charts)),
        ("training", "Training", _training(charts)),
        ("cost", "Cost", _table(costs_of(report), heading=False) if report.costs else ""),
        ("examples", "Examples", examples_of(report)),
        ("method", "How it was measured", _method(report)),
    ]
    present = [section for section in sections if section[2]]
    template = resources.files("rlhf.eval").joinpath("report_template.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=escape(report.title),
        subtitle=escape(subtitle_of(report)),
        script_hash=_script_hash(template),
        navigation="".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title, _ in present),
        headline=_headline(report),
        sections="\n".join(
            f'<section id="{name}" aria-labelledby="{name}-title">'
            f'<h2 id="{name}-title">{escape(title)}</h2>{body}</section>'
            for name, title, body in present
        ),
    )


def _script_hash(template: str) -> str:
    """The page's policy allows this one script and no other, so no model output can ever run."""
    found = _SCRIPT.search(template)
    assert found is not None, "the template has one script"
    return "sha256-" + base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()


def _headline(report: Report) -> str:
    """The few numbers a reader comes for, about the last model."""
    name, reference = report.candidate, report.reference
    if name is None or name not in report.main_view.metrics:
        return ""
    metrics = report.main_view.metrics[name]
    win = report.main_view.against(name, reference or "")
    tiles: list[tuple[str, Interval | None, int, float, bool]] = [
        (f"{name} wins against {reference}, %", win.rate if win else None, 1, 100, False),
        (f"Gold score of {name}", metrics.gold, 3, 1, False),
        (f"KL to {reference}, nats per response", metrics.kl, 2, 1, False),
        (f"Length against {reference}, %", metrics.length_drift, 0, 100, True),
        ("Refuses harmful prompts, %", metrics.refusal_harmful, 1, 100, False),
        ("Refuses benign prompts, %", metrics.refusal_benign, 1, 100, False),
    ]
    shown = [(label, cell(value, digits, factor, sign)) for label, value, digits, factor, sign in tiles if value]
    if not shown:
        return ""
    items = "".join(f"<div><dt>{escape(label)}</dt><dd>{_cell(found)}</dd></div>" for label, found in shown)
    return f'<dl class="headline">{items}</dl>'


def _summary(report: Report) -> str:
    tables = [summary_of(report, view) for view in report.views]
    parts = [
        gold_parts_of(report, view) for view in report.views[:1] if any(m.gold_parts for m in view.metrics.values())
    ]
    return _grid([*tables, *parts])


def _grid(tables: Sequence[Table]) -> str:
    """Two tables side by side on a wide screen, as long as they are narrow."""
    wide = any(len(table.columns) > _FEW_COLUMNS for table in tables)
    body = "".join(f"<div>{_table(table)}</div>" for table in tables if table.rows)
    return f'<div class="{"tables wide" if wide else "tables"}">{body}</div>'


def _families(report: Report) -> str:
    return "".join(
        _table(families_of(report, view))
        for view in report.views
        if view.by_family and view.mode == report.main_view.mode
    )


def _failures(failures: Failures) -> str:
    body = "" if failures.failed else f"<p>{NOTHING_FAILED}</p>"
    for title, sentences in failures.failed.items():
        body += f'<h3>{escape(title)} ({len(sentences)})</h3><ul class="checks failed">{_items(sentences)}</ul>'
    if failures.passed:
        body += f'<h3>Looked at and not failed</h3><ul class="checks fine">{_items(failures.passed)}</ul>'
    return body


def _hacking(report: Report, charts: Charts) -> str:
    if not report.hacking:
        return ""
    during = [record for record in report.hacking if not record.after_training]
    after = [record for record in report.hacking if record.after_training]
    body = f"<p>{HOW_HACKING_IS_JUDGED}</p>"
    for record in during:
        body += _table(hacking_of(record)) + _figures(charts.hacking.get(record.title, ()))
    return body + _grid([hacking_of(record) for record in after]) + _figures(charts.hacking.get(AFTER, ()))


def _cautions(checks: Sequence[Check]) -> str:
    wary = [check for check in checks if check.wary and not check.missed]
    fine = [check for check in checks if not check.wary]
    if not checks:
        return ""
    body = "<p>Worked out from the numbers in this report.</p>"
    if wary:
        body += f'<ul class="checks">{_items(check.sentence for check in wary)}</ul>'
    else:
        body += f"<p>{NO_CAUTION}</p>"
    if fine:
        body += (
            f"<details><summary>{len(fine)} questions whose answer was as it should be</summary>"
            f'<ul class="checks fine">{_items(check.sentence for check in fine)}</ul></details>'
        )
    return body


def _items(sentences: Iterable[str]) -> str:
    return "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)


def _reward_model(report: Report, charts: Charts) -> str:
    found = report.reward_model
    if found is None:
        return ""
    tables = [reward_model_of(found)]
    if len(found.by_family) > 1:
        tables.append(reward_families_of(found))
    return _grid(tables) + _figures(charts.reward_model)


def _training(charts: Charts) -> str:
    # A stage with more than a few plots is what a reader comes for; the others keep their order behind it.
    stages = sorted(charts.training.items(), key=lambda item: len(item[1]) <= _FEW_CHARTS)
    return "".join(f"<h3>{escape(stage)}</h3>{_figures(of_stage)}" for stage, of_stage in stages if of_stage)


def _figures(charts: Sequence[Chart]) -> str:
    if not charts:
        return ""
    figures = "".join(
        f'<figure class="{"chart tall" if chart.tall else "chart"}">'
        f"<figcaption>{escape(chart.title)}{_unit(chart)}</figcaption>{_labelled(chart)}</figure>"
        for chart in charts
    )
    return f'<div class="charts">{figures}</div>'


def _unit(chart: Chart) -> str:
    return f' <span class="muted">{escape(chart.unit)}</span>' if chart.unit else ""


def _labelled(chart: Chart) -> str:
    label = f'<svg role="img" aria-label="{escape(chart.description)}" '
    return chart.svg.replace("<svg ", label, 1)


def _table(table: Table, heading: bool = True) -> str:
    if not table.rows:
        return ""
    head = "".join(f'<th scope="col">{escape(column) or _hidden("Row")}</th>' for column in table.columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{_cell(found)}</td>" for found in cells)}</tr>'
        for name, cells in table.rows
    )
    title = f"<h3>{escape(table.title)}</h3>" if heading else ""
    caption = f'<p class="caption">{escape(table.caption)}</p>' if table.caption else ""
    shape = ' class="one-line"' if table.one_line else ""
    return (
        f'{title}<div class="scroll" role="region" tabindex="0" aria-label="{escape(table.title)}">'
        f"<table{shape}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{caption}"
    )


def _hidden(text: str) -> str:
    return f'<span style="position:absolute;clip-path:inset(50%);height:1px;width:1px;overflow:hidden">{text}</span>'


def _cell(found: Cell) -> str:
    interval = f'<span class="interval">{escape(found.interval)}</span>' if found.interval else ""
    return (f'<b class="bad">{escape(found.text)}</b>' if found.bad else escape(found.text)) + interval


def _method(report: Report) -> str:
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in how_measured(report))
    notes = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in report.notes.items()
    )
    return sentences + (f'<dl class="notes">{notes}</dl>' if notes else "")
