"""The code in what a model wrote, and what tests call in it; whether the code is right is decided in `code_tests`."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterable, Sequence

_FENCE = re.compile(r"```(?:\w*)\s*\n(.*?)(?:```|\Z)", re.DOTALL)
_CODE_START = re.compile(r"(?m)^(?:def |async def |class |import |from \w|@|\w+ = lambda)")
# Where a completion of a function has left it.
_PAST_THE_FUNCTION = re.compile(r"\n(?=def |class |if __name__|print\(|assert |#|@|```)")
_BUILTINS = frozenset(dir(builtins))


def python_source(response: str, names: Sequence[str] = ()) -> str | None:
    """Python source: the fenced blocks that define what tests call, else the first lines that read as code."""
    blocks = _FENCE.findall(response)
    chosen = [block for block in blocks if any(re.search(rf"\b{re.escape(name)}\b", block) for name in names)]
    if chosen or blocks:
        return "\n\n".join(chosen or blocks).rstrip() + "\n"
    start = _CODE_START.search(response)
    return _parsing_part(response[start.start() :]) if start else None


def completed_function(response: str, start: str, entry: str) -> str | None:
    """The beginning `start` of a function with what follows it, or the function alone where it is written again."""
    again = python_source(response, (entry,))
    if again is not None and re.search(rf"(?m)^def {re.escape(entry)}\b", again):
        return re.split(rf"(?m)^def {re.escape(entry)}\b", start)[0] + again
    body = _FENCE.findall(response)
    text = body[0] if body else response
    return start + _PAST_THE_FUNCTION.split(text)[0].rstrip() + "\n" if text.strip() else None


def begun_function(prompt: str, entry: str) -> str | None:
    """The code in a prompt that begins the function `entry` for the answer to go on with; None where there is none."""
    block = next((text for text in _FENCE.findall(prompt) if re.search(rf"(?m)^def {re.escape(entry)}\b", text)), None)
    begin = _CODE_START.search(prompt)
    code = block if block is not None else prompt[begin.start() :] if begin else ""
    return code if re.search(rf"(?m)^def {re.escape(entry)}\b", code) else None


def called_names(tests: Iterable[str], setup: str = "") -> tuple[str, ...]:
    """What tests call and nobody else defines: neither Python, nor the setup, nor the tests themselves; sorted."""
    called: set[str] = set()
    defined: set[str] = set(_BUILTINS)
    for text in (setup, *tests):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and text is not setup:
                called.add(node.func.id)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                defined |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.arg):
                defined.add(node.arg)
    return tuple(sorted(called - defined))


def _parsing_part(text: str) -> str | None:
    """The longest beginning, in whole lines, that is Python."""
    lines = text.splitlines()
    for end in range(len(lines), 0, -1):
        try:
            ast.parse("\n".join(lines[:end]))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        return "\n".join(lines[:end]).rstrip() + "\n"
    return None
