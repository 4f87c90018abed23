"""Worked solutions as tokens: where a step ends, what its label becomes, what is cut; truth in the built-in world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from tiny_tokenizers import CHATML, byte_level, family

from rlhf.data.chat import ChatEncoder
from rlhf.data.data_config import StepDataConfig
from rlhf.data.rows import PromptRow, StepLabel, StepRow
from rlhf.data.step_dataset import StepDataset, StepExample
from rlhf.data.step_splitter import StepSplitter, tokens_until, tokens_within
from rlhf.data.tinychat import judge_steps, make_tasks, step_rows
from rlhf.data.tinychat.arithmetic import compose_steps
from rlhf.infra.errors import UserError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ASKED = [{"role": "user", "content": "2+2+1?"}]


@pytest.fixture(scope="module")
def letters() -> ChatEncoder:
    """One token per byte, so that places can be counted by hand."""
    return ChatEncoder(byte_level(["</s>"], "</s>", vocab_size=256))


def dataset(encoder: ChatEncoder, labels: Sequence[StepLabel] = (1.0, 0.0), **settings: object) -> StepDataset:
    row = StepRow("ab\n", ["cd", "efg"][: len(labels)], list(labels))
    return StepDataset.from_rows([row], encoder, StepDataConfig.model_validate(settings))


def pieces(example: StepExample, encoder: ChatEncoder) -> list[str]:
    starts = [0, *(end + 1 for end in example.ends)]
    return [
        encoder.tokenizer.decode(example.input_ids[start : end + 1])
        for start, end in zip(starts, example.ends, strict=False)
    ]


def test_a_step_ends_with_the_last_token_of_its_separator(letters: ChatEncoder) -> None:
    (example,) = dataset(letters, separator="; ").examples
    assert letters.tokenizer.decode(example.input_ids) == "ab\ncd; efg; "
    assert example.ends == [6, 11]
    assert example.labels == [1.0, 0.0]
    assert dataset(letters, separator="").examples[0].ends == [4, 7]


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "zephyr"])
def test_steps_follow_the_prompt_of_generation_in_every_template(name: str) -> None:
    encoder = ChatEncoder(family(name))
    row = StepRow(ASKED, ["2+2 = 4.\n", "\n4+1 = 5. "], [1.0, 1.0])
    (example,) = StepDataset.from_rows([row], encoder, StepDataConfig()).examples
    prompt_ids = encoder.prompt_ids(ASKED)
    assert example.input_ids[: len(prompt_ids)] == prompt_ids
    # The marker is the same token behind every step, whatever the tokenizer would have merged it with.
    assert len({example.input_ids[end] for end in example.ends}) == 1
    text = encoder.tokenizer.decode(example.input_ids[len(prompt_ids) :]).replace("▁", " ")
    assert text.strip() == "2+2 = 4.\n4+1 = 5."
    assert pieces(example, encoder)[1].strip() == "4+1 = 5."


def test_a_raw_prompt_gets_one_space_before_the_first_step(letters: ChatEncoder) -> None:
    row = StepRow("Q:", ["a", "b"], [1.0, 1.0])
    (example,) = StepDataset.from_rows([row], letters, StepDataConfig()).examples
    assert letters.tokenizer.decode(example.input_ids) == "Q: a\nb\n"


def test_a_long_solution_loses_its_last_steps_or_the_row(letters: ChatEncoder) -> None:
    cut = dataset(letters, max_length=9)  # prompt 3, first step 3, second step 4
    assert (cut.examples[0].labels, cut.examples[0].row.completions) == ([1.0], ["cd"])
    assert str(cut.report) == "1 examples of 1 rows; changed: 1 steps_cut"
    assert dataset(letters, max_length=10).report.notes == {}
    for settings in ({"max_length": 9, "overlong": "drop"}, {"max_length": 5}):
        with pytest.raises(UserError, match="1 too_long"):
            dataset(letters, **settings)


def test_labels_become_what_the_config_says(letters: ChatEncoder) -> None:
    given: list[StepLabel] = ["neutral", 0.25]
    for neutral, expected in (("right", 1.0), ("wrong", 0.0), ("ignore", None)):
        assert dataset(letters, given, neutral=neutral).examples[0].labels == [expected, 0.25]
    assert dataset(letters, [0.25, 0.0], soft_labels="harden").examples[0].labels == [1.0, 0.0]
    assert dataset(letters, [None, 1.0]).examples[0].num_labels == 1


def test_a_solution_without_a_judged_step_is_dropped(letters: ChatEncoder) -> None:
    rows = [StepRow("a\n", ["b", "c"], [None, 1.0]), StepRow("a\n", ["b"], [None]), StepRow("a\n", ["b"], ["neutral"])]
    kept = StepDataset.from_rows(rows, letters, StepDataConfig(neutral="ignore"))
    assert (len(kept), kept.report.dropped) == (1, {"no_judged_step": 2})
    # Cut to its first step, the first row has no verdict left.
    with pytest.raises(UserError, match="3 no_judged_step"):
        StepDataset.from_rows(rows, letters, StepDataConfig(neutral="ignore", max_length=5))


def test_other_rows_are_refused(letters: ChatEncoder) -> None:
    with pytest.raises(UserError, match="PromptRow, expected worked solutions with step labels"):
        StepDataset.from_rows([PromptRow("a")], letters, StepDataConfig())


def test_published_labels_are_split_by_question() -> None:
    path = SHARED / "process_labels" / "prm800k_multi_step.json.gz"
    if not path.exists():
        pytest.skip("the published file is not here")
    encoder = ChatEncoder(byte_level(SPECIAL, "<|endoftext|>", template=CHATML))
    config = StepDataConfig(train_files=(str(path),), validation_fraction=0.2, max_length=4096)
    train, held = StepDataset.load(config, encoder)
    assert held is not None
    questions = [{str(example.row.prompt) for example in part.examples} for part in (train, held)]
    assert not questions[0] & questions[1]
    assert sum(map(len, questions)) == 93


# ---------------------------------------------------------------------- free answers


def test_steps_of_an_answer() -> None:
    text = "\n one\ntwo \n\n\n three\n"
    assert StepSplitter().steps(text) == ["one", "two", "three"]
    assert [text[start:end] for start, end in StepSplitter().spans(text)] == ["one", "two", "three"]
    assert StepSplitter(r"\. (?:Then )?").steps("1 + 1 = 2. Then 2 + 1 = 3. Answer: 3") == [
        "1 + 1 = 2",
        "2 + 1 = 3",
        "Answer: 3",
    ]
    assert StepSplitter().steps(" \n ") == []
    with pytest.raises(UserError, match="no regular expression"):
        StepSplitter("(")


@pytest.mark.parametrize("text", ["1 + 1 = 2. Then 2 + 10 = 12.\nAnswer: 12", "é + ü = ö. ß = 3\n\nAnswer: ☃☃", "one"])
def test_steps_are_found_in_the_tokens(text: str) -> None:
    for encoder in (ChatEncoder(byte_level(["</s>"], "</s>", vocab_size=256)), ChatEncoder(family("chatml"))):
        ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        spans = StepSplitter(r"\. |\n+").spans(text)
        for (_, end), following in zip(spans, [start for start, _ in spans[1:]] + [len(text)], strict=True):
            count = tokens_until(encoder.decode, ids, end)
            assert len(encoder.decode(ids[:count])) >= end > len(encoder.decode(ids[: count - 1]))
            within = tokens_within(encoder.decode, ids, following)
            assert count <= within and text.startswith(encoder.decode(ids[:within])[:following])
            assert within == len(ids) or len(encoder.decode(ids[: within + 1])) > following
        assert tokens_until(encoder.decode, ids, 10_000) == len(ids)
        assert tokens_until(encoder.decode, ids, 0) == 0


# ---------------------------------------------------------------------- the built-in world


def test_the_world_writes_solutions_with_true_labels() -> None:
    rows = step_rows("train", 60, seed=3)
    assert rows == step_rows("train", 60, seed=3)
    for row in rows:
        assert len(row["completions"]) == len(row["labels"]) >= 2
        # What follows a wrong step is wrong.
        assert row["labels"] == sorted(row["labels"], reverse=True)
        is_right = row["completions"][-1] == f"Answer: {row['task']['spec']['answer']}"
        assert row["labels"][-1] == is_right
    assert 0.3 < sum(row["labels"][-1] for row in rows) / len(rows) < 0.5


@pytest.mark.parametrize(
    ("steps", "verdicts"),
    [
        (["4 * 3 = 12", "12 - 5 = 7", "Answer: 7"], [True, True, True]),
        (["3 x 4 = 12.", "So 12 - 5 = 7.", "The answer is 7"], [True, True, True]),
        (["Great question!", "4 * 3 = 12 and 12 - 5 = 7", "Answer: 7"], [True, True, True]),
        (["4 * 3 = 13", "13 - 5 = 8", "Answer: 8"], [False, False, False]),
        (["4 * 3 = 12", "5 - 12 = 7", "Answer: 7"], [True, False, False]),  # a difference cannot be turned round
        (["4 + 3 = 7", "Answer: 7"], [False, False]),  # right by chance
        (["4 * 3 = 12", "12 - 5 = 7", "7 + 1 = 8"], [True, True, False]),  # beyond the problem
        (["Answer: 7"], [True]),
        (["4 * 3 = 12", "Answer: 12"], [True, False]),
    ],
)
def test_truth_of_steps_by_hand(steps: list[str], verdicts: list[bool]) -> None:
    spec = {"kind": "*-", "numbers": [4, 3, 5], "unit": "eggs", "answer": 7}
    assert judge_steps(spec, steps) == verdicts


def test_a_written_slip_is_where_the_judge_finds_it() -> None:
    rng = Random(0)
    for task in make_tasks("train", 200, 0, ["arithmetic"]):
        assert all(judge_steps(task.spec, compose_steps(task.spec, rng, wrong=False)))
        assert not judge_steps(task.spec, compose_steps(task.spec, rng, wrong=True))[-1]
