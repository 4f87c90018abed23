"""Instructions that a program can verify: "at least 200 words", "no commas", "end with this phrase".

The names and arguments are those of IFEval (arXiv:2311.07911), so its file loads as it is; the checks are written from
its descriptions. A check takes the response and the instruction's arguments and says whether it was followed. Languages
are told by `language.languages_of`, which is rougher than a language identifier.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.eval.language import languages_of
from rlhf.infra.errors import UserError

Arguments = Mapping[str, Any]
Check = Callable[[str, Arguments], bool]
_ANSWERS = ("my answer is yes.", "my answer is no.", "my answer is maybe.")


@dataclass(frozen=True)
class Followed:
    """Which of a prompt's instructions were followed, read strictly and read kindly (see `followed`)."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


def followed(response: str, names: Sequence[str], arguments: Sequence[Arguments]) -> Followed:
    """Check every instruction of a prompt.

    Loosely an instruction counts as followed if some variant of the response follows it: without its first line, its
    last line or both, each with and without asterisks (arXiv:2311.07911, section 3). Raises UserError for an
    instruction that is not known or lacks an argument.
    """
    checks = [(_check_of(name), _given(kwargs)) for name, kwargs in zip(names, arguments, strict=True)]
    variants = _variants(response)
    try:
        strict = tuple(bool(response.strip()) and check(response, kwargs) for check, kwargs in checks)
        loose = tuple(any(text.strip() and check(text, kwargs) for text in variants) for check, kwargs in checks)
    except KeyError as error:
        raise UserError(f"the instructions {', '.join(names)} lack the argument {error}") from None
    return Followed(strict, loose)


def _check_of(name: str) -> Check:
    if name not in CHECKS:
        raise UserError(f"no instruction named '{name}' can be verified; known are {', '.join(sorted(CHECKS))}")
    return CHECKS[name]


def _given(kwargs: Arguments) -> Arguments:
    return {name: value for name, value in kwargs.items() if value is not None}


def _variants(response: str) -> list[str]:
    lines = response.split("\n")
    cut = [lines, lines[1:], lines[:-1], lines[1:-1]]
    texts = ["\n".join(part).strip() for part in cut]
    return [response, *texts, *(text.replace("*", "") for text in [response, *texts])]


def _compare(number: int, wanted: Any, relation: str) -> bool:
    if relation == "at least":
        return number >= int(wanted)
    if relation == "less than":
        return number < int(wanted)
    raise UserError(f"the relation of an instruction is 'at least' or 'less than', got '{relation}'")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['\u2019-]\w+)*", text)


def _sentences(text: str) -> int:
    """Sentences end at . ! ? before white space, but not behind a single letter, a number or a title."""
    ends = re.sub(r"\b(?:[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e)\.", "", text)
    return len([part for part in re.split(r"(?<=[.!?])[\"')\]]*\s+|\n{2,}", ends.strip()) if re.search(r"\w", part)])


def _occurrences(text: str, part: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(part)}(?!\w)", text, re.IGNORECASE))


def _paragraphs(text: str, mark: str) -> list[str]:
    parts = re.split(mark, text)
    # A mark at the very start or end sets nothing apart.
    parts = parts[1:] if len(parts) > 1 and not parts[0].strip() else parts
    return parts[:-1] if len(parts) > 1 and not parts[-1].strip() else parts


def _number_paragraphs(text: str, a: Arguments) -> bool:
    parts = _paragraphs(text, r"\s?\*\*\*\s?")
    return len(parts) == int(a["num_paragraphs"]) and all(part.strip() for part in parts)


def _nth_paragraph(text: str, a: Arguments) -> bool:
    parts = [part for part in re.split(r"\n\n", text) if part.strip()]
    nth = int(a["nth_paragraph"])
    if len(parts) != int(a["num_paragraphs"]) or nth > len(parts):
        return False
    first = _words(parts[nth - 1])[:1]
    return bool(first) and first[0].lower() == str(a["first_word"]).lower().strip("\"'.,")


def _bullets(text: str, a: Arguments) -> bool:
    return len(re.findall(r"(?m)^\s*(?:\*(?!\*)|-)\s*\S", text)) == int(a["num_bullets"])


def _highlights(text: str, a: Arguments) -> bool:
    double = re.findall(r"\*\*([^*\n]+)\*\*", text)
    single = re.findall(r"\*([^*\n]+)\*", re.sub(r"\*\*[^*\n]+\*\*", " ", text))
    return sum(bool(part.strip()) for part in [*double, *single]) >= int(a["num_highlights"])


def _sections(text: str, a: Arguments) -> bool:
    marks = re.findall(rf"\s?{re.escape(str(a['section_spliter']).strip())}\s?\d+\s?", text)
    return len(marks) >= int(a["num_sections"])


def _is_json(text: str, _: Arguments) -> bool:
    bare = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return True


def _postscript(text: str, a: Arguments) -> bool:
    letters = [re.escape(letter) for letter in str(a["postscript_marker"]).lower() if letter.isalpha()]
    return re.search(r"(?m)^\s*" + r"\.?\s?".join(letters) + r"\.?\b", text.lower()) is not None


def _two_responses(text: str, _: Arguments) -> bool:
    parts = [part.strip() for part in _paragraphs(text, r"\*{6}")]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _repeats_prompt(text: str, a: Arguments) -> bool:
    return text.strip().lower().startswith(str(a["prompt_to_repeat"]).strip().lower())


def _ends_with(text: str, a: Arguments) -> bool:
    return text.strip().strip('"').strip().lower().endswith(str(a["end_phrase"]).strip().lower())


def _capital_words(text: str, a: Arguments) -> bool:
    capitals = [word for word in _words(text) if word.isupper()]
    return _compare(len(capitals), a["capital_frequency"], a["capital_relation"])


def _letters(text: str, a: Arguments) -> bool:
    return _compare(text.lower().count(str(a["letter"]).lower()), a["let_frequency"], a["let_relation"])


def _quoted(text: str, _: Arguments) -> bool:
    bare = text.strip()
    return len(bare) > 1 and bare.startswith('"') and bare.endswith('"')


def _in_english(text: str) -> bool:
    return "en" in languages_of(text)


CHECKS: dict[str, Check] = {
    "keywords:existence": lambda text, a: all(_occurrences(text, word) for word in a["keywords"]),
    "keywords:frequency": lambda text, a: _compare(_occurrences(text, a["keyword"]), a["frequency"], a["relation"]),
    "keywords:forbidden_words": lambda text, a: not any(_occurrences(text, word) for word in a["forbidden_words"]),
    "keywords:letter_frequency": _letters,
    "language:response_language": lambda text, a: a["language"] in languages_of(text),
    "length_constraints:number_sentences": lambda text, a: _compare(
        _sentences(text), a["num_sentences"], a["relation"]
    ),
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_words": lambda text, a: _compare(len(_words(text)), a["num_words"], a["relation"]),
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": lambda text, a: (
        len(re.findall(r"\[[^\]\n]+\]", text)) >= int(a["num_placeholders"])
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": lambda text, _: any(said in text.lower() for said in _ANSWERS),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _is_json,
    "detectable_format:title": lambda text, _: re.search(r"<<[^\n<>]*[^\s<>][^\n<>]*>>", text) is not None,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeats_prompt,
    "startend:end_checker": _ends_with,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda text, _: text.isupper() and _in_english(text),
    "change_case:english_lowercase": lambda text, _: text.islower() and _in_english(text),
    "punctuation:no_comma": lambda text, _: "," not in text,
}
