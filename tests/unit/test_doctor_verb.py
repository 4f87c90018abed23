"""`rlhf doctor` on whole set-ups: sound ones, and folders and data with a planted fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_tokenizers import CHATML, FAMILIES, LLAMA3, NO_END, byte_level
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from rlhf.cli import app
from rlhf.eval.doctor import reward_checks
from rlhf.infra.config import load_config
from rlhf.infra.errors import UserError
from rlhf.models.reward_model import ClassifierReward, RewardModel
from rlhf.models.scoring import HEAD_FILE
from rlhf.recipes.doctor import doctor_config, run_doctor

HIDING = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'assistant' %}")


def write_model(folder: Path, tokenizer: PreTrainedTokenizerFast, *, classifier: bool = False) -> None:
    """A random GPT-2 of two layers with this tokenizer."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=256,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    model = GPT2ForSequenceClassification(config) if classifier else GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def chat_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = byte_level(["<|pad|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", template=template)
    tokenizer.pad_token = "<|pad|>"
    return tokenizer


def test_V8_a_classifier_that_pads_with_eos_passes_over_the_end(tmp_path: Path) -> None:
    write_model(tmp_path, byte_level(["<|im_start|>", "<|im_end|>"], "<|im_end|>", template=CHATML), classifier=True)
    model = ClassifierReward(str(tmp_path))
    rows = [[5, 6, 7, model.tokenizer.eos_token_id], [8, 9, 10, 11, 12, model.tokenizer.eos_token_id]]
    assert model.tokenizer.pad_token_id == model.tokenizer.eos_token_id
    assert reward_checks.scores_ignore_the_batch(model, rows, "fp32").level == "yellow"


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    rows = [
        {"prompt": f"What is {n}+2?", "chosen": f"The answer is {n + 2}.", "rejected": "Yes, of course."}
        for n in range(12)
    ]
    return write_rows(tmp_path / "pairs.jsonl", rows)


def write_rows(path: Path, rows: list[dict[str, object]]) -> str:
    messages = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in messages), encoding="utf-8")
    return str(path)


def diagnosed(recipe: str, *overrides: str) -> dict[str, str]:
    """Level by id."""
    diagnosis = run_doctor(recipe, load_config(doctor_config(recipe), None, overrides))
    return {found.finding.id: found.finding.level for found in diagnosis.findings}


SFT_IDS = ["T10", "T6", "T2", "T3", "T4", "T8", "start", "T1", "P2", "O12"]


def test_a_small_gpt2_with_its_own_pad_token_is_sound(tmp_path: Path, pairs: str) -> None:
    write_model(tmp_path / "model", chat_tokenizer())
    data = f"data.train_files=[{pairs}]"
    levels = diagnosed("sft", f"model.name_or_path={tmp_path / 'model'}", data)
    assert levels == dict.fromkeys(SFT_IDS, "green")


@pytest.mark.slow
def test_the_bundled_model_and_world_are_sound() -> None:
    dpo = ["T10", "T6", "T2", "T3", "T4", "T8", "start", "T1", "P2", "P8", "O12"]
    assert diagnosed("kto", "data.max_samples=20") == dict.fromkeys(dpo, "green")
    assert diagnosed("dpo", "data.max_samples=20", "loss=simpo") == dict.fromkeys(
        [x for x in dpo if x != "P8"], "green"
    )
    reward = ["T10", "T6", "T2", "T3", "T4", "T8", "start", "P2", "V8", "V9", "O12"]
    assert diagnosed("dpo", "data.max_samples=20") == dict.fromkeys(dpo, "green")
    assert diagnosed("rm", "data.max_samples=20") == dict.fromkeys(reward, "green")
    ppo = ["T10", "T6", "start", "T3", "T4", "T2", "T1", "P2", "P1", "P8", "O12"]
    assert diagnosed("ppo", "rewards=[{name: keyword_sentiment}]", "data.max_samples=20") == dict.fromkeys(ppo, "green")
    assert diagnosed("sft", "run.dtype=bf16", "data.max_samples=20") == dict.fromkeys(SFT_IDS, "green")


