"""Which answers of a pool are kept, and as what: plain rows in, plain rows out.

A row of a pool is a `prompt` with its other `columns` and lists of equal length: `answers`, `scores`, `finished` and,
where they were measured, `worths`. Equal scores are settled by the order in which the answers were drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf.data.formats import detect_format
from rlhf.recipes.best_of_n_config import SelectionSettings

Row = Mapping[str, Any]


def selected(rows: Sequence[Row], settings: SelectionSettings) -> list[tuple[int, int]]:
    """(row, answer) of what is kept, by row and then from the best down; equal answers to a prompt count once.

    Empty answers are never kept, and those that were cut off or score below `min_score` only as the settings say.
    """
    of_rows = [_candidates(row, settings) for row in rows]
    if settings.selection == "per_prompt":
        return [(place, answer) for place, answers in enumerate(of_rows) for answer in answers[: settings.keep]]
    every = [(place, answer) for place, answers in enumerate(of_rows) for answer in answers]
    every.sort(key=lambda one: -rows[one[0]]["scores"][one[1]])  # stable: earlier rows first among equals
    return sorted(every[: settings.keep * len(rows)], key=lambda one: (one[0], of_rows[one[0]].index(one[1])))


def as_demonstrations(rows: Sequence[Row], kept: Iterable[tuple[int, int]]) -> list[dict[str, Any]]:
    """What is kept as prompts with completions, for supervised fine-tuning."""
    return [
        _with_columns(
            rows[place],
            {
                "prompt": rows[place]["prompt"],
                "completion": _said(rows[place]["prompt"], rows[place]["answers"][answer]),
                "score": rows[place]["scores"][answer],
            },
        )
        for place, answer in kept
    ]


def as_pairs(rows: Sequence[Row], min_gap: float) -> list[dict[str, Any]]:
    """Best and worst answer of every prompt where their scores differ by more than `min_gap`, as preference pairs."""
    pairs = []
    for row in rows:
        said = [place for place, text in enumerate(row["answers"]) if text.strip()]
        if not said:
            continue
        best = max(said, key=lambda place: row["scores"][place])
        worst = min(said, key=lambda place: row["scores"][place])
        if row["scores"][best] - row["scores"][worst] > min_gap and row["answers"][best] != row["answers"][worst]:
            texts = {"chosen": row["answers"][best], "rejected": row["answers"][worst]}
            pair = {side: _said(row["prompt"], text) for side, text in texts.items()}
            scores = {"chosen_score": row["scores"][best], "rejected_score": row["scores"][worst]}
            pairs.append(_with_columns(row, {"prompt": row["prompt"], **pair, **scores}))
    return pairs


def _candidates(row: Row, settings: SelectionSettings) -> list[int]:
    """Answers that may be kept, from the best down."""
    order = sorted(range(len(row["answers"])), key=lambda place: -row["scores"][place])
    seen: set[str] = set()
    found = []
    for place in order:
        text = row["answers"][place]
        good = settings.min_score is None or row["scores"][place] >= settings.min_score
        if text.strip() and text not in seen and good and (row["finished"][place] or settings.keep_unfinished):
            seen.add(text)
            found.append(place)
    return found


def _with_columns(row: Row, made: dict[str, Any]) -> dict[str, Any]:
    """The other columns of a prompt travel along, but for those by which the row would be taken for another format."""
    wanted = detect_format(made)
    found = dict(made)
    for name, value in row["columns"].items():
        if name not in made and name not in wanted.also_used and detect_format([*found, name]) is wanted:
            found[name] = value
    return found


def _said(prompt: Any, text: str) -> Any:
    """The answer in the form of its prompt: text behind text, a message behind messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
