"""The files that judging leaves: `judgements.jsonl` with every verdict, `JUDGE_REPORT.md`, `judge.json`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.eval.judge import RULES
from rlhf.eval.judge_figures import JudgedModels
from rlhf.eval.markdown import plain, table_text
from rlhf.eval.tables import Table
from rlhf.infra.durable import write_json, write_text

JUDGEMENTS = "judgements.jsonl"
REPORT = "JUDGE_REPORT.md"
NUMBERS = "judge.json"
_FORMAT = 1


def write_judgements(path: Path, comparisons: Sequence[JudgedModels], rule: str = "averaged") -> None:
    """One line per judge and pair, with the judge's words or scores; `preference` joins both orders by `rule`."""
    lines = []
    for models, one in [(both, judged) for both in comparisons for judged in both.judged]:
        for pair, judgement in zip(one.pairs, one.judgements, strict=True):
            row: dict[str, Any] = {
                "judge": one.judge,
                "prompt_id": pair.prompt_id,
                "group": pair.group,
                "prompt": pair.prompt,
                "first": pair.first,
                "second": pair.second,
                "first_model": models.first,
                "second_model": models.second,
                "label": pair.label,
                "preference": RULES[rule](judgement),
                "in_front": judgement.in_front,
                "behind": judgement.behind,
            }
            row |= {"scores": judgement.scores} if judgement.scores is not None else {"replies": judgement.replies}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def write_judge_report(
    folder: Path,
    title: str,
    sentences: Sequence[str],
    tables: Sequence[Table],
    numbers: Mapping[str, Any],
    notes: Mapping[str, str | int | float],
) -> Path:
    """Write tables and what has to be said about them as Markdown, every number as JSON; returns the Markdown file."""
    blocks = [f"# {plain(title)}", *(plain(sentence) for sentence in sentences)]
    blocks += [f"## {plain(table.title)}\n\n{table_text(table, heading=False)}" for table in tables if table.rows]
    told = "\n".join(f"- {plain(name)}: {plain(str(value))}" for name, value in notes.items())
    write_text(folder / REPORT, "\n\n".join([*blocks, f"## How it was measured\n\n{told}"]) + "\n")
    write_json(folder / NUMBERS, {"format": _FORMAT} | as_json(dict(numbers)))
    return folder / REPORT


def as_json(value: Any) -> Any:
    """Numbers in dataclasses as JSON types; what is not a finite number becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return as_json({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {str(name): as_json(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