@pytest.mark.parametrize(
    ("template", "found", "level"),
    [(NO_END, "T3", "yellow"), (HIDING, "T8", "red"), (LLAMA3, "T6", "yellow")],
)
def test_planted_templates(tmp_path: Path, pairs: str, template: str, found: str, level: str) -> None:
    if template == LLAMA3:  # template and tokenizer both write the beginning
        special, bos, eos = FAMILIES["llama3"][1:4]
        tokenizer = byte_level([*special, "<|pad|>"], eos, bos, LLAMA3, adds_bos=True)
        tokenizer.pad_token = "<|pad|>"
    else:
        tokenizer = chat_tokenizer(template)
    write_model(tmp_path / "model", tokenizer)
    levels = diagnosed("sft", f"model.name_or_path={tmp_path / 'model'}", f"data.train_files=[{pairs}]")
    assert {name for name, one in levels.items() if one != "green"} == {found}
    assert levels[found] == level


def test_planted_long_rows(tmp_path: Path) -> None:
    write_model(tmp_path / "model", chat_tokenizer())
    rows = [{"prompt": "Hi" * n, "chosen": "Yes, of course.", "rejected": "No."} for n in (1, 2, 3, 4, 60, 70)]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    model, files = f"policy={tmp_path / 'model'}", f"data.train_files=[{data}]"
    fractionless = "data.validation_fraction=0"
    some = diagnosed("dpo", model, files, fractionless, "data.max_length=60")
    assert {name for name, level in some.items() if level != "green"} == {"T10"}
    assert some["T10"] == "yellow"
    # Nothing left, and more than the model has positions: nothing else can be looked at.
    assert diagnosed("dpo", model, files, fractionless, "data.max_length=11") == {"T10": "red"}
    many = write_rows(tmp_path / "long.jsonl", [{"prompt": "Hi" * 400, "chosen": "Yes.", "rejected": "No."}] * 3)
    assert diagnosed("dpo", model, f"data.train_files=[{many}]", fractionless, "data.max_length=2000") == {"T10": "red"}


@pytest.fixture
def ppo(tmp_path: Path, pairs: str) -> list[str]:
    """PPO from a small GPT-2 with a reward model on the same base, in the folder `reward`."""
    write_model(tmp_path / "model", chat_tokenizer())
    RewardModel(str(tmp_path / "model")).save(tmp_path / "reward")
    return [f"policy={tmp_path / 'model'}", f"data.train_files=[{pairs}]", "generation.max_new_tokens=32"]


def test_ppo_with_a_sound_reward_model(tmp_path: Path, ppo: list[str]) -> None:
    levels = diagnosed("ppo", *ppo, f"reward_model={tmp_path / 'reward'}")
    names = ["T10", "T6", "start", "T3", "T4", "T2", "T1", "P2", "P1", "P8", "V9", "V8", "O12"]
    assert levels == dict.fromkeys(names, "green")


@pytest.mark.slow
def test_grpo_is_checked_like_ppo_and_its_verifiers_against_the_prompts(tmp_path: Path, ppo: list[str]) -> None:
    levels = diagnosed("grpo", *ppo, f"reward_model={tmp_path / 'reward'}")
    names = ["T10", "T6", "start", "T3", "T4", "T2", "T1", "P2", "P1", "P8", "V9", "V8", "O12"]
    assert levels == dict.fromkeys(names, "green")
    assert diagnosed("grpo", *ppo, "rewards=[{name: math_answer}]") == {"T10": "green", "T6": "green", "start": "red"}


