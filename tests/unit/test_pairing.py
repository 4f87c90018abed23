"""Which answers of a group are compared, and what becomes of each comparison: by hand."""

from __future__ import annotations

import pytest

from rlhf.rewards.pairing import Answer, Comparison, CutOff, compare, counted, decided

A, B, C, D = (Answer(text, True, score) for text, score in (("a", 0.5), ("b", 2.0), ("c", -1.0), ("d", 2.0)))
CUT = Answer("c and on and", False, 9.0)


def outcomes(answers: list[Answer], choose: str, cut_off: CutOff = "worst", min_gap: float = 0.0) -> list[str]:
    """Each comparison as "first>second" where the first is better, "<" where the second is, "?" where nobody knows."""
    signs = {1.0: ">", 0.0: "<", 0.5: "=", None: "?"}
    found = compare(answers, choose, cut_off, min_gap)
    return [f"{answers[c.first].text[0]}{signs[c.preference]}{answers[c.second].text[0]} {c.outcome}" for c in found]


def test_the_best_against_the_worst_of_equal_ones_the_first() -> None:
    assert outcomes([A, B, C, D], "best_and_worst") == ["b>c kept"]
    assert outcomes([D, A, B], "best_and_worst") == ["d>a kept"]
    assert outcomes([B, D], "best_and_worst") == ["b=d alike"]  # a group of equals is counted, not lost


def test_neighbours_use_no_answer_twice_and_all_pairs_every_one() -> None:
    assert outcomes([A, B, C, D, A], "neighbours") == ["a<b kept", "c<d kept"]
    every = ["a<b kept", "a>c kept", "a<d kept", "b>c kept", "b=d alike", "c<d kept"]
    assert outcomes([A, B, C, D], "all_pairs") == every


def test_scores_that_hardly_differ_are_alike() -> None:
    assert outcomes([A, B], "neighbours", min_gap=1.4) == ["a<b kept"]
    assert outcomes([A, B], "neighbours", min_gap=1.5) == ["a=b alike"]


def test_the_same_text_is_no_pair_whatever_its_scores() -> None:
    assert outcomes([A, Answer(" a\n", True, 7.0)], "best_and_worst") == ["=".join([" ", "a"]) + " identical"]


def test_an_answer_that_was_cut_off_is_worst_or_left_out() -> None:
    assert outcomes([CUT, A, B], "best_and_worst") == ["b>c kept"]
    assert outcomes([CUT, A, B], "best_and_worst", "leave_out") == ["b>a kept"]
    other = Answer("other, without end", False, 1.0)
    assert outcomes([CUT, other], "neighbours") == ["c=o cut_off"]
    assert outcomes([CUT, other], "neighbours", "leave_out") == []
    assert outcomes([CUT, A, B], "all_pairs", "as_it_is") == ["c>a kept", "c>b kept", "a<b kept"]
    # Whoever asks a judge is spared the question.
    assert outcomes([Answer("x", True), Answer("y", False)], "neighbours") == ["x>y kept"]


def test_an_answer_without_text_is_compared_with_none() -> None:
    assert outcomes([Answer(" ", True, 5.0), A, Answer("", True, -9.0), B], "all_pairs") == ["a<b kept"]
    assert outcomes([Answer("", True, 5.0), A], "best_and_worst") == []


@pytest.mark.parametrize("choose", ["best_and_worst", "neighbours", "all_pairs"])
def test_one_answer_alone_makes_no_comparison(choose: str) -> None:
    assert compare([A], choose, "worst") == [] == compare([CUT, A], choose, "leave_out")


def test_without_scores_somebody_must_say() -> None:
    asked = compare([Answer("x", True), Answer("y", True)], "neighbours", "worst")
    assert asked == [Comparison(0, 1, None, None)]
    words = [decided(asked[0], preference) for preference in (1.0, 0.75, 0.5, 0.25, None)]
    assert [word.outcome for word in words] == ["kept", "kept", "alike", "kept", "no_verdict"]
    assert [word.preference for word in words] == [1.0, 0.75, 0.5, 0.25, None]
    assert counted(words) == {"kept": 3, "alike": 1, "identical": 0, "cut_off": 0, "no_verdict": 1}
