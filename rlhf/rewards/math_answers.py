r"""The final answer of a written solution, and whether two answers are the same.

An answer is looked for, the last of its kind each time, in `<answer>...</answer>`, in `\boxed{...}`, behind `####`,
behind "the answer is" or "Answer:", and, where that is allowed, it is the last number of all. Two answers are compared
as numbers (thousands separators, currency, units, percent, fractions, mixed numbers, powers of ten, LaTeX), then as
lists of such, then as text without what is mere typography. Nothing is computed: `2\sqrt{3}` and `\sqrt{12}` differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

# What is longer is no final answer; and exponents of more digits would be numbers that fill the memory.
MAX_ANSWER, MAX_SOLUTION, MAX_BOXES = 300, 20_000, 10

_PHRASE = re.compile(r"\b(?:final\s+)?answer(?:\s+is|\s*[:=])[:=\s]*(.+)", re.IGNORECASE)
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
_LAST_NUMBER = re.compile(rf"(?:(?<![\w.)\]}}])-\s?)?[$\u20ac\u00a3]?{_DECIMAL}(?:\s?/\s?\d+(?![\d.]))?\s?%?")
# A sign, a currency; a mixed number, a fraction of either spelling, or a decimal with a power of ten; percent or unit.
_UNIT = r"(?:(?:\s+[a-z][a-z'.-]*){1,3}|[a-z]{2,}(?:\s+[a-z]+)?)(?:\s?/\s?[a-z]+)?(?:\^\{?[23]\}?|[\u00b2\u00b3])?"
_NUMBER = re.compile(
    rf"(?P<sign>[-+\u2212]?)\s*[$\u20ac\u00a3]?\s*(?P<inner>[-+]?)"
    rf"(?:(?P<whole>\d+)\s*(?:\\frac\{{(?P<top>\d+)\}}\{{(?P<under>\d+)\}}|\s(?P<top2>\d+)/(?P<under2>\d+))"
    rf"|\\frac\{{(?P<num>[-+]?{_DECIMAL})\}}\{{(?P<den>[-+]?{_DECIMAL})\}}"
    rf"|(?P<num2>{_DECIMAL})\s*/\s*(?P<den2>{_DECIMAL})"
    rf"|(?P<value>{_DECIMAL})(?:(?:e|\s*\*\s*10\^)\{{?(?P<power>[-+]?\d{{1,3}})\}}?)?)"
    rf"\s*(?P<percent>%|percent\b)?(?:{_UNIT})?",
    re.IGNORECASE,
)
_TYPOGRAPHY = tuple((re.compile(pattern), replacement) for pattern, replacement in (
    (r"\\[dtc]frac\b", r"\\frac"),
    (r"\\(?:left|right|displaystyle|limits)(?![a-z])|\\[!,;: ]|~", ""),
    (r"\^\s*\{?\s*(?:\\circ|\u00b0)\s*\}?|\u00b0", ""),
    (r"\\(?:text|mathrm|textbf|mathbf|mbox|textit)\s*\{([^{}]*)\}", r" \1"),
    (r"\\(?:times|cdot)|\u00d7", "*"),
    (r"\\%", "%"),
    (r"\\\$|\$|\\[()\[\]]|\*\*", ""),
    (r"(?<=\d)\{,\}(?=\d)", ","),
    (r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
    (r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}"),
))  # fmt: skip
_LEFT_SIDE = re.compile(r"^(?:[a-z](?:_\{?\w\}?|\([a-z]\))?\s*)?(?:=|\\approx|\u2248|\\in\b)\s*", re.IGNORECASE)
_BRACKETS = {"(": ")", "[": "]", "{": "}"}


class Number(NamedTuple):
    """An exact value. `percent`: it was written as a percentage ("50%" has the value 50); `exact`: without a point."""

    value: Fraction
    percent: bool
    exact: bool


def final_answer(solution: str, *, marked_only: bool = False) -> str | None:
    """The answer that a solution ends with, as it is written; None where there is none.

    `marked_only`: a number that stands anywhere is none; it must be marked as the answer.
    """
    text = solution[-MAX_SOLUTION:]
    for find in _MARKERS.values():
        found = find(text)
        if found is not None and found.strip(" .*$"):
            return found.strip()
    numbers = [] if marked_only else _LAST_NUMBER.findall(text)
    return numbers[-1].strip() if numbers else None


def marker_of(solution: str) -> str | None:
    """What marks the final answer of a solution: tag, boxed, hashes or phrase; None where nothing does."""
    text = solution[-MAX_SOLUTION:]
    return next((name for name, find in _MARKERS.items() if (find(text) or "").strip(" .*$")), None)


def reference_answer(text: str) -> str:
    """The answer in a data set's column, which may hold the answer alone or a whole solution (GSM8K, MATH)."""
    return final_answer(text, marked_only=True) or text.strip()


