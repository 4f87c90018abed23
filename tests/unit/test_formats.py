"""Reading files and telling formats apart, on small made-up rows and on the published files where they are at hand."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.data_config import SourceConfig
from rlhf.data.dialogue import parse_hh_dialogue, split_hh_text
from rlhf.data.formats import (
    InstructionRow,
    LabelledRow,
    PreferenceRow,
    PromptRow,
    StepRow,
    TextRow,
    as_instruction,
    as_labelled,
    as_prompt,
    detect_format,
)
from rlhf.data.loading import load_rows, rows_from_memory
from rlhf.data.reading import data_files, read_rows
from rlhf.infra.errors import UserError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
PLAIN = SourceConfig()
USER = {"role": "user", "content": "Hi"}
GOOD, BAD = {"role": "assistant", "content": "Hello!"}, {"role": "assistant", "content": "Go away."}


def one(row: dict[str, Any]) -> Any:
    (converted,) = rows_from_memory([row], PLAIN).rows
    return converted


def load(name: str) -> list[Any]:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the published file {name} is not here")
    loaded = load_rows(PLAIN, [str(path)], "train")
    assert loaded.num_malformed == 0
    return loaded.rows


# ---------------------------------------------------------------------- conventions, by hand


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Tea?\n\nAssistant: Gladly.",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Tea?\n\nAssistant: No.",
            },
            PreferenceRow("\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Tea?\n\nAssistant:", "Gladly.", "No."),
        ),
        (
            {"prompt": "The sky is", "chosen": " blue.", "rejected": " green.", "margin": 2},
            PreferenceRow("The sky is", " blue.", " green.", 2.0),
        ),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is black.", "id": 7},
            PreferenceRow("The sky is", " blue.", " black.", None, {"id": 7}),
        ),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, PreferenceRow([USER], "Hello!", "Go away.")),
        ({"prompt": [USER], "chosen": "Hello!", "rejected": "No."}, PreferenceRow([USER], "Hello!", "No.")),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, PreferenceRow([USER], "Hello!", "Go away.")),
        (
            {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            PreferenceRow([USER], "Hello!", "Go away."),
        ),
        ({"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]}, PreferenceRow([USER], "Hello!", "Go away.")),
        (
            {
                "conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "Hello!"},
                "rejected": {"from": "gpt", "value": "Go away."},
            },
            PreferenceRow([{"role": "system", "content": "Be kind."}, USER], "Hello!", "Go away."),
        ),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3", "chosen": "3", "rejected": "4"},
            PreferenceRow([{"role": "user", "content": "Add.\n\n1 2"}], "3", "4", None, {"output": "3"}),
        ),
        ({"messages": [USER, GOOD]}, InstructionRow([USER], "Hello!")),
        ({"messages": [USER, GOOD, {"role": "user", "content": "?"}]}, InstructionRow([USER], "Hello!")),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}], "system": "S"},
            InstructionRow([{"role": "system", "content": "S"}, USER], "Hello!"),
        ),
        ({"prompt": "The sky is", "completion": " blue."}, InstructionRow("The sky is", " blue.")),
        ({"prompt": [USER], "completion": [GOOD]}, InstructionRow([USER], "Hello!")),
        ({"instruction": "Hi", "input": "", "output": "Hello!"}, InstructionRow([USER], "Hello!")),
        (
            {"instruction": "Hi", "context": "x", "response": "Hello!", "category": "qa"},
            InstructionRow([{"role": "user", "content": "Hi\n\nx"}], "Hello!", {"category": "qa"}),
        ),
        ({"question": "Hi", "answer": "Hello!"}, InstructionRow([USER], "Hello!", {"answer": "Hello!"})),
        ({"problem": "Hi", "solution": "Hello!"}, InstructionRow([USER], "Hello!", {"solution": "Hello!"})),
        (
            {"text": "Hi", "code": "pass", "test_list": ["assert 1"]},
            InstructionRow(
                [{"role": "user", "content": "Hi\nYour code should pass these tests:\n\nassert 1"}],
                "pass",
                {"test_list": ["assert 1"], "code": "pass"},
            ),
        ),
        ({"prompt": "Hi", "completion": "Hello!", "label": True}, LabelledRow("Hi", "Hello!", True)),
        ({"messages": [USER, BAD], "label": False}, LabelledRow([USER], "Go away.", False)),
        ({"instruction": "Hi", "output": "Hello!", "tag": "1"}, LabelledRow([USER], "Hello!", True)),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}], "label": 0},
            LabelledRow([USER], "Hello!", False),
        ),
        (
            {"prompt": "2+2+1", "completions": ["2+2=4", "4+1=6"], "labels": [True, False]},
            StepRow("2+2+1", ["2+2=4", "4+1=6"], [True, False]),
        ),
        (
            {"question": "Hi", "process": "Step 1: a ки\nStep 2: b ки", "labels": [1, 0]},
            StepRow([USER], ["Step 1: a", "Step 2: b"], [True, False]),
        ),
        (
            {"input": "Hi Step 1: a ки\nStep 2: b ки", "label": "Hi Step 1: a +\nStep 2: b -", "task": "GSM8K"},
            StepRow([USER], ["Step 1: a", "Step 2: b"], [True, False]),
        ),
        (
            {"input": "Hi", "steps": ["a", "b", "c"], "mistake_index": 1, "target": "c"},
            StepRow([USER], ["a", "b"], [True, False], {"target": "c"}),
        ),
        ({"input": "Hi", "steps": ["a", "b"], "mistake_index": None}, StepRow([USER], ["a", "b"], [True, True])),
        ({"problem": "Hi", "steps": ["a", "b", "c"], "label": 1}, StepRow([USER], ["a", "b"], [1.0, 0.0])),
        ({"problem": "Hi", "steps": ["a", "b"], "label": -1}, StepRow([USER], ["a", "b"], [1.0, 1.0])),
        ({"question": "Hi", "process": "Step 7: a ки", "label": 0}, StepRow([USER], ["Step 7: a"], [0.0])),
        (
            {"prompt": "p", "completions": ["a", "b", "c"], "labels": [0.25, None, "+"]},
            StepRow("p", ["a", "b", "c"], [0.25, None, 1.0]),
        ),
        ({"prompt": [USER], "task": {"id": 1}}, PromptRow([USER], {"task": {"id": 1}})),
        ({"text": "Once."}, TextRow("Once.")),
    ],
)
def test_every_convention_becomes_its_canonical_row(row: dict[str, Any], expected: object) -> None:
    assert one(row) == expected


def test_one_row_of_several_instances_becomes_several() -> None:
    row = {"instruction": "Hi", "id": 3, "instances": [{"input": "", "output": "a"}, {"input": "x", "output": "b"}]}
    assert rows_from_memory([row], PLAIN).rows == [
        InstructionRow([USER], "a", {"id": 3}),
        InstructionRow([{"role": "user", "content": "Hi\n\nx"}], "b", {"id": 3}),
    ]


# ---------------------------------------------------------------------- steps


def stepwise(*labels: Any, steps: list[Any] | None = None) -> dict[str, Any]:
    return {"prompt": "p", "completions": steps or ["a", "b", "c"][: len(labels)], "labels": list(labels)}


def test_zero_is_neutral_in_a_file_that_knows_minus_one_and_wrong_in_one_that_does_not() -> None:
    three = rows_from_memory([stepwise(1, 0), stepwise(-1, 1)], PLAIN).rows
    assert [row.labels for row in three] == [[1.0, "neutral"], [0.0, 1.0]]
    two = rows_from_memory([stepwise(1, 0), stepwise(0, 1)], PLAIN).rows
    assert [row.labels for row in two] == [[1.0, 0.0], [0.0, 1.0]]
    single = [{"question": "q", "process": "a ки", "label": label} for label in (1, 0, -1)]
    assert [row.labels for row in rows_from_memory(single, PLAIN).rows] == [[1.0], ["neutral"], [0.0]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (stepwise(1, 0, steps=["a", "b", "c"]), "3 steps but 2 labels; expected one label for each step"),
        (stepwise(1, 0, steps=["a", " \n"]), "step 2 is empty"),
        (stepwise(1, 0, steps=["a", 3]), "step 2 is int '3', expected text"),
        ({"prompt": "p", "completions": [], "labels": []}, "no steps"),
        ({"prompt": "p", "completions": "a", "labels": [1]}, "not both lists"),
        (stepwise(1, 7), "a label is int '7', expected true or false"),
        (stepwise(1, 1.5), "a label is float '1.5', expected true or false"),
        ({"input": "q", "steps": ["a"], "mistake_index": 1}, "mistake_index is 1, expected none or 0 to 0"),
        ({"problem": "q", "steps": ["a"], "label": True}, "label is True"),
        ({"question": "q", "process": "a ки b", "labels": [1]}, "2 steps but 1 labels"),
        ({"input": "q Step 1: a ки", "label": "q Step 1: a", "task": "t"}, "step 1 has no . or - in label"),
        ({"labeler": 1, "question": "q", "label": {}}, "not the objects of PRM800K"),
        ({"labeler": 1, "question": {}, "label": {"steps": [{"completions": []}]}}, "not as in PRM800K: KeyError"),
        ({"question": "q", "reasoning_steps": [{"solution_prefix": "x", "mc_value": 1}]}, "begin with the question"),
    ],
)
def test_malformed_steps_are_told_in_one_sentence(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rows_from_memory([row], PLAIN)


def test_prm800k_gives_the_chosen_path_and_every_other_candidate_once() -> None:
    def step(chosen: int | None, *rated: tuple[str, int | None], human: str | None = None) -> dict[str, Any]:
        completions = [{"text": text, "rating": rating, "flagged": False} for text, rating in rated]
        written = None if human is None else {"text": human, "rating": None}
        return {"completions": completions, "human_completion": written, "chosen_completion": chosen}

    steps = [step(0, ("a", 1)), step(None, ("b", -1), ("c", 0), human="d"), step(1, ("e", None), ("f", 0)), step(None)]
    raw = {"labeler": "x", "question": {"problem": "Hi", "ground_truth_answer": "29"}, "label": {"steps": steps}}
    columns = {"ground_truth_answer": "29"}
    assert rows_from_memory([raw], PLAIN).rows == [
        StepRow([USER], ["a", "d", "f"], [1.0, None, "neutral"], columns),
        StepRow([USER], ["a", "b"], [None, 0.0], columns),
        StepRow([USER], ["a", "c"], [None, "neutral"], columns),
    ]
    raw["label"] = {"steps": [step(None)]}
    assert rows_from_memory([raw], PLAIN).skipped == {"no_judged_step": 1}


def test_math_aps_gives_a_row_per_leaf_and_every_value_once() -> None:
    values = [("", 0.5), (" a", 0.5), (" a b", 0.25), (" a b", 0.75), (" a c", 0.0), (" d ", 1.0)]
    entries = [{"solution_prefix": f"Hi{text}", "mc_value": value} for text, value in values]
    row = {"question": "Hi", "reasoning_steps": entries, "final_answer": "4"}
    assert rows_from_memory([row], PLAIN).rows == [
        StepRow([USER], ["a", "b"], [0.5, 0.5], {"final_answer": "4"}),
        StepRow([USER], ["a", "c"], [None, 0.0], {"final_answer": "4"}),
        StepRow([USER], ["d"], [1.0], {"final_answer": "4"}),
    ]


def test_only_a_wholly_right_solution_is_imitated() -> None:
    assert as_instruction(StepRow("p", ["a", "b"], [1.0, 1.0])) == InstructionRow("p", "a\nb")
    for labels in ([1.0, 0.9], [1.0, "neutral"], [1.0, None]):
        assert as_instruction(StepRow("p", ["a", "b"], labels)) is None  # type: ignore[arg-type]


def test_columns_can_be_renamed() -> None:
    config = SourceConfig(columns={"prompt": "query", "completion": "reply"})
    (row,) = rows_from_memory([{"query": "Hi", "reply": "Hello!"}], config).rows
    assert row == InstructionRow("Hi", "Hello!")


def test_unknown_columns_are_listed_with_what_is_accepted() -> None:
    with pytest.raises(UserError) as error:
        detect_format(["colour", "taste"])
    assert "['colour', 'taste']" in str(error.value)
    assert "prompt + chosen + rejected" in str(error.value)
    with pytest.raises(UserError, match="rows"):
        rows_from_memory([{"colour": 1}], PLAIN)


def test_pairs_whose_prompts_differ_are_counted_not_malformed() -> None:
    good = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    other = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: c"}
    talk = {
        "chosen": "\n\nHuman: a\n\nAssistant: b",
        "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
    }
    loaded = rows_from_memory([good, other, talk], PLAIN)
    assert len(loaded.rows) == 1
    assert loaded.skipped == {"prompts_differ": 2}
    assert loaded.num_malformed == 0


def test_one_use_becomes_another() -> None:
    pair = PreferenceRow("p", "good", "bad", columns={"id": 1})
    assert as_instruction(pair) == InstructionRow("p", "good", {"id": 1})
    assert as_prompt(pair) == PromptRow("p", {"id": 1})
    assert as_labelled(pair) == [LabelledRow("p", "good", True, {"id": 1}), LabelledRow("p", "bad", False, {"id": 1})]
    assert as_instruction(LabelledRow("p", "bad", False)) is None
    assert as_instruction(PromptRow("p")) is None
    assert as_prompt(TextRow("t")) is None


def test_hh_dialogue_as_messages() -> None:
    text = "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\nmore\n\nHuman: d\n\nAssistant:"
    assert parse_hh_dialogue(text) == [
        {"role": "user", "content": "a\n\nb"},
        {"role": "assistant", "content": "c\nmore"},
        {"role": "user", "content": "d"},
    ]
    assert split_hh_text("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d ") == (
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
        "d",
    )


# ---------------------------------------------------------------------- published files


def test_hh_file() -> None:
    rows = load("hh_rlhf/train.jsonl.gz")
    assert len(rows) == 3098
    assert Counter(row.columns["subset"] for row in rows) == {"helpful-base": 1594, "harmless-base": 1504}
    assert all(isinstance(row, PreferenceRow) and row.prompt.endswith("\n\nAssistant:") for row in rows)
    turns = [parse_hh_dialogue(row.prompt) for row in rows]
    assert sum(len(messages) > 1 for messages in turns) > 1000
    assert all(one["role"] != two["role"] for messages in turns for one, two in pairwise(messages))


@pytest.mark.parametrize(
    ("name", "kind", "number"),
    [
        ("hh_rlhf/extra_noisy_harmless_train_truncated.jsonl.gz", PreferenceRow, 4775),
        ("hh_rlhf/extra_themis_train.jsonl.gz", PreferenceRow, 481),
        ("preference_demos/dpo_en_demo.json.gz", PreferenceRow, 300),
        ("preference_demos/tulu3_preference_sample.jsonl.gz", PreferenceRow, 100),
        ("preference_demos/kto_en_demo.json.gz", LabelledRow, 300),
        ("preference_demos/kto-mix-test.json.gz", LabelledRow, 1092),
        ("llms_from_scratch/instruction-data.json.gz", InstructionRow, 1100),
        ("llms_from_scratch/instruction-data-with-preference.json.gz", PreferenceRow, 1100),
        ("self_instruct/seed_tasks.jsonl", InstructionRow, 175),
        ("self_instruct/user_oriented_instructions.jsonl", InstructionRow, 252),
        ("dolly_sample/databricks_dolly_15k.csv.gz", InstructionRow, 1000),
        ("gsm8k/train.jsonl.gz", InstructionRow, 7473),
        ("math/math_test_minus_math500.jsonl.gz", InstructionRow, 4500),
        ("mbpp/mbpp_minus_test.jsonl.gz", InstructionRow, 474),
        ("process_labels/prm800k_multi_step.json.gz", StepRow, 310),
        ("process_labels/prm800k_single_step.json.gz", StepRow, 4441),
        ("process_labels/samples_math-shepherd.jsonl", StepRow, 7),
        ("process_labels/samples_prm800k.jsonl", StepRow, 37),
        ("process_labels/samples_math-aps.jsonl", StepRow, 124),
        ("process_labels/bbmistake_word_sorting.jsonl.gz", StepRow, 300),
        ("process_labels/bbmistake_tracking_shuffled_objects.jsonl.gz", StepRow, 300),
        ("process_labels/bbmistake_dyck_languages.jsonl.gz", StepRow, 986),
    ],
)
def test_published_files_are_read_whole(name: str, kind: type, number: int) -> None:
    rows = load(name)
    assert len(rows) == number
    assert {type(row) for row in rows} == {kind}


def test_published_files_in_detail() -> None:
    sharegpt = load("preference_demos/dpo_en_demo.json.gz")
    assert Counter(len(row.prompt) for row in sharegpt)[7] == 46
    assert all(row.prompt[-1]["role"] == "user" for row in sharegpt)
    tulu = load("preference_demos/tulu3_preference_sample.jsonl.gz")
    assert all([turn["role"] for turn in row.prompt] == ["user"] for row in tulu)
    labels = Counter(row.label for row in load("preference_demos/kto-mix-test.json.gz"))
    assert labels == {True: 546, False: 546}
    steps = load("process_labels/prm800k_multi_step.json.gz")
    assert Counter(label for row in steps for label in row.labels) == {True: 4898, False: 1008}
    sorting = load("process_labels/bbmistake_word_sorting.jsonl.gz")
    assert sum(all(row.labels) for row in sorting) == 34


# ---------------------------------------------------------------------- files

ROWS = [{"prompt": "Say \u2028 hi", "completion": "hi\nthere"}, {"prompt": "Ünï", "completion": "b"}]


def write(path: Path) -> Path:
    """Write ROWS in the format the name asks for."""
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
        content = sink.getvalue()
    elif kind in ("csv", "tsv"):
        sheet = io.StringIO()
        writer = csv.DictWriter(sheet, ["prompt", "completion"], delimiter="," if kind == "csv" else "\t")
        writer.writeheader()
        writer.writerows(ROWS)
        content = sheet.getvalue().encode()
    elif kind == "json":
        content = json.dumps(ROWS).encode()
    else:
        content = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_file_kind_gives_the_same_rows(tmp_path: Path, kind: str, gz: str) -> None:
    path = write(tmp_path / f"rows.{kind}{gz}")
    raw = read_rows(path)
    assert [dict(row.fields) for row in raw.rows] == ROWS
    assert raw.files == [path]


def test_several_files_a_glob_and_a_folder(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.jsonl"), write(tmp_path / "b.csv")
    assert len(read_rows([one, two]).rows) == 4
    assert data_files(str(tmp_path / "*.jsonl")) == [one]
    assert data_files(tmp_path) == [one, two]
    with pytest.raises(UserError, match="no file matches"):
        data_files(str(tmp_path / "*.parquet"))


def test_folder_splits_are_kept_apart(tmp_path: Path) -> None:
    train, held = write(tmp_path / "train-00000-of-00001.parquet"), write(tmp_path / "val.jsonl")
    assert data_files(tmp_path, "train") == [train]
    assert data_files(tmp_path, "validation") == [held]
    with pytest.raises(UserError, match="no files of split 'test'"):
        data_files(tmp_path, "test")


def test_json_written_in_other_ways(tmp_path: Path) -> None:
    nested, lines = tmp_path / "nested.json", tmp_path / "lines.json"
    nested.write_text(json.dumps({"version": 1, "data": ROWS}), encoding="utf-8")
    lines.write_text("\ufeff" + "\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    for path in (nested, lines):
        assert [dict(row.fields) for row in read_rows(path).rows] == ROWS


def test_malformed_lines_are_set_aside_with_place_and_reason(tmp_path: Path) -> None:
    good = [json.dumps({"prompt": "a", "completion": str(number)}) for number in range(96)]
    bad = ['{"prompt": "a", ', "[1, 2]", json.dumps({"prompt": "a", "completion": 5}), json.dumps({"prompt": "a"})]
    path, aside = tmp_path / "rows.jsonl", tmp_path / "out" / "rejected_rows.jsonl"
    path.write_text("\n".join([*good[:2], bad[0], "", *good[2:], *bad[1:]]), encoding="utf-8")
    loaded = load_rows(PLAIN, [str(path)], "train", aside)
    assert len(loaded.rows) == 96
    assert loaded.num_malformed == 4
    rejected = [json.loads(line) for line in aside.read_text(encoding="utf-8").splitlines()]
    assert [(row["file"], row["line"]) for row in rejected] == [(str(path), place) for place in (3, 99, 100, 101)]
    assert rejected[0]["raw"] == '{"prompt": "a", '
    assert "not valid JSON" in rejected[0]["reason"]
    assert rejected[1]["reason"] == "a list instead of an object"
    assert rejected[2]["reason"] == "completion is not a list of messages"
    assert rejected[3]["reason"] == "column 'completion' is missing"


def test_more_than_five_in_a_hundred_malformed_rows_stop(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": "a", "completion": "b"})] * 94 + ["{"] * 6
    path, aside = tmp_path / "rows.jsonl", tmp_path / "rejected_rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=r"6 of 100 rows are malformed.*line 95.*not valid JSON"):
        load_rows(PLAIN, [str(path)], "train", aside)
    assert len(aside.read_text(encoding="utf-8").splitlines()) == 6
    path.write_text("\n".join(lines[:95] * 2 + lines[:5]), encoding="utf-8")
    assert load_rows(PLAIN, [str(path)], "train").num_malformed == 2


def test_long_raw_text_is_cut_in_the_rejected_file(tmp_path: Path) -> None:
    path, aside = tmp_path / "rows.jsonl", tmp_path / "rejected_rows.jsonl"
    path.write_text("\n".join(['{"prompt": "a", "completion": "b"}'] * 30 + ["x" * 5000]), encoding="utf-8")
    load_rows(PLAIN, [str(path)], "train", aside)
    assert len(json.loads(aside.read_text(encoding="utf-8"))["raw"]) == 2000


def test_csv_rows_of_the_wrong_width_are_named_by_line(tmp_path: Path) -> None:
    path, aside = tmp_path / "rows.csv", tmp_path / "rejected_rows.jsonl"
    rows = ['"spans\ntwo lines",x'] * 20 + ["only one cell"] + ["a,b"] * 5
    path.write_text("\n".join(["prompt,completion", *rows]), encoding="utf-8")
    loaded = load_rows(PLAIN, [str(path)], "train", aside)
    assert len(loaded.rows) == 25
    rejected = json.loads(aside.read_text(encoding="utf-8"))
    assert (rejected["line"], rejected["reason"]) == (42, "1 cells under 2 column names")


def test_csv_cells_may_hold_lists_and_long_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as sheet:
        writer = csv.writer(sheet)
        writer.writerow(["messages"])
        writer.writerow([json.dumps([{"role": "user", "content": "x" * 200_000}, GOOD])])
    (row,) = load_rows(PLAIN, [str(path)], "train").rows
    assert isinstance(row, InstructionRow)
    assert len(row.prompt[0]["content"]) == 200_000  # type: ignore[index]
    assert csv.field_size_limit() == 131_072


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.json", b'[{"prompt": "a"},\n {"prompt": ]', "line 2 is not valid JSON"),
        ("text.json", b'"just text"', "expected an array"),
        ("latin.csv", "prompt\n\xe9".encode("latin-1"), "line 2 is not UTF-8"),
        ("cut.jsonl.gz", gzip.compress(b'{"prompt": "a"}', mtime=0)[:-9], "cannot be read"),
        ("no.parquet", b"PAR1", "not readable as Parquet"),
        ("empty.jsonl", b"\n\n", "holds no rows"),
        ("rows.xml", b"<a/>", "not a data file"),
    ],
)
def test_unreadable_files_are_user_errors(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / name)


def test_missing_files_are_named() -> None:
    for name in ("nowhere/rows.jsonl", "./nowhere", "nowhere"):
        with pytest.raises(UserError, match=f"'{name}' does not exist"):
            read_rows(name)


def test_hub_names_go_to_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[str, str, str | None]] = []

    def fake(name: str, split: str, data_dir: str | None) -> list[dict[str, Any]]:
        asked.append((name, split, data_dir))
        return [{"prompt": "a", "completion": "b", "label": None}]

    monkeypatch.setattr(datasets, "load_dataset", fake)
    loaded = load_rows(SourceConfig(data_dir="helpful-base"), ["Anthropic/hh-rlhf"], "test")
    assert asked == [("Anthropic/hh-rlhf", "test", "helpful-base")]
    assert loaded.rows == [InstructionRow("a", "b")]  # an empty column is not in the row


def test_an_unreachable_hub_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fake(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'Anthropic/hh-rlhf' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fake)
    with pytest.raises(UserError, match=r"neither a file or folder here.*check the name and the network"):
        read_rows("Anthropic/hh-rlhf")
