"""A step that is not finite in a real stage: weights, state and log stay sound, and a run that stops can go on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import WriteRows, column, demonstrations, log_lines, pairs, prompts, settings
from transformers import AutoModelForCausalLM

from rlhf.algo.ppo_loss import ClippedLoss, value_loss
from rlhf.algo.trainer import NonFiniteError
from rlhf.infra.checkpoint import CheckpointStore
from rlhf.infra.config import load_config
from rlhf.models.reference import Reference
from rlhf.recipes.dpo import DPOConfig, run_dpo
from rlhf.recipes.ppo import run_ppo
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.resume import resume_run
from rlhf.recipes.reward import RewardConfig, run_reward
from rlhf.recipes.sft import SFTConfig, run_sft


@pytest.fixture(scope="module")
def poisoned_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model with one word, `very`, that it cannot read: its embedding is infinite."""
    folder = tmp_path_factory.mktemp("poisoned")
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    model = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=False)
    word = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]["very"]
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.get_input_embeddings().weight[word] = math.inf
    model.save_pretrained(folder)
    return folder


def run_stage(stage: str, source: Path, data: Path, tmp_path: Path, name: str, *more: str) -> Path:
    key = {"sft": "model.name_or_path", "reward": "backbone", "dpo": "policy"}[stage]
    shared = settings(tmp_path, name, f"{key}={source}", f"data.train_files={data}", "data.min_length=1")
    shared += ["training.per_device_train_batch_size=2", "training.max_steps=6", *more]
    if stage == "sft":
        return run_sft(load_config(SFTConfig, overrides=shared)).folder
    if stage == "reward":
        return run_reward(load_config(RewardConfig, overrides=shared)).folder
    return run_dpo(load_config(DPOConfig, overrides=shared)).folder


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_poisoned_rows_are_skipped_and_told_about(
    tmp_path: Path, poisoned_base: Path, write_rows: WriteRows, stage: str
) -> None:
    rows: list[dict[str, str]] = demonstrations(12) if stage == "sft" else pairs(12)
    rows[4]["prompt"] += " very"
    held = write_rows(rows[:4])
    folder = run_stage(stage, poisoned_base, write_rows(rows), tmp_path, stage, f"data.validation_files={held}")
    lines = log_lines(folder)
    assert len(lines) == 6 and lines[-1]["train/skipped_steps"] == 1
    (bad,) = [line for line in lines if line["train/loss"] == "NaN"]
    (kept,) = (folder / "nonfinite").iterdir()
    assert kept.name == f"step_{bad['step']:06d}"
    report = json.loads((kept / "report.json").read_text(encoding="utf-8"))
    names = {
        "sft": "the output of LlamaModel.embed_tokens",
        "reward": "the output of LlamaModel.embed_tokens",
        "dpo": "tensor 0.1 of the batch",  # the reference could not read the word either
    }
    assert report["first_nonfinite"] == names[stage]
    assert len(load_file(kept / "batch.safetensors")) >= 4
    product = folder / ("reward_model" if stage == "reward" else "policy")
    for file in product.glob("*.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(file).values())
    sentences = (folder / "logs" / "train.log").read_text(encoding="utf-8")
    assert f"optimizer step {bad['step']} was skipped" in sentences


def test_a_stage_stops_with_a_good_checkpoint_and_goes_on_behind_the_bad_rows(
    tmp_path: Path, poisoned_base: Path, write_rows: WriteRows
) -> None:
    rows = demonstrations(12)
    for row in rows:
        row["prompt"] += " very"
    more = ("optimizer.max_nonfinite_steps=4", "data.validation_fraction=0")
    with pytest.raises(NonFiniteError, match=r"^4 optimizer steps in a row .* LlamaModel\.embed_tokens; ") as caught:
        run_stage("sft", poisoned_base, write_rows(rows), tmp_path, "run", *more)
    folder = tmp_path / "run"
    assert f"rlhf resume {folder}" in str(caught.value)
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert info["status"] == "failed" and "LlamaModel.embed_tokens" in info["error"]
    checkpoint = CheckpointStore(folder / "checkpoints").latest()
    assert checkpoint is not None and checkpoint.step == 4
    assert all(bool(tensor.isfinite().all()) for tensor in checkpoint.tensors("weights").values())
    resume_run(folder, lambda *_: None)  # two more steps, which are bad as well, but not four in a row
    assert [line["train/skipped_steps"] for line in log_lines(folder)] == [1, 2, 3, 4, 5, 6]
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "finished"


# ---------------------------------------------------------------- PPO


@pytest.fixture
def prompt_file(write_rows: WriteRows) -> Path:
    return write_rows([{"prompt": prompt} for prompt in prompts(12)])


def ppo_config(tmp_path: Path, base: Path, data: Path, *more: str) -> PPOConfig:
    shared = [
        f"policy={base}",
        f"data.train_files={data}",
        "data.validation_fraction=0",
        "rewards=[{name: target_string, arguments: {text: red}}]",
        "generation.max_new_tokens=4",
        "ppo.num_iterations=3",
        "ppo.rollout_batch_size=8",
        "ppo.num_ppo_epochs=2",
        "ppo.num_mini_batches=2",
        "ppo.target_kl=null",
        "kl.controller=adaptive",
        "optimizer.learning_rate=0.01",
    ]
    return load_config(PPOConfig, overrides=settings(tmp_path, "ppo", *shared, *more))


def failing_value_loss(bad_calls: set[int]) -> Callable[..., ClippedLoss]:
    """The value loss, no number at some of its calls; the look at a skipped step calls it once more."""
    calls = 0

    def loss(*arguments: Any) -> ClippedLoss:
        nonlocal calls
        calls += 1
        good = value_loss(*arguments)
        return ClippedLoss(good.loss * math.nan, good.clip_fraction) if calls in bad_calls else good

    return loss


def test_one_bad_update_of_ppo_spoils_neither_weights_nor_log(
    tmp_path: Path, base: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.recipes.ppo.value_loss", failing_value_loss({6, 7}))
    run = run_ppo(ppo_config(tmp_path, base, prompt_file))
    lines = log_lines(run.folder)
    assert [line["train/skipped_steps"] for line in lines] == [0, 1, 1]
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for line in lines for value in line.values())
    assert column(run.folder, "train/optimizer_steps") == [4, 8, 12]
    kept = load_file(run.folder / "nonfinite" / "step_000006" / "batch.safetensors")
    assert {"0.trajectory.response_ids_BR", "0.advantages_BR", "0.scores_B"} <= kept.keys()
    # The loss was added up outside any module, so the trainer's own word stands.
    report = json.loads((run.folder / "nonfinite" / "step_000006" / "report.json").read_text(encoding="utf-8"))
    assert report["first_nonfinite"] == "the loss (nan)"


def test_ppo_stops_inside_an_iteration_and_goes_on_there(
    tmp_path: Path, base: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("rlhf.recipes.ppo.value_loss", failing_value_loss(set(range(6, 100))))
        with pytest.raises(NonFiniteError, match="2 optimizer steps in a row were not finite, first in the loss"):
            run_ppo(ppo_config(tmp_path, base, prompt_file, "optimizer.max_nonfinite_steps=2"))
    folder = tmp_path / "ppo"
    checkpoint = CheckpointStore(folder / "checkpoints").latest()
    assert checkpoint is not None and (checkpoint.step, checkpoint.part) == (1, 3)
    assert "rollout" in checkpoint.names
    assert len(log_lines(folder)) == 1
    resume_run(folder, lambda *_: None)
    assert column(folder, "train/skipped_steps") == [0, 2, 2]
    assert column(folder, "train/updates_this_iteration") == [4, 4, 4]


def test_a_kl_that_is_no_number_does_not_stay_in_the_controller(
    tmp_path: Path, base: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Reference.logprobs, 0

    def logprobs(reference: Reference, *arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(reference, *arguments) * (math.nan if calls == 2 else 1.0)

    monkeypatch.setattr(Reference, "logprobs", logprobs)
    run = run_ppo(ppo_config(tmp_path, base, prompt_file, "optimizer.max_nonfinite_steps=5", "kl.target=0.1"))
    first, second, third = log_lines(run.folder)
    assert second["kl/mean"] == "NaN" and second["train/skipped_steps"] == 4
    assert second["kl/coefficient"] == first["kl/coefficient"]
    assert third["train/skipped_steps"] == 4 and third["kl/coefficient"] != second["kl/coefficient"]
    report = json.loads((run.folder / "nonfinite" / "step_000005" / "report.json").read_text(encoding="utf-8"))
    assert report["first_nonfinite"] == "tensor 0.reference_logprobs_BR of the batch"


def test_divergence_is_measured_at_its_largest(tmp_path: Path, base: Path, prompt_file: Path) -> None:
    run = run_ppo(ppo_config(tmp_path, base, prompt_file, "ppo.max_tokens_per_micro_batch=20"))
    for line in log_lines(run.folder):
        assert 0 < line["policy/ratio_deviation"] < line["policy/ratio_deviation_max"]
        assert line["policy/logprob_gap"] <= line["policy/logprob_gap_max"] < 1e-4
        assert line["policy/clamped_share"] == 0
        assert line["reward/min"] <= line["reward/mean"] <= line["reward/max"]
        assert 0 <= line["reward/outlier_share"] <= 1 and 0 <= line["reward/clipped_share"] <= 1
        assert line["kl/clamped_share"] == 0
