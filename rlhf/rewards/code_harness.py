"""Runs tests whose subject is elsewhere: the source of this file runs inside the sandbox, behind that of `code_values`.

The function under test is a stand-in that looks its answers up. A call that has no answer yet ends the test and is
reported; it is made in another process, which holds the code under test and knows no test, and the test starts again.
"""

from __future__ import annotations

from rlhf.rewards.code_values import pack, unpack  # left out in the sandbox, where both stand in one file

MODULES = (
    "bisect", "cmath", "collections", "copy", "datetime", "functools", "heapq", "itertools", "json", "math", "operator",
    "random", "re", "statistics", "string", "sys",
)  # fmt: skip


class _CallNeeded(BaseException):
    """Not an Exception: a test that catches those must not take it for one of the subject's."""


def run_each(setup: str, names: list[str], cases: list[list[object]]) -> list[dict[str, object]]:
    """`run_test` for each case of (test, answers), every one with a name space of its own."""
    return [run_test(setup, str(test), names, answers) for test, answers in cases]  # type: ignore[arg-type]


def run_test(setup: str, test: str, names: list[str], answers: list[list[object]]) -> dict[str, object]:
    """Run one test; says passed, failed, call (the first call without an answer), or outside (cannot be told apart).

    `answers` holds [name, arguments as JSON text, packed value or None, error text or None].
    """
    import json
    import random

    known = {(name, arguments): (value, error) for name, arguments, value, error in answers}
    missing: list[list[str]] = []
    outside: list[str] = []

    def stand_in(name: str) -> object:
        def call(*args: object, **kwargs: object) -> object:
            try:
                arguments = json.dumps([pack(list(args)), pack(kwargs)])
            except TypeError as error:
                outside.append(str(error))
                raise _CallNeeded from None
            if (name, arguments) not in known:
                missing.append([name, arguments])
                raise _CallNeeded
            value, error = known[name, arguments]
            if error is not None:
                raise RuntimeError(error)
            return unpack(value)

        return call

    namespace: dict[str, object] = {name: __import__(name) for name in MODULES}
    namespace.update({name: stand_in(name) for name in names})
    random.seed(0)  # a test that draws must draw the same when it starts again
    verdict, detail = "passed", ""
    try:
        exec(compile(f"{setup}\n{test}", "<test>", "exec"), namespace)
    except _CallNeeded:
        verdict = "call"
    except NameError as error:
        # Tests may build objects of the subject's own classes; those cannot be made here.
        verdict, detail = "outside", str(error)
    except BaseException as error:
        verdict, detail = "failed", f"{type(error).__name__}: {error}"[:200]
    if missing:
        return {"verdict": "call", "call": missing[0], "detail": ""}
    if outside:
        return {"verdict": "outside", "detail": outside[0]}
    return {"verdict": verdict, "detail": detail}
