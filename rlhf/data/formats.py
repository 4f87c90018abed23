"""Which format a data set is in, told by its columns alone, and its rows turned into canonical rows.

| columns | format | becomes |
|---|---|---|
| conversations, chosen, rejected | sharegpt_preference | PreferenceRow |
| instruction, chosen, rejected (input, system) | alpaca_preference | PreferenceRow |
| prompt, chosen, rejected | prompt_preference (TRL, HH with the prompt split off) | PreferenceRow |
| chosen, rejected | implicit_preference (HH dialogues, TRL implicit prompt) | PreferenceRow |
| prompt, completions, labels | stepwise (TRL) | StepRow |
| question, process, labels | marked_steps (PRM800K as in openr) | StepRow |
| question, process, label | marked_step (one step of it alone) | StepRow |
| labeler, question, label | prm800k (as published) | StepRow per judged path |
| question, reasoning_steps | math_aps (prefixes with Monte-Carlo values) | StepRow per path |
| input, label, task | math_shepherd | StepRow |
| input, steps, mistake_index | first_mistake (BIG-Bench Mistake) | StepRow |
| problem, steps, label | process_bench (index of the first mistake, -1: none) | StepRow |
| messages, label | labelled_messages | LabelledRow |
| prompt, completion, label | labelled_completion (TRL) | LabelledRow |
| instruction, output, tag (input, system) | labelled_alpaca | LabelledRow |
| conversations, label | labelled_sharegpt | LabelledRow |
| messages | messages | InstructionRow |
| conversations | sharegpt | InstructionRow |
| prompt, completion | completion (TRL) | InstructionRow |
| instruction, instances | self_instruct | InstructionRow per instance |
| instruction, output (input, system) | alpaca | InstructionRow |
| instruction, response (context) | dolly | InstructionRow |
| question, answer | question_answer (GSM8K) | InstructionRow |
| problem, solution | problem_solution (MATH) | InstructionRow |
| text, code | text_code (MBPP) | InstructionRow |
| prompt | prompt_only | PromptRow |
| text | text | TextRow |

The first line of the table whose columns are all there wins; other columns travel along in `columns`. Step labels are
1, true or + for right, 0, false, - or -1 for wrong; in a file that holds -1, 0 is neutral. A `str` prompt
under "prompt" stays raw text; instructions and questions become a user message, because that is what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf.data.dialogue import answer_and_prefix, common_prefix_split, parse_hh_dialogue, split_hh_text
from rlhf.data.fields import (
    Fields,
    MalformedRowError,
    UnusableRowError,
    flag_of,
    messages_of,
    prompt_of,
    shown,
    text_of,
)
from rlhf.data.rows import (
    Columns,
    InstructionRow,
    LabelledRow,
    Message,
    PreferenceRow,
    Prompt,
    PromptRow,
    Row,
    StepLabel,
    StepRow,
    TextRow,
    prompt_key,
)
from rlhf.data.step_formats import (
    aps_paths,
    first_mistake,
    marked_step,
    marked_steps,
    math_shepherd,
    prm800k_paths,
    process_bench,
    stepwise,
    with_neutral,
)
from rlhf.infra.errors import UserError

__all__ = [
    "FORMATS",
    "Format",
    "InstructionRow",
    "LabelledRow",
    "MalformedRowError",
    "Message",
    "PreferenceRow",
    "Prompt",
    "PromptRow",
    "Row",
    "StepLabel",
    "StepRow",
    "TextRow",
    "UnusableRowError",
    "as_instruction",
    "as_labelled",
    "as_prompt",
    "detect_format",
    "parse_hh_dialogue",
    "prompt_key",
    "split_hh_text",
]


@dataclass(frozen=True)
class Format:
    """A named set of columns and the function that makes a canonical row of one raw row.

    `also_used` are optional columns the converter reads; `expand` makes several raw rows of one before converting;
    `over_file` settles what only the whole file can tell.
    """

    name: str
    columns: tuple[str, ...]
    to_row: Callable[[Fields, Columns], Row]
    also_used: tuple[str, ...] = ()
    expand: Callable[[Fields], list[Fields]] | None = None
    over_file: Callable[[Sequence[Fields]], list[Fields]] | None = None

    def convert(self, fields: Fields) -> list[Row]:
        """Return the canonical rows of one raw row; raises MalformedRowError or UnusableRowError."""
        missing = [name for name in self.columns if name not in fields]
        if missing:
            raise MalformedRowError(f"column '{missing[0]}' is missing")
        rows = []
        for part in self.expand(fields) if self.expand else [fields]:
            used = {*self.columns, *self.also_used}
            rows.append(self.to_row(part, {name: value for name, value in part.items() if name not in used}))
        return rows


def detect_format(columns: Iterable[str]) -> Format:
    """Return the format these columns belong to; raises UserError that lists them and every accepted set."""
    present = set(columns)
    for candidate in FORMATS:
        if present.issuperset(candidate.columns):
            return candidate
    accepted = "; ".join(" + ".join(candidate.columns) for candidate in FORMATS)
    raise UserError(
        f"the columns {sorted(present)} match no known format; expected one of: {accepted} "
        "(rename columns with data.columns, for example data.columns={prompt: question})"
    )


# ---------------------------------------------------------------------- from one use to another


def as_instruction(row: Row) -> InstructionRow | TextRow | None:
    """Return the row as something to imitate: the chosen side of a pair, an approved answer; None when it has none."""
    if isinstance(row, PreferenceRow):
        return InstructionRow(row.prompt, row.chosen, row.columns)
    if isinstance(row, LabelledRow):
        return InstructionRow(row.prompt, row.completion, row.columns) if row.label else None
    if isinstance(row, StepRow):
        is_right = all(label == 1 for label in row.labels)
        return InstructionRow(row.prompt, "\n".join(row.completions), row.columns) if is_right else None
    return None if isinstance(row, PromptRow) else row


def as_prompt(row: Row) -> PromptRow | None:
    """Return the row's prompt with its columns; None for plain text, which has no prompt."""
    return None if isinstance(row, TextRow) else PromptRow(row.prompt, row.columns)


