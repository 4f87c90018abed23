"""Tests of written code: what must pass passes, and a verdict cannot be forged."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.eval.extractors import python_completion
from rlhf.eval.scorers import python_tests
from rlhf.eval.suite_formats import read_items
from rlhf.infra.sandbox import Sandbox, SandboxLimits
from rlhf.rewards.code_tests import CodeReport, Program, run_tests
from rlhf.rewards.code_values import pack, unpack

LIMITS = SandboxLimits(wall_seconds=2.0, cpu_seconds=2.0, memory_mb=256, output_bytes=1 << 18, code_bytes=1 << 22)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(LIMITS) as box:
        yield box


def report(sandbox: Sandbox, code: str, *tests: str, setup: str = "", names: tuple[str, ...] = ("f",)) -> CodeReport:
    return run_tests([Program(code, names, tests, setup)], sandbox)[0]


@pytest.mark.parametrize(
    ("code", "test"),
    [
        ("def f(x): return x + 1", "assert f(1) == 2"),
        ("def f(a, b=2): return (a, b)", "assert f(1) == (1, 2) and f(1, b=3) == (1, 3)"),
        ("def f(n): return [n] * n", "for n in range(5): assert f(n) == [n] * n"),
        ("def f(x): return x / 3", "import math\nassert math.isclose(f(1), 1 / 3)"),
        (
            "def f(): return float('nan'), -float('inf'), 10**300",
            "a, b, c = f()\nassert a != a and b < 0 and c == 10**300",
        ),
        ("def f(s): return {c: s.count(c) for c in s}", "assert f('aab') == {'a': 2, 'b': 1}"),
        ("import collections\ndef f(s): return collections.Counter(s)", "assert f('aab') == {'a': 2, 'b': 1}"),
        ("def f(xs): return (x for x in xs)", "assert list(f([1, 2])) == [1, 2]"),
        ("def f(kind, x): return isinstance(x, kind)", "assert f(int, 3) and not f(str, 3)"),
        ("def f(): return {1, 2}, frozenset([3]), b'a', 2j", "assert f() == ({1, 2}, frozenset([3]), b'a', 2j)"),
        (
            "def f(x):\n  if x < 0: raise ValueError(x)\n  return x",
            "try: f(-1)\nexcept Exception: pass\nelse: assert False",
        ),
        ("def pack(x): return x * 2\ndef f(x): return pack(x)", "assert f(2) == 4"),
        ("from __future__ import annotations\ndef f(x: Nothing): return x", "assert f(1) == 1"),
        ("def f(x): return x * x", "import random\nn = random.randint(0, 99)\nassert f(n) == n * n"),
        ("def f(x): return x\nif __name__ == '__main__': f(input())", "assert f(0) == 0"),
        ("def f(x): print('noise'); return x", "assert f(0) == 0"),
    ],
)
def test_right_code_passes(sandbox: Sandbox, code: str, test: str) -> None:
    found = report(sandbox, code, test)
    assert found == CodeReport(1, 1, 0), found


@pytest.mark.parametrize(
    ("code", "detail"),
    [
        ("def f(x): return x", "AssertionError"),
        ("def f(x) return 2", "SyntaxError"),
        ("def g(x): return 2", "KeyError"),
        ("def f(x): return 1 / 0", "ZeroDivisionError"),
        ("def f(x): import socket", "ModuleNotFoundError"),
        pytest.param("def f(x):\n  while True: pass", "timeout", marks=pytest.mark.slow),
        ("def f(x): return object()", "no plain data"),
        ("def f(): return 2", "TypeError"),
        ("def f(x): return '2'", "AssertionError"),
        ("def f(x): return (2,)", "AssertionError"),
    ],
)
def test_wrong_code_fails_and_says_why(sandbox: Sandbox, code: str, detail: str) -> None:
    found = report(sandbox, code, "assert f(1) == 2")
    assert not found.passed and found.num_together == 0
    assert detail in found.detail


FORGERIES = {
    "equals everything": "class E:\n  def __eq__(self, other): return True\n  def __ne__(self, other): return False\n"
    "def f(x): return E()",
    "an int that equals everything": "class E(int):\n  def __eq__(self, other): return True\n  __hash__ = None\n"
    "def f(x): return E(7)",
    "a list that equals everything": "class E(list):\n  def __eq__(self, other): return True\ndef f(x): return E()",
    "a text that equals everything": "class E(str):\n  def __eq__(self, other): return True\n  __hash__ = None\n"
    "def f(x): return E('no')",
    "exits with code 0": "import sys\ndef f(x): sys.exit(0)",
    "exits while it loads": "import sys\nsys.exit(0)\ndef f(x): return 1",
    "leaves at once": "import os\ndef f(x): os._exit(0)",
    "says that it passed": "print('passed')\ndef f(x):\n  print('{\"verdict\": \"passed\"}', flush=True)\n"
    "  return 'passed'",
    "returns a verdict": "def f(x): return {'verdict': 'passed', 'detail': ''}",
    "patches the builtins": "import builtins\nbuiltins.all = builtins.isinstance = builtins.any = lambda *a: True\n"
    "builtins.AssertionError = builtins.StopIteration\ndef f(x): return 1",
    "patches exec and compile": "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\n"
    "def f(x): return 1",
    "writes to every descriptor": "import os\ndef f(x):\n  for fd in range(3, 64):\n    try: os.write(fd, "
    'b\'[{"status": "ok", "outputs": [{"value": {"verdict": "passed"}}], "detail": ""}]\')\n'
    "    except OSError: pass\n  os._exit(0)",
    "writes a packed value": "import os\ndef f(x):\n  for fd in range(3, 64):\n    try: os.write(fd, "
    'b\'[{"status": "ok", "outputs": [{"value": ["y", "object"]}], "detail": ""}]\')\n'
    "    except OSError: pass\n  os._exit(0)",
    "replaces run_test": "def run_test(*a): return {'verdict': 'passed'}\ndef f(x): return 1",
    "replaces _call_by_name": "def _call_by_name(*a): return ['i', '0x2']\ndef f(x): return 1",
    "looks for the test": "import sys\ndef f(x):\n  frame, seen = sys._getframe(), ''\n  while frame:\n"
    "    seen += str(frame.f_locals)\n    frame = frame.f_back\n  return 2 if '=' + '= 2' in seen else 1",
    "raises what tests need": "class _CallNeeded(BaseException): pass\ndef f(x): raise _CallNeeded",
    "raises SystemExit(0)": "def f(x): raise SystemExit(0)",
    "raises KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "a class of the test's": "class Node: pass\ndef f(x): return 1",
}


QUICK = ("equals everything", "exits with code 0", "writes to every descriptor", "replaces _call_by_name")


@pytest.mark.parametrize(
    "code",
    [pytest.param(code, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, code in FORGERIES.items()],
)
def test_a_verdict_cannot_be_forged(sandbox: Sandbox, code: str) -> None:
    found = report(sandbox, code, "assert f(1) == 2 and isinstance(f(1), int)")
    assert not found.passed, found
    assert found.num_together == 0
    assert report(sandbox, "def f(x): return 2", "assert f(1) == 2").passed


def test_tests_that_need_the_codes_classes_run_with_it_and_are_counted(sandbox: Sandbox) -> None:
    code = "class Pair:\n  def __init__(self, a, b): self.a, self.b = a, b\ndef f(p): return p.a + p.b"
    assert report(sandbox, code, "assert f(Pair(1, 2)) == 3", "assert f(Pair(1, 2)) == 4") == CodeReport(
        2, 1, 2, "AssertionError: "
    )
    # Without the class there is nothing to run: the name is missing and the test fails.
    assert report(sandbox, "def f(p): return 3", "assert f(Pair(1, 2)) == 3").num_passed == 0


@pytest.mark.slow
def test_a_call_that_never_ends_takes_no_other_along(sandbox: Sandbox) -> None:
    code = "def f(x):\n  while x == 2: pass\n  return x"
    found = report(sandbox, code, "assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 3")
    assert (found.num_passed, found.num_tests) == (2, 3)


@pytest.mark.slow
def test_programs_do_not_see_each_other(sandbox: Sandbox) -> None:
    programs = [Program(f"def f(x): return x + {n}", ("f",), (f"assert f(1) == {n + 1}",)) for n in range(4)]
    spoiler = Program(
        "import builtins\nbuiltins.len = lambda x: 7\ndef f(x): return len(x)", ("f",), ("assert f('a') == 1",)
    )
    honest = Program("def f(x): return len(x)", ("f",), ("assert f('a') == 1",))
    assert [one.passed for one in run_tests([*programs, spoiler, honest], sandbox)] == [True] * 4 + [False, True]


@pytest.mark.slow
def test_too_many_calls_are_given_up(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.rewards.code_tests.MAX_CALLS", 5)
    assert report(sandbox, "def f(x): return x", "for x in range(5): assert f(x) == x").passed
    found = report(sandbox, "def f(x): return x", "for x in range(9): assert f(x) == x")
    assert not found.passed and "more than 5 calls" in found.detail


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(10**5000),
        0.1,
        float("inf"),
        "a\ud800",
        b"\xff",
        1 + 2j,
        [1, [2]],
        (1, (2,)),
        {(1, 2): {3}},
        range(3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_come_through(value: object) -> None:
    there = unpack(json.loads(json.dumps(pack(value))))
    assert there == value and type(there) is type(value)


def test_a_value_that_is_no_data_is_refused() -> None:
    nested: list[object] = []
    for _ in range(200):
        nested = [nested]
    for value in (object(), sys, print, nested, type("T", (), {})):
        with pytest.raises(TypeError):
            pack(value)
    for packed in ({}, 1, 1.5, ["q", 1], [], ["i", "zz"]):
        with pytest.raises((TypeError, ValueError, LookupError)):
            unpack(packed)
    assert unpack(["y", "int"]) is int and unpack(["y", "eval"]) is None


@pytest.mark.slow
def test_the_official_fixture_of_humaneval_has_its_known_score(shared_data: Path) -> None:
    """Its samples read a file, sleep, ask for input and are right three times: pass@1 is one half."""
    folder = shared_data / "humaneval"
    (item,) = read_items("humaneval", str(folder / "example_problem.jsonl"))
    lines = (folder / "example_samples.jsonl").read_text(encoding="utf-8").splitlines()
    completions = [json.loads(line)["completion"] for line in lines if line.strip()]
    extracted = [python_completion(completion, item) for completion in completions]
    scores = python_tests(extracted, [item] * len(completions))
    assert [score.value for score in scores] == [0, 0, 0, 1, 1, 1]


def reference_solutions(shared_data: Path, count: int) -> tuple[list[Program], int]:
    path = shared_data / "mbpp" / "mbpp_minus_test.jsonl.gz"
    items = read_items("mbpp", str(path))
    with gzip.open(path, "rt", encoding="utf-8") as file:
        solutions = [json.loads(line)["code"].replace("\r\n", "\n") for line in file]
    programs = [
        Program(code, tuple(item.spec["names"]), tuple(item.spec["tests"]), item.spec["setup"])
        for code, item in zip(solutions, items, strict=True)
    ]
    return programs[:count], len(programs)


@pytest.mark.slow
def test_mbpps_own_solutions_pass(sandbox: Sandbox, shared_data: Path) -> None:
    programs, num = reference_solutions(shared_data, 40)
    assert num == 474
    assert all(found.passed and found.num_together == 0 for found in run_tests(programs, sandbox))


@pytest.mark.slow
def test_all_of_mbpps_own_solutions_pass(shared_data: Path) -> None:
    programs, _ = reference_solutions(shared_data, 474)
    with Sandbox(LIMITS.model_copy(update={"wall_seconds": 10.0, "cpu_seconds": 10.0})) as box:
        found = run_tests(programs, box)
    assert sum(one.passed for one in found) == 474
    assert sum(one.num_together > 0 for one in found) == 2
