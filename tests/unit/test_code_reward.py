"""The reward that runs code: forms of tests, what a completion holds, and that nobody can award it to himself."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.tinychat.rows import prompt_rows
from rlhf.infra.errors import UserError
from rlhf.rewards.code_answers import called_names
from rlhf.rewards.protocol import RewardFunction
from rlhf.rewards.verifiers import code_tests

DATA = Path(__file__).parents[3] / "shared" / "data"


def given(reward: RewardFunction, completions: list[str], **columns: Any) -> list[float]:
    return list(reward(["a prompt"] * len(completions), completions, **columns))


DOUBLE = "def double(x):\n    return 2 * x"


def test_code_is_worth_what_its_tests_say() -> None:
    tests = ["assert double(2) == 4", "assert double('a') == 'aa'", "assert double(-1) == -2"]
    completions = {
        f"Here it is:\n```python\n{DOUBLE}\n```\nDone.": 1.0,
        DOUBLE: 1.0,
        "def double(x):\n    return x ** 2": 0.0,
        "double = lambda x: x + x": 1.0,
        "def twice(x):\n    return 2 * x": 0.0,
        "def double(x): return 2 *": 0.0,
        "I do not know.": 0.0,
        "": 0.0,
        "def double(x):\n    while True: pass": 0.0,
        # Nothing that the code can do says "passed": the tests run where it is not.
        "import os\ndef double(x):\n    os._exit(0)": 0.0,
        "class E:\n    def __eq__(self, o): return True\ndef double(x): return E()": 0.0,
    }
    texts = list(completions)
    reward = code_tests(seconds=0.3)
    assert dict(zip(texts, given(reward, texts, test_list=[tests] * len(texts)), strict=True)) == completions
    partly = given(code_tests(partial=True), [texts[2], texts[4]], test_list=[tests] * 2)
    assert partly == pytest.approx([1 / 3, 0.0])  # two times two is two squared


def test_code_tests_in_their_three_forms() -> None:
    mbpp = {"test_list": ["assert twice(3) == scale * 3"], "test_setup_code": "scale = 2"}
    assert given(code_tests(), ["def twice(n): return n + n"], **{k: [v] for k, v in mbpp.items()}) == [1.0]
    start = 'def add(a, b):\n    """The sum."""\n'
    human = {"test": ["def check(f):\n    assert f(1, 2) == 3"] * 4, "entry_point": ["add"] * 4}
    bodies = ["    return a + b", f"```python\n{start}    return b + a\n```", "    return a - b", "  "]
    assert list(code_tests(column="test")([start] * 4, bodies, **human)) == [1.0, 1.0, 0.0, 0.0]
    for text in (f"Complete this:\n{start}", f"Complete this:\n```python\n{start}```\nNothing else."):
        asked = [[{"role": "user", "content": text}]] * 2
        two = {name: column[:2] for name, column in human.items()}
        assert list(code_tests(column="test")(asked, [f"{start}    return a + b", "    return a + b"], **two)) == [1, 1]
    spec = {"entry": "g", "calls": [[0], [1, 2]], "expected": [4, [5]]}
    written = "def g(*n): return 4 if n == (0,) else [5]"
    assert given(code_tests(column="task.spec"), [written], task=[{"spec": spec}]) == [1.0]


def test_tests_that_ask_for_nothing_pay_nothing_and_others_are_refused() -> None:
    assert given(code_tests(), [DOUBLE] * 3, test_list=[[], ["assert len('a') == 1"], None]) == [0.0, 0.0, 0.0]
    with pytest.raises(UserError, match="it reads a list of statements, one program with `check`, or a mapping"):
        given(code_tests(), [DOUBLE], test_list=[3])


@pytest.mark.parametrize(
    ("tests", "setup", "names"),
    [
        (["assert f(1) == g(2)", "assert f(2)"], "", ("f", "g")),
        (["assert set(f([1])) == {1} and math.isclose(h(), 1)"], "import math", ("f", "h")),
        (["for i in range(3):\n    assert near(f(i), i)"], "def near(a, b): return abs(a - b) < 1e-6", ("f",)),
        (["k = lambda x: x\nassert k(f(1)) == 1", "no python ("], "", ("f",)),
    ],
)
def test_what_tests_call_and_nobody_else_defines(tests: list[str], setup: str, names: tuple[str, ...]) -> None:
    assert called_names(tests, setup) == names


@pytest.mark.slow
@pytest.mark.slow
def test_mbpps_own_solutions_pass_their_tests_and_those_of_others_do_not() -> None:
    rows = rows_of("mbpp/mbpp_minus_test.jsonl.gz")[:120]
    solutions = [row["code"] for row in rows]
    columns = {name: [row[name] for row in rows] for name in ("test_list", "test_setup_code")}
    assert sum(given(code_tests(), solutions, **columns)) >= 0.97 * len(rows)
    assert sum(given(code_tests(), [*solutions[1:], solutions[0]], **columns)) == 0


def by_heart(spec: dict[str, Any]) -> str:
    """A function that knows the expected values and nothing else."""
    known = {repr(call): wanted for call, wanted in zip(spec["calls"], spec["expected"], strict=True)}
    return f"def {spec['entry']}({spec['argument']}): return {known!r}[repr([{spec['argument']}])]"


def test_the_built_in_worlds_code_can_be_verified() -> None:
    rows = prompt_rows("validation", 12, seed=3, families=["code"])
    tasks = [row["task"] for row in rows]
    right = [by_heart(row["task"]["spec"]) for row in rows]
    assert given(code_tests(column="task.spec"), right, task=tasks) == [1.0] * 12
    assert given(code_tests(column="task.spec"), [*right[1:], right[0]], task=tasks).count(1.0) < 3


def rows_of(name: str) -> list[dict[str, str]]:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{name} is not beside the repository")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file][:1500]
