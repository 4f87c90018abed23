"""GRPO against a reward for length: the watch sees it, stops the run, and a clean reward stays clean."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from toy_runs import interrupt_after, settings

from rlhf.infra.config import load_config
from rlhf.infra.experiment import Run
from rlhf.infra.interrupt import Stopped
from rlhf.recipes.grpo import run_grpo
from rlhf.recipes.grpo_config import GRPOConfig
from rlhf.recipes.resume import resume_run

pytestmark = pytest.mark.slow


def wordy(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward for length, and nothing else."""
    return [len(text.split()) / 20 for text in completions]


def trained(folder: Path, iterations: int, *more: str) -> Run:
    shared = [
        f"rewards=[{{name: '{__name__}:wordy'}}]",
        f"grpo.num_iterations={iterations}",
        "grpo.num_prompts=8",
        "grpo.num_generations=4",
        "generation.max_new_tokens=48",
        "kl.coefficient=0",
        "optimizer.learning_rate=0.003",
        "data.max_samples=64",
        "hacking.num_held_out=8",
        "hacking.refusal=null",  # eight prompts an iteration hold now more, now fewer that ought to be refused
    ]
    return run_grpo(load_config(GRPOConfig, overrides=settings(folder, "grpo", *shared, *more)))


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "hacking.json").read_text())
    return found


def test_a_policy_that_lengthens_is_stopped(tmp_path: Path) -> None:
    run = trained(tmp_path, 20, "hacking.every=4", "hacking.action=stop")
    found = record(run.folder)
    assert "length" in {verdict["sign"] for verdict in found["verdicts"] if verdict["caught"]}
    assert run.info["stop_reason"] == "reward_hacking"
    looks = found["looks"]
    assert looks[-1]["step"] < 20 and [look["step"] for look in looks[:-1]] == [1, 4, 8, 12, 16][: len(looks) - 1]
    # Of every answer of every group, and of the held-out prompts.
    assert all(look["figures"]["length"]["num"] == 32 for look in looks)
    assert all(look["figures"]["held_out_reward"]["num"] == 8 for look in looks)
    assert (run.folder / "hacking.png").is_file() and (run.folder / "policy").is_dir()


def test_a_run_taken_up_again_has_seen_what_it_would_have_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(tmp_path / "whole", 3, "hacking.every=1")
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(Run, "should_stop", interrupt_after(2))
        trained(tmp_path, 3, "hacking.every=1")
    resume_run(tmp_path / "grpo", lambda *_: None)
    assert [look["step"] for look in record(whole.folder)["looks"]] == [1, 2, 3]
    assert record(tmp_path / "grpo") == record(whole.folder)
