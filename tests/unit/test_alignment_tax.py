"""What training costs in knowledge: rates and paired changes by hand, and what a report makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from test_report import full_input

from rlhf.eval.alignment_tax import taxes
from rlhf.eval.benchmarks import answers_of_task, hash_of_questions, is_benchmark
from rlhf.eval.cautions import run_checks
from rlhf.eval.report_data import Report, build_report
from rlhf.eval.suite_items import Suite
from rlhf.eval.suite_report import SuiteReport, cautions_of
from rlhf.eval.suite_results import Answered, SuiteResult, suite_result
from rlhf.eval.tables import summary_of, taxes_of
from rlhf.infra.errors import UserError

SUITE = Suite("mmlu", "1", "f" * 64, (), "likelihood", "chosen", ranked=True)


def result(model: str, right: Sequence[bool], suite: Suite = SUITE) -> SuiteResult:
    answers = [Answered(f"q{n}", "all", "?", "A", "0", float(value), {}) for n, value in enumerate(right)]
    return suite_result(model, suite, answers)


def test_a_loss_is_paired_question_by_question() -> None:
    """Newcombe (1998), method 10: 40 of 50 before, 30 after, 29 of them right both times."""
    before = [True] * 40 + [False] * 10
    after = [True] * 29 + [False] * 11 + [True] + [False] * 9
    found = taxes([result("sft", before), result("ppo", after)], ["sft", "ppo"], "sft")
    assert [(tax.model, tax.accuracy.estimate) for tax in found] == [("sft", 0.8), ("ppo", 0.6)]
    assert found[0].change is None and found[1].change is not None
    # By hand: phi = (29*9 - 1*11 - 50/2) / sqrt(30*20*40*10) = 0.4593; Wilson 0.4618..0.7239 and 0.6696..0.8876.
    change = found[1].change
    assert change.estimate == pytest.approx(-0.2)
    assert (change.low, change.high) == pytest.approx((-0.3251, -0.0677), abs=1e-4)
    assert change.num == 50


def test_what_came_before_the_reference_has_no_tax() -> None:
    results = [result(name, [True, False, True]) for name in ("base", "sft", "ppo")]
    found = taxes(results, ["base", "sft", "ppo"], "sft")
    assert [tax.change is None for tax in found] == [True, True, False]
    assert all(tax.change is None for tax in taxes(results[:1], ["base"], None))


def test_each_benchmark_has_its_own() -> None:
    other = dataclasses.replace(SUITE, name="arc", sha256="e" * 64)
    results = [result(m, [m == "sft", True], s) for s in (SUITE, other) for m in ("sft", "ppo")]
    found = taxes(results, ["sft", "ppo"], "sft")
    assert [(tax.benchmark.split(" ")[0], tax.model) for tax in found] == [
        ("mmlu", "sft"), ("mmlu", "ppo"), ("arc", "sft"), ("arc", "ppo"),
    ]  # fmt: skip


def test_another_version_does_not_compare() -> None:
    other = dataclasses.replace(SUITE, sha256="e" * 64)
    with pytest.raises(UserError, match="measure both with one version"):
        taxes([result("sft", [True]), result("ppo", [True], other)], ["sft", "ppo"], "sft")


def report(after: Sequence[bool]) -> Report:
    before = [True] * 80 + [False] * 20
    source = dataclasses.replace(full_input(), tax_results=[result("sft", before), result("ppo", after)])
    return build_report(source)


@pytest.mark.parametrize(
    ("lost", "gained", "wary", "words"),
    [
        (4, 3, False, "changes by -1.0"),
        (9, 6, True, "do not say whether that is chance"),
        (20, 0, True, "lost knowledge, beyond chance"),
    ],
)
def test_a_report_tells_a_loss(lost: int, gained: int, wary: bool, words: str) -> None:
    made = report([number >= lost for number in range(80)] + [number < gained for number in range(20)])
    (check,) = [check for check in run_checks(made) if "alignment tax" in check.name]
    assert (check.wary, words in check.sentence) == (wary, True), check
    rows = dict(summary_of(made, made.main_view).rows)
    assert "Alignment tax: mmlu, points" in rows
    assert "Alignment tax: mmlu, points" not in dict(summary_of(made, made.views[1]).rows)
    shown = {name: [one.text for one in cells] for name, cells in taxes_of(made).rows}
    assert shown["mmlu 1 (ffffffff), %"][1] == "80.0"


def test_a_benchmark_on_which_the_reference_guesses_says_so() -> None:
    def chosen(model: str, num_right: int) -> SuiteResult:
        answers = [
            Answered(f"q{n}", "all", "?", "A", "0", float(n < num_right), {"by_guessing": 0.25}) for n in range(100)
        ]
        return suite_result(model, SUITE, answers)

    for num_right, told in ((26, True), (80, False)):
        results = [chosen("sft", num_right), chosen("ppo", num_right)]
        made = build_report(dataclasses.replace(full_input(), tax_results=results))
        names = [check.name for check in run_checks(made) if check.wary]
        assert ("sft: knowledge to lose, mmlu 1 (ffffffff)" in names) is told
        notes = cautions_of(SuiteReport("Suites", "sft", tuple(results), (), {}))
        assert [("no better than guessing (25 %)" in note) for note in notes] == ([True, True] if told else [])


# ---------------------------------------------------------------- the harness's log


def row(number: int, metrics: dict[str, object], **fixed: object) -> dict[str, object]:
    logged: dict[str, object] = {
        "doc_id": number, "metrics": list(metrics), "filter": "none", "arguments": [("Q", " A"), ("Q", " B")],
        "filtered_resps": [(-2.0, False), (-1.0, True)],
    }  # fmt: skip
    return logged | metrics | fixed


def test_the_first_measure_is_the_score_and_the_likeliest_choice_the_answer() -> None:
    (found,) = answers_of_task("arc", [row(7, {"acc": 1, "acc_norm": 0.0, "likelihood": -3.2})])
    assert (found.item_id, found.group, found.score, found.parts) == (
        "arc-7",
        "arc",
        1.0,
        {"acc_norm": 0.0, "by_guessing": 0.5},
    )
    assert (found.response, found.prompt) == ("B", "Q")


def test_filters_of_one_item_become_one_answer() -> None:
    rows = [
        row(number, {"exact_match": float(name == "flexible")}, filter=name, filtered_resps=["7"])
        for name in ("strict", "flexible")
        for number in (1, 0)
    ]
    found = answers_of_task("gsm8k", rows)
    assert [one.item_id for one in found] == ["gsm8k-0", "gsm8k-1"]
    assert found[0].score == 0.0 and found[0].parts == {"exact_match (flexible)": 1.0}
    assert found[0].response == "7"


def test_a_measure_that_is_no_share_is_refused() -> None:
    with pytest.raises(UserError, match="none of which is a number between 0 and 1"):
        answers_of_task("wikitext", [row(0, {"word_perplexity": (-310.0, 52)})])


def test_names_and_hashes() -> None:
    assert is_benchmark("lm-eval:mmlu") and not is_benchmark("mmlu:folder")
    assert hash_of_questions([{"a": 1}]) == hash_of_questions([{"a": 1}]) != hash_of_questions([{"a": 2}])
