"""What suites say, for a reader: `SUITES.md` and the table on the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.eval.markdown import plain, table_text
from rlhf.eval.suite_results import GUESSING, Comparison, SuiteResult
from rlhf.eval.tables import Cell, Table, cell

REPORT_FILE = "SUITES.md"
_MAX_GROUPS = 12
_FINISHED_SHARE, _EXTRACTED_SHARE = 0.95, 0.9
_SHOWN = 300


@dataclass(frozen=True)
class SuiteReport:
    """All results in the order of models and suites, what was compared, and how it was measured."""

    title: str
    reference: str | None
    results: tuple[SuiteResult, ...]
    comparisons: tuple[Comparison, ...]
    notes: Mapping[str, str]

    @property
    def worse(self) -> tuple[Comparison, ...]:
        """Comparisons in which something fell that must not."""
        return tuple(comparison for comparison in self.comparisons if comparison.worse)

    @property
    def models(self) -> list[str]:
        """Names of the models, in order."""
        return list(dict.fromkeys(result.model for result in self.results))


def scores_of(report: SuiteReport) -> Table:
    """One row per suite, one column per model: percent with its interval."""
    rows = []
    for label in dict.fromkeys(result.label for result in report.results):
        found = {result.model: result for result in report.results if result.label == label}
        num = max(result.num for result in found.values())
        cells = [_score(found.get(model)) for model in report.models]
        rows.append((label, (*cells, Cell(f"{num:,}"))))
    caption = (
        "Score in percent with its 95 % interval (Wilson's where items are right or wrong, else a bootstrap over "
        "items); suites with version and hash."
    )
    return Table("Suites", ("", *report.models, "Items"), tuple(rows), caption)


def changes_of(report: SuiteReport) -> Table:
    """Change of each model against the reference on the same items, in points, and how many items rose and fell."""
    rows = [
        (
            f"{found.suite}, {found.model} against {found.reference}",
            (cell(found.change, 1, 100, sign=True), Cell(str(found.wins)), Cell(str(found.losses))),
        )
        for found in report.comparisons
    ]
    caption = "Paired on the same items: Newcombe's interval for right and wrong, else a bootstrap."
    return Table("Changes", ("", "Change, points", "Better", "Worse"), tuple(rows), caption, one_line=True)


def groups_of(report: SuiteReport) -> Table:
    """Scores by group of each suite that has a few of them."""
    rows = []
    for label in dict.fromkeys(result.label for result in report.results):
        found = {result.model: result for result in report.results if result.label == label}
        groups = list(dict.fromkeys(group for result in found.values() for group in result.groups))
        for group in groups if len(groups) <= _MAX_GROUPS else []:
            scores = [found[model].groups.get(group) if model in found else None for model in report.models]
            rows.append((f"{label.split(' ')[0]}: {group}", tuple(cell(score, 1, 100) for score in scores)))
    return Table("By group", ("", *report.models), tuple(rows), "Score in percent.")


def parts_of(report: SuiteReport) -> Table:
    """Other measures of the answers, and how long they are."""
    rows = []
    for label in dict.fromkeys(result.label for result in report.results):
        found = {result.model: result for result in report.results if result.label == label}
        suite = label.split(" ")[0]
        for part in dict.fromkeys(part for result in found.values() for part in result.parts):
            # Scores of a reward model know no upper bound, the others are shares.
            factor = 1 if part == "reward" else 100
            name = part.replace("_", " ") + ("" if part == "reward" else ", %")
            values = [found[model].parts.get(part) if model in found else None for model in report.models]
            rows.append((f"{suite}: {name}", tuple(cell(value, 2 if factor == 1 else 1, factor) for value in values)))
        lengths = [found[model].mean_tokens if model in found else None for model in report.models]
        if any(length is not None for length in lengths):
            rows.append((f"{suite}: tokens per answer", tuple(cell(length, 1) for length in lengths)))
            ended = [found[model].finished if model in found else None for model in report.models]
            rows.append((f"{suite}: finished by itself, %", tuple(cell(share, 1, 100) for share in ended)))
    return Table("Other measures", ("", *report.models), tuple(rows))


def cautions_of(report: SuiteReport) -> list[str]:
    """What makes a number less than it seems."""
    found = []
    for result in report.results:
        if result.finished is not None and result.finished.estimate < _FINISHED_SHARE:
            found.append(
                f"{result.suite}, {result.model}: {100 * (1 - result.finished.estimate):.0f} % of the answers were cut "
                "off; raise generation.max_new_tokens."
            )
        if result.extracted.estimate < _EXTRACTED_SHARE:
            found.append(
                f"{result.suite}, {result.model}: no answer was found in {100 * (1 - result.extracted.estimate):.0f} % "
                "of the responses; the score may say more about form than about ability."
            )
        together = result.parts.get("ran_together")
        if together is not None and together.estimate > 0:
            found.append(
                f"{result.suite}, {result.model}: {together.estimate * together.num:.0f} programs could not be kept "
                "apart from their tests; code that wants to could forge those."
            )
        guessing = result.parts.get(GUESSING)
        if result.score is not None and guessing is not None and result.score.low <= guessing.estimate:
            found.append(
                f"{result.suite}, {result.model}: no better than guessing ({100 * guessing.estimate:.0f} %); a change "
                "on this suite says little."
            )
        if result.score is None:
            found.append(f"{result.suite}, {result.model}: nobody judged these answers; they are in answers.jsonl.")
    return found


def verdict_of(report: SuiteReport, guards: Sequence[str]) -> list[str]:
    """One sentence per comparison on a set that must not get worse."""
    sentences = []
    before = report.models[: report.models.index(report.reference)] if report.reference in report.models else []
    for found in report.comparisons:
        if found.suite in guards and found.model not in before:
            fell = len(found.worse)
            total = next(r.num for r in report.results if (r.suite, r.model) == (found.suite, found.model))
            sentences.append(
                f"{found.suite}: {found.model} is worse than {found.reference} on {fell} of {total} prompts"
                + (": " + ", ".join(worse.item_id for worse in found.worse) if fell else "")
            )
    return sentences


def render_suites(report: SuiteReport, guards: Sequence[str]) -> str:
    """The whole report as Markdown."""
    blocks = [f"# {plain(report.title)}", table_text(scores_of(report), heading=False)]
    if report.comparisons:
        blocks += [f"## Against {plain(str(report.reference))}", table_text(changes_of(report), heading=False)]
    verdicts = verdict_of(report, guards)
    if verdicts:
        blocks += ["## What must not get worse", *(f"{plain(sentence)}." for sentence in verdicts)]
        for comparison in report.worse:
            blocks += [_fallen(comparison)]
    for table in (groups_of(report), parts_of(report)):
        if table.rows:
            blocks += [f"## {table.title}", table_text(table, heading=False)]
    cautions = cautions_of(report)
    if cautions:
        blocks += ["## What to be wary of", "\n".join(f"- {plain(sentence)}" for sentence in cautions)]
    notes = "\n".join(f"- {plain(name)}: {plain(value)}" for name, value in report.notes.items())
    return "\n\n".join([*blocks, "## How it was measured", notes]) + "\n"


def write_report(folder: Path, report: SuiteReport, guards: Sequence[str]) -> Path:
    """Write `SUITES.md` into the folder and return its path."""
    path = folder / REPORT_FILE
    path.write_text(render_suites(report, guards), encoding="utf-8")
    return path


def _fallen(comparison: Comparison) -> str:
    lines = [f"| {comparison.model} | before | after | answer before | answer after |", "|---|---:|---:|---|---|"]
    for worse in comparison.worse:
        texts = [plain(text[:_SHOWN]) for text in (worse.prompt, worse.answer_before, worse.answer_after)]
        lines.append(f"| {texts[0]} | {worse.before:.2f} | {worse.after:.2f} | {texts[1]} | {texts[2]} |")
    return "\n".join(lines)


def _score(result: SuiteResult | None) -> Cell:
    return cell(result.score, 1, 100) if result is not None else Cell()
