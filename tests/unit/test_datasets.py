"""Preference, prompt and instruction data sets: filters and their counts, splits by prompt, document 001's snippets."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokenizers import CHATML, byte_level, family
from torch.utils.data import DataLoader

from rlhf.data.chat import ChatEncoder
from rlhf.data.data_config import InstructionDataConfig
from rlhf.data.formats import InstructionRow, LabelledRow, PreferenceRow, Prompt, PromptRow, Row, TextRow
from rlhf.data.instruction_dataset import InstructionDataset
from rlhf.data.loading import load_splits, rows_from_memory, split_by_prompt
from rlhf.data.preference_dataset import DataConfig, PreferenceDataset
from rlhf.data.prompt_dataset import PromptDataConfig, PromptDataset, gather_columns
from rlhf.infra.config import load_config
from rlhf.infra.errors import UserError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
HH_FILE = SHARED / "hh_rlhf" / "train.jsonl.gz"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def hh(question: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant:"


def pair(prompt: Prompt, chosen: str, rejected: str, **columns: object) -> PreferenceRow:
    return PreferenceRow(prompt, chosen, rejected, None, columns)


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(byte_level(SPECIAL, "<|endoftext|>", template=CHATML))


@pytest.fixture(scope="module")
def letters() -> ChatEncoder:
    """One token per byte, so that lengths can be counted by hand."""
    return ChatEncoder(byte_level(["</s>"], "</s>", vocab_size=256))


# ---------------------------------------------------------------------- document 001, phase 2


def test_document_001_extracts_prompt_and_response() -> None:
    _extract_prompt_and_response = PreferenceDataset._extract_prompt_and_response

    text = "\n\nHuman: What is 2+2?\n\nAssistant: The answer is 4."
    prompt, response = _extract_prompt_and_response(text)
    assert "Human: What is 2+2?" in prompt
    assert response == "The answer is 4."


def hh_file_rows() -> list[dict[str, Any]]:
    if not HH_FILE.exists():
        pytest.skip("the HH file is not here")
    return [json.loads(line) for line in gzip.decompress(HH_FILE.read_bytes()).splitlines()[:200]]


def hub_rows() -> list[dict[str, Any]]:
    """HH as the hub has it: whole dialogues on both sides."""
    return [{side: f"{row['prompt']} {row[side]}" for side in ("chosen", "rejected")} for row in hh_file_rows()]


def test_document_001_loads_hh_and_iterates_a_dataloader(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = hub_rows()
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, data_dir: rows)
    tokenizer = byte_level(["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>")

    dataset = PreferenceDataset(tokenizer, split="train", max_samples=100)
    assert len(dataset) == 100
    assert dataset.examples[0].prompt  # Non-empty
    assert dataset.examples[0].chosen != dataset.examples[0].rejected

    item = dataset[0]
    ids, mask = item["chosen_input_ids"], item["chosen_attention_mask"]
    assert ids.shape == mask.shape == item["rejected_input_ids"].shape == (512,)
    start, end = int(item["prompt_length"]), int(mask.sum())
    assert ids[:start].tolist() == tokenizer(dataset.examples[0].prompt)["input_ids"]
    assert tokenizer.decode(ids[start:end]) == f" {dataset.examples[0].chosen}<|endoftext|>"
    assert mask[:end].all() and not mask[end:].any()
    assert (ids[end:] == tokenizer.eos_token_id).all()
    batch = next(iter(DataLoader(dataset, batch_size=4, shuffle=True)))
    assert batch["rejected_input_ids"].shape == (4, 512)
    assert batch["prompt_length"].shape == (4,)


def test_hh_of_the_hub_and_of_the_file_come_out_alike(encoder: ChatEncoder) -> None:
    rows, whole = hh_file_rows()[:60], hub_rows()[:60]
    config = DataConfig(max_length=2048)
    file = PreferenceDataset.from_rows(rows_from_memory(rows, config), encoder, config)
    hub = PreferenceDataset.from_rows(rows_from_memory(whole, config), encoder, config)
    assert file.report.dropped == hub.report.dropped
    assert len(file) > 50
    assert hub.content_hash() == file.content_hash()


# ---------------------------------------------------------------------- filters


def test_T10_pairs_are_dropped_by_reason_and_counted(letters: ChatEncoder) -> None:
    rows = [
        pair("abcdef\n", "good", "bad"),  # 7 + 5 and 7 + 4 tokens, EOS included
        pair("abcdef\n", "good", "  "),
        pair("abcdef\n", "", "bad"),
        pair("abcdef\n", "same", "same "),
        pair("ab\n", "good", "no"),  # 3 + 3 = 6 tokens on the rejected side
        pair("abcdef\n", "x" * 40, "bad"),
        pair("", "good answer", "bad answer"),
    ]
    data = PreferenceDataset.from_rows(rows, letters, DataConfig(min_length=7, max_length=20))
    assert len(data) == 1
    assert data.report.dropped == {
        "empty_response": 2,
        "identical_pair": 1,
        "too_short": 1,
        "too_long": 1,
        "empty_prompt": 1,
    }
    assert (data.report.num_rows, data.report.num_kept, data.report.num_malformed) == (7, 1, 0)
    assert str(data.report) == (
        "1 examples of 7 rows; dropped: 1 empty_prompt, 2 empty_response, 1 identical_pair, 1 too_long, 1 too_short"
    )
    only = data.examples[0]
    assert [len(only.prompt_ids), len(only.chosen_ids), len(only.rejected_ids)] == [7, 5, 4]
    assert data.lengths == [16]


@pytest.mark.parametrize(("min_length", "max_length", "kept"), [(12, 12, 1), (13, 20, 0), (2, 11, 0)])
def test_length_bounds_are_inclusive(letters: ChatEncoder, min_length: int, max_length: int, kept: int) -> None:
    rows = [pair("abcdef\n", "good", "evil"), pair("0123456789", "x", "y")]  # both sides: 7 + 5 = 12; 10 + 3 = 13
    config = DataConfig(min_length=min_length, max_length=max_length)
    if kept:
        assert len(PreferenceDataset.from_rows(rows, letters, config)) == kept
    else:
        dropped = {"too_short": 1} if min_length == 13 else {"too_long": 2}
        try:
            assert PreferenceDataset.from_rows(rows, letters, config).report.dropped == dropped
        except UserError as error:
            assert "2 too_long" in str(error)


def test_T10_overlong_rows_can_lose_the_start_of_the_prompt_but_never_the_answer(letters: ChatEncoder) -> None:
    rows = [pair("abcdefghij\n", "good", "longer answer"), pair("abc\n", "x" * 19, "y"), pair("ab\n", "z" * 30, "y")]
    config = DataConfig(min_length=2, max_length=20, overlong="truncate_prompt")
    data = PreferenceDataset.from_rows(rows, letters, config)
    assert data.report.notes == {"prompt_shortened": 1}
    assert data.report.dropped == {"too_long": 2}  # an answer of 20 tokens leaves the prompt no room
    (example,) = data.examples
    assert letters.tokenizer.decode(example.prompt_ids) == "fghij\n"
    assert letters.decode(example.chosen_ids) == "good"
    assert letters.decode(example.rejected_ids) == "longer answer"


def test_no_usable_row_is_a_user_error(letters: ChatEncoder) -> None:
    with pytest.raises(UserError, match=r"no usable preference pairs .* are left .*1 empty_response"):
        PreferenceDataset.from_rows([pair("abcdefghij", "good", "")], letters, DataConfig())
    with pytest.raises(UserError, match="expected preference pairs"):
        PreferenceDataset.from_rows([PromptRow("a")], letters, DataConfig())


def test_samples_are_drawn_from_the_whole_file_and_keep_counting(encoder: ChatEncoder) -> None:
    rows: list[Row] = [pair(hh(f"question number {n}"), f"answer {n}", "no idea", id=n) for n in range(3000)]
    config = DataConfig(max_samples=50)
    data = PreferenceDataset.from_rows(rows, encoder, config)
    picked = [example.row.columns["id"] for example in data.examples]
    assert len(picked) == len(set(picked)) == 50
    assert max(picked) > 1500  # not the first fifty
    again = PreferenceDataset.from_rows(rows, encoder, config)
    assert [example.row.columns["id"] for example in again.examples] == picked


@pytest.mark.parametrize("as_messages", [False, True])
def test_hh_file_with_and_without_messages(encoder: ChatEncoder, as_messages: bool) -> None:
    path = SHARED / "hh_rlhf" / "val.jsonl.gz"
    if not path.exists():
        pytest.skip("the HH file is not here")
    config = DataConfig(train_files=str(path), max_length=4096, hh_as_messages=as_messages, validation_fraction=0.0)
    data, _ = PreferenceDataset.load(config, encoder)
    assert data.report.dropped == {"empty_response": 1}
    assert len(data) == 413
    assert all(isinstance(example.prompt, list) == as_messages for example in data.examples)
    assert all(len(example.chosen_ids) > 1 and len(example.rejected_ids) > 1 for example in data.examples)


# ---------------------------------------------------------------------- prompts


def test_prompts_are_distinct_short_enough_and_keep_their_columns(letters: ChatEncoder) -> None:
    rows: list[Row] = [
        PromptRow("first", {"answer": "1", "task": {"id": 1}}),
        PromptRow(" first", {"answer": "other"}),
        pair("second", "a", "b", answer="2"),
        InstructionRow("third", "x", {"level": 3}),
        PromptRow("a prompt that is too long"),
        PromptRow("  "),
        TextRow("no prompt at all"),
    ]
    data = PromptDataset.from_rows(rows, letters, PromptDataConfig(max_prompt_length=10))
    assert [example.prompt for example in data.examples] == ["first", "second", "third"]
    assert data.report.dropped == {"duplicate_prompt": 1, "prompt_too_long": 1, "empty_prompt": 1, "no_prompt": 1}
    assert data.columns([0, 2]) == {"answer": ["1", None], "task": [{"id": 1}, None], "level": [None, 3]}
    assert gather_columns([]) == {}

    def reward(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        return [float(text == truth) for text, truth in zip(completions, columns["answer"], strict=True)]

    examples = [data[0], data[1]]
    assert reward([e.prompt for e in examples], ["1", "1"], **data.columns([0, 1])) == [1.0, 0.0]


def test_prompt_messages_end_with_the_generation_prompt(encoder: ChatEncoder) -> None:
    rows = [PromptRow([{"role": "user", "content": "Hi"}])]
    data = PromptDataset.from_rows(rows, encoder, PromptDataConfig())
    assert encoder.tokenizer.decode(data[0].prompt_ids).endswith("<|im_start|>assistant\n")


# ---------------------------------------------------------------------- instructions


def trained(data: InstructionDataset, index: int) -> str:
    example = data[index]
    kept = [token for token, keep in zip(example.input_ids, example.loss_mask, strict=True) if keep]
    return str(data.encoder.tokenizer.decode(kept))


TALK: list[dict[str, str]] = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "How are you today?"},
]


def test_every_source_becomes_answers_to_imitate(encoder: ChatEncoder) -> None:
    rows: list[Row] = [
        pair(hh("What is 2+2?"), "four, of course", "five"),
        InstructionRow(TALK, "Very well, thank you."),
        LabelledRow(hh("What is 2+2?"), "This answer was approved.", True),
        LabelledRow(hh("What is 2+2?"), "This answer was not.", False),
        PromptRow("nothing to imitate"),
        InstructionRow(TALK, " "),
    ]
    data = InstructionDataset.from_rows(rows, encoder, InstructionDataConfig())
    assert [trained(data, index) for index in range(len(data))] == [
        " four, of course<|endoftext|>",
        "Hello.<|im_end|>Very well, thank you.<|im_end|>",
        " This answer was approved.<|endoftext|>",
    ]
    assert data.report.dropped == {"no_answer_to_imitate": 2, "empty_response": 1}


def test_last_turn_only(encoder: ChatEncoder) -> None:
    rows: list[Row] = [InstructionRow(TALK, "Very well, thank you.")]
    data = InstructionDataset.from_rows(rows, encoder, InstructionDataConfig(train_on="last"))
    assert trained(data, 0) == "Very well, thank you.<|im_end|>"
    assert data.lengths == [len(data[0].input_ids)]


def test_every_token_of_texts_and_dialogues_is_trained_and_none_is_lost(letters: ChatEncoder) -> None:
    config = InstructionDataConfig(train_on="every_token", min_length=4, max_length=8)
    rows: list[Row] = [TextRow("abcdefghijklmnopqr"), TextRow("ab"), TextRow(" "), pair("Q:", "A", "B")]
    data = InstructionDataset.from_rows(rows, letters, config)
    texts = [str(letters.tokenizer.decode(example.input_ids)) for example in data.examples]
    assert texts == ["abcdefgh", "ijklmnop", "qr</s>", "Q: A</s>"]
    assert all(all(example.loss_mask) for example in data.examples)
    assert data.report.dropped == {"too_short": 1, "empty_text": 1}
    assert data.report.notes == {"cut_into_pieces": 3}


# ---------------------------------------------------------------------- validation


def test_no_prompt_stands_on_both_sides() -> None:
    prompts: list[Prompt] = [hh(f"question {n % 200}") for n in range(1000)]
    prompts += [[{"role": "user", "content": f"request {n % 100}"}] for n in range(500)]
    train, held = split_by_prompt(prompts, 0.2, seed=0)
    assert sorted([*train, *held]) == list(range(1500))
    assert not {str(prompts[i]) for i in train} & {str(prompts[i]) for i in held}
    assert 0.1 < len(held) / 1500 < 0.3
    assert split_by_prompt(prompts, 0.2, seed=0) == (train, held)
    assert split_by_prompt(prompts, 0.2, seed=1) != (train, held)


def test_longer_dialogues_stay_with_their_beginning() -> None:
    prompts: list[Prompt] = []
    for number in range(300):
        start = hh(f"topic {number}")
        prompts += [start, f"{start} Yes?\n\nHuman: and then?\n\nAssistant:"]
    train, held = split_by_prompt(prompts, 0.3, seed=0)
    assert {index // 2 for index in train}.isdisjoint({index // 2 for index in held})


def test_the_side_of_a_prompt_does_not_depend_on_the_other_rows() -> None:
    prompts: list[Prompt] = [f"prompt {n}" for n in range(400)]
    _, held = split_by_prompt(prompts, 0.1, seed=3)
    _, half = split_by_prompt(prompts[::2], 0.1, seed=3)
    assert {prompts[i] for i in held} & set(prompts[::2]) == {prompts[::2][i] for i in half}


def test_tiny_data_still_get_both_sides() -> None:
    for fraction in (0.001, 0.999):
        train, held = split_by_prompt(["a", "b"], fraction, seed=0)
        assert len(train) == len(held) == 1
    with pytest.raises(UserError, match="share one prompt"):
        split_by_prompt(["a", "a "], 0.5, seed=0)


def test_data_sets_split_and_stages_hold_back_the_same_prompts(encoder: ChatEncoder, tmp_path: Path) -> None:
    rows = [{"prompt": hh(f"question {n}"), "chosen": f"a long answer {n}", "rejected": "no idea"} for n in range(200)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    config = {"train_files": str(path), "validation_fraction": 0.2}
    train, held = PreferenceDataset.load(DataConfig.model_validate(config), encoder)
    _, sft_held = InstructionDataset.load(InstructionDataConfig.model_validate(config | {"max_length": 40}), encoder)
    prompts, held_prompts = PromptDataset.load(PromptDataConfig.model_validate(config), encoder)
    assert held is not None and sft_held is not None and held_prompts is not None
    assert len(train) + len(held) == len(prompts) + len(held_prompts) == 200
    assert {str(e.prompt) for e in held.examples} == {str(e.prompt) for e in held_prompts.examples}
    again, rest = PreferenceDataset.from_rows([e.row for e in train.examples], encoder, train.config).split_by_prompt(
        0.2, seed=1
    )
    assert len(again) + len(rest) == len(train)
    none = PreferenceDataset.load(DataConfig.model_validate(config | {"validation_fraction": 0.0}), encoder)
    assert none[1] is None


def test_validation_from_named_files_and_their_rejects(encoder: ChatEncoder, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "completion": "an answer long enough to be kept"} for n in range(40)]
    for name in ("train.jsonl", "val.jsonl"):
        text = "\n".join([*(json.dumps(row) for row in rows), "{"])
        (tmp_path / name).write_text(text, encoding="utf-8")
    config = InstructionDataConfig(train_files=str(tmp_path), validation_files=str(tmp_path / "val.jsonl"))
    train, held = load_splits(config, tmp_path / "out" / "rejected_rows.jsonl")
    assert held is not None
    assert len(train.rows) == len(held.rows) == 40
    assert train.num_malformed == held.num_malformed == 1
    assert config.files() == [tmp_path / "train.jsonl", tmp_path / "val.jsonl"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "rejected_rows.jsonl",
        "rejected_rows_validation.jsonl",
    }


# ---------------------------------------------------------------------- hashes and configs


def test_content_hash_follows_the_tokens_and_their_order(encoder: ChatEncoder) -> None:
    rows = [pair(hh(f"question {n}"), f"answer {n}", "no idea at all", id=n) for n in range(3)]
    data = PreferenceDataset.from_rows(rows, encoder, DataConfig())
    relabelled = [pair(row.prompt, row.chosen, row.rejected, id="other") for row in rows]
    assert PreferenceDataset.from_rows(relabelled, encoder, DataConfig()).content_hash() == data.content_hash()
    assert PreferenceDataset.from_rows(rows[::-1], encoder, DataConfig()).content_hash() != data.content_hash()
    assert data.subset([0, 1]).content_hash() != data.content_hash()
    swapped = [pair(row.prompt, row.rejected, row.chosen) for row in rows]
    assert PreferenceDataset.from_rows(swapped, encoder, DataConfig()).content_hash() != data.content_hash()


def test_config_accepts_one_file_as_text_and_refuses_idle_keys() -> None:
    config = load_config(DataConfig, None, ["train_files=a.jsonl", "max_length=64"])
    assert config.train_files == ("a.jsonl",)
    with pytest.raises(UserError, match="validation_files names the validation data"):
        load_config(DataConfig, None, ["train_files=a", "validation_files=b", "validation_fraction=0.1"])
    with pytest.raises(UserError, match="tinychat"):
        load_config(DataConfig, None, ["split=test"])


def test_batches_of_real_length_equal_the_padded_items(encoder: ChatEncoder) -> None:
    from rlhf.data.collate import pair_batch

    rows = [pair(hh(f"question {n}"), f"answer {n}", "no idea at all") for n in range(3)]
    data = PreferenceDataset.from_rows(rows, encoder, DataConfig(max_length=64))
    pairs = pair_batch(data.examples, encoder.tokenizer.eos_token_id)
    for index in range(3):
        item = data[index]
        for row, side in ((index, "chosen"), (3 + index, "rejected")):
            ids = item[f"{side}_input_ids"][item[f"{side}_attention_mask"]]
            assert pairs.batch.attention_mask_BT is not None
            real = pairs.batch.input_ids_BT[row][pairs.batch.attention_mask_BT[row]]
            assert torch.equal(ids, real)
            assert int(pairs.batch.loss_mask_BT[row].sum()) == len(ids) - int(item["prompt_length"])


def test_template_families_agree_on_what_is_an_example() -> None:
    for name in ("chatml", "llama3", "mistral", "zephyr", "no_end"):
        tokenizer = family(name)
        data = InstructionDataset.from_rows(
            [InstructionRow(TALK, "Very well, thank you.")], ChatEncoder(tokenizer), InstructionDataConfig()
        )
        assert data[0].loss_mask[-1] and not data[0].loss_mask[0]
        assert data[0].input_ids[-1] == ChatEncoder(tokenizer).stop_token_ids[0]
