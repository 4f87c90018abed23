"""Judges in tables: who wins by whom, how each judge behaves, how far they agree with each other and with people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf.eval.intervals import Interval
from rlhf.eval.judge_figures import Accuracy, Agreement, Duel, JudgeLine
from rlhf.eval.report_data import Report
from rlhf.eval.tables import Cell, Table, cell, p_value
from rlhf.eval.winrate import WinRate

_RULES = {
    "averaged": "Both orders are averaged.",
    "agreed": "A win counts only where both orders say so.",
}


def judges_of(report: Report) -> list[Table]:
    """What further judges said in an evaluation; empty where there are none."""
    if not report.judges:
        return []
    tables = [wins_by_judge(report.judges), behaviour_by_judge(report.judges)]
    return tables if report.judge_agreement is None else [*tables, agreement_between(report.judge_agreement)]


def wins_by_judge(lines: Sequence[JudgeLine], rule: str = "averaged") -> Table:
    """One row per comparison and judge; a single comparison stands in the title."""
    rows = []
    for line in lines:
        win, unjudged = line.win, Cell(str(line.behaviour.num_unparsable))
        cells = (Cell(), Cell(), Cell(), Cell(), Cell(), unjudged)
        if win is not None:
            counts = Cell(f"{win.wins} / {win.ties} / {win.losses}")
            rates = cell(win.rate, 1, 100), wilson_bounds(win), cell(win.length_controlled, 1, 100)
            cells = (*rates, counts, p_value(win.p_value), unjudged)
        rows.append((_label(line, lines), cells))
    columns = ("", "Win-rate, %", "Wilson", "At equal length, %", "Wins / ties / losses", "p", "No verdict")
    caption = (
        f"{_RULES[rule]} Ties count one half, pairs without a verdict not at all. 95 % intervals over prompts, "
        "bootstrapped and Wilson's; p by a sign test over prompts."
    )
    title = f"Win-rate of {lines[0].first} against {lines[0].second}" if _is_single(lines) else "Win-rates by judge"
    return Table(title, columns, tuple(rows), caption, one_line=True)


def behaviour_by_judge(lines: Sequence[JudgeLine]) -> Table:
    """What sways each judge, whatever is true."""
    rows = [
        (
            _label(line, lines),
            (
                cell(line.behaviour.consistency, 1, 100),
                cell(line.behaviour.front, 1, 100),
                cell(line.behaviour.front_always, 1, 100),
                cell(line.behaviour.back_always, 1, 100),
                cell(line.behaviour.longer, 1, 100),
            ),
        )
        for line in lines
    ]
    places = ("Same in both orders, %", "Prefers the front, %", "Always front, %", "Always back, %")
    columns = ("", *places, "Prefers longer, %")
    caption = (
        "A judge whom places do not sway prefers the answer in front half of the time; always front or back are pairs "
        "in which the place won twice. Judges that score one answer at a time see no order. Preferring the longer "
        "answer is a fault only beyond what is deserved."
    )
    return Table("How the judges judge", columns, tuple(rows), caption, one_line=True)


def agreement_between(agreement: Agreement) -> Table:
    """Kappa of every two judges and of all."""
    rows = [(f"{pair.first} and {pair.second}", _kappa(pair.kappa)) for pair in agreement.pairs]
    if agreement.all is not None and len(agreement.pairs) > 1:
        rows.append(("all of them", _kappa(agreement.all)))
    caption = "Cohen's kappa of two judges, Fleiss' of all: 1 is perfect agreement, 0 what chance would give."
    return Table("Agreement between judges", ("", "Kappa", "Pairs"), tuple(rows), caption, one_line=True)


def agreement_with_people(accuracies: Mapping[tuple[str, str], Accuracy]) -> Table:
    """One row per judge and set of labelled pairs."""
    rows = [
        (
            f"{judge}, {group}" if group else judge,
            (
                cell(found.agreement, 1, 100),
                cell(found.both_orders, 1, 100),
                cell(found.kappa, 2),
                Cell(str(found.num_labelled)),
                Cell(str(found.num_unparsable)),
                Cell(f"{100 * found.bounds[0]:.1f} to {100 * found.bounds[1]:.1f}") if found.num_unparsable else Cell(),
            ),
        )
        for (judge, group), found in accuracies.items()
    ]
    rates = ("Agreement, %", "Right in both orders, %", "Kappa")
    columns = ("", *rates, "Pairs", "No verdict", "If these were wrong or right, %")
    caption = (
        "Agreement with people's labels over pairs with a verdict, a tie or a change of mind with the order counting "
        "one half; 95 % Wilson intervals. Guessing gives 50 %."
    )
    return Table("Agreement with people", columns, tuple(rows), caption, one_line=True)


def length_bias(accuracies: Mapping[tuple[str, str], Accuracy]) -> Table:
    """Whether a judge is right more often where the better answer is also the longer one."""
    rows = [
        (
            f"{judge}, {group}" if group else judge,
            (
                cell(found.longer_right, 1, 100),
                cell(found.shorter_right, 1, 100),
                cell(found.length_gap, 1, 100, sign=True),
                cell(found.longer_labelled, 1, 100),
            ),
        )
        for (judge, group), found in accuracies.items()
    ]
    right = ("Right where longer is better, %", "Right where shorter is better, %")
    columns = ("", *right, "Gap, points", "People prefer longer, %")
    caption = "A judge without a liking for length is as often right in either case: its gap is zero."
    return Table("Length", columns, tuple(rows), caption, one_line=True).without_empty_rows()


def duels_of(duels: Sequence[Duel]) -> Table:
    """Every two judges on the same labels."""
    rows = [
        (
            f"{duel.first} minus {duel.second}",
            (
                cell(duel.difference.difference, 1, 100, sign=True),
                p_value(duel.difference.p_value),
                p_value(duel.mcnemar),
                Cell(str(duel.difference.difference.num)),
            ),
        )
        for duel in duels
    ]
    columns = ("", "Agreement, points", "p, paired bootstrap", "p, McNemar", "Pairs")
    caption = "On pairs on which both have a verdict. McNemar's test is about being right in both orders."
    return Table("Judges against each other", columns, tuple(rows), caption, one_line=True)


def wilson_bounds(win: WinRate, places: int = 1) -> Cell:
    """Wilson's interval of a win-rate, in percent, without the rate."""
    return Cell(f"{100 * win.wilson.low:.{places}f} to {100 * win.wilson.high:.{places}f}")


def _is_single(lines: Sequence[JudgeLine]) -> bool:
    return len({(line.first, line.second) for line in lines}) == 1


def _label(line: JudgeLine, lines: Sequence[JudgeLine]) -> str:
    return line.judge if _is_single(lines) else f"{line.first} against {line.second}, {line.judge}"


def _kappa(found: Interval) -> tuple[Cell, ...]:
    return cell(found, 2), Cell(str(found.num))
