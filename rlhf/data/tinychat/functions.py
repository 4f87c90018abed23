"""One-line Python functions: a small grammar of shapes, each with its reference, equivalents and known mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from rlhf.data.tinychat.schema import Draft, Flaws, Spec

FUNCTION_NAMES = ("f", "g", "h", "run", "calc", "work")
OOD_FUNCTION_NAMES = ("solve", "compute", "func", "apply")
ARGUMENT_NAMES = {"number": ("x", "n", "a"), "text": ("s", "t", "w"), "list": ("xs", "v", "nums")}
OOD_ARGUMENT_NAMES = {"number": ("value", "k"), "text": ("line", "text"), "list": ("items", "data")}

TEMPLATES = (
    "Write a function {f} that {does}.",
    "Write a Python function {f}({x}) that {does}.",
    "Define {f}({x}), which {does}.",
    "I need a function {f} that {does}.",
    "Please write {f} in Python. It {does}.",
    "Give me code for {f}({x}). It {does}.",
    "Can you write a function {f} that {does}?",
    "Make a one-line function {f} that {does}.",
)
OOD_TEMPLATES = (
    "My program lacks a helper called {f} which {does}. Could you supply it?",
    "Complete the exercise: implement {f}({x}) such that it {does}.",
)


@dataclass(frozen=True)
class Shape:
    """One kind of function of an argument `{x}` and constants `{c}`, `{d}`: what it does and ways to write it.

    Every entry of `good` gives the same values as `reference` on all test inputs; no entry of `wrong` does.
    """

    argument: str
    does: str
    reference: Callable[..., Any]
    good: tuple[str, ...]
    wrong: tuple[str, ...]
    smallest: int = 2


SHAPES: dict[str, Shape] = {
    "add": Shape("number", "adds {c} to {x}", lambda x, c, d: x + c,
                 ("{x} + {c}", "{c} + {x}"), ("{x} - {c}", "{x} + {c} + 1", "{x} * {c} + 1")),
    "subtract": Shape("number", "takes {c} away from {x}", lambda x, c, d: x - c,
                      ("{x} - {c}", "-{c} + {x}"), ("{c} - {x}", "{x} + {c}")),
    "multiply": Shape("number", "multiplies {x} by {c}", lambda x, c, d: x * c,
                      ("{x} * {c}", "{c} * {x}"), ("{x} + {c}", "{x} * {c} + 1", "{x} ** {c}"), 3),
    "double": Shape("number", "doubles {x} and adds {c}", lambda x, c, d: 2 * x + c,
                    ("{x} * 2 + {c}", "2 * {x} + {c}", "{x} + {x} + {c}"), ("{x} * 2 - {c}", "{x} + {c}")),
    "triple": Shape("number", "triples {x} and takes away {c}", lambda x, c, d: 3 * x - c,
                    ("{x} * 3 - {c}", "3 * {x} - {c}"), ("{x} * 3 + {c}", "{x} - {c}")),
    "square": Shape("number", "squares {x} and adds {c}", lambda x, c, d: x * x + c,
                    ("{x} * {x} + {c}", "{x} ** 2 + {c}"), ("{x} * 2 + {c}", "{x} ** 2 - {c}")),
    "rest": Shape("number", "gives the rest of {x} divided by {c}", lambda x, c, d: x % c,
                  ("{x} % {c}",), ("{x} // {c}", "{x} % {c} + 1")),
    "halve": Shape("number", "divides {x} by {c} and rounds down", lambda x, c, d: x // c,
                   ("{x} // {c}",), ("{x} % {c}", "{x} // {c} + 1")),
    "more": Shape("number", "tells if {x} is more than {c}", lambda x, c, d: x > c,
                  ("{x} > {c}", "{c} < {x}"), ("{x} < {c}", "{x} >= {c}")),
    "less": Shape("number", "tells if {x} is less than {c}", lambda x, c, d: x < c,
                  ("{x} < {c}", "{c} > {x}"), ("{x} > {c}", "{x} <= {c}")),
    "equal": Shape("number", "tells if {x} is equal to {c}", lambda x, c, d: x == c,
                   ("{x} == {c}", "{c} == {x}"), ("{x} != {c}", "{x} > {c}")),
    "divisible": Shape("number", "tells if {c} divides {x}", lambda x, c, d: x % c == 0,
                       ("{x} % {c} == 0", "not {x} % {c}"), ("{x} % {c} == 1", "{x} // {c} == 0")),
    "larger": Shape("number", "gives the larger of {x} and {c}", lambda x, c, d: max(x, c),
                    ("max({x}, {c})", "max({c}, {x})"), ("min({x}, {c})", "max({x})")),
    "smaller": Shape("number", "gives the smaller of {x} and {c}", lambda x, c, d: min(x, c),
                     ("min({x}, {c})", "min({c}, {x})"), ("max({x}, {c})", "min({x})")),
    "distance": Shape("number", "gives the distance from {x} to {c}", lambda x, c, d: abs(x - c),
                      ("abs({x} - {c})", "abs({c} - {x})"), ("{x} - {c}", "abs({x} + {c})")),
    "scale_add": Shape("number", "multiplies {x} by {c} and adds {d}", lambda x, c, d: x * c + d,
                       ("{x} * {c} + {d}", "{c} * {x} + {d}", "{d} + {x} * {c}"), ("{x} * {c} - {d}", "{x} + {d}")),
    "repeat": Shape("text", "repeats {x} {c} times", lambda x, c, d: x * c,
                    ("{x} * {c}", "{c} * {x}"), ("{x} + {c}", "{x} * {c} + {x}")),
    "first": Shape("text", "gives the first {c} letters of {x}", lambda x, c, d: x[:c],
                   ("{x}[:{c}]", "{x}[0:{c}]"), ("{x}[{c}:]", "{x}[-{c}:]")),
    "last": Shape("text", "gives the last {c} letters of {x}", lambda x, c, d: x[-c:],
                  ("{x}[-{c}:]",), ("{x}[:{c}]", "{x}[:-{c}]")),
    "skip": Shape("text", "drops the first {c} letters of {x}", lambda x, c, d: x[c:],
                  ("{x}[{c}:]",), ("{x}[:{c}]", "{x}[-{c}:]")),
    "length": Shape("text", "gives the length of {x} plus {c}", lambda x, c, d: len(x) + c,
                    ("len({x}) + {c}", "{c} + len({x})"), ("len({x})", "len({x}) - {c}")),
    "reverse": Shape("text", "turns {x} around and repeats it {c} times", lambda x, c, d: x[::-1] * c,
                     ("{x}[::-1] * {c}", "{c} * {x}[::-1]"), ("{x} * {c}", "{x}[::-1]")),
    "upper": Shape("text", "puts {x} in upper case and cuts it to {c} letters", lambda x, c, d: x.upper()[:c],
                   ("{x}.upper()[:{c}]", "{x}[:{c}].upper()"), ("{x}.lower()[:{c}]", "{x}.upper()[{c}:]")),
    "sum": Shape("list", "sums {x} and adds {c}", lambda x, c, d: sum(x) + c,
                 ("sum({x}) + {c}", "{c} + sum({x})"), ("sum({x}) - {c}", "len({x}) + {c}")),
    "top": Shape("list", "gives the largest number in {x} plus {c}", lambda x, c, d: max(x) + c,
                 ("max({x}) + {c}", "{c} + max({x})"), ("min({x}) + {c}", "max({x}) - {c}")),
    "bottom": Shape("list", "gives the smallest number in {x} minus {c}", lambda x, c, d: min(x) - c,
                    ("min({x}) - {c}",), ("max({x}) - {c}", "min({x}) + {c}")),
    "map_add": Shape("list", "adds {c} to each number in {x}", lambda x, c, d: [i + c for i in x],
                     ("[i + {c} for i in {x}]", "[{c} + i for i in {x}]"), ("[i - {c} for i in {x}]",
                     "sum({x}) + {c}")),
    "map_scale": Shape("list", "multiplies each number in {x} by {c}", lambda x, c, d: [i * c for i in x],
                       ("[i * {c} for i in {x}]", "[{c} * i for i in {x}]"), ("[i + {c} for i in {x}]", "{x} * {c}"),
                       3),
    "keep": Shape("list", "keeps the numbers in {x} above {c}", lambda x, c, d: [i for i in x if i > c],
                  ("[i for i in {x} if i > {c}]", "[i for i in {x} if {c} < i]"),
                  ("[i for i in {x} if i < {c}]", "[i for i in {x}]")),
    "count": Shape("list", "counts the numbers in {x} below {c}", lambda x, c, d: sum(i < c for i in x),
                   ("sum(i < {c} for i in {x})", "len([i for i in {x} if i < {c}])"),
                   ("sum(i > {c} for i in {x})", "len({x})")),
}  # fmt: skip
OOD_SHAPES: dict[str, Shape] = {
    "cube": Shape("number", "returns the cube of {x} minus {c}", lambda x, c, d: x**3 - c,
                  ("{x} ** 3 - {c}", "{x} * {x} * {x} - {c}"), ("{x} * 3 - {c}", "{x} ** 3 + {c}")),
    "digit": Shape("number", "returns the last digit of {x} plus {c}", lambda x, c, d: (x + c) % 10,
                   ("({x} + {c}) % 10",), ("({x} + {c}) // 10", "{x} + {c}")),
    "middle": Shape("text", "removes {c} letters at both ends of {x}", lambda x, c, d: x[c:-c],
                    ("{x}[{c}:-{c}]",), ("{x}[{c}:]", "{x}[:-{c}]")),
    "every": Shape("list", "returns the entries of {x} that {c} does not divide",
                   lambda x, c, d: [i for i in x if i % c], ("[i for i in {x} if i % {c}]",
                   "[i for i in {x} if i % {c} != 0]"),
                   ("[i for i in {x} if i % {c} == 0]", "[i % {c} for i in {x}]")),
}  # fmt: skip


def draw(rng: Random, ood: bool) -> Draft:
    """Draw one function to write; out of distribution means unseen shapes, templates, names, larger constants."""
    shapes = OOD_SHAPES if ood else SHAPES
    kind = rng.choice(list(shapes))
    shape = shapes[kind]
    entry = rng.choice(OOD_FUNCTION_NAMES if ood else FUNCTION_NAMES)
    argument = rng.choice((OOD_ARGUMENT_NAMES if ood else ARGUMENT_NAMES)[shape.argument])
    # Texts are short, so constants that count letters stay small.
    high = 6 if shape.argument == "text" else 12
    c = rng.randint(13, 40) if ood and shape.argument != "text" else rng.randint(shape.smallest, high)
    d = rng.randint(13, 40) if ood else rng.randint(1, 9)
    if "{d}" not in shape.does:
        d = 0
    does = shape.does.format(x=argument, c=c, d=d)
    prompt = rng.choice(OOD_TEMPLATES if ood else TEMPLATES).format(f=entry, x=argument, does=does)
    calls = _inputs(shape.argument, c)
    spec: Spec = {"kind": kind, "entry": entry, "argument": argument, "c": c, "d": d,
                  "calls": [[value] for value in calls],
                  "expected": [shape.reference(value, c, d) for value in calls]}  # fmt: skip
    return Draft(f"code|{kind}|{entry}|{argument}|{c}|{d}", prompt, spec)


def compose(spec: Spec, rng: Random, flaws: Flaws) -> str:
    """Write the function; `wrong` takes a known mistake, `malformed` is a bare return, a lambda, a block or chatter."""
    shape = SHAPES.get(spec["kind"]) or OOD_SHAPES[spec["kind"]]
    form = rng.choice(shape.wrong if flaws.wrong else shape.good)
    body = form.format(x=spec["argument"], c=spec["c"], d=spec["d"])
    head = f"def {spec['entry']}({spec['argument']}):"
    if not flaws.malformed:
        return rng.choice((f"{head} return {body}", f"{head} return {body}", f"{head} return ({body})"))
    bare = f"return {body}"
    return rng.choice((
        bare,
        bare,
        bare,
        f"{spec['entry']} = lambda {spec['argument']}: {body}",
        f"{head}\n    return {body}",
        f"Here is the code: {head} return {body}",
        f"```\n{head} return {body}\n```",
    ))  # fmt: skip


def _inputs(argument: str, c: int) -> list[Any]:
    if argument == "number":
        return [0, 1, 7, -5, c, c + 1, c - 1, 3 * c, 31]
    if argument == "text":
        return ["", "ab", "python", "Hello you", "a-b-c-d-e-f-g"]
    return [[1, 2, 3], [c], [c - 1, c, c + 1, 2 * c], [40, -3, 7], [5, 9, 14, 0]]
