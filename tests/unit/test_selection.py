"""What is kept of a pool of answers, in which form, and what choosing was worth."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.data_config import DataConfig, InstructionDataConfig
from rlhf.data.loading import load_rows
from rlhf.data.rows import InstructionRow, PreferenceRow
from rlhf.eval.best_of_n_report import best_of_n_report, shown
from rlhf.infra.config import load_config
from rlhf.infra.errors import UserError
from rlhf.recipes.best_of_n_config import BestOfNConfig, SelectionSettings
from rlhf.recipes.selection import as_demonstrations, as_pairs, selected

MESSAGES = [{"role": "user", "content": "two?"}]


def row(
    prompt: Any, *answers: tuple[str, float, bool], worths: list[float] | None = None, **columns: Any
) -> dict[str, Any]:
    texts, scores, finished = (list(column) for column in zip(*answers, strict=True))
    measured = {} if worths is None else {"worths": worths}
    return {"prompt": prompt, "columns": columns, "answers": texts, "scores": scores, "finished": finished, **measured}


POOL = [
    row("one?", ("a", 1.0, True), ("b", 3.0, False), ("c", 2.0, True), ("c", 2.0, True), label=1, task={"id": 7}),
    row(MESSAGES, ("d", 0.0, True), (" ", 9.0, True), ("e", 0.0, True), ("f", -5.0, True)),
    row("three?", ("", 0.0, True), ("", 0.0, True), ("", 0.0, True), ("g", 1.5, True)),
]


def kept(**settings: Any) -> list[str]:
    return [
        POOL[place]["answers"][answer] for place, answer in selected(POOL, SelectionSettings(num_answers=4, **settings))
    ]


def test_the_best_of_each_prompt() -> None:
    assert kept() == ["c", "d", "g"]  # b was cut off; d comes before e; what is empty is no answer
    assert kept(keep_unfinished=True) == ["b", "d", "g"]
    assert kept(keep=2) == ["c", "a", "d", "e", "g"]  # the second c is the first one again
    assert kept(keep=3, min_score=1.0) == ["c", "a", "g"]
    assert kept(min_score=2.5) == []


def test_the_best_of_all() -> None:
    assert kept(selection="overall") == ["c", "a", "g"]
    assert kept(selection="overall", keep_unfinished=True) == ["b", "c", "g"]
    assert kept(selection="overall", min_score=1.6) == ["c"]
    assert kept(selection="overall", keep=2) == ["c", "a", "d", "e", "f", "g"]


def test_demonstrations_and_pairs_are_read_as_such(tmp_path: Path) -> None:
    demonstrations = as_demonstrations(POOL, [(0, 2), (1, 0)])
    assert demonstrations == [
        {"prompt": "one?", "completion": "c", "score": 2.0, "task": {"id": 7}},  # a label would make another format
        {"prompt": MESSAGES, "completion": [{"role": "assistant", "content": "d"}], "score": 0.0},
    ]
    pairs = as_pairs(POOL, 0.0)
    assert [(pair["chosen"], pair["rejected"], pair["chosen_score"]) for pair in pairs] == [
        ("b", "a", 3.0),
        ([{"role": "assistant", "content": "d"}], [{"role": "assistant", "content": "f"}], 0.0),
    ]
    assert len(as_pairs(POOL, 2.0)) == 1  # further apart than that, not as far
    for name, rows, kind, config in (
        ("best", demonstrations, InstructionRow, InstructionDataConfig()),
        ("pairs", pairs, PreferenceRow, DataConfig()),
    ):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(one) + "\n" for one in rows))
        loaded = load_rows(config, [str(file)], "train")
        assert loaded.num_malformed == 0 and [type(one) for one in loaded.rows] == [kind, kind]


def test_what_choosing_is_worth_by_hand() -> None:
    rows = [
        row("a", ("w", 1.0, True), ("x", 2.0, True), ("y", 4.0, False), worths=[6.0, 0.0, 3.0]),
        row("b", ("w", 0.0, True), ("x", 0.0, True), ("y", 3.0, True), worths=[3.0, 0.0, 0.0]),
    ]
    found = best_of_n_report(rows)
    assert (found.num_prompts, found.num_answers, found.finished) == (2, 3, 5 / 6)
    assert [one.n for one in found.by_n] == [1, 2, 3]
    assert [one.kl_at_most for one in found.by_n] == pytest.approx([0, math.log(2) - 0.5, math.log(3) - 2 / 3])
    # Of two: the pairs of a give 2, 4, 4 with worths 0, 3, 3; those of b 0, 3, 3 with worths 3 / 2, 0, 0.
    assert [one.score.estimate for one in found.by_n] == pytest.approx([(7 / 3 + 1) / 2, (10 / 3 + 2) / 2, 3.5])
    assert [one.worth.estimate for one in found.by_n if one.worth] == pytest.approx([2, (2 + 0.5) / 2, 1.5])
    assert [one.worth_gain.estimate for one in found.by_n if one.worth_gain] == pytest.approx([0, -0.75, -0.5])
    ceiling = [((6 + 6 + 3) / 3 + 2) / 2 - 2, (6 + 3) / 2 - 2]
    assert [one.ceiling_gain.estimate for one in found.by_n[1:] if one.ceiling_gain] == pytest.approx(ceiling)
    lines = shown(found)
    assert len(lines) == 4 and "n = 2: KL at most 0.19 nats; score 2.667" in lines[2] and "of at most 1.5" in lines[2]
    alone = best_of_n_report([{name: v for name, v in one.items() if name != "worths"} for one in rows])
    assert alone.by_n[1].worth is None and "worth" not in shown(alone)[2]
    assert [one.n for one in best_of_n_report([row("a", *[("x", 0.0, True)] * 16)]).by_n] == [1, 2, 4, 8, 16]
    with pytest.raises(UserError, match=r"same number of answers to every prompt.*got \[3, 4\]"):
        best_of_n_report([rows[0], POOL[0]])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("best_of_n.num_answers=1", "greater than or equal to 2"),
        ("best_of_n.keep=16", "no choice; keep fewer"),
        ("generation.temperature=0", "all answers to a prompt are the same"),
        ("rewards=[{name: process, arguments: {per_step: change}}]", "a choice among answers needs aggregation"),
        ("rewards=[{name: process, arguments: {agg: min}}]", "it takes aggregation, split, per_step"),
        ("process_model=here", "no term of `rewards` or `measured_by` is called process"),
    ],
)
def test_settings_that_leave_no_choice_are_refused(setting: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config(BestOfNConfig, overrides=[setting])
