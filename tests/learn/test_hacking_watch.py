"""PPO against rewards that can be gamed: the watch sees it, and does what it is told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rlhf.infra.config import load_config
from rlhf.infra.experiment import Run
from rlhf.recipes.ppo import run_ppo
from rlhf.recipes.ppo_config import PPOConfig


def wordy(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward for length, and nothing else."""
    return [len(text.split()) / 20 for text in completions]


def nothing(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward that is the same for every answer."""
    return [0.0] * len(completions)


def trained(folder: Path, reward: str, iterations: int, *more: str) -> Run:
    settings = [
        f"run.output_dir={folder}",
        "run.name=ppo",
        f"rewards=[{{name: '{__name__}:{reward}'}}]",
        f"ppo.num_iterations={iterations}",
        "ppo.rollout_batch_size=32",
        "ppo.target_kl=null",
        "generation.max_new_tokens=48",
        "kl.coefficient=0.0",
        "optimizer.learning_rate=0.003",
        "data.max_samples=256",
        "hacking.num_held_out=16",
        *more,
    ]
    return run_ppo(load_config(PPOConfig, overrides=settings))


def record(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.folder / "hacking.json").read_text())
    return found


def caught(run: Run) -> set[str]:
    return {verdict["sign"] for verdict in record(run)["verdicts"] if verdict["caught"]}


@pytest.mark.slow
def test_a_policy_that_lengthens_is_stopped_and_its_clean_weights_come_back(tmp_path: Path) -> None:
    run = trained(tmp_path, "wordy", 24, "hacking.every=4", "hacking.action=rollback")
    assert "length" in caught(run)
    assert run.info["stop_reason"] == "reward_hacking"
    looks = [look["step"] for look in record(run)["looks"]]
    assert looks[-1] < 24
    clean = json.loads((run.folder / "clean" / "look.json").read_text())
    assert clean["iteration"] == looks[-2]
    kept = load_file(run.folder / "clean" / "weights.safetensors")
    saved = load_file(run.folder / "policy" / "adapter_model.safetensors")
    sums = sorted(round(float(tensor.double().sum()), 4) for name, tensor in kept.items() if "lora" in name)
    assert sums == sorted(round(float(tensor.double().sum()), 4) for tensor in saved.values())
    assert (run.folder / "hacking.png").is_file()


@pytest.mark.slow
def test_a_reward_that_cannot_be_gamed_leaves_a_clean_record(tmp_path: Path) -> None:
    run = trained(tmp_path, "nothing", 6, "hacking.every=2", "hacking.action=stop", "optimizer.learning_rate=1e-5")
    assert caught(run) == set()
    assert run.info["stop_reason"] is None
    assert [look["step"] for look in record(run)["looks"]] == [1, 2, 4, 6]
    signs = {verdict["sign"] for verdict in record(run)["verdicts"]}
    assert {"length", "repetition", "formatting", "flattery", "refusal", "entropy", "kl", "gold"} <= signs


@pytest.mark.slow
def test_warning_goes_on_to_the_end_and_nothing_is_looked_at_where_that_is_asked_for(tmp_path: Path) -> None:
    run = trained(tmp_path, "wordy", 2, "hacking.every=1", "hacking.kl=0.000001", "hacking.length=null")
    assert run.info["stop_reason"] is None
    quiet = trained(tmp_path / "quiet", "wordy", 2, "hacking.num_held_out=null", "hacking.every=null")
    assert not (quiet.folder / "hacking.json").exists()
