"""Answers with a label: where they come from, what is dropped, and which strangers stand behind which prompt."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from tiny_tokenizers import CHATML, byte_level

from rlhf.data.chat import ChatEncoder
from rlhf.data.data_config import DataConfig
from rlhf.data.formats import InstructionRow, LabelledRow, PreferenceRow, Row
from rlhf.data.loading import rows_from_memory
from rlhf.data.order import epoch_order
from rlhf.data.preference_dataset import PreferenceDataset
from rlhf.data.unpaired_dataset import UnpairedDataset
from rlhf.infra.errors import UserError


@pytest.fixture(scope="module")
def letters() -> ChatEncoder:
    """One token per byte, so that lengths can be counted by hand."""
    return ChatEncoder(byte_level(["</s>"], "</s>", vocab_size=256))


def dataset(rows: list[Row], letters: ChatEncoder, **settings: object) -> UnpairedDataset:
    config = DataConfig.model_validate({"min_length": 1, "max_length": 40} | settings)
    return UnpairedDataset.from_rows(rows, letters, config)


def test_labelled_rows_and_both_sides_of_pairs(letters: ChatEncoder) -> None:
    rows: list[Row] = [
        LabelledRow("Add 2 and 2.\n", "4", True),
        LabelledRow("Add 2 and 2.\n", "5", False),
        PreferenceRow("Name a colour.\n", "red", "dog", None, {"family": "words"}),
    ]
    data = dataset(rows, letters)
    found = [(example.row.prompt, example.row.completion, example.desirable) for example in data.examples]
    assert found == [
        ("Add 2 and 2.\n", "4", True),
        ("Add 2 and 2.\n", "5", False),
        ("Name a colour.\n", "red", True),
        ("Name a colour.\n", "dog", False),
    ]
    assert data.num_desirable == 2 and data.examples[2].row.columns == {"family": "words"}
    assert str(data.report) == "4 examples of 4 rows"
    tokens = data.examples[2].tokens
    assert letters.tokenizer.decode(tokens.input_ids) == "Name a colour.\nred</s>"
    assert tokens.loss_mask == [False] * 15 + [True] * 4
    # The ids are those of the pair, so that reference and policy see the same whatever the recipe.
    pairs = PreferenceDataset.from_rows(rows[2:], letters, DataConfig(min_length=1))
    assert [example.answer_ids for example in data.examples[2:]] == [
        pairs.examples[0].chosen_ids,
        pairs.examples[0].rejected_ids,
    ]


def test_t10_what_cannot_serve_is_dropped_by_reason(letters: ChatEncoder) -> None:
    rows: list[Row] = [
        LabelledRow("abcdef\n", "good", True),
        LabelledRow("abcdef\n", "  ", False),
        LabelledRow("abcdef\n", "x" * 40, False),
        LabelledRow("a\n", "b", True),
        LabelledRow("", "good answer", True),
        PreferenceRow("abcdef\n", "same", "same "),
        PreferenceRow("abcdef\n", "good", ""),
    ]
    data = dataset(rows, letters, min_length=7, max_length=20)
    assert data.report.dropped == {
        "empty_response": 2,
        "too_long": 1,
        "too_short": 1,
        "empty_prompt": 1,
        "identical_pair": 2,
    }
    assert (data.report.num_rows, data.report.num_kept) == (9, 2)
    assert [example.desirable for example in data.examples] == [True, True]


def test_max_samples_counts_answers(letters: ChatEncoder) -> None:
    rows: list[Row] = [PreferenceRow(f"prompt {i}\n", "good", "bad") for i in range(20)]
    data = dataset(rows, letters, max_samples=11)
    assert len(data) == 11 and 0 < data.num_desirable < 11


def test_rows_without_a_label_are_refused(letters: ChatEncoder) -> None:
    with pytest.raises(UserError, match="rows of kind InstructionRow, expected answers with a label"):
        dataset([InstructionRow("a\n", "b")], letters)
    with pytest.raises(UserError, match="no usable labelled answers"):
        dataset([LabelledRow("a\n", "", True)], letters)


# ---------------------------------------------------------------- mismatched pairs


def test_a_stranger_is_the_next_row_with_another_prompt(letters: ChatEncoder) -> None:
    data = dataset([PreferenceRow(f"prompt {i}\n", f"good {i}", f"bad {i}") for i in range(3)], letters)
    # Rows 0 and 1 are sides of one pair, as are 2 and 3, 4 and 5.
    assert data.mismatches([0, 1, 2]) == [(0, 2), (1, 2), (2, 0)]
    assert data.mismatches([5, 0, 3]) == [(5, 0), (0, 3), (3, 5)]
    assert data.mismatches([4, 5]) == [] == data.mismatches([4])
    strangers = data.mismatched((5, 0))
    assert letters.tokenizer.decode(strangers.input_ids) == "prompt 2\ngood 0</s>"
    assert sum(strangers.loss_mask) == len("good 0") + 1


def test_strangers_that_do_not_fit_are_passed_by(letters: ChatEncoder) -> None:
    rows: list[Row] = [
        LabelledRow("p" * 29 + "\n", "short", True),
        LabelledRow("q\n", "long" * 8, False),
        LabelledRow("r\n", "tiny", True),
    ]
    data = dataset(rows, letters, max_length=40)
    assert data.mismatches([0, 1, 2]) == [(0, 2), (1, 2), (2, 0)]  # 30 + 33 would be more than 40
    assert data.mismatches([0, 1]) == [(1, 0)]
    assert max(len(data.mismatched(pair).input_ids) for pair in data.mismatches(range(3))) <= 40


def test_rows_in_random_order_meet_answers_of_both_kinds(letters: ChatEncoder) -> None:
    data = dataset([PreferenceRow(f"prompt {i}\n", "good", "bad") for i in range(200)], letters)
    in_order = Counter(data.examples[other].desirable for _, other in data.mismatches(range(400)))
    shuffled = Counter(data.examples[other].desirable for _, other in data.mismatches(epoch_order(400, 0, 0)))
    assert in_order[False] == 0  # the good side of the next pair, always
    assert 150 < shuffled[True] < 250 and shuffled.total() == 400


# ---------------------------------------------------------------- real files


@pytest.mark.parametrize(
    ("file", "count", "desirable"),
    [
        ("kto_en_demo.json.gz", 300, 150),
        pytest.param("kto-mix-test.json.gz", 1_092, 546, marks=pytest.mark.slow),
        pytest.param("dpo_en_demo.json.gz", 600, 300, marks=pytest.mark.slow),
    ],
)
def test_published_files_are_read(shared_data: Path, file: str, count: int, desirable: int) -> None:
    rows = json.loads(gzip.decompress((shared_data / "preference_demos" / file).read_bytes()))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    encoder = ChatEncoder(byte_level(special, "<|endoftext|>", template=CHATML))
    config = DataConfig(max_length=100_000)
    data = UnpairedDataset.from_rows(rows_from_memory(rows, config), encoder, config)
    assert data.report.num_rows == count
    assert (len(data), data.num_desirable) == (count, desirable)
