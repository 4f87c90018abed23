"""Win-rates from verdicts that are there already, such as AlpacaEval's annotations: raw and at equal length."""

from __future__ import annotations

import csv
import dataclasses
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf.data.comparison_rows import ComparisonRow, read_comparisons
from rlhf.data.rows import prompt_key
from rlhf.eval.intervals import FloatArray
from rlhf.eval.judge_tables import wilson_bounds
from rlhf.eval.length_control import Regulariser, length_controlled
from rlhf.eval.tables import Cell, Table, cell, p_value
from rlhf.eval.winrate import Comparison, WinRate, win_rate
from rlhf.infra.errors import UserError


@dataclass(frozen=True)
class StoredWinRate:
    """Figures of one judge's stored verdicts; `num_unjudged` rows hold none. The standard error is that of the mean."""

    win: WinRate
    standard_error: float
    length_effect: float
    num_unjudged: int


def stored_win_rates(
    source: str, difficulty: Path | None = None, regulariser: Path | None = None, seed: int = 0
) -> list[StoredWinRate]:
    """The win-rate of each judge in a file of judged pairs, of the first model against the second.

    `difficulty` is a CSV with AlpacaEval's columns index and instruction_difficulty (index is the row's number in the
    file), `regulariser` one with std_delta_len, instruction_difficulty and expected_preference, whose lengths are
    baseline minus model. Raises UserError where a file does not hold what is expected.
    """
    rows = read_comparisons(source)
    hardness = None if difficulty is None else _difficulties(difficulty)
    fixed = None if regulariser is None else _regulariser(regulariser)
    if fixed is not None and hardness is None:
        raise UserError("a regulariser needs the difficulty of the prompts too; give --difficulty")
    by_judge: dict[str, list[ComparisonRow]] = {}
    for row in rows:
        by_judge.setdefault(str(row.columns.get("judge", row.columns.get("annotator", "judge"))), []).append(row)
    return [_of_judge(judge, of_judge, hardness, fixed, seed) for judge, of_judge in by_judge.items()]


def winrate_table(found: Sequence[StoredWinRate]) -> Table:
    """One row per judge."""
    rows = []
    for one in found:
        win = one.win
        cells = (
            cell(win.rate, 2, 100),
            wilson_bounds(win, 2),
            cell(one.standard_error, 2, 100),
            cell(win.length_controlled, 2, 100),
            Cell(f"{one.length_effect:+.2f}"),
            Cell(f"{win.wins} / {win.ties} / {win.losses}"),
            p_value(win.p_value),
            Cell(str(one.num_unjudged)),
        )
        rows.append((win.judge, cells))
    rates = ("Win-rate, %", "Wilson", "Standard error", "At equal length, %", "Length effect")
    columns = ("", *rates, "Wins / ties / losses", "p", "No verdict")
    caption = (
        "Ties count one half. 95 % intervals over prompts, bootstrapped and Wilson's; p by a sign test over "
        "prompts. Length effect: logits for the longer answer, positive where the judge favours it."
    )
    title = f"Win-rate of {found[0].win.first} against {found[0].win.second}"
    return Table(title, columns, tuple(rows), caption)


def _of_judge(
    judge: str,
    rows: Sequence[ComparisonRow],
    difficulty: Mapping[int, float] | None,
    regulariser: Regulariser | None,
    seed: int,
) -> StoredWinRate:
    kept = [(row, row.preference) for row in rows if row.preference is not None]
    if not kept:
        raise UserError(f"no row of judge '{judge}' holds a verdict; is the column preference empty?")
    comparisons = [Comparison(_id_of(row), preference, len(row.first), len(row.second)) for row, preference in kept]
    preferences = np.array([preference for _, preference in kept])
    hardness = None
    if difficulty is not None:
        absent = next((row.place for row, _ in kept if row.place not in difficulty), None)
        if absent is not None:
            raise UserError(f"the difficulties have no index {absent}, but row {absent} was judged; give one per row")
        hardness = [difficulty[row.place] for row, _ in kept]
    controlled = length_controlled(
        preferences,
        [one.length_first for one in comparisons],
        [one.length_second for one in comparisons],
        hardness,
        regulariser,
        seed,
    )
    spread = float(preferences.std(ddof=1)) if len(preferences) > 1 else float("nan")
    names = _names(kept[0][0])
    return StoredWinRate(
        dataclasses.replace(win_rate(comparisons, names, judge, seed=seed), length_controlled=controlled.rate),
        spread / len(preferences) ** 0.5,
        controlled.length_effect,
        len(rows) - len(kept),
    )


def _id_of(row: ComparisonRow) -> str:
    return str(row.columns.get("prompt_id", f"{row.source}/{prompt_key(row.prompt)}"))


def _names(row: ComparisonRow) -> tuple[str, str]:
    columns = row.columns
    first = columns.get("first_model") or columns.get("generator_2") or "first"
    second = columns.get("second_model") or columns.get("generator_1") or "second"
    return str(first), str(second)


def _difficulties(path: Path) -> dict[int, float]:
    columns = _columns(path, ("index", "instruction_difficulty"))
    return {int(index): value for index, value in zip(columns["index"], columns["instruction_difficulty"], strict=True)}


def _regulariser(path: Path) -> Regulariser:
    columns = _columns(path, ("std_delta_len", "instruction_difficulty", "expected_preference"))
    # The file counts baseline minus model, as the paper's code does; here it is the model's lead in length.
    return Regulariser(-columns["std_delta_len"], columns["instruction_difficulty"], columns["expected_preference"])


def _columns(path: Path, names: Sequence[str]) -> dict[str, FloatArray]:
    """Columns of numbers in a CSV, gzipped or not."""
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' cannot be read: {error}") from None
    rows = list(csv.DictReader(text.splitlines()))
    missing = [name for name in names if not rows or name not in rows[0]]
    if missing:
        raise UserError(f"'{path}' lacks the column {missing[0]}; expected a CSV with {', '.join(names)}")
    try:
        return {name: np.array([float(row[name]) for row in rows]) for name in names}
    except (TypeError, ValueError) as error:
        raise UserError(f"'{path}' holds something that is no number: {error}") from None
