"""Every key of the pipeline reaches the stage it belongs to, or is refused with the reason (checklist C9)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from config_keys import CASES, IDLE, Changes, Refused, cases, keys_of

from rlhf.data.data_config import SourceConfig
from rlhf.infra.config import load_config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import RunConfig
from rlhf.recipes.pipeline import PipelineConfig, with_sources
from rlhf.recipes.resume import CONFIGS

STAGES = {"pretrain": "pretrain", "sft": "sft", "reward": "reward", "dpo": "dpo", "ppo": "ppo", "evaluate": "eval"}
PLACES = {name: f"some/{name}" for name in ("base", "other", "tokenizer", "policy", "reward", "other_reward")}
PLACES |= {name: f"some/{name}" for name in ("refuser", "elsewhere", "splits", "measured", "ensemble")}
PLACES |= {name: f"some/{name}" for name in ("process", "other_process")}
PLACES |= {name: f"{name}.jsonl" for name in ("pairs", "more", "renamed", "hh", "chats")}
PLACES |= {"absent_device": "cuda", "server": "http://127.0.0.1:1/v1", "key_variable": "A_KEY", "functions": "mine.py"}
RUN = {f"run.{name}" for name in RunConfig.model_fields}
SOURCES = {
    "data.name", "data.train_files", "data.validation_files", "data.split", "data.validation_split", "data.data_dir",
    "data.columns", "data.validation_fraction", "data.hh_as_messages",
}  # fmt: skip
LORA = {f"model.lora.{name}" for name in ("r", "lora_alpha", "target_modules", "use_rslora")}
COPIES = LORA | {"model.lora.lora_dropout", "model.name_or_path", "model.random_init"}
# Keys of a stage that cannot act inside a pipeline on the built-in world, whose data and adapters come from elsewhere.
REFUSED = {
    "pretrain": RUN | SOURCES | {"data.split_seed", "data.system_prompt", "data.overlong", "data.train_on"},
    "sft": RUN | SOURCES | {"data.split_seed"},
    "reward": RUN | SOURCES | COPIES | {"data.split_seed", "model.train", "use_margin"},
    "dpo": RUN | SOURCES | COPIES | {"data.split_seed", "policy"},
    "ppo": RUN | SOURCES | COPIES | {"data.split_seed", "data.max_validation_samples", "data.families", "policy"},
    "evaluate": RUN | COPIES | {
        "model.train", "model.gradient_checkpointing", "models", "reward_model", "histories", "reference",
        "suites", "max_items", "baseline",
        "data.validation_files", "data.split_seed", "data.families", "data.where",
        "data.validation_fraction", "data.max_samples", "data.max_validation_samples", "data.max_prompt_length",
    },
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder in which the built-in world lies already: the rows are of no account here."""
    (tmp_path / "data").mkdir()
    for name in ("pairs", "validation_pairs", "prompts", "validation_prompts"):
        (tmp_path / "data" / f"{name}.jsonl").touch()
    return tmp_path


def resolved(folder: Path, *texts: str) -> dict[str, Any]:
    """The settings that the stages are started with."""
    config = load_config(PipelineConfig, overrides=["run.name=p", *texts])
    return with_sources(config, folder).model_dump(mode="json")


def value_at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return tree


@pytest.mark.parametrize("stage", STAGES)
def test_C9_a_key_of_a_stage_arrives_or_is_refused(folder: Path, stage: str) -> None:
    recipe, refused, lost = STAGES[stage], set(), []
    places = PLACES | {"instructions": str(folder / "instructions.txt")}
    (folder / "instructions.txt").write_text("Say [[A]], [[B]] or [[C]].", encoding="utf-8")
    before_that = cache(lambda around: resolved(folder, *around))
    for key, owner, name in keys_of(CONFIGS[recipe]):
        case = cases(recipe, key, owner, name)[0]
        value = f"{stage}.{key}={case.value}".format_map(places)
        around = [] if isinstance(case, Refused) else [text.format_map(places) for text in case.around]
        around = [f"{stage}.{text}" for text in around if text.partition("=")[0] not in REFUSED[stage]]
        around += ["pretrain.training.max_steps=9"] if stage == "pretrain" else []
        before = before_that(tuple(around))
        try:
            after = resolved(folder, *around, value)
        except UserError as error:
            words = {case.words} if isinstance(case, Refused) else {f"'{stage}.{key}' {IDLE}", "on random weights"}
            assert any(text in str(error) for text in words), (key, str(error))
            refused.add(key)
        else:
            is_there = value_at(after, f"{stage}.{key}") != value_at(before, f"{stage}.{key}")
            lost += [] if is_there else [key]
    assert refused == REFUSED[stage]
    assert lost == []


@pytest.mark.parametrize("name", [name for name in RunConfig.model_fields if name not in ("name", "output_dir")])
def test_C9_the_run_section_holds_for_every_stage(folder: Path, name: str) -> None:
    (case, *_) = (found for found in CASES[RunConfig][name] if not isinstance(found, Refused))
    around = [f"run{text}" for text in case.around if text.startswith(".") and not text.startswith(".name")]
    after = resolved(folder, *around, f"run.{name}={case.value}".format_map(PLACES), "pretrain.training.max_steps=9")
    for stage in STAGES:
        here = after[stage]["run"]
        assert (here["output_dir"], here["name"], here["overwrite"]) == (str(folder), STAGES[stage], True)
        assert here[name] == after["run"][name] != RunConfig.model_fields[name].default


@pytest.mark.parametrize("name", SourceConfig.model_fields)
def test_C9_the_data_section_holds_for_every_stage(folder: Path, name: str) -> None:
    value = next(c.value for c in CASES[SourceConfig][name] if isinstance(c, Changes))
    source = [] if name in ("name", "train_files") else ["data.train_files=[toy/hub]"]
    after = resolved(folder, *source, f"data.{name}={value}".format_map(PLACES))
    for stage in ("sft", "reward", "dpo", "ppo", "evaluate"):
        assert after[stage]["data"][name] == after["data"][name] != SourceConfig.model_fields[name].default
        with pytest.raises(UserError, match=f"'{stage}.data.{name}' {IDLE}"):
            resolved(folder, *source, *[f"{s}data.{name}={value}".format_map(PLACES) for s in ("", f"{stage}.")])


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [
        ("world.num_prompts", "20", ["data.train_files=[a.jsonl]"]),
        ("world.labeller.label_noise", "0.2", ["data.train_files=[a.jsonl]"]),
        ("sft.model.name_or_path", "elsewhere", ["pretrain.training.max_steps=9"]),
        ("evaluate.reference", "dpo", ["dpo=null"]),
        ("evaluate.suite.num_ood", "3", ["data.train_files=[a.jsonl]"]),
        ("ppo.reward_model", "elsewhere", ["ppo.rewards=[{name: target_string, arguments: {text: a}}]"]),
        ("reward.model.lora.r", "8", ["sft.model.lora.r=4"]),
    ],
)
def test_C9_what_one_section_says_makes_another_idle(folder: Path, key: str, value: str, needed: list[str]) -> None:
    resolved(folder, *needed)
    with pytest.raises(UserError, match=f"config key '{key}' {IDLE}"):
        resolved(folder, *needed, f"{key}={value}")


def test_C9_saying_what_is_so_anyway_is_no_lie(folder: Path) -> None:
    resolved(folder, "sft.model.lora.r=8", "reward.model.lora.r=8", "dpo.model.lora.r=8")
    resolved(folder, "reward.backbone=elsewhere", "reward.model.lora.r=3")  # which has no adapter of the SFT stage
    resolved(folder, "evaluate.reference=dpo")
