"""The report's tables as plain cells, so that the page, the Markdown file and the console show the same numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf.eval.intervals import Interval
from rlhf.eval.metrics import ModelMetrics
from rlhf.eval.report_data import Report, View
from rlhf.eval.reward_accuracy import RewardAccuracy
from rlhf.eval.samples import Cost

NONE = "\u2013"


@dataclass(frozen=True)
class Cell:
    """One number as text, with its interval as text ("" for none); `bad` asks for it to be seen."""

    text: str = NONE
    interval: str = ""
    bad: bool = False


@dataclass(frozen=True)
class Table:
    """A title, column heads (the first is that of the row names), rows and a sentence on how to read them.

    `one_line` asks for intervals beside their numbers instead of below them.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    caption: str = ""
    one_line: bool = False

    def without_empty_rows(self) -> Table:
        """Leave out rows in which nothing was measured."""
        kept = tuple((name, cells) for name, cells in self.rows if any(cell.text != NONE for cell in cells))
        return dataclasses.replace(self, rows=kept)


def cell(value: Interval | float | None, digits: int = 2, factor: float = 1.0, sign: bool = False) -> Cell:
    """Format a number with its interval; `factor` 100 makes percent, `sign` shows a plus."""
    if value is None:
        return Cell()
    pattern = f"{{:{'+' if sign else ''},.{digits}f}}"

    def text(number: float) -> str:
        # Adding zero turns a rounded -0.0 into 0.0.
        return pattern.format(round(number, digits) + 0.0) if number == number else NONE

    if not isinstance(value, Interval):
        return Cell(text(value * factor))
    scaled = value.scaled(factor)
    bounds = f"[{text(scaled.low)}, {text(scaled.high)}]" if scaled.has_bounds else ""
    return Cell(text(scaled.estimate), bounds)


def p_value(value: float) -> Cell:
    """Format a p-value; what is smaller than a thousandth is said to be that."""
    return Cell("< 0.001" if value < 0.001 else f"{value:.3f}")


def summary_of(report: Report, view: View) -> Table:
    """One row per metric, one column per model."""
    names = tuple(name for name in report.models if name in view.metrics)
    reference = report.reference

    def row(label: str, of: Callable[[ModelMetrics], Cell]) -> tuple[str, tuple[Cell, ...]]:
        return label, tuple(of(view.metrics[name]) for name in names)

    rows = [
        row("Gold score, mean", lambda m: cell(m.gold, 3)),
        row("Gold score, change", lambda m: cell(m.gold_change, 3, sign=True)),
        ("Win-rate against " + str(reference) + ", %", tuple(_win(view, name, reference) for name in names)),
        row("Reward-model score", lambda m: cell(m.reward, 2)),
        row("Refuses harmful prompts, %", lambda m: cell(m.refusal_harmful, 1, 100)),
        row("Refuses benign prompts, %", lambda m: cell(m.refusal_benign, 1, 100)),
        row("Length, tokens", lambda m: cell(m.length, 1)),
        row("Length change, %", lambda m: cell(m.length_drift, 0, 100, sign=True)),
        row("Entropy, nats per token", lambda m: cell(m.entropy, 3)),
        row("Distinct word pairs, %", lambda m: cell(m.distinct[2], 1, 100)),
        row("Repetition, %", lambda m: cell(m.repetition, 1, 100)),
        row("KL per response, nats", lambda m: cell(m.kl, 2)),
        row("KL, 95th percentile", lambda m: cell(m.kl_p95, 2)),
        row("Finished by itself, %", lambda m: cell(m.finished, 1, 100)),
        *(_tax_rows(report, names) if view is report.main_view else ()),
        *(_hacking_rows(report, names) if view is report.main_view else ()),
        row("Gold-reward correlation", lambda m: cell(m.gold_reward.spearman if m.gold_reward else None)),
        row("Prompts", lambda m: cell(float(m.num_prompts), 0)),
        *(_cost_rows(report, names) if view is report.main_view else ()),
    ]
    caption = f"Judge: {_judge_name(report)}." if view.win_rates else ""
    return Table(view.title, ("", *names), tuple(rows), caption).without_empty_rows()


