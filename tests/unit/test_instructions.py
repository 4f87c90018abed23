"""Verifiable instructions: for each one responses that follow it and responses that do not."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.eval.instructions import CHECKS, followed
from rlhf.eval.language import languages_of
from rlhf.infra.errors import UserError

CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["red", "sea"]}, ["The Red sea."], ["The redder sea.", "red"]),
    ("keywords:frequency", {"keyword": "dry", "frequency": 2, "relation": "at least"}, ["Dry, dry."], ["dry drying"]),
    ("keywords:frequency", {"keyword": "dry", "frequency": 2, "relation": "less than"}, ["dry"], ["dry dry"]),
    ("keywords:forbidden_words", {"forbidden_words": ["blue"]}, ["bluish"], ["It is BLUE."]),
    (
        "keywords:letter_frequency",
        {"letter": "s", "let_frequency": 3, "let_relation": "at least"},
        ["Sass"],
        ["as", "sas no"],
    ),
    (
        "language:response_language",
        {"language": "de"},
        ["Das ist nicht die Antwort."],
        ["This is not the answer.", "123"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        ["One is here. Two is there.", "Dr. Who came? He did!"],
        ["Mr. A. B. Smith came.", "It cost 3.50 euros."],
    ),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, ["One."], ["One. Two."]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "a *** b", "***\na\n***\nb\n***"],
        ["a", "a\n***\n***\nb", "a\n***\nb\n***\nc"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "at least"},
        ["one two three", "don't well-known it"],
        ["one two", "one, two!"],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["one two"], ["one two three"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "however"},
        ["a\n\nHowever, b", '\n\na\n\n"however" b'],
        ["a\n\nb however", "However a\n\nb", "a\n\nhowever\n\nc"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[name] of [place]"],
        ["[name]", "name place", "[] []"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Bye\nP.S. hi", "P. S. hi"],
        ["Bye", "ps hi?x"[3:]],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["Bye\nP.P.S. hi"], ["Bye\nP.S. hi"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n* b", "- a\n  * b"], ["* a", "** a\n** b"]),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "Well. My answer is maybe."],
        ["Yes.", "my answer"],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and **b c**"],
        ["*a*", "* a\n* b", "** **"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Day", "num_sections": 2},
        ["Day 1\nx\nDay 2\ny"],
        ["Day one, Day two", "Day 1"],
    ),
    ("detectable_format:json_format", {}, ['{"a": 1}', "```json\n[1]\n```", "3"], ["{a: 1}", "", "a {}"]),
    ("detectable_format:title", {}, ["<<A title>>\ntext"], ["<A title>", "<<>>", "<< >>"]),
    ("combination:two_responses", {}, ["a ****** b"], ["a", "a ****** a", "a ****** b ****** c", "a ******"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it. "}, ["say it. It."], ["It. Say it."]),
    ("startend:end_checker", {"end_phrase": "The end."}, ["So. the end.", '"The end."'], ["The end. Bye."]),
    ("startend:quotation", {}, ['"So."'], ['"So.', "So.", '"']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["WATCH OUT now", "I AM"],
        ["Watch Out", "WATCH"],
    ),
    ("change_case:english_capital", {}, ["THIS IS IT"], ["This is it", "DAS IST NICHT DER ORT"]),
    ("change_case:english_lowercase", {}, ["this is it"], ["this is It"]),
    ("punctuation:no_comma", {}, ["a b"], ["a, b"]),
]


@pytest.mark.parametrize(
    ("name", "arguments", "good", "bad"), CASES, ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)]
)
def test_each_instruction(name: str, arguments: dict[str, Any], good: list[str], bad: list[str]) -> None:
    for response in good:
        assert followed(response, [name], [arguments]).strict == (True,), response
    for response in bad:
        assert followed(response, [name], [arguments]).strict == (False,), response


def test_every_instruction_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(CHECKS)
    assert len(CHECKS) == 25


def test_loosely_a_line_or_an_asterisk_too_many_is_forgiven() -> None:
    quoted = 'Sure, here it is:\n"This is **it**."\nI hope this helps.'
    found = followed(quoted, ["startend:quotation", "punctuation:no_comma"], [{}, {}])
    assert found.strict == (False, False)
    assert found.loose == (True, True)
    assert followed("**my answer is *yes*.**", ["detectable_format:constrained_response"], [{}]).loose == (True,)


def test_an_empty_response_follows_nothing() -> None:
    assert followed("  ", ["punctuation:no_comma"], [{}]).strict == (False,)
    assert followed("", ["punctuation:no_comma"], [{}]).loose == (False,)


def test_null_arguments_are_none_and_missing_ones_are_told() -> None:
    arguments = {"num_words": 1, "relation": "at least", "keywords": None}
    assert followed("a", ["length_constraints:number_words"], [arguments]).strict == (True,)
    with pytest.raises(UserError, match="lack the argument 'keywords'"):
        followed("a", ["keywords:existence"], [{"keywords": None}])
    with pytest.raises(UserError, match="no instruction named 'poem:rhymes'"):
        followed("a", ["poem:rhymes"], [{}])
    with pytest.raises(UserError, match="at least"):
        followed("a", ["length_constraints:number_words"], [{"num_words": 1, "relation": "exactly"}])


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("This is what they have for you.", "en"),
        ("Das ist nicht der richtige Weg.", "de"),
        ("C'est pour vous et pas pour nous.", "fr"),
        ("El perro de la casa no es muy grande.", "es"),
        ("\u041f\u0440\u0438\u0432\u0435\u0442, \u044d\u0442\u043e \u043e\u0442\u0432\u0435\u0442.", "ru"),
        ("\u0426\u0435 \u0457\u0457 \u0432\u0456\u0434\u043f\u043e\u0432\u0456\u0434\u044c.", "uk"),
        ("\u0928\u092e\u0938\u094d\u0924\u0947 \u092f\u0939 \u0909\u0924\u094d\u0924\u0930", "hi"),
        ("\u3053\u308c\u306f\u7b54\u3048\u3067\u3059", "ja"),
        ("\u8fd9\u662f\u7b54\u6848", "zh"),
        ("\ub2f5\ubcc0\uc785\ub2c8\ub2e4", "ko"),
        ("\u0645\u0631\u062d\u0628\u0627", "ar"),
    ],
)
def test_languages(text: str, language: str) -> None:
    assert language in languages_of(text)
    assert languages_of("") == languages_of("12 34") == set()
