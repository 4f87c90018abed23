"""Tests of code that a model wrote, in a way that the code cannot forge.

Code and tests never share a process. Tests run in a sandboxed process with a stand-in for the function; each call it
meets is made in another sandboxed process that holds the code and knows nothing of the tests; only plain data goes
between them (`code_values`), and the verdict comes from the process without the code. Printing "passed", leaving with
exit code 0, patching `assert`'s helpers or returning an object that equals everything gains nothing. Where a test
builds objects of the code's own classes the two cannot be kept apart: such a test runs in one process and is counted.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from rlhf.infra.sandbox import Sandbox, SandboxJob, SandboxLimits, SandboxResult
from rlhf.rewards import code_harness, code_values

# Tests with more calls than this (loops over thousands of inputs) are given up: each new call costs two processes.
MAX_CALLS = 400
LIMITS = SandboxLimits(wall_seconds=3.0, cpu_seconds=3.0, memory_mb=512, output_bytes=1 << 20, code_bytes=1 << 22)
_VALUES = inspect.getsource(code_values)
_HARNESS = _VALUES + re.sub(r"(?m)^from (?:__future__|rlhf)\S* import .*$", "", inspect.getsource(code_harness))
_TOGETHER = """

def _run_together(setup, test):
    try:
        exec(compile(setup + "\\n" + test, "<test>", "exec"), globals())
    except BaseException as error:
        return type(error).__name__ + ": " + str(error)[:200]
    return None
"""
# The code under test may have a `pack` of its own, so the values' functions get a name space to themselves.
_CALL = f"""

def _call_by_name(name, arguments):
    import json
    values = {{}}
    exec({_VALUES!r}, values)
    args, kwargs = map(values["unpack"], json.loads(arguments))
    return values["pack"](globals()[name](*args, **kwargs))
"""


@dataclass(frozen=True)
class Program:
    """Code under test, the names of the functions that tests call, and tests as source; each runs behind `setup`."""

    code: str
    names: tuple[str, ...]
    tests: tuple[str, ...]
    setup: str = ""


@dataclass(frozen=True)
class CodeReport:
    """How many tests passed, why the first one that did not failed, and how many ran in one process with the code."""

    num_tests: int
    num_passed: int
    num_together: int
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether every test passed."""
        return self.num_passed == self.num_tests


@dataclass
class _Test:
    """One test on its way: the answers collected so far, and its verdict once there is one."""

    program: Program
    test: str
    answers: list[list[object]] = field(default_factory=list)
    call: list[str] | None = None
    verdict: str = "call"
    detail: str = ""
    together: bool = False


def run_tests(programs: Sequence[Program], sandbox: Sandbox) -> list[CodeReport]:
    """Run every test of every program; never raises for what the code does."""
    tests = [_Test(program, test) for program in programs for test in program.tests]
    answers: dict[tuple[str, str, str], list[object]] = {}
    for _ in range(MAX_CALLS + 1):
        waiting = [test for test in tests if test.verdict == "call"]
        if not waiting:
            break
        _advance(waiting, sandbox)
        _answer([test for test in waiting if test.verdict == "call"], answers, sandbox)
    for test in tests:
        if test.verdict == "call":
            test.verdict, test.detail = "failed", f"the test makes more than {MAX_CALLS} calls"
    _run_together([test for test in tests if test.verdict == "outside"], sandbox)
    by_program = iter(tests)
    return [_report([next(by_program) for _ in program.tests]) for program in programs]


def _advance(tests: Sequence[_Test], sandbox: Sandbox) -> None:
    """Run the tests with the answers that are there, those of one program in one process while that goes well."""
    by_program: dict[int, list[_Test]] = {}
    for test in tests:
        by_program.setdefault(id(test.program), []).append(test)
    groups = list(by_program.values())
    alone: list[list[_Test]] = []
    for group, result in zip(groups, sandbox.run([_test_job(group) for group in groups]), strict=True):
        if not _take_verdicts(group, result) and len(group) > 1:
            alone += [[test] for test in group]
    for group, result in zip(alone, sandbox.run([_test_job(group) for group in alone]), strict=True):
        _take_verdicts(group, result)


