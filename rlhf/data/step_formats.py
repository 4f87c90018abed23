"""Converters of the published formats in which every step of a worked solution is judged.

A label is 1, true or "+" for a right step, 0, false, "-" or -1 for a wrong one, a number between for a share of
completions that came to the right answer, null for a step that nobody judged. Where a file also knows -1, its 0 is
PRM800K's third verdict, neutral: correct as far as it goes, but no progress.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from rlhf.data.fields import Fields, MalformedRowError, UnusableRowError, flag_of, prompt_of, shown, text_of
from rlhf.data.rows import Columns, Prompt, Row, StepLabel, StepRow

STEP_MARK = "ки"  # Math-Shepherd's step tag, also used by openr's PRM800K files
NEUTRAL: Final[Literal["neutral"]] = "neutral"
_RATINGS: dict[Any, StepLabel] = {1: 1.0, 0: NEUTRAL, -1: 0.0, None: None}


def stepwise(fields: Fields, columns: Columns) -> Row:
    completions, labels = fields["completions"], fields["labels"]
    if not isinstance(completions, list) or not isinstance(labels, list):
        raise MalformedRowError("completions and labels are not both lists")
    return _steps(prompt_of(fields["prompt"], "prompt"), completions, labels, columns)


def marked_steps(fields: Fields, columns: Columns) -> Row:
    labels = fields["labels"]
    if not isinstance(labels, list):
        raise MalformedRowError("labels is not a list")
    return _steps(_asked(fields, "question"), _between_marks(text_of(fields, "process")), labels, columns)


def marked_step(fields: Fields, columns: Columns) -> Row:
    """A single judged step; the steps before it are not in the file, so it is judged as the first."""
    steps = _between_marks(text_of(fields, "process"))
    return _steps(_asked(fields, "question"), steps, [fields["label"]], columns)


def math_shepherd(fields: Fields, columns: Columns) -> Row:
    """Math-Shepherd writes the solution twice: `input` with a mark after each step, `label` with + or - instead."""
    marked, judged = text_of(fields, "input"), text_of(fields, "label")
    question, first, steps_text = marked.partition("Step 1:")
    steps = _between_marks(first + steps_text)
    judged_lines = judged[len(question) :]
    labels: list[StepLabel] = []
    cursor = 0
    for step in steps:
        cursor = judged_lines.find(step, cursor)
        verdict = judged_lines[cursor + len(step) :].lstrip()[:1] if cursor >= 0 else ""
        if verdict not in ("+", "-"):
            raise MalformedRowError(f"step {len(labels) + 1} has no + or - in label")
        labels.append(float(verdict == "+"))
        cursor += len(step)
    return _steps([{"role": "user", "content": question.strip()}], steps, labels, columns)


def first_mistake(fields: Fields, columns: Columns) -> Row:
    """Steps up to and including the first wrong one; what follows a mistake was not judged."""
    return _until_mistake(_asked(fields, "input"), fields["steps"], fields["mistake_index"], "mistake_index", columns)


def process_bench(fields: Fields, columns: Columns) -> Row:
    """The same with -1 for a solution without a mistake."""
    mistake = None if fields["label"] == -1 else fields["label"]
    return _until_mistake(_asked(fields, "problem"), fields["steps"], mistake, "label", columns)


def prm800k_paths(fields: Fields) -> list[Fields]:
    """PRM800K as published: each step has several candidates with ratings, one of which the solution goes on with.

    Gives the solution that was gone on with, and for every other rated candidate the path to it, on which only that
    candidate's label stands, so that no verdict counts twice. A step that the labeller wrote has no rating.
    """
    question, label = fields["question"], fields["label"]
    steps = label.get("steps") if isinstance(label, Mapping) else None
    if not isinstance(question, Mapping) or not isinstance(steps, list):
        raise MalformedRowError("question and label are not the objects of PRM800K with problem and steps")
    path: list[Any] = []
    ratings: list[StepLabel] = []
    others: list[tuple[list[Any], list[StepLabel]]] = []
    try:
        for step in steps:
            candidates, chosen, human = step["completions"] or [], step["chosen_completion"], step["human_completion"]
            others += [
                ([*path, one["text"]], [*[None] * len(path), _RATINGS[one["rating"]]])
                for place, one in enumerate(candidates)
                if place != chosen and one["rating"] is not None
            ]
            if chosen is None and human is None:
                break  # the labeller gave up, or the last candidates held the mistake that was looked for
            path.append(human["text"] if chosen is None else candidates[chosen]["text"])
            ratings.append(None if chosen is None else _RATINGS[candidates[chosen]["rating"]])
        shared: dict[str, Any] = {"prompt": [{"role": "user", "content": question["problem"]}]}
    except (KeyError, TypeError, IndexError) as error:
        raise MalformedRowError(f"a step is not as in PRM800K: {type(error).__name__} {error}") from None
    paths = ([(path, ratings)] if any(rating is not None for rating in ratings) else []) + others
    if not paths:
        raise UnusableRowError("no_judged_step")
    shared |= {"ground_truth_answer": question.get("ground_truth_answer")}
    return [{**fields, **shared, "completions": steps, "labels": labels} for steps, labels in paths]


def aps_paths(fields: Fields) -> list[Fields]:
    """MATH-APS: solution prefixes in a tree, each with the share of completions that came to the right answer.

    Gives one row per leaf; a step is what a prefix adds to the longest other prefix it begins with. Where leaves share
    a step its value stands in the first of them only. Prefixes that occur twice have the mean of their values.
    """
    question, entries = text_of(fields, "question"), fields["reasoning_steps"]
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise MalformedRowError("reasoning_steps is not a list of objects with solution_prefix and mc_value")
    values: dict[str, list[float]] = {}
    for entry in entries:
        prefix, value = text_of(entry, "solution_prefix"), entry.get("mc_value")
        if not prefix.startswith(question) or not isinstance(value, int | float):
            raise MalformedRowError("a solution_prefix does not begin with the question, or has no mc_value")
        if answer := prefix[len(question) :].rstrip():
            values.setdefault(answer, []).append(float(value))
    if not values:
        raise UnusableRowError("no_judged_step")
    told: set[str] = set()
    paths = []
    for leaf in (one for one in values if not any(other != one and other.startswith(one) for other in values)):
        nodes = sorted((other for other in values if leaf.startswith(other)), key=len)
        starts = [0, *map(len, nodes)]
        labels = [None if node in told else sum(values[node]) / len(values[node]) for node in nodes]
        told.update(nodes)
        steps = [node[start:].strip() for node, start in zip(nodes, starts, strict=False)]
        paths.append({"completions": steps, "labels": labels})
    return [{**fields, "prompt": [{"role": "user", "content": question}], **path} for path in paths]


def with_neutral(rows: Sequence[Fields]) -> list[Fields]:
    """Turn 0 into neutral in a file whose labels also know -1."""
    name = "labels" if any("labels" in row for row in rows) else "label"
    found = [row[name] if isinstance(row.get(name), list) else [row.get(name)] for row in rows]
    if not any(str(label) in ("-1", "-1.0") for labels in found for label in labels):
        return list(rows)

    def settled(value: Any) -> Any:
        return NEUTRAL if str(value) in ("0", "0.0") else value

    return [
        {**row, name: [settled(v) for v in row[name]] if isinstance(row.get(name), list) else settled(row.get(name))}
        for row in rows
    ]


def _asked(fields: Fields, name: str) -> Prompt:
    return [{"role": "user", "content": text_of(fields, name)}]


def _between_marks(text: str) -> list[str]:
    return [step.strip() for step in text.split(STEP_MARK) if step.strip()]


def _until_mistake(prompt: Prompt, steps: Any, mistake: Any, name: str, columns: Columns) -> StepRow:
    if not isinstance(steps, list):
        raise MalformedRowError("steps is not a list")
    is_index = isinstance(mistake, int) and not isinstance(mistake, bool) and 0 <= mistake < len(steps)
    if mistake is not None and not is_index:
        raise MalformedRowError(f"{name} is {mistake!r}, expected none or 0 to {len(steps) - 1}")
    judged = steps if mistake is None else steps[: mistake + 1]
    return _steps(prompt, judged, [float(index != mistake) for index in range(len(judged))], columns)


def _steps(prompt: Prompt, completions: list[Any], labels: Sequence[Any], columns: Columns) -> StepRow:
    if not completions:
        raise MalformedRowError("the solution has no steps; expected at least one")
    if len(completions) != len(labels):
        raise MalformedRowError(f"{len(completions)} steps but {len(labels)} labels; expected one label for each step")
    for place, step in enumerate(completions, start=1):
        if not isinstance(step, str):
            raise MalformedRowError(f"step {place} is {shown(step)}, expected text")
        if not step.strip():
            raise MalformedRowError(f"step {place} is empty; expected text")
    return StepRow(prompt, list(completions), [_label(label) for label in labels], columns)


def _label(value: Any) -> StepLabel:
    if value is None:
        return None
    if value == NEUTRAL:
        return NEUTRAL
    if isinstance(value, float) and 0 < value < 1:
        return value
    try:
        return float(flag_of(value, "labels"))
    except MalformedRowError:
        raise MalformedRowError(
            f"a label is {shown(value)}, expected true or false, 1 or 0 or -1, a share between 0 and 1, or null"
        ) from None