def _tax_rows(report: Report, names: Sequence[str]) -> list[tuple[str, tuple[Cell, ...]]]:
    rows = []
    for benchmark in dict.fromkeys(tax.benchmark for tax in report.taxes):
        found = {tax.model: tax.change for tax in report.taxes if tax.benchmark == benchmark}
        cells = tuple(cell(found.get(name), 1, 100, sign=True) for name in names)
        rows.append((f"Alignment tax: {benchmark.split(' ')[0]}, points", cells))
    return rows


def _hacking_rows(report: Report, names: Sequence[str]) -> list[tuple[str, tuple[Cell, ...]]]:
    rows = []
    for after, when in ((False, "in training"), (True, "after it")):
        found = {record.policy: record for record in report.hacking if record.after_training == after}
        cells = tuple(
            Cell(f"{len(found[name].caught)} of {len(found[name].verdicts)}", bad=bool(found[name].caught))
            if name in found
            else Cell()
            for name in names
        )
        rows.append((f"Reward-hacking signs {when}", cells))
    return rows


def _cost_rows(report: Report, names: Sequence[str]) -> list[tuple[str, tuple[Cell, ...]]]:
    costs = [report.costs.get(name) for name in names]
    return [("Cost of training, seconds", tuple(cell(cost.seconds if cost else None, 1) for cost in costs))]


def gold_parts_of(report: Report, view: View) -> Table:
    """Mean of each part of the gold score, one column per model."""
    names = tuple(name for name in report.models if name in view.metrics)
    parts = sorted({part for name in names for part in view.metrics[name].gold_parts})
    rows = tuple(
        (part.replace("_", " "), tuple(cell(view.metrics[name].gold_parts.get(part), 3) for name in names))
        for part in parts
    )
    return Table("Parts of the gold score: " + view.title.lower(), ("", *names), rows)


def families_of(report: Report, view: View) -> Table:
    """The judge's mean score per family, and the candidate's win-rate against the reference in it."""
    names = tuple(name for name in report.models if name in view.metrics)
    versus = f"{report.candidate} wins, %"
    with_wins = bool(view.family_wins)
    rows = []
    for family, scores in view.by_family.items():
        cells = [cell(scores.get(name), 3) for name in names]
        if with_wins:
            win = view.family_wins.get(family)
            cells.append(cell(win.rate if win else None, 1, 100))
        rows.append((family, tuple(cells)))
    columns = ("", *names, versus) if with_wins else ("", *names)
    caption = f"Mean score by {_judge_name(report)}."
    if with_wins:
        caption += f" Last column: win-rate of {report.candidate} against {report.reference}, ties half."
    return Table(view.title, columns, tuple(rows), caption)


def win_rates_of(report: Report) -> Table:
    """Every comparison that was made, with its counts."""
    rows = [
        (
            f"{win.first} against {win.second}, {view.title.lower().replace(' prompts', '')}",
            (
                cell(win.rate, 1, 100),
                cell(win.length_controlled, 1, 100),
                Cell(str(win.wins)),
                Cell(str(win.ties)),
                Cell(str(win.losses)),
                p_value(win.p_value),
            ),
        )
        for view in report.views
        for win in view.win_rates
    ]
    caption = f"Judge: {_judge_name(report)}. 95 % bootstrap intervals over prompts; p by a sign test over prompts."
    columns = ("", "Win-rate, %", "At equal length, %", "Wins", "Ties", "Losses", "p")
    return Table("Win-rates", columns, tuple(rows), caption, one_line=True)


def refusals_of(report: Report) -> Table:
    """Refusal rates with their change against the reference."""
    rows = [
        (
            f"{row.model}, {row.intent}, {row.mode}",
            (
                cell(row.rate, 1, 100),
                cell(row.change, 1, 100, sign=True),
                cell(row.worsening_bound, 1, 100, sign=True),
                Cell(str(row.rate.num)),
            ),
        )
        for row in report.refusals
    ]
    columns = ("", "Refuses, %", "Change, points", "At worst, points", "Prompts")
    caption = (
        f"Change against {report.reference} on the same prompts (Newcombe's paired interval). At worst: the one-sided "
        "95 % bound on refusing fewer harmful or more benign prompts."
    )
    return Table("Refusals", columns, tuple(rows), caption, one_line=True)


