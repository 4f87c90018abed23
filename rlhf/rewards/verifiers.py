"""Rewards that check an answer: final results of problems, code by its tests, and the form that was asked for.

Every factory here returns a reward `f(prompts, completions, **columns) -> list[float]`; `VERIFIERS` at the foot names
them, and `rewards` of a recipe takes the names with their arguments. What an answer is checked against stands in a
column of the prompt set, which may lie inside another: "task.spec.answer" is `answer` in `spec` in `task`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf.data.rows import Columns, Prompt
from rlhf.infra.errors import UserError
from rlhf.infra.sandbox import Sandbox
from rlhf.rewards.code_answers import begun_function, called_names, completed_function, python_source
from rlhf.rewards.code_tests import LIMITS, Program, run_tests
from rlhf.rewards.math_answers import final_answer, marker_of, reference_answer, same_answer
from rlhf.rewards.protocol import RewardFunction, RewardTerm

MAX_SECONDS = 60.0  # of one call of code under test: longer, and an endless loop in each answer stops all learning


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


def code_tests(
    column: str = "test_list", setup: str = "test_setup_code", partial: bool = False, seconds: float = 2.0
) -> RewardFunction:
    """1 where the completion's code passes every test in the sandbox, else 0; with `partial` the share it passes.

    The column holds tests in one of three forms: a list of statements (MBPP's `test_list`); one program that defines
    `check` (HumanEval's `test`, beside `entry_point`: code may go on where the prompt ends); or `entry`, `calls` and
    `expected` in a mapping. `setup` names a column of code that runs before every test, where there is one. A call
    may take so many `seconds`. Code and tests never share a process (see `rlhf.rewards.code_tests`); a prompt whose
    tests call nothing is worth 0.
    """
    if not 0 < seconds <= MAX_SECONDS:
        raise UserError(f"code_tests got seconds={seconds}; a call may take more than 0 and at most {MAX_SECONDS}")
    sandbox = Sandbox(LIMITS.model_copy(update={"wall_seconds": seconds, "cpu_seconds": max(1.0, seconds)}))

    def reward(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        entries, setups = _optional(columns, "entry_point"), _optional(columns, setup)
        tests = [None if value is None else _tests_of(value) for value in values_of(columns, column)]
        programs: dict[int, Program] = {}
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            asked = tests[row]
            if asked is not None:
                before = _lines(setups.get(row))
                program = _program(last_said(prompt), completion, asked, before, entries.get(row))
                programs |= {} if program is None else {row: program}
        worth = _worth(list(dict.fromkeys(programs.values())), partial, sandbox)
        return [worth[programs[row]] if row in programs else 0.0 for row in range(len(completions))]

    return Verifier(reward, (column,))


@dataclass(frozen=True)
class _Tests:
    tests: tuple[str, ...]
    names: tuple[str, ...] = ()


def _tests_of(value: Any) -> _Tests:
    """Tests in any of the three forms. Raises `UserError` for anything else."""
    if isinstance(value, str):
        return _Tests((value,))
    if isinstance(value, Mapping) and {"entry", "calls", "expected"} <= value.keys():
        calls = zip(value["calls"], value["expected"], strict=True)
        entry = str(value["entry"])
        return _Tests(tuple(f"assert {entry}(*{call!r}) == {wanted!r}" for call, wanted in calls), (entry,))
    if isinstance(value, (list, tuple)) and all(isinstance(test, str) for test in value):
        return _Tests(tuple(value))
    raise UserError(
        f"code_tests got {str(value)[:80]!r} for tests; it reads a list of statements, one program with `check`, or a "
        "mapping with entry, calls and expected"
    )


def _program(asked: str, completion: str, tests: _Tests, setup: str, entry: Any) -> Program | None:
    """What is to be run; None where the completion holds no code, or nothing is known that it should define."""
    names = tests.names or ((str(entry),) if entry else called_names(tests.tests, setup))
    statements = tests.tests
    if entry and len(statements) == 1 and re.search(r"(?m)^def check\(", statements[0]):
        statements = (f"{statements[0]}\n\ncheck({entry})\n",)
    start = begun_function(asked, str(entry)) if entry else None
    code = python_source(completion, names) if start is None else completed_function(completion, start, str(entry))
    return Program(code, names, statements, setup) if code is not None and names and statements else None


def _worth(programs: Sequence[Program], partial: bool, sandbox: Sandbox) -> dict[Program, float]:
    """What each program is worth; without `partial` what fails its first test is spared the others."""
    if partial:
        reports = run_tests(programs, sandbox)
        return {one: report.num_passed / report.num_tests for one, report in zip(programs, reports, strict=True)}
    first = run_tests([replace(one, tests=one.tests[:1]) for one in programs], sandbox)
    passed = [one for one, report in zip(programs, first, strict=True) if report.passed]
    rest = run_tests([replace(one, tests=one.tests[1:]) for one in passed], sandbox)
    return dict.fromkeys(programs, 0.0) | {one: float(report.passed) for one, report in zip(passed, rest, strict=True)}


def _optional(columns: Mapping[str, Sequence[Any]], path: str) -> dict[int, Any]:
    """The values of a column by row, where it is there and has one."""
    if path.split(".")[0] not in columns and path not in columns:
        return {}
    return {row: value for row, value in enumerate(values_of(columns, path)) if value is not None}


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value or "")


def last_said(prompt: Prompt) -> str:
    """The prompt's text, or what its last message says."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"]) if prompt else ""


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
    "code_tests": code_tests,
    "marked_answer": marked_answer,
    "tagged_format": tagged_format,
}
