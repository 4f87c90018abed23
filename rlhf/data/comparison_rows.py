"""Rows that hold two answers to one prompt, judged or not, and rows that hold one: what judges are asked about.

| columns | form | preference for the first |
|---|---|---|
| output_1, output_2, label (input, instruction or prompt) | LLMBar, FairEval, LLMEval^2 | label 1: 1, label 2: 0 |
| instruction, output_1, output_2, preference | AlpacaEval; the first is output_2, its model | preference - 1, undecided (0, 1.5) one half |
| conversation_a, conversation_b, winner | MT-bench's and Chatbot Arena's human votes | model_a 1, model_b 0, tie one half |
| prompt, first, second, preference | what `rlhf judge` writes | as it stands |
| any preference format of `data.formats` | HH, UltraFeedback and the like | chosen is first: 1 |
"""  # noqa: E501 - a table row is one line

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.data.fields import Fields, MalformedRowError, UnusableRowError, messages_of, prompt_of, shown, text_of
from rlhf.data.formats import detect_format
from rlhf.data.reading import RawRow, RawRows, read_rows
from rlhf.data.rows import Columns, InstructionRow, LabelledRow, PreferenceRow, Prompt, prompt_key
from rlhf.infra.errors import UserError


@dataclass(frozen=True)
class ComparisonRow:
    """A prompt with two answers. `preference` for the first is in [0, 1], None where nobody has judged.

    `source` is the file's name without its endings, `place` the row's number in that file, counted from 0.
    """

    prompt: Prompt
    first: str
    second: str
    preference: float | None
    source: str = ""
    place: int = 0
    columns: Columns = field(default_factory=dict)


@dataclass(frozen=True)
class AnswerRow:
    """One answer; `key` pairs it with the other model's answers to the same prompt."""

    key: str
    prompt: Prompt
    response: str
    columns: Columns = field(default_factory=dict)


def read_comparisons(
    sources: str | Path | Sequence[str | Path], rejected_rows: Path | None = None
) -> list[ComparisonRow]:
    """Every row of files with two answers each, in any of the forms above.

    Raises UserError for what cannot be read, for columns of no known form, and when over 5 % of rows are malformed.
    """
    raw = read_rows(sources, rejected_rows=rejected_rows)
    num_rows = len(raw.rows) + len(raw.rejected)
    rows = []
    for file, of_file in _by_file(raw.rows).items():
        convert = _converter(file, of_file)
        for place, one in enumerate(of_file):
            try:
                prompt, first, second, preference, columns = convert(one.fields)
            except UnusableRowError:
                continue
            except MalformedRowError as error:
                raw.reject(one, str(error))
                continue
            rows.append(ComparisonRow(prompt, first, second, preference, _stem(file), place, columns))
    raw.check(num_rows)
    return rows


def read_answers(source: str | Path, model: str | None = None) -> list[AnswerRow]:
    """One answer per row: `prompt` and `response`, or any instruction format of `data.formats`.

    Rows are paired by `prompt_id` where they have one, else by their prompt. `model` keeps rows whose column `model`
    (or `generator`) says so. Raises UserError for what cannot be read and for a model that is not there.
    """
    raw = read_rows(source)
    num_rows = len(raw.rows) + len(raw.rejected)
    there = dict.fromkeys(str(name) for row in raw.rows if (name := _model_of(row.fields)) is not None)
    if model is not None and model not in there:
        raise UserError(f"'{source}' has no answers of '{model}'; models in it: {', '.join(there) or 'none is named'}")
    if model is None and len(there) > 1:
        choices = ", ".join(f"{source}:{name}" for name in there)
        raise UserError(f"'{source}' has answers of {len(there)} models; choose one: {choices}")
    rows = [_answer(row, raw) for row in raw.rows if model is None or _model_of(row.fields) == model]
    raw.check(num_rows)
    return [row for row in rows if row is not None]


def _answer(row: RawRow, raw: RawRows) -> AnswerRow | None:
    fields = row.fields
    try:
        if "response" in fields and "prompt" in fields:
            prompt, response = prompt_of(fields["prompt"], "prompt"), text_of(fields, "response")
            columns = {name: value for name, value in fields.items() if name not in ("prompt", "response", "prompt_id")}
        else:
            converted = detect_format(fields).convert(fields)
            if len(converted) != 1 or not isinstance(converted[0], InstructionRow | LabelledRow):
                raise MalformedRowError("the row does not hold one answer")
            only = converted[0]
            response = only.response if isinstance(only, InstructionRow) else only.completion
            prompt, columns = only.prompt, dict(only.columns)
    except UserError as error:
        raise UserError(f"'{row.file}' {row.unit} {row.place} does not hold one answer: {error}") from None
    except (MalformedRowError, UnusableRowError) as error:
        raw.reject(row, str(error))
        return None
    key = fields.get("prompt_id")
    return AnswerRow(prompt_key(prompt) if key is None else str(key), prompt, response, columns)