def reward_model_of(found: RewardAccuracy) -> Table:
    """The reward model on held-out pairs, beside what length alone achieves."""
    quantiles = found.score_quantiles
    rows = (
        ("Accuracy against the labels, %", (cell(found.accuracy, 1, 100),)),
        ("Longer answer wins, %", (cell(found.longer_wins, 1, 100),)),
        ("Shorter answer wins, %", (cell(found.shorter_wins, 1, 100),)),
        ("Lead over the better length rule, points", (cell(found.lead, 1, 100, sign=True),)),
        ("Accuracy against gold order, %", (cell(found.against_gold, 1, 100),)),
        ("Labels against gold order, %", (cell(found.labels_against_gold, 1, 100),)),
        ("Margin, mean", (cell(found.margin_mean, 3),)),
        ("Margin, standard deviation", (cell(found.margin_std, 3),)),
        ("Scores, mean", (cell(found.score_mean, 2),)),
        ("Scores, standard deviation", (cell(found.score_std, 2),)),
        ("Scores, 1st to 99th percentile", (Cell(f"{quantiles['p1']:.2f} to {quantiles['p99']:.2f}"),)),
        ("Calibration error", (cell(found.ece, 3),)),
        ("Brier score", (cell(found.brier, 3),)),
        ("Time per sample, ms", (cell(found.ms_per_sample, 2),)),
        ("Pairs", (cell(float(found.num_pairs), 0),)),
    )
    caption = "95 % Wilson intervals, equal scores count one half."
    return Table("On held-out pairs", ("", "Value"), rows, caption, one_line=True).without_empty_rows()


def reward_families_of(found: RewardAccuracy) -> Table:
    """The reward model's accuracy in each family."""
    rows = tuple((name, (cell(rate, 1, 100), Cell(str(rate.num)))) for name, rate in found.by_family.items())
    return Table("Accuracy by family", ("", "Accuracy, %", "Pairs"), rows, one_line=True)


def taxes_of(report: Report) -> Table:
    """Accuracy on benchmarks of knowledge, and its paired change against the reference."""
    rows = []
    for benchmark in dict.fromkeys(tax.benchmark for tax in report.taxes):
        found = {tax.model: tax for tax in report.taxes if tax.benchmark == benchmark}
        accuracies = [found[name].accuracy if name in found else None for name in report.models]
        changes = [found[name].change if name in found else None for name in report.models]
        rows.append((f"{benchmark}, %", tuple(cell(accuracy, 1, 100) for accuracy in accuracies)))
        rows.append((f"{benchmark}, change, points", tuple(cell(change, 1, 100, sign=True) for change in changes)))
    caption = (
        "Questions with four choices; the likeliest choice counts. Wilson intervals; changes against "
        f"{report.reference} on the same questions (Newcombe's paired interval)."
    )
    return Table("Alignment tax", ("", *report.models), tuple(rows), caption).without_empty_rows()


def costs_of(report: Report) -> Table:
    """What each stage used, with the total where adding up makes sense."""
    costs = report.costs
    rows = [(name, _cost_cells(cost)) for name, cost in costs.items()]
    if len(costs) > 1:
        total = Cost(
            seconds=sum(cost.seconds or 0 for cost in costs.values()),
            tokens=sum(cost.tokens or 0 for cost in costs.values()),
            peak_memory_mb=max((cost.peak_memory_mb or 0 for cost in costs.values()), default=0) or None,
            optimizer_steps=sum(cost.optimizer_steps or 0 for cost in costs.values()),
        )
        rows.append(("together", _cost_cells(total)))
    columns = ("", "Seconds", "Tokens", "Peak MB", "Steps")
    return Table(
        "Cost",
        columns,
        tuple(rows),
        "Tokens processed and optimizer steps made in training; the peak of memory is the largest of the stages.",
    )


def _cost_cells(cost: Cost) -> tuple[Cell, ...]:
    return cell(cost.seconds, 1), cell(cost.tokens, 0), cell(cost.peak_memory_mb, 0), cell(cost.optimizer_steps, 0)


def _win(view: View, name: str, reference: str | None) -> Cell:
    win = view.against(name, reference or "")
    return cell(win.rate, 1, 100) if win is not None else Cell()


def _judge_name(report: Report) -> str:
    return {"gold": "the gold scorer", "reward": "the reward model"}.get(report.judge or "", "none")
