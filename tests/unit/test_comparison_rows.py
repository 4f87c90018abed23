"""Rows of two answers in every published form, and files of answers that are matched by prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.comparison_rows import read_answers, read_comparisons
from rlhf.infra.errors import UserError

ASKED = [{"role": "user", "content": "Why?"}]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "first", "second", "preference"),
    [
        ({"input": "Why?", "output_1": "a", "output_2": "b", "label": 1}, "a", "b", 1.0),
        ({"input": "Why?", "output_1": "a", "output_2": "b", "label": "2"}, "a", "b", 0.0),
        ({"instruction": "Why?", "output_1": "a", "output_2": "b", "label": 0}, "a", "b", 0.5),
        # AlpacaEval's model is output_2, and its preference counts from 1 to 2.
        ({"instruction": "Why?", "output_1": "base", "output_2": "m", "preference": 1.9}, "m", "base", 0.9),
        ({"instruction": "Why?", "output_1": "base", "output_2": "m", "preference": 1.5}, "m", "base", 0.5),
        ({"instruction": "Why?", "output_1": "base", "output_2": "m", "preference": 0}, "m", "base", 0.5),
        ({"instruction": "Why?", "output_1": "base", "output_2": "m", "preference": None}, "m", "base", None),
        ({"prompt": ASKED, "first": "a", "second": "b", "preference": 0.25}, "a", "b", 0.25),
        ({"prompt": ASKED, "chosen": "a", "rejected": "b"}, "a", "b", 1.0),
        (
            {
                "conversation_a": [*ASKED, {"role": "assistant", "content": "a"}],
                "conversation_b": [*ASKED, {"role": "assistant", "content": "b"}],
                "winner": "model_b",
            },
            "a",
            "b",
            0.0,
        ),
    ],
)
def test_every_form_is_read(
    tmp_path: Path, row: dict[str, Any], first: str, second: str, preference: float | None
) -> None:
    found = read_comparisons(write(tmp_path / "set.jsonl", [row | {"kept": 7}]))[0]
    assert (found.prompt, found.first, found.second) == (ASKED, first, second)
    assert found.preference == (None if preference is None else pytest.approx(preference))
    assert (found.source, found.place, found.columns["kept"]) == ("set", 0, 7)


def test_later_turns_of_two_conversations_are_shown_whole(tmp_path: Path) -> None:
    def talk(*said: str) -> list[dict[str, str]]:
        return [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(said)]

    row = {"conversation_a": talk("Hi", "Yes?", "Go", "a2"), "conversation_b": talk("Hi", "No.", "Go", "b2")}
    found = read_comparisons(write(tmp_path / "s.jsonl", [row | {"winner": "tie"}]))[0]
    assert found.prompt == [{"role": "user", "content": "Hi"}] and found.preference == 0.5
    assert found.first == "assistant: Yes?\n\nuser: Go\n\nassistant: a2"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"input": "q", "output_1": "a", "output_2": "b", "label": 3}, "label is 3, expected 0 to 2"),
        ({"input": "q", "output_1": "a", "output_2": "b", "label": "good"}, "label is str 'good', expected a number"),
        ({"input": "q", "output_1": "a", "output_2": None, "label": 1}, "output_2 is missing, expected text"),
        ({"instruction": "q", "output_1": "a", "output_2": "b", "preference": 0.4}, "preference is 0.4"),
        ({"conversation_a": [], "conversation_b": [], "winner": "nobody"}, "winner is str 'nobody'"),
        ({"a": 1, "b": 2}, "has the columns a, b, which are no form of two answers"),
        ({"prompt": "q", "completion": "a"}, "no form of two answers"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        read_comparisons(write(tmp_path / "bad.jsonl", [row]))


def test_real_labels_are_read(shared_data: Path) -> None:
    rows = read_comparisons(str(shared_data / "llmbar" / "*.json*"))
    assert len(rows) == 581
    assert {row.source for row in rows} >= {"Processed__FairEval__dataset", "CaseStudy__Normal__dataset"}
    normal = [row.preference for row in rows if row.source == "CaseStudy__Normal__dataset"]
    assert (normal.count(1.0), normal.count(0.0)) == (33, 26)


def test_answers_of_several_models_in_one_file(tmp_path: Path) -> None:
    rows = [{"prompt_id": "1", "prompt": "q", "response": f"by {m}", "model": m, "gold": 0.5} for m in ("sft", "ppo")]
    path = write(tmp_path / "samples.jsonl", rows)
    found = read_answers(path, "ppo")
    assert [(row.key, row.response, row.columns["gold"]) for row in found] == [("1", "by ppo", 0.5)]
    with pytest.raises(UserError, match=r"no answers of 'dpo'; models in it: sft, ppo"):
        read_answers(path, "dpo")
    with pytest.raises(UserError, match=r"answers of 2 models; choose one: .*samples.jsonl:sft, .*:ppo"):
        read_answers(path)


def test_answers_in_the_usual_formats(tmp_path: Path) -> None:
    forms: list[dict[str, Any]] = [
        {"prompt": "Why?", "response": "so"},
        {"prompt": "Why?", "completion": "so"},
        {"instruction": "Why?", "output": "so", "generator": "m"},
        {"messages": [*ASKED, {"role": "assistant", "content": "so"}]},
    ]
    for number, form in enumerate(forms):
        found = read_answers(write(tmp_path / f"{number}.jsonl", [form]))
        assert found[0].response == "so"
    with pytest.raises(UserError, match="does not hold one answer"):
        read_answers(write(tmp_path / "pair.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}]))
    with pytest.raises(UserError, match="line 1 does not hold one answer: the columns"):
        read_answers(write(tmp_path / "odd.jsonl", [{"x": 1}]))
