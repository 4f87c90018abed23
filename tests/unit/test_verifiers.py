"""Final answers of problems: how they are found, when two are the same, and the rewards made of that."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.tinychat.rows import prompt_rows
from rlhf.infra.errors import UserError
from rlhf.rewards.math_answers import as_number, final_answer, marker_of, reference_answer, same_answer
from rlhf.rewards.protocol import RewardFunction, RewardTerm
from rlhf.rewards.rules import make_rule
from rlhf.rewards.verifiers import VERIFIERS, check_columns, marked_answer, math_answer, tagged_format, values_of

DATA = Path(__file__).parents[3] / "shared" / "data"


# ---------------------------------------------------------------- finding the answer


@pytest.mark.parametrize(
    ("solution", "answer", "marker"),
    [
        ("48 + 24 = <<48+24=72>>72 clips.\n#### 72", "72", "hashes"),
        ("#### 5\nNo, again.\n#### 1,250", "1,250", "hashes"),
        ("so \\boxed{\\frac{1}{2}} it is", "\\frac{1}{2}", "boxed"),
        ("first \\boxed{3}, then \\boxed{\\text{\\{1, 2\\}}}.", "\\text{\\{1, 2\\}}", "boxed"),
        ("\\boxed{7} and then \\boxed{8", "7", "boxed"),  # cut off inside the last one
        ("#### 4 but \\boxed{5}", "5", "boxed"),
        ("<think>1 + 1</think><answer> 2 </answer>", "2", "tag"),
        ("<answer>3</answer> or <answer>4", "3", "tag"),
        ("7 - 3 = 4\nAnswer: 4", "4", "phrase"),
        ("The answer is 3.5. That is all.", "3.5", "phrase"),
        ("The final answer is: $12$", "$12$", "phrase"),
        ("We get 12 apples and 1,300.50 euros", "1,300.50", None),
        ("so it is 5 - 3 = 2 in all", "2", None),
        ("a loss of -$40", "-$40", None),
        ("1/2 of them is 3/4", "3/4", None),
        ("nothing to see", None, None),
        ("", None, None),
        ("#### ", None, None),
        ("\\boxed{}", None, None),
    ],
)
def test_the_final_answer(solution: str, answer: str | None, marker: str | None) -> None:
    assert final_answer(solution) == answer
    assert marker_of(solution) == marker
    assert final_answer(solution, marked_only=True) == (answer if marker else None)


def test_a_reference_is_an_answer_or_a_solution_that_ends_with_one() -> None:
    assert reference_answer("72") == "72"
    assert reference_answer("48/2 = 24\n#### 24") == "24"
    assert reference_answer("Thus $x = \\boxed{-3}$.") == "-3"
    assert reference_answer(" (1, 2) ") == "(1, 2)"  # and not its last number


# ---------------------------------------------------------------- the same answer

SAME = [
    ("1,000", "1000"), ("$1{,}000", "1000"), ("1\\!,\\!000", "1000"), ("\\$3.50", "3.5"), ("-$40", "-40"), ("007", "7"),
    ("+5", "5"), ("\u22125", "-5"), ("12.", "12"), (".5", "0.5"), ("5.0", "5"), ("**12**", "12"), ("$12$", "12"),
    ("\\(12\\)", "12"), ("x = 5", "5"), ("f(x)=5", "5"), ("\\approx 5", "5"),
    ("\\frac{1}{2}", "0.5"), ("\\frac12", "1/2"), ("\\dfrac{3}{4}", ".75"), ("\\frac{-1}{3}", "-\\frac{1}{3}"),
    ("\\frac{10}{4}", "2.5"), ("1 1/2", "1.5"), ("1\\frac{1}{2}", "3/2"), ("2/4", "1/2"),
    ("50%", "50"), ("50\\%", "0.5"), ("0.5", "50%"), ("50 percent", "1/2"),
    ("12 apples", "12"), ("5\\text{ cm}^2", "5"), ("90^\\circ", "90"), ("90\u00b0", "90"), ("60 km/h", "60"),
    ("30min", "30"), ("3.50 dollars", "3.5"), ("5 square feet", "5"),
    ("1.5 \\times 10^{3}", "1500"), ("2e3", "2000"), ("2 \\cdot 10^{-2}", "0.02"),
    ("12 apples in all, so 12", "12"), ("0.333333333", "1/3"),
    ("(1, 2)", "(1,2)"), ("\\left(\\frac12, 3\\right)", "(0.5,3)"), ("3, -1", "-1,3"), ("\\{1,2\\}", "{2, 1}"),
    ("[0,\\infty)", "[0, \\infty)"), ("(0,1)", "(0.0, 1)"),
    ("\\text{Even}", "even"), ("x^{2}+1", "x^2 + 1"), ("\\frac{\\pi}{2}", "\\pi/2"), ("\\sqrt{2}", "\\sqrt2"),
    ("\\mathrm{C}", "C"), ("\\frac{x+1}{2}", "(x+1)/2"),
]  # fmt: skip
DIFFERENT = [
    ("5", "-5"), ("2x", "2"), ("12 or 13", "12"), ("3+4", "7"), ("2^3", "2"), ("x=5, y=3", "5"), ("5", "5, 3"),
    ("1.000", "1000"), ("0.33", "1/3"), ("1000001", "1000000"), ("50%", "5000"), ("1/0", "0"), ("", "5"), ("", ""),
    ("5e999999999", "5"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("[1,2)", "[1,2]"), ("{1,2}", "{1,3}"),
    ("1,2,2", "1,1,2"), ("(1,2)", "(1,2,3)"), ("\\text{odd}", "\\text{even}"), ("a", "b"), ("\\frac{x+1}{2}", "x+1/2"),
    ("12", "\\text{twelve}"), ("nothing", "0"), ("-\\frac{1}{2}", "\\frac{1}{2}"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), SAME)
def test_these_say_the_same(one: str, other: str) -> None:
    assert same_answer(one, other)
    assert same_answer(other, one) or "so 12" in one  # words around a number are allowed in an answer only


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_these_do_not(one: str, other: str) -> None:
    assert not same_answer(one, other) and not same_answer(other, one)


def test_the_tolerance_is_relative_and_never_for_whole_numbers() -> None:
    assert same_answer("0.33", "1/3", tolerance=0.02) and not same_answer("0.33", "1/3", tolerance=0.001)
    assert not same_answer("1001", "1000", tolerance=0.1)
    assert same_answer("1001.0", "1000", tolerance=0.1)
    assert not same_answer("0.0000002", "0.0000001")
    assert same_answer("3.1415926", "3.1415927") and not same_answer("3.1415926", "3.1415927", tolerance=0)


def test_numbers_are_exact() -> None:
    def value(text: str) -> Fraction | None:
        found = as_number(text)
        return None if found is None else found.value

    assert value("0.1") == Fraction(1, 10)
    assert value("-2\\frac{3}{4}") == Fraction(-11, 4)
    assert value("1.25e-3") == Fraction(1, 800)
    assert value("three") is None and value("1/0") is None and value("9" * 500) is None


def test_hostile_answers_cost_nothing() -> None:
    """A policy may write anything; each of these would keep a careless pattern busy, and this test from ending."""
    texts = [
        "1" * 50_000, "1," * 25_000, "\\boxed{" * 8_000, "{" * 50_000, "<answer>" * 6_000, "answer is " * 5_000,
        "#### " * 10_000, "((" * 25_000 + "," * 100, "1 " * 25_000, "\\frac" * 9_000, "a" * 50_000, "-" * 50_000,
        "$" * 50_000,
    ]  # fmt: skip
    reward = math_answer()
    for answer in ("(1, 2)", "72", "x^2"):
        assert given(reward, texts, answer=[answer] * len(texts)) == [0.0] * len(texts)
    assert not any(same_answer(text, text) for text in texts)  # what is that long is no final answer


# ---------------------------------------------------------------- as rewards


def given(reward: RewardFunction, completions: list[str], **columns: Any) -> list[float]:
    return list(reward(["a prompt"] * len(completions), completions, **columns))


def test_math_answer_pays_for_the_right_number() -> None:
    solutions = ["48 + 24 = 72\n#### 72", "so 72", "so 71", "I do not know", "72 or 73? \\boxed{73}"]
    answer = ["24 and 48\n#### 72"] * 5
    assert given(math_answer(), solutions, answer=answer) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert given(math_answer(marked_only=True), solutions, answer=answer) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert given(math_answer(column="gold"), ["72", "3"], gold=[72, None]) == [1.0, 0.0]


def test_a_column_may_lie_inside_another() -> None:
    rows: list[Mapping[str, Any]] = [{"answer": 4}, {"answer": None}, {}]
    reward = math_answer(column="task.answer")
    assert given(reward, ["Answer: 4"] * 3, task=rows) == [1.0, 0.0, 0.0]
    assert values_of({"a.b": [1]}, "a.b") == [1]
    with pytest.raises(UserError, match="looks for the column 'answer', but the prompts have finished, task"):
        given(math_answer(), ["4"], task=[{}], finished=[True])


def test_the_built_in_worlds_arithmetic_can_be_verified() -> None:
    rows = prompt_rows("validation", 20, seed=3, families=["arithmetic"])
    right = [f"It is so.\nAnswer: {row['task']['spec']['answer']}" for row in rows]
    wrong = [f"Answer: {row['task']['spec']['answer'] + 1}" for row in rows]
    reward, tasks = math_answer(column="task.spec.answer"), [row["task"] for row in rows]
    assert given(reward, right, task=tasks) == [1.0] * 20 and given(reward, wrong, task=tasks) == [0.0] * 20


def test_marks_and_tags() -> None:
    assert given(marked_answer(), ["#### 5", "it is 5", "The answer is 5", "\\boxed{}"]) == [1.0, 0.0, 1.0, 0.0]
    texts = {
        "<think>a\nb</think>\n<answer>4</answer>": 1.0,
        "  <think>a</think><answer>4</answer>  ": 1.0,
        "<think>a</think><answer>4</answer> more": 0.0,
        "so <think>a</think><answer>4</answer>": 0.0,
        "<answer>4</answer><think>a</think>": 0.0,
        "<think>a</think><answer> </answer>": 0.0,
        "<think>a</think><answer>4": 0.0,
        "<think>a<think>b</think><answer>4</answer>": 0.0,
        "<think>a<answer>4</answer></think><answer>4</answer>": 0.0,
        "<think>a</think><answer>4</answer><answer>5</answer>": 0.0,
        "": 0.0,
    }
    assert dict(zip(texts, given(tagged_format(), list(texts)), strict=True)) == texts
    assert given(tagged_format(tags=["answer"]), ["<answer>4</answer>"]) == [1.0]
    for tags in ([], "answer", ["a b"]):
        with pytest.raises(UserError, match="give a list of names"):
            tagged_format(tags=tags)  # type: ignore[arg-type]


def test_verifiers_are_made_by_name() -> None:
    assert given(make_rule("math_answer", {"column": "gold"}, VERIFIERS), ["5"], gold=["5"]) == [1.0]
    with pytest.raises(UserError, match="reward 'math_answer' does not take"):
        make_rule("math_answer", {"colum": "gold"}, VERIFIERS)
    with pytest.raises(UserError, match="tolerance=-1"):
        make_rule("math_answer", {"tolerance": -1}, VERIFIERS)


def test_prompts_without_what_a_verifier_needs_are_noticed_before_anything_is_sampled() -> None:
    terms = [RewardTerm("math_answer", math_answer(column="task.spec.answer")), RewardTerm("marked", marked_answer())]
    with_answer, without = {"task": {"spec": {"answer": 4}}}, {"task": {"spec": {}}, "family": "safety"}
    assert check_columns(terms, [with_answer, with_answer]) == []
    assert check_columns(terms, [with_answer, without, without]) == [
        "2 of 3 prompts have no 'task.spec.answer': math_answer gives them 0"
    ]
    with pytest.raises(UserError, match=r"'task\.spec\.answer', which no prompt has; .* are: family, task"):
        check_columns(terms, [without])


# ---------------------------------------------------------------- on real solutions


def rows_of(name: str) -> list[dict[str, str]]:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{name} is not beside the repository")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file][:1500]


def test_solutions_of_gsm8k_are_right_by_their_own_answer() -> None:
    rows = rows_of("gsm8k/train.jsonl.gz")
    solutions = [row["answer"] for row in rows]
    assert given(math_answer(), solutions, answer=[s.split("####")[1] for s in solutions]) == [1.0] * len(rows)
    assert given(math_answer(), solutions, answer=solutions) == [1.0] * len(rows)
    assert sum(given(math_answer(), solutions, answer=[*solutions[1:], solutions[0]])) < 0.05 * len(rows)
    # Without its last line a solution mostly ends with the answer, as the last number.
    stripped = [solution.split("####")[0] for solution in solutions]
    assert sum(given(math_answer(), stripped, answer=solutions)) > 0.95 * len(rows)
    assert all(as_number(reference_answer(solution)) is not None for solution in solutions)


def test_solutions_of_math_are_right_by_their_own_answer() -> None:
    solutions = [row["solution"] for row in rows_of("math/math_test_minus_math500.jsonl.gz")]
    assert {marker_of(solution) for solution in solutions} == {"boxed"}
    assert given(math_answer(column="solution"), solutions, solution=solutions) == [1.0] * len(solutions)
    shifted = [*solutions[1:], solutions[0]]
    assert sum(given(math_answer(column="solution"), solutions, solution=shifted)) < 0.05 * len(solutions)
