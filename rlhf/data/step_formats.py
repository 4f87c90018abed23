"""Converters of the published formats in which every step of a worked solution is judged."""

from __future__ import annotations

from typing import Any

from rlhf.data.fields import Fields, MalformedRowError, flag_of, prompt_of, text_of
from rlhf.data.rows import Columns, Prompt, Row, StepRow

STEP_MARK = "ки"  # Math-Shepherd's step tag, also used by openr's PRM800K files


def stepwise(fields: Fields, columns: Columns) -> Row:
    completions, labels = fields["completions"], fields["labels"]
    if not isinstance(completions, list) or not isinstance(labels, list):
        raise MalformedRowError("completions and labels are not both lists")
    return _steps(prompt_of(fields["prompt"], "prompt"), completions, labels, columns)


def marked_steps(fields: Fields, columns: Columns) -> Row:
    question, process, labels = text_of(fields, "question"), text_of(fields, "process"), fields["labels"]
    steps = [step.strip() for step in process.split(STEP_MARK)]
    if not isinstance(labels, list):
        raise MalformedRowError("labels is not a list")
    return _steps([{"role": "user", "content": question}], [step for step in steps if step], labels, columns)


def math_shepherd(fields: Fields, columns: Columns) -> Row:
    """Math-Shepherd writes the solution twice: `input` with a mark after each step, `label` with + or - instead."""
    marked, judged = text_of(fields, "input"), text_of(fields, "label")
    question, first, steps_text = marked.partition("Step 1:")
    steps = [step.strip() for step in (first + steps_text).split(STEP_MARK)]
    steps = [step for step in steps if step]
    judged_lines = judged[len(question) :]
    labels: list[bool] = []
    cursor = 0
    for step in steps:
        cursor = judged_lines.find(step, cursor)
        verdict = judged_lines[cursor + len(step) :].lstrip()[:1] if cursor >= 0 else ""
        if verdict not in ("+", "-"):
            raise MalformedRowError(f"step {len(labels) + 1} has no + or - in label")
        labels.append(verdict == "+")
        cursor += len(step)
    return _steps([{"role": "user", "content": question.strip()}], steps, labels, columns)


def first_mistake(fields: Fields, columns: Columns) -> Row:
    """Steps up to and including the first wrong one; what follows a mistake was not judged."""
    steps, mistake = fields["steps"], fields["mistake_index"]
    if not isinstance(steps, list):
        raise MalformedRowError("steps is not a list")
    if mistake is not None and not (isinstance(mistake, int) and 0 <= mistake < len(steps)):
        raise MalformedRowError(f"mistake_index is {mistake!r}, expected null or 0 to {len(steps) - 1}")
    judged = steps if mistake is None else steps[: mistake + 1]
    labels = [index != mistake for index in range(len(judged))]
    return _steps([{"role": "user", "content": text_of(fields, "input")}], judged, labels, columns)


def _steps(prompt: Prompt, completions: list[Any], labels: list[Any], columns: Columns) -> StepRow:
    if len(completions) != len(labels) or not completions:
        raise MalformedRowError(f"{len(completions)} steps but {len(labels)} labels; expected one label for each step")
    if not all(isinstance(step, str) for step in completions):
        raise MalformedRowError("a step is not text")
    return StepRow(prompt, list(completions), [flag_of(label, "labels") for label in labels], columns)
