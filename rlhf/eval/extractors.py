"""From what a model wrote to the answer in it; what the answer is worth is decided elsewhere (`scorers`).

An extractor takes the response and the item and returns the answer as text, or None where there is none. Suites name
theirs; the dict at the foot holds the names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

from rlhf.eval.suite_items import Item
from rlhf.rewards.code_answers import completed_function, python_source

Extractor = Callable[[str, Item], "str | None"]

_NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
_FIGURE = re.compile(rf"(?<![\w.])(?:(-)\s?)?[$\u20ac\u00a3]?\s?(?=[\d.]*\d)({_NUMBER.removeprefix('-?')})")
_MARKED = re.compile(r"(?:####|\banswer(?: is\b)?\s*[:=]?)\s*(?=(.{0,80}))", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
# Where the letter of a choice stands, the surest place first.
_LETTERS = (
    re.compile(r"\b[Aa]nswer(?: is)?\s*:?\s*\**\(?([A-J])\b"),
    re.compile(r"^\W*([A-J])(?:[.):*]|\s*$)"),
    re.compile(r"\(([A-Ja-j])\)"),
    re.compile(r"^\W*([B-HJ]|[AI](?! [a-z']))\W"),  # "A" and "I" are words, too
)


def whole(response: str, item: Item) -> str | None:
    """The whole response without outer white space; None when that is empty."""
    return response.strip() or None


def last_number(response: str, item: Item) -> str | None:
    r"""The number behind "####" or in "\boxed{}", else behind the last "answer is", else the last one of all.

    Written without thousands separators, currency signs and trailing zeros ("$1,250.00" is "1250").
    """
    places = [*_BOXED.findall(response)] or [part for part in _MARKED.findall(response) if _numbers(part)]
    found = _numbers(places[-1])[:1] if places else _numbers(response)[-1:]
    return found[0] if found else None


def marked_number(response: str, item: Item) -> str | None:
    """The number behind "####" alone, as GSM8K writes solutions."""
    match = re.search(r"####\s*(.*)", response)
    found = _numbers(match.group(1))[:1] if match else []
    return found[0] if found else None


def choice_letter(response: str, item: Item) -> str | None:
    """The letter of a choice: behind "answer is", at the start, or in brackets."""
    matches = (pattern.search(response.strip()) for pattern in _LETTERS)
    return next((match.group(1).upper() for match in matches if match), None)


def python(response: str, item: Item) -> str | None:
    """Python source: the fenced blocks that define what the tests call, else the first lines that read as code."""
    return python_source(response, item.spec.get("names", ()))


def python_completion(response: str, item: Item) -> str | None:
    """The item's prompt and what follows it as source, or the function alone where the response writes it again."""
    return completed_function(response, str(item.spec["start"]), str(item.spec["entry"]))


def _numbers(text: str) -> list[str]:
    found = []
    for sign, figure in _FIGURE.findall(text):
        try:
            number = Decimal(sign + figure.replace(",", ""))
        except InvalidOperation:
            continue
        found.append(format(number.normalize(), "f") if number else "0")
    return found


EXTRACTORS: dict[str, Extractor] = {
    "whole": whole,
    "last_number": last_number,
    "marked_number": marked_number,
    "choice_letter": choice_letter,
    "python": python,
    "python_completion": python_completion,
}