def _test_job(tests: Sequence[_Test]) -> SandboxJob:
    program = tests[0].program
    cases = [[test.test, test.answers] for test in tests]
    return SandboxJob(_HARNESS, "run_each", [[program.setup, list(program.names), cases]])


def _take_verdicts(tests: Sequence[_Test], result: SandboxResult) -> bool:
    """Note each test's verdict; False where the process gave none, which fails them all."""
    value = result.outputs[0].value if result.outputs else None
    for index, test in enumerate(tests):
        if isinstance(value, list):
            found = value[index]
            test.verdict, test.detail, test.call = found["verdict"], found.get("detail", ""), found.get("call")
        else:
            why = result.outputs[0].error if result.outputs else None
            test.verdict, test.detail = "failed", why or _why(result)
    return isinstance(value, list)


def _answer(tests: Sequence[_Test], known: dict[tuple[str, str, str], list[object]], sandbox: Sandbox) -> None:
    """Make the calls that tests wait for, each once for each program."""
    wanted: dict[str, dict[tuple[str, str], None]] = {}
    for test in tests:
        assert test.call is not None
        name, arguments = test.call
        if (test.program.code, name, arguments) not in known:
            wanted.setdefault(test.program.code, {})[name, arguments] = None
    jobs, keys = [], []
    for code, calls in wanted.items():
        keys.append([(code, *call) for call in calls])
        jobs.append(SandboxJob(code + _CALL, "_call_by_name", [list(call) for call in calls]))
    for job, of_job, result in zip(jobs, keys, sandbox.run(jobs), strict=True):
        if result.status != "ok" and len(of_job) > 1:
            # One call that never ends must not take the others along.
            alone = sandbox.run([SandboxJob(job.code, job.entry, [call]) for call in job.calls])
            known.update({key: _answer_of(key, one, 0) for key, one in zip(of_job, alone, strict=True)})
            continue
        known.update({key: _answer_of(key, result, index) for index, key in enumerate(of_job)})
    for test in tests:
        assert test.call is not None
        test.answers.append(known[test.program.code, test.call[0], test.call[1]])


def _answer_of(key: tuple[str, str, str], result: SandboxResult, index: int) -> list[object]:
    if result.status != "ok":
        return [key[1], key[2], None, _why(result)]
    output = result.outputs[index]
    return [key[1], key[2], output.value, output.error]


def _run_together(tests: Sequence[_Test], sandbox: Sandbox) -> None:
    """For tests that need classes of the code: in one process; a name that the code lacks too stays an error."""
    able = [test for test in tests if _defines_classes(test.program.code) or "plain data" in test.detail]
    jobs = [SandboxJob(t.program.code + _TOGETHER, "_run_together", [[t.program.setup, t.test]]) for t in able]
    for test, result in zip(able, sandbox.run(jobs), strict=True):
        output = result.outputs[0] if result.outputs else None
        passed = output is not None and output.error is None and output.value is None
        test.verdict, test.together = "passed" if passed else "failed", True
        test.detail = "" if passed else str(output.value or output.error) if output is not None else _why(result)


def _defines_classes(code: str) -> bool:
    try:
        return any(isinstance(node, ast.ClassDef) for node in ast.walk(ast.parse(code)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _report(tests: Sequence[_Test]) -> CodeReport:
    failed = [test for test in tests if test.verdict != "passed"]
    return CodeReport(
        num_tests=len(tests),
        num_passed=len(tests) - len(failed),
        num_together=sum(test.together for test in tests),
        detail=failed[0].detail if failed else "",
    )


def _why(result: SandboxResult) -> str:
    return f"{result.status}: {result.detail}"
