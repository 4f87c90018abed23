"""Rewards that check an answer against a reference: final results of problems, and the form that was asked for.

Every factory here returns a reward `f(prompts, completions, **columns) -> list[float]`; `VERIFIERS` at the foot names
them, and `rewards` of a recipe takes the names with their arguments. What an answer is checked against stands in a
column of the prompt set, which may lie inside another: "task.spec.answer" is `answer` in `spec` in `task`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.rows import Columns, Prompt
from rlhf.infra.errors import UserError
from rlhf.rewards.math_answers import final_answer, marker_of, reference_answer, same_answer
from rlhf.rewards.protocol import RewardFunction, RewardTerm


@dataclass(frozen=True)
class Verifier:
    """A reward that says nothing about a prompt without these columns: every answer to one is worth 0."""

    function: RewardFunction
    columns: tuple[str, ...]

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float]:
        return self.function(prompts, completions, **columns)


def math_answer(column: str = "answer", tolerance: float = 1e-6, marked_only: bool = False) -> RewardFunction:
    """1 where the completion's final answer is that of the column, else 0 (see `rlhf.rewards.math_answers`).

    The column holds the answer, or a whole solution that ends with it, as GSM8K's and MATH's do. `marked_only`: the
    last number of a completion is no answer, it must be marked as one.
    """
    if tolerance < 0:
        raise UserError(f"math_answer got tolerance={tolerance}; it must be 0 or more")

    def reward(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        references = [None if value is None else reference_answer(str(value)) for value in values_of(columns, column)]
        answers = [final_answer(completion, marked_only=marked_only) for completion in completions]
        return [
            float(answer is not None and reference is not None and same_answer(answer, reference, tolerance))
            for answer, reference in zip(answers, references, strict=True)
        ]

    return Verifier(reward, (column,))


def marked_answer() -> RewardFunction:
    r"""1 where the completion marks an answer (`<answer>`, `\boxed{}`, `####`, "the answer is", "Answer:"), else 0."""

    def reward(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        return [float(marker_of(completion) is not None) for completion in completions]

    return reward


def tagged_format(tags: Sequence[str] = ("think", "answer")) -> RewardFunction:
    """1 where the completion is these tags in this order, each once, closed and not empty, and nothing else; else 0."""
    if isinstance(tags, str) or not tags or not all(re.fullmatch(r"\w+", tag) for tag in tags):
        raise UserError(f"tagged_format got tags={tags!r}; give a list of names, such as [think, answer]")

    def holds(text: str) -> bool:
        for tag in tags:
            opening, closing = f"<{tag}>", f"</{tag}>"
            inside, closed, rest = text.strip().removeprefix(opening).partition(closing)
            is_nested = any(f"<{other}>" in inside or f"</{other}>" in inside for other in tags)
            if not text.strip().startswith(opening) or not closed or not inside.strip() or is_nested:
                return False
            text = rest
        return not text.strip()

    def reward(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        return [float(holds(completion)) for completion in completions]

    return reward


def values_of(columns: Mapping[str, Sequence[Any]], path: str) -> list[Any]:
    """A column by its name or its path through mappings; None where a row has nothing there.

    Raises:
        UserError: no row has a column of that name.
    """
    name, *inside = [path] if path in columns else path.split(".")
    if name not in columns:
        raise UserError(
            f"a reward looks for the column '{name}', but the prompts have {', '.join(sorted(columns))}; "
            "name another in its arguments, such as {column: solution}"
        )
    return [_inside(value, inside) for value in columns[name]]


def check_columns(terms: Sequence[RewardTerm], rows: Sequence[Columns]) -> list[str]:
    """Notes on prompts that lack what a verifier needs; to be asked before anything is sampled.

    Raises:
        UserError: none of the prompts has it.
    """
    notes = []
    for term in terms:
        for path in term.function.columns if isinstance(term.function, Verifier) else ():
            there = sum(_inside(row, [path] if path in row else path.split(".")) is not None for row in rows)
            if there == 0:
                found = ", ".join(sorted({key for row in rows for key in row})) or "none"
                raise UserError(
                    f"the reward '{term.name}' checks answers against the column '{path}', which no prompt has; the "
                    f"columns beside the prompts are: {found}; name another in its arguments, such as "
                    "{column: solution}"
                )
            if there < len(rows):
                notes.append(f"{len(rows) - there} of {len(rows)} prompts have no '{path}': {term.name} gives them 0")
    return notes


def _inside(value: Any, path: Sequence[str]) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


VERIFIERS: dict[str, Callable[..., RewardFunction]] = {
    "math_answer": math_answer,
    "marked_answer": marked_answer,
    "tagged_format": tagged_format,
}