@pytest.mark.slow
def test_ppo_is_checked_on_a_rollout_even_where_its_reward_model_has_no_head(tmp_path: Path, ppo: list[str]) -> None:
    (tmp_path / "reward" / HEAD_FILE).unlink()
    levels = diagnosed("ppo", *ppo, f"reward_model={tmp_path / 'reward'}")
    assert levels.pop("V9") == "red"
    assert levels == dict.fromkeys(["T10", "T6", "start", "T3", "T4", "T2", "T1", "P2", "P1", "P8", "O12"], "green")


@pytest.mark.slow
def test_ppo_without_the_reward_model_it_asks_for_and_with_rules_alone(ppo: list[str]) -> None:
    assert diagnosed("ppo", *ppo)["V9"] == "red"
    assert "V9" not in diagnosed("ppo", *ppo, "rewards=[{name: keyword_sentiment}]")


@pytest.mark.slow
def test_ppo_with_a_classifier_whose_head_was_lost(tmp_path: Path, ppo: list[str]) -> None:
    write_model(tmp_path / "classifier", chat_tokenizer(), classifier=True)
    assert diagnosed("ppo", *ppo, f"reward_model={tmp_path / 'classifier'}")["V9"] == "green"
    file = tmp_path / "classifier" / "model.safetensors"
    tensors = load_file(file)
    del tensors["score.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert diagnosed("ppo", *ppo, f"reward_model={tmp_path / 'classifier'}")["V9"] == "red"


def test_what_would_end_the_run_is_red() -> None:
    assert diagnosed("sft", "model.name_or_path=/nowhere/at/all") == {"start": "red"}
    assert diagnosed("dpo", "data.train_files=[/nowhere/pairs.jsonl]") == {"start": "red"}


@pytest.mark.slow
def test_a_pipeline_is_checked_stage_by_stage() -> None:
    overrides = ["world.num_pairs=20", "world.num_validation_pairs=10", "world.num_prompts=10"]
    diagnosis = run_doctor("pipeline", load_config(doctor_config("pipeline"), None, overrides))
    assert list(dict.fromkeys(found.stage for found in diagnosis.findings)) == ["sft", "reward", "dpo", "ppo"]
    assert diagnosis.level == "green"


@pytest.mark.slow
def test_a_pipeline_with_pre_training_and_full_fine_tuning(tmp_path: Path) -> None:
    overrides = ["world.num_pairs=40", "world.num_validation_pairs=10", "world.num_prompts=10"]
    overrides += ["pretrain.architecture.hidden_size=32", "pretrain.architecture.num_attention_heads=2"]
    overrides += ["pretrain.architecture.num_hidden_layers=2", "sft.model.train=full"]
    diagnosis = run_doctor("pipeline", load_config(doctor_config("pipeline"), None, overrides))
    assert [found for found in diagnosis.findings if found.finding.level == "red"] == []
    assert diagnosis.findings[0].stage == "pretrain"


def test_the_command_line(tmp_path: Path, pairs: str) -> None:
    runner = CliRunner()
    write_model(tmp_path / "model", chat_tokenizer())
    arguments = [f"policy={tmp_path / 'model'}", f"data.train_files=[{pairs}]"]
    sound = runner.invoke(app, ["doctor", "dpo", "--json", *arguments])
    assert sound.exit_code == 0
    told = json.loads(sound.stdout)
    assert (told["recipe"], told["level"], len(told["findings"])) == ("dpo", "green", 11)
    assert set(told["findings"][0]) == {"stage", "id", "title", "level", "seen", "breaks", "fix"}
    broken = runner.invoke(app, ["doctor", "sft", "model.name_or_path=/nowhere/at/all"])
    assert broken.exit_code == 1
    assert broken.stdout.splitlines()[-1].startswith("0 green, 0 yellow, 1 red")
    with pytest.raises(UserError, match="choose from sft, rm, dpo, kto, ppo, grpo, pipeline"):
        runner.invoke(app, ["doctor", "eval"], catch_exceptions=False)
