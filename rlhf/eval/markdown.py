"""The report as Markdown, with the same tables as the page and its plots as files beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlhf.eval.cautions import Check
from rlhf.eval.examples import Example
from rlhf.eval.failures import Failures
from rlhf.eval.hacking_plot import AFTER
from rlhf.eval.hacking_tables import hacking_of
from rlhf.eval.judge_tables import judges_of
from rlhf.eval.page import Charts
from rlhf.eval.plots import Chart
from rlhf.eval.report_data import Report
from rlhf.eval.tables import (
    Table,
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
from rlhf.eval.wording import (
    HOW_HACKING_IS_JUDGED,
    NO_CAUTION,
    NOTHING_FAILED,
    how_measured,
    outcome_words,
    subtitle_of,
)

_NUM_EXAMPLES = 20


def render_markdown(
    report: Report, checks: Sequence[Check], failures: Failures, charts: Charts, plots_folder: str = "plots"
) -> str:
    """Return the whole report as Markdown; plots are linked as `<plots_folder>/<name>.svg`."""
    main = report.main_view
    parts = [gold_parts_of(report, main)] if any(m.gold_parts for m in main.metrics.values()) else []
    blocks = [
        f"# {plain(report.title)}",
        plain(subtitle_of(report)),
        _section("Summary", *(table_text(t) for t in [*(summary_of(report, view) for view in report.views), *parts])),
        _section("What failed", *_failures(failures)),
        _section("What to be wary of", _cautions(checks)),
        _section("Signs of reward hacking", *_hacking(report, charts, plots_folder)),
        _section("By family", *(table_text(families_of(report, view)) for view in report.views if view.by_family)),
        _section("Side by side", _images(charts.comparison, plots_folder)),
        _section("Win-rates", table_text(win_rates_of(report), heading=False)),
        _section("Judges", *(table_text(table) for table in judges_of(report))),
        _section("Refusals", table_text(refusals_of(report), heading=False) if report.refusals else ""),
        _section("Alignment tax", table_text(taxes_of(report), heading=False) if report.taxes else ""),
        _section("Reward model", *_reward_model(report, charts, plots_folder)),
        _section(
            "Training",
            *(
                f"### {plain(stage)}\n\n{_images(found, plots_folder)}"
                for stage, found in charts.training.items()
                if found
            ),
        ),
        _section("Cost", table_text(costs_of(report), heading=False) if report.costs else ""),
        _section("Examples", *_examples(report)),
        _section("How it was measured", *how_measured(report), _notes(report)),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _section(title: str, *blocks: str) -> str:
    present = [block for block in blocks if block]
    return "\n\n".join([f"## {title}", *present]) if present else ""


def table_text(table: Table, heading: bool = True) -> str:
    """A table as Markdown, its title above and its caption below; "" for one without rows."""
    if not table.rows:
        return ""
    lines = [
        "| " + " | ".join(plain(column) or " " for column in table.columns) + " |",
        "|---|" + "---:|" * (len(table.columns) - 1),
    ]
    for name, cells in table.rows:
        texts = [f"{found.text} {found.interval}".strip() for found in cells]
        lines.append("| " + " | ".join([plain(name), *texts]) + " |")
    text = "\n".join(lines) + (f"\n\n{plain(table.caption)}" if table.caption else "")
    return f"### {plain(table.title)}\n\n{text}" if heading else text


def _failures(failures: Failures) -> list[str]:
    blocks = [NOTHING_FAILED] if not failures.failed else []
    for title, sentences in failures.failed.items():
        blocks += [f"### {title}", _bullets(sentences)]
    return blocks + (["Looked at and not failed:", _bullets(failures.passed)] if failures.passed else [])


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {plain(sentence)}" for sentence in sentences)


def _hacking(report: Report, charts: Charts, plots_folder: str) -> list[str]:
    blocks = [HOW_HACKING_IS_JUDGED] if report.hacking else []
    for record in report.hacking:
        blocks += [table_text(hacking_of(record)), _images(charts.hacking.get(record.title, ()), plots_folder)]
    return [*blocks, _images(charts.hacking.get(AFTER, ()), plots_folder)]


def _cautions(checks: Sequence[Check]) -> str:
    wary = "\n".join(f"- {plain(check.sentence)}" for check in checks if check.wary and not check.missed)
    fine = "\n".join(f"- {plain(check.sentence)}" for check in checks if not check.wary)
    none = NO_CAUTION if checks else ""
    text = wary or none
    return f"{text}\n\nAs it should be:\n\n{fine}" if fine else text


def _reward_model(report: Report, charts: Charts, plots_folder: str) -> list[str]:
    found = report.reward_model
    if found is None:
        return []
    by_family = table_text(reward_families_of(found)) if len(found.by_family) > 1 else ""
    return [table_text(reward_model_of(found), heading=False), by_family, _images(charts.reward_model, plots_folder)]


def _images(charts: Sequence[Chart], folder: str) -> str:
    return "\n".join(f"![{plain(chart.title)}]({folder}/{chart.name}.svg)" for chart in charts)


def _examples(report: Report) -> list[str]:
    shown = [_example(report, number, found) for number, found in enumerate(report.examples[:_NUM_EXAMPLES], start=1)]
    left = len(report.examples) - len(shown)
    return [*shown, f"{left} more are in report.html, where they can be searched." if left else ""]


def _example(report: Report, number: int, example: Example) -> str:
    kind = f", {plain(example.kind)}" if example.kind else ""
    outcome = outcome_words(report, report.candidate, example.outcomes.get(report.candidate or "", "not judged"))
    head = f"### {number}. {plain(example.family)}{kind}: {plain(outcome)}"
    blocks = [head, _fenced(example.prompt)]
    for name in report.models:
        if name in example.answers:
            sample = example.answers[name]
            score = f", gold {sample.gold:.2f}" if sample.gold is not None else ""
            score += f", reward {sample.reward:.2f}" if sample.reward is not None else ""
            blocks += [f"{plain(name)}{score}:", _fenced(sample.response)]
    return "\n\n".join(blocks)


def _notes(report: Report) -> str:
    return "\n".join(f"- {plain(str(name))}: {plain(str(value))}" for name, value in report.notes.items())


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks inside, so that the text cannot end it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text.strip()}\n{fence}"


def plain(text: str) -> str:
    """Text that Markdown and HTML take literally, on one line."""
    escaped = re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))
    return escaped.replace("\\[", "[").replace("\\]", "]") if "](" not in text else escaped