def same_answer(answer: str, reference: str, tolerance: float = 1e-6) -> bool:
    """Whether two answers say the same.

    Numbers are equal when they differ by no more than `tolerance` of the reference; whole numbers must be equal. A
    percentage equals the number before its sign, and its hundredth part where the other one is no percentage. Lists
    without brackets and sets may stand in any order.
    """
    if max(len(answer), len(reference)) > MAX_ANSWER:
        return False
    ours, theirs = normalised(answer), normalised(reference)
    right = as_number(reference)
    if right is None:
        return _same_list(ours, theirs, tolerance) or _as_text(ours) == _as_text(theirs) != ""
    said = as_number(answer)
    if said is None:
        # "12 apples in all, so 12" is an answer; "12 or 13" is not.
        numbers = {as_number(number) for number in _LAST_NUMBER.findall(ours)}
        said = numbers.pop() if len(numbers) == 1 and not re.search(r"[a-z]\s?[*+^=]|\d[a-z]\b", ours) else None
    return said is not None and _same_number(said, right, tolerance)


def as_number(text: str) -> Number | None:
    """The text as a number with at most a currency, a percent sign or a unit; None where it is anything else."""
    match = _NUMBER.fullmatch(normalised(text)) if len(text) <= MAX_ANSWER else None
    if match is None:
        return None
    part = match.groupdict()
    try:
        if part["whole"]:
            top, under = part["top"] or part["top2"], part["under"] or part["under2"]
            value = int(part["whole"]) + Fraction(int(top), int(under))
        elif part["num"] or part["num2"]:
            value = _decimal(part["num"] or part["num2"]) / _decimal(part["den"] or part["den2"])
        else:
            value = _decimal(part["value"]) * Fraction(10) ** int(part["power"] or 0)
    except (ZeroDivisionError, ValueError):
        return None
    sign = -1 if (part["sign"] in ("-", "\u2212")) != (part["inner"] == "-") else 1
    return Number(sign * value, part["percent"] is not None, "." not in match.group())


def normalised(text: str) -> str:
    """The text without typography: spacing, sizes and fonts of LaTeX, dollar signs, a closing full stop, "x ="."""
    found = text.strip()
    for pattern, replacement in _TYPOGRAPHY:
        found = pattern.sub(replacement, found)
    found = re.sub(r"\s+", " ", found).strip().removesuffix(".").strip()
    return _LEFT_SIDE.sub("", found).strip()


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", "").removesuffix("."))


def _same_number(said: Number, right: Number, tolerance: float) -> bool:
    values = [said.value]
    if said.percent and not right.percent:
        values.append(said.value / 100)
    elif right.percent and not said.percent:
        values.append(said.value * 100)
    allowed = 0 if said.exact and right.exact else Fraction(tolerance) * abs(right.value)
    return any(abs(value - right.value) <= allowed for value in values)


def _same_list(ours: str, theirs: str, tolerance: float) -> bool:
    """Whether both are lists in the same kind of brackets, or without, whose parts say the same."""
    (our_open, our_parts), (their_open, their_parts) = _parts(ours), _parts(theirs)
    if len(their_parts) < 2 or len(our_parts) != len(their_parts) or our_open != their_open:
        return False
    if their_open in ("", "{}"):
        left = list(our_parts)
        for part in their_parts:
            match = next((one for one in left if same_answer(one, part, tolerance)), None)
            if match is None:
                return False
            left.remove(match)
        return True
    return all(same_answer(one, other, tolerance) for one, other in zip(our_parts, their_parts, strict=True))


def _parts(text: str) -> tuple[str, list[str]]:
    """The pair of brackets around a list, and its parts between commas that no bracket encloses."""
    text = text.replace("\\{", "{").replace("\\}", "}")
    opening = text[:1]
    encloses = opening in _BRACKETS and text.endswith((")", "]", "}")) and _closes_at(text) == len(text) - 1
    inner = text[1:-1] if encloses else text
    parts, depth = [""], 0
    for character in inner:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    # Both brackets count: a half-open interval is another thing than an open one.
    return opening + text[-1] if encloses else "", [part.strip() for part in parts]


def _closes_at(text: str) -> int:
    """Where the bracket that opens the text is closed; -1 where it is not."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return place
    return -1


def _as_text(text: str) -> str:
    """For comparing what is no number: without spaces and needless braces, in lower case, fractions with a slash."""
    found = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", lambda m: f"{_grouped(m[1])}/{_grouped(m[2])}", text)
    found = re.sub(r"\{(\w)\}", r"\1", found)
    return re.sub(r"[\s*]+", "", found).rstrip(".!").casefold()


def _grouped(part: str) -> str:
    return part if re.fullmatch(r"\\?\w+", part) else f"({part})"


def _tagged(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(0, end))
    return None if start < 0 else text[start + len("<answer>") : end]


def _boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` or `\fbox{...}` whose braces are closed."""
    for match in list(re.finditer(r"\\f?box(?:ed)?\s*(?=\{)", text))[: -MAX_BOXES - 1 : -1]:
        end = _closes_at(text[match.end() :])
        if end > 0:
            return text[match.end() + 1 : match.end() + end]
    return None


def _behind_hashes(text: str) -> str | None:
    place = text.rfind("####")
    return None if place < 0 else (text[place + 4 :].strip().splitlines() or [""])[0]


def _behind_phrase(text: str) -> str | None:
    found = _PHRASE.findall(text)
    # "The answer is 12. That is all." ends at the full stop; "Answer: 3.5" does not.
    return re.split(r"[.!;](?=\s|$)", found[-1].strip())[0] if found else None


_MARKERS: dict[str, Callable[[str], str | None]] = {
    "tag": _tagged,
    "boxed": _boxed,
    "hashes": _behind_hashes,
    "phrase": _behind_phrase,
}
