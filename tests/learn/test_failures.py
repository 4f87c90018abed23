"""What breaks PPO shows in its logs: the damages of `scripts/break_ppo.py` on a toy, beside a sound run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from toy_runs import WriteRows, log_lines, mean, prompts, settings

from rlhf.infra.config import load_config
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.updates import MAX_LOGPROB_GAP

SCRIPT = Path(__file__).parents[2] / "scripts" / "break_ppo.py"
pytestmark = pytest.mark.slow
Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("break_ppo", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def broken(script: ModuleType, base: Path, write_rows: WriteRows, tmp_path: Path, name: str, *more: str) -> Lines:
    """The log of a toy run with the damage of that name."""
    rows = write_rows([{"prompt": prompt} for prompt in prompts(24)])
    texts = [f"policy={base}", f"data.train_files={rows}", "data.validation_fraction=0", "generation.max_new_tokens=6"]
    texts += ["ppo.num_iterations=5", "ppo.rollout_batch_size=32", "ppo.num_mini_batches=2", "ppo.num_ppo_epochs=2"]
    texts += ["optimizer.learning_rate=0.01", "optimizer.lr_scheduler_type=constant", "model.lora.r=8"]
    texts += ["rewards=[{name: target_string, arguments: {text: red}}]", *more]
    script.broken(load_config(PPOConfig, overrides=settings(tmp_path, name, *texts)), script.BREAKS[name][1])
    return log_lines(tmp_path / name)


@pytest.fixture
def sound(script: ModuleType, base: Path, write_rows: WriteRows, tmp_path: Path) -> Lines:
    return broken(script, base, write_rows, tmp_path, "sound")


def test_dropout_moves_the_first_ratio_and_recomputing_does_not_cure_it(
    script: ModuleType, base: Path, write_rows: WriteRows, tmp_path: Path, sound: Lines
) -> None:
    assert max(line["policy/logprob_gap"] for line in sound) < 1e-4
    found = broken(script, base, write_rows, tmp_path, "dropout")
    assert min(line["policy/logprob_gap"] for line in found) > MAX_LOGPROB_GAP
    said = "log-probs of generation and training differ"
    assert said in (tmp_path / "dropout" / "logs" / "train.log").read_text(encoding="utf-8")
    assert said not in (tmp_path / "sound" / "logs" / "train.log").read_text(encoding="utf-8")


def test_a_broken_critic_explains_less_than_nothing(
    script: ModuleType, base: Path, write_rows: WriteRows, tmp_path: Path, sound: Lines
) -> None:
    assert min(line["value/explained_variance"] for line in sound) > -0.5
    found = broken(script, base, write_rows, tmp_path, "value_head")
    assert max(line["value/explained_variance"] for line in found) < -0.5
    assert mean([line["value/loss"] for line in found]) > 5 * mean([line["value/loss"] for line in sound])


def test_steps_that_are_too_large_end_the_inner_epochs(
    script: ModuleType, base: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    small = broken(script, base, write_rows, tmp_path, "sound", "optimizer.learning_rate=0.001")
    large = broken(script, base, write_rows, tmp_path, "learning_rate", "optimizer.learning_rate=0.01")
    assert [line["train/updates_this_iteration"] for line in small] == [4] * 5
    assert min(line["train/updates_this_iteration"] for line in large) < 4
    assert max(line["policy/kl_old_new"] for line in small) < 0.02 < max(line["policy/kl_old_new"] for line in large)
