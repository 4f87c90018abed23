"""GRPO with rewards that verify, on the bundled model: problems it cannot solve, and sums that it sometimes can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.data.tinychat.rows import prompt_rows
from rlhf.infra.config import load_config
from rlhf.recipes.grpo import run_grpo
from rlhf.recipes.grpo_config import GRPOConfig

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl.gz"
pytestmark = pytest.mark.slow


def log_of(tmp_path: Path, *more: str) -> list[dict[str, float]]:
    shared = [f"run.output_dir={tmp_path}", "run.name=grpo", "run.device=cpu", "run.num_threads=1", "policy=tinychat"]
    shared += ["model.attn_implementation=eager", "optimizer.learning_rate=0.003", "data.validation_fraction=0"]
    run = run_grpo(load_config(GRPOConfig, overrides=[*shared, *more]))
    return [json.loads(line) for line in (run.folder / "logs" / "train.jsonl").read_text(encoding="utf-8").splitlines()]


def test_gsm8k_is_read_as_it_is_and_a_model_that_solves_nothing_learns_nothing(tmp_path: Path) -> None:
    if not GSM8K.is_file():
        pytest.skip("GSM8K is not beside the repository")
    size = ["grpo.num_iterations=3", "grpo.num_prompts=4", "grpo.num_generations=4", "grpo.max_sampling_rounds=2"]
    data = [f"data.train_files=[{GSM8K}]", "data.max_prompt_length=400", "generation.max_new_tokens=48"]
    lines = log_of(tmp_path, *size, *data, "rewards=[{name: math_answer}]", "data.max_samples=300")
    for line in lines:
        # By luck a last number may be right now and then; whole groups of equal scores are what there is.
        assert line["grpo/sampled_reward_mean"] < 0.1
        assert line["grpo/groups_without_variance"] >= 6
        assert line["grpo/groups_sampled"] == 8 and line["grpo/sampling_rounds"] == 2


def test_code_of_the_built_in_world_is_run_and_learnt(tmp_path: Path) -> None:
    rows = prompt_rows("train", 400, seed=0, families=["code"])
    path = tmp_path / "code.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    size = ["grpo.num_iterations=12", "grpo.num_prompts=8", "grpo.num_generations=8", "grpo.num_mini_batches=2"]
    rewards = "rewards=[{name: code_tests, arguments: {column: task.spec}}]"
    lines = log_of(tmp_path, *size, f"data.train_files=[{path}]", rewards, "grpo.max_tokens_per_micro_batch=2048")
    passed = [line["reward/mean"] for line in lines]
    assert sum(passed[-4:]) / 4 > sum(passed[:4]) / 4 + 0.1


def test_sums_of_the_built_in_world_are_verified_and_learnt(tmp_path: Path) -> None:
    rows = prompt_rows("train", 400, seed=0, families=["arithmetic"])
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    size = ["grpo.num_iterations=16", "grpo.num_prompts=8", "grpo.num_generations=8", "grpo.num_mini_batches=2"]
    rewards = "rewards=[{name: math_answer, arguments: {column: task.spec.answer}}, {name: marked_answer, weight: 0.2}]"
    lines = log_of(tmp_path, *size, f"data.train_files=[{path}]", rewards, "grpo.max_tokens_per_micro_batch=2048")
    right = [line["reward/term/math_answer"] for line in lines]
    assert sum(right[-4:]) / 4 > sum(right[:4]) / 4 + 0.1
    assert any(0 < line["grpo/groups_without_variance"] < 8 for line in lines)