def as_labelled(row: Row) -> list[LabelledRow]:
    """Return the row's answers with labels: a pair gives one approved and one disapproved answer."""
    if isinstance(row, LabelledRow):
        return [row]
    if isinstance(row, PreferenceRow):
        return [
            LabelledRow(row.prompt, row.chosen, True, row.columns),
            LabelledRow(row.prompt, row.rejected, False, row.columns),
        ]
    return []


# ---------------------------------------------------------------------- preference pairs


def _prompt_preference(fields: Fields, columns: Columns) -> Row:
    prompt = prompt_of(fields["prompt"], "prompt")
    chosen, rejected = fields["chosen"], fields["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        return PreferenceRow(prompt, chosen, rejected, _margin(fields), columns)
    # Answers as messages: either the answer alone, or the whole conversation with the prompt in front (Tulu 3).
    better, better_prefix = answer_and_prefix(chosen, prompt, "chosen")
    worse, worse_prefix = answer_and_prefix(rejected, prompt, "rejected")
    if better_prefix != worse_prefix:
        raise UnusableRowError("prompts_differ")
    return PreferenceRow(better_prefix, better, worse, _margin(fields), columns)


def _implicit_preference(fields: Fields, columns: Columns) -> Row:
    chosen, rejected = fields["chosen"], fields["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt, better, worse = common_prefix_split(chosen, rejected)
        return PreferenceRow(prompt, better, worse, _margin(fields), columns)
    better_prefix, better = _conversation(chosen, "chosen")
    worse_prefix, worse = _conversation(rejected, "rejected")
    if better_prefix != worse_prefix:
        raise UnusableRowError("prompts_differ")
    return PreferenceRow(better_prefix, better, worse, _margin(fields), columns)


def _sharegpt_preference(fields: Fields, columns: Columns) -> Row:
    prompt = _with_system(fields, messages_of(fields["conversations"], "conversations"))
    chosen, rejected = (_one_answer(fields[name], name) for name in ("chosen", "rejected"))
    return PreferenceRow(prompt, chosen, rejected, _margin(fields), columns)


def _alpaca_preference(fields: Fields, columns: Columns) -> Row:
    return PreferenceRow(
        _alpaca_prompt(fields), text_of(fields, "chosen"), text_of(fields, "rejected"), _margin(fields), columns
    )


def _margin(fields: Fields) -> float | None:
    margin = fields.get("margin")
    if margin is None:
        return None
    if isinstance(margin, (int, float)) and not isinstance(margin, bool):
        return float(margin)
    try:
        return float(margin)
    except (TypeError, ValueError):
        raise MalformedRowError(f"margin is {margin!r}, expected a number") from None


# ---------------------------------------------------------------------- one answer, with or without a label


def _messages(fields: Fields, columns: Columns) -> Row:
    return InstructionRow(*_conversation(fields["messages"], "messages"), columns)


def _sharegpt(fields: Fields, columns: Columns) -> Row:
    prompt, answer = _conversation(fields["conversations"], "conversations")
    return InstructionRow(_with_system(fields, prompt), answer, columns)


def _completion(fields: Fields, columns: Columns) -> Row:
    prompt = prompt_of(fields["prompt"], "prompt")
    if isinstance(fields["completion"], str):
        return InstructionRow(prompt, fields["completion"], columns)
    answer, prefix = answer_and_prefix(fields["completion"], prompt, "completion")
    return InstructionRow(prefix, answer, columns)


def _alpaca(fields: Fields, columns: Columns) -> Row:
    return InstructionRow(_alpaca_prompt(fields), text_of(fields, "output"), columns)


def _dolly(fields: Fields, columns: Columns) -> Row:
    prompt = _alpaca_prompt({**fields, "input": fields.get("context")})
    return InstructionRow(prompt, text_of(fields, "response"), columns)


def _instances(fields: Fields) -> list[Fields]:
    instances = fields["instances"]
    if not isinstance(instances, list) or not all(isinstance(instance, Mapping) for instance in instances):
        raise MalformedRowError("instances is not a list of objects with input and output")
    return [{**fields, **instance} for instance in instances]


def _asked(question: str, answer: str) -> Callable[[Fields, Columns], Row]:
    def to_row(fields: Fields, columns: Columns) -> Row:
        prompt = [{"role": "user", "content": text_of(fields, question)}]
        # The reference answer stays a column: rewards that check answers need it.
        return InstructionRow(prompt, text_of(fields, answer), {**columns, answer: fields[answer]})

    return to_row


def _text_code(fields: Fields, columns: Columns) -> Row:
    row = _asked("text", "code")(fields, columns)
    tests = fields.get("test_list")
    if not isinstance(row, InstructionRow) or not isinstance(tests, list):
        return row
    # As MBPP is asked (arXiv:2108.07732): the tests say what the function is to be called.
    shown = "\n".join([f"{text_of(fields, 'text')}\nYour code should pass these tests:\n", *map(str, tests)])
    return replace(row, prompt=[{"role": "user", "content": shown}])


def _labelled(label: str, unlabelled: Callable[[Fields, Columns], Row]) -> Callable[[Fields, Columns], Row]:
    def to_row(fields: Fields, columns: Columns) -> Row:
        row = unlabelled(fields, columns)
        assert isinstance(row, InstructionRow)
        return LabelledRow(row.prompt, row.response, flag_of(fields[label], label), columns)

    return to_row


def _prompt_only(fields: Fields, columns: Columns) -> Row:
    return PromptRow(prompt_of(fields["prompt"], "prompt"), columns)


def _text_only(fields: Fields, columns: Columns) -> Row:
    return TextRow(text_of(fields, "text"), columns)


# ---------------------------------------------------------------------- parts of a row


def _conversation(value: Any, name: str) -> tuple[list[Message], str]:
    """Return the conversation before its last assistant turn, and that turn's text."""
    messages = messages_of(value, name)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise MalformedRowError(f"{name} has no assistant turn")
    return messages[: turns[-1]], messages[turns[-1]]["content"]


def _one_answer(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    messages = messages_of([value] if isinstance(value, Mapping) else value, name)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise MalformedRowError(f"{name} is not one assistant message")
    return messages[0]["content"]


def _alpaca_prompt(fields: Fields) -> list[Message]:
    instruction, extra = text_of(fields, "instruction"), fields.get("input") or ""
    if not isinstance(extra, str):
        raise MalformedRowError(f"input is {shown(extra)}, expected text")
    content = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return _with_system(fields, [{"role": "user", "content": content}])


def _with_system(fields: Fields, messages: list[Message]) -> list[Message]:
    system = fields.get("system")
    if isinstance(system, str) and system.strip() and not (messages and messages[0]["role"] == "system"):
        return [{"role": "system", "content": system}, *messages]
    return messages


_ALPACA_EXTRAS = ("input", "system")
_STEPWISE = ("prompt", "completions", "labels")
FORMATS: tuple[Format, ...] = (
    Format("sharegpt_preference", ("conversations", "chosen", "rejected"), _sharegpt_preference, ("system", "margin")),
    Format("alpaca_preference", ("instruction", "chosen", "rejected"), _alpaca_preference, (*_ALPACA_EXTRAS, "margin")),
    Format("prompt_preference", ("prompt", "chosen", "rejected"), _prompt_preference, ("margin",)),
    Format("implicit_preference", ("chosen", "rejected"), _implicit_preference, ("margin",)),
    Format("stepwise", ("prompt", "completions", "labels"), stepwise, over_file=with_neutral),
    Format("marked_steps", ("question", "process", "labels"), marked_steps, over_file=with_neutral),
    Format("marked_step", ("question", "process", "label"), marked_step, over_file=with_neutral),
    Format("prm800k", ("labeler", "question", "label"), stepwise, _STEPWISE, prm800k_paths),
    Format("math_aps", ("question", "reasoning_steps"), stepwise, _STEPWISE, aps_paths),
    Format("math_shepherd", ("input", "label", "task"), math_shepherd),
    Format("first_mistake", ("input", "steps", "mistake_index"), first_mistake),
    Format("process_bench", ("problem", "steps", "label"), process_bench),
    Format("labelled_messages", ("messages", "label"), _labelled("label", _messages)),
    Format("labelled_completion", ("prompt", "completion", "label"), _labelled("label", _completion)),
    Format("labelled_alpaca", ("instruction", "output", "tag"), _labelled("tag", _alpaca), _ALPACA_EXTRAS),
    Format("labelled_sharegpt", ("conversations", "label"), _labelled("label", _sharegpt), ("system",)),
    Format("messages", ("messages",), _messages),
    Format("sharegpt", ("conversations",), _sharegpt, ("system",)),
    Format("completion", ("prompt", "completion"), _completion),
    Format("self_instruct", ("instruction", "instances"), _alpaca, (*_ALPACA_EXTRAS, "output"), _instances),
    Format("alpaca", ("instruction", "output"), _alpaca, _ALPACA_EXTRAS),
    Format("dolly", ("instruction", "response"), _dolly, ("context", "system")),
    Format("question_answer", ("question", "answer"), _asked("question", "answer")),
    Format("problem_solution", ("problem", "solution"), _asked("problem", "solution")),
    Format("text_code", ("text", "code"), _text_code),
    Format("prompt_only", ("prompt",), _prompt_only),
    Format("text", ("text",), _text_only),
)