def _model_of(fields: Mapping[str, Any]) -> Any:
    return fields.get("model", fields.get("generator"))


def _by_file(rows: Sequence[RawRow]) -> dict[str, list[RawRow]]:
    parts: dict[str, list[RawRow]] = {}
    for row in rows:
        parts.setdefault(row.file, []).append(row)
    return parts


def _stem(file: str) -> str:
    return Path(file).name.removesuffix(".gz").rsplit(".", 1)[0]


Converted = tuple[Prompt, str, str, "float | None", Columns]


def _converter(file: str, rows: Sequence[RawRow]) -> Callable[[Fields], Converted]:
    """The form that a file's first row is in."""
    columns = set(rows[0].fields)
    for needed, convert in _FORMS:
        if columns.issuperset(needed):
            return convert
    try:
        form = detect_format(columns)
    except UserError:
        form = None
    if form is None or "chosen" not in form.columns:
        forms = "; ".join(" + ".join(needed) for needed, _ in _FORMS)
        raise UserError(
            f"'{file}' has the columns {', '.join(sorted(columns))}, which are no form of two answers to one prompt; "
            f"expected one of: {forms}; or prompt + chosen + rejected"
        )

    def preferred(fields: Fields) -> Converted:
        (row,) = form.convert(fields)
        assert isinstance(row, PreferenceRow)
        return row.prompt, row.chosen, row.rejected, 1.0, row.columns

    return preferred


def _written_here(fields: Fields) -> Converted:
    value = fields["preference"]
    preference = None if value is None else _number(value, "preference", 0.0, 1.0)
    used = ("prompt", "first", "second", "preference")
    return (
        prompt_of(fields["prompt"], "prompt"),
        text_of(fields, "first"),
        text_of(fields, "second"),
        preference,
        _rest(fields, *used),
    )


def _alpaca_eval(fields: Fields) -> Converted:
    value = fields["preference"]
    preference = None if value is None else _number(value, "preference", 0.0, 2.0)
    if preference is not None:
        if 0.0 < preference < 1.0:
            raise MalformedRowError(f"preference is {preference}, expected 1 to 2, or 0 for undecided")
        preference = 0.5 if preference in (0.0, 1.5) else preference - 1
    used = ("instruction", "output_1", "output_2", "preference")
    return _question(fields), text_of(fields, "output_2"), text_of(fields, "output_1"), preference, _rest(fields, *used)


def _llmbar(fields: Fields) -> Converted:
    label = _number(fields["label"], "label", 0.0, 2.0)
    if label not in (0.0, 1.0, 1.5, 2.0):
        raise MalformedRowError(f"label is {shown(fields['label'])}, expected 1 or 2, or 0 for a tie")
    preference = 0.5 if label in (0.0, 1.5) else 2 - label
    used = ("input", "instruction", "prompt", "output_1", "output_2", "label")
    return _question(fields), text_of(fields, "output_1"), text_of(fields, "output_2"), preference, _rest(fields, *used)


_WINNERS = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5, "tie (inconsistent)": 0.5}


def _arena(fields: Fields) -> Converted:
    winner = str(fields["winner"]).strip().lower()
    if winner not in _WINNERS:
        raise MalformedRowError(f"winner is {shown(fields['winner'])}, expected one of {', '.join(_WINNERS)}")
    one, two = (messages_of(fields[name], name) for name in ("conversation_a", "conversation_b"))
    if one[-1]["role"] != "assistant" or two[-1]["role"] != "assistant":
        raise MalformedRowError("a conversation does not end with the assistant's answer")
    used = ("conversation_a", "conversation_b", "winner")
    first, second = one[-1]["content"], two[-1]["content"]
    if one[:-1] != two[:-1]:
        # In later turns each model answers its own conversation: the judge has to see both whole.
        prompt: Prompt = one[:1]
        first, second = _told(one[1:]), _told(two[1:])
    else:
        prompt = one[:-1]
    return prompt, first, second, _WINNERS[winner], _rest(fields, *used)


def _told(turns: Sequence[Mapping[str, str]]) -> str:
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _question(fields: Fields) -> Prompt:
    name = next((name for name in ("instruction", "prompt", "input") if name in fields), "input")
    value = fields.get(name)
    return [{"role": "user", "content": value}] if isinstance(value, str) else prompt_of(value, name)


def _rest(fields: Fields, *used: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in used}


def _number(value: Any, name: str, low: float, high: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise MalformedRowError(f"{name} is {shown(value)}, expected a number") from None
    if not low <= number <= high:
        raise MalformedRowError(f"{name} is {number:g}, expected {low:g} to {high:g}")
    return number


_FORMS: tuple[tuple[tuple[str, ...], Callable[[Fields], Converted]], ...] = (
    (("prompt", "first", "second", "preference"), _written_here),
    (("instruction", "output_1", "output_2", "preference"), _alpaca_eval),
    (("output_1", "output_2", "label"), _llmbar),
    (("conversation_a", "conversation_b", "winner"), _arena),
)
