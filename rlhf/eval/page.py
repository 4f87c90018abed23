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
from rlhf.eval.intervals import Interval
from rlhf.eval.judge_tables import judges_of
from rlhf.eval.plots import Chart
from rlhf.eval.report_data import Example, Report
from rlhf.eval.samples import Sample
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
from rlhf.eval.wording import how_measured, outcome_words, subtitle_of

_FEW_CHARTS = 6
_FEW_COLUMNS = 5
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


@dataclass(frozen=True)
class Charts:
    """The plots of a report by where they belong: models side by side, the reward model, each training stage."""

    comparison: Sequence[Chart]
    reward_model: Sequence[Chart]
    training: dict[str, list[Chart]]


def render_page(report: Report, checks: Sequence[Check], charts: Charts) -> str:
    """Return the whole page as HTML text."""
    sections = [
        ("summary", "Summary", _summary(report)),
        ("comparison", "Side by side", _figures(charts.comparison)),
        ("wary", "What to be wary of", _cautions(checks)),
        ("families", "By family", _families(report)),
        ("win-rates", "Win-rates", _table(win_rates_of(report), heading=False)),
        ("judges", "Judges", "".join(_table(table) for table in judges_of(report))),
        ("refusals", "Refusals", _table(refusals_of(report), heading=False) if report.refusals else ""),
        ("tax", "Alignment tax", _table(taxes_of(report), heading=False) if report.taxes else ""),
        ("reward-model", "Reward model", _reward_model(report, charts)),
        ("training", "Training", _training(charts)),
        ("cost", "Cost", _table(costs_of(report), heading=False) if report.costs else ""),
        ("examples", "Examples", _examples(report)),
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


def _cautions(checks: Sequence[Check]) -> str:
    wary = [check for check in checks if check.wary]
    fine = [check for check in checks if not check.wary]
    if not checks:
        return ""
    body = "<p>Worked out from the numbers in this report.</p>"
    if wary:
        body += f'<ul class="checks">{_items(wary)}</ul>'
    else:
        body += "<p>None of the questions that could be asked of these numbers gave a reason for caution.</p>"
    if fine:
        body += (
            f"<details><summary>{len(fine)} questions whose answer was as it should be</summary>"
            f'<ul class="checks">{_items(fine)}</ul></details>'
        )
    return body


def _items(checks: Iterable[Check]) -> str:
    return "".join(f"<li>{escape(check.sentence)}</li>" for check in checks)


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
    return escape(found.text) + interval


def _examples(report: Report) -> str:
    if not report.examples:
        return ""
    outcomes = [
        name for name in ("win", "tie", "loss", "not judged") if any(e.outcome == name for e in report.examples)
    ]
    families = sorted({example.family for example in report.examples})
    family_options = "".join(f'<option value="{escape(name)}">{escape(name)}</option>' for name in families)
    outcome_options = "".join(
        f'<option value="{name}">{escape(outcome_words(report, name))}</option>' for name in outcomes
    )
    controls = (
        '<div class="controls"><label>Search prompts and answers<input type="search" id="search" autocomplete="off">'
        f'</label><label>Family<select id="family"><option value="">all</option>{family_options}</select></label>'
        f'<label>Who did better<select id="outcome"><option value="">all</option>{outcome_options}</select></label>'
        '<span class="count" id="count" role="status"></span></div>'
    )
    intro = (
        f"<p>{len(report.examples)} prompts drawn by seed {report.seed}, in turn from each family; "
        f"{escape(report.main_view.title.lower())}.</p>"
    )
    return intro + controls + "".join(_example(report, example) for example in report.examples)


def _example(report: Report, example: Example) -> str:
    kind = f", {escape(example.kind)}" if example.kind else ""
    answers = "".join(_answer(name, example.answers[name]) for name in report.models if name in example.answers)
    return (
        f'<article class="example {example.outcome.split()[0]}" data-family="{escape(example.family)}" '
        f'data-outcome="{example.outcome}"><h3><b>{escape(example.family)}</b>{kind} · '
        f'<b class="outcome">{escape(outcome_words(report, example.outcome))}</b></h3>'
        f'<p class="text prompt">{escape(example.prompt.strip())}</p><div class="answers">{answers}</div></article>'
    )


def _answer(name: str, sample: Sample) -> str:
    facts = [f"gold {sample.gold:.2f}"] if sample.gold is not None else []
    facts += [f"reward {sample.reward:.2f}"] if sample.reward is not None else []
    facts.append(f"{sample.num_tokens} tokens")
    facts += ["refuses"] if sample.refused else []
    facts += [] if sample.finished else ["cut off"]
    parts = ", ".join(f"{part.replace('_', ' ')} {value:.2f}" for part, value in sample.gold_parts.items())
    below = f'<p class="parts">{escape(parts)}</p>' if parts else ""
    response = escape(sample.response.strip()) or '<span class="muted">(empty)</span>'
    return (
        f'<div class="answer"><h4>{escape(name)}<span>{escape(" · ".join(facts))}</span></h4>'
        f'<p class="text">{response}</p>{below}</div>'
    )


def _method(report: Report) -> str:
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in how_measured(report))
    notes = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in report.notes.items()
    )
    return sentences + (f'<dl class="notes">{notes}</dl>' if notes else "")
