"""Word problems worked step by step, with the truth about every step: what a process reward model is trained on.

A step is right while the answer can still be reached without taking anything back: its equation is true and is the
problem's next one. From the first wrong step on every later one is wrong, whatever its own equation says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from rlhf.data.tinychat import arithmetic
from rlhf.data.tinychat.rows import Row, prompt_row
from rlhf.data.tinychat.schema import Spec
from rlhf.data.tinychat.tasks import make_tasks

# Share of written solutions with a slip. Near one half, so that right and wrong steps are about equally many.
WRONG_SHARE = 0.6

_EQUATION = re.compile(r"(?<![\d.])(\d{1,6}) *([-+*/x\u00d7\u00f7]) *(\d{1,6}) *= *(-?\d{1,7})(?!\d)")
_ANSWER = re.compile(r"\banswer\s*(?:is|:|=)\s*(-?\d{1,7})\b", re.IGNORECASE)
_SAME_OPERATION = {"x": "*", "\u00d7": "*", "\u00f7": "/"}


def step_rows(split: str, num: int, seed: int, wrong_share: float = WRONG_SHARE) -> list[Row]:
    """Return `num` worked word problems with TRL's stepwise columns: prompt, completions, labels; also task, family."""
    rng = Random(f"tinychat steps {split} {seed}")
    rows: list[dict[str, Any]] = []
    for task in make_tasks(split, num, seed, ["arithmetic"]):
        steps = arithmetic.compose_steps(task.spec, rng, rng.random() < wrong_share)
        rows.append({**prompt_row(task), "completions": steps, "labels": judge_steps(task.spec, steps)})
    return rows


def judge_steps(spec: Spec, steps: Sequence[str]) -> list[bool]:
    """Tell of each step of an arithmetic task whether the solution is still right after it.

    A step without equation and answer (a phrase) leaves things as they are; one step may hold several equations.
    """
    results, done, is_right, verdicts = arithmetic.results(spec), 0, True, []
    before = [spec["numbers"][0], *results]
    for step in steps:
        for left, sign, right, result in _EQUATION.findall(step):
            is_next = done < len(results) and _is_next(
                spec, done, before[done], int(left), _SAME_OPERATION.get(sign, sign), int(right)
            )
            is_right = is_right and is_next and int(result) == results[done]
            done += 1
        stated = [int(number) for number in _ANSWER.findall(step)]
        is_right = is_right and all(number == spec["answer"] for number in stated)
        verdicts.append(is_right)
    return verdicts


def known_truth(row: Mapping[str, Any], steps: Sequence[str]) -> list[bool] | None:
    """Tell of each step of an answer to a row of this world whether it is right; None where that is not known."""
    task = row.get("task")
    if not isinstance(task, Mapping) or task.get("family") != "arithmetic" or "spec" not in task:
        return None
    return judge_steps(task["spec"], steps)


def _is_next(spec: Spec, done: int, total: int, left: int, operation: str, right: int) -> bool:
    """Whether these are the operands of the next operation; sums and products may be turned round."""
    number = spec["numbers"][done + 1]
    turned = operation in "+*" and (left, right) == (number, total)
    return operation == spec["kind"][done] and ((left, right) == (total, number) or turned)
