"""Rewards of steps in PPO and GRPO: a process reward model that is obeyed, and runs that resume bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_process_rewards_learn import solutions
from toy_runs import WriteRows, column, interrupt_after, log_lines, mean, prompts, settings

from rlhf.infra.config import load_config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run
from rlhf.infra.interrupt import Stopped
from rlhf.recipes.grpo import run_grpo
from rlhf.recipes.grpo_config import GRPOConfig
from rlhf.recipes.ppo import run_ppo
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.prm import ProcessRewardConfig, run_prm
from rlhf.recipes.resume import resume_run

SPLIT = "split: ' (?=red |green |blue |black )'"


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A model of steps that finds every step with "bad" in it wrong."""
    import json

    folder = tmp_path_factory.mktemp("judge")
    file = folder / "steps.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in solutions(96)))
    overrides = settings(
        folder, "prm", f"backbone={base}", f"data.train_files={file}", "data.validation_fraction=0",
        "data.separator=<end>", "training.num_train_epochs=10", "optimizer.learning_rate=0.01", "model.lora.r=4",
    )  # fmt: skip
    return run_prm(load_config(ProcessRewardConfig, overrides=overrides)).folder


def online(kind: str, tmp_path: Path, base: Path, judge: Path, data: Path, name: str, *more: str) -> Any:
    shared = settings(
        tmp_path, name, f"policy={base}", f"process_model={judge}", f"data.train_files={data}",
        "data.validation_fraction=0", "generation.max_new_tokens=8", "optimizer.learning_rate=0.01",
        "optimizer.lr_scheduler_type=constant", "model.lora.r=8", "kl.coefficient=0.01",
        "shaping.missing_eos_penalty=0",
    )  # fmt: skip
    if kind == "ppo":
        return load_config(PPOConfig, overrides=[*shared, "ppo.rollout_batch_size=48", *more])
    return load_config(GRPOConfig, overrides=[*shared, "grpo.num_prompts=8", "grpo.num_generations=6", *more])


@pytest.fixture
def prompt_file(write_rows: WriteRows) -> Path:
    return write_rows([{"prompt": prompt} for prompt in prompts(24)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("ppo", f"{{per_step: change, {SPLIT}}}"),
        ("ppo", f"{{per_step: log_probability, {SPLIT}}}"),
        ("grpo", f"{{per_step: probability, {SPLIT}}}"),
        ("grpo", f"{{aggregation: min, {SPLIT}}}"),
    ],
)
def test_the_judge_of_steps_is_obeyed(
    tmp_path: Path, base: Path, judge: Path, prompt_file: Path, kind: str, arguments: str
) -> None:
    rewards = f"rewards=[{{name: process, arguments: {arguments}}}]"
    config = online(kind, tmp_path, base, judge, prompt_file, "run", rewards, f"{kind}.num_iterations=12")
    run = run_ppo(config) if kind == "ppo" else run_grpo(config)
    found = column(run.folder, "reward/mean")
    assert mean(found[-3:]) > mean(found[:3]) + 0.1
    last = log_lines(run.folder)[-1]
    if "per_step" in arguments:
        assert last["reward/steps"] >= 1
        assert last["reward/term/process"] == pytest.approx(last["reward/mean"], abs=1e-5)
    else:
        assert "reward/steps" not in last


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_resumed_inside_an_iteration_it_changes_no_bit(
    tmp_path: Path, base: Path, judge: Path, prompt_file: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs = "ppo.num_ppo_epochs=3" if kind == "ppo" else "grpo.num_epochs=3"
    more = (f"{kind}.num_iterations=3", epochs, f"{kind}.save_every_updates=1", f"{kind}.target_kl=null")
    both = "{name: target_string, arguments: {text: red}}"
    more += (f"rewards=[{{name: process, weight: 0.5, arguments: {{per_step: change, {SPLIT}}}}}, {both}]",)
    if kind == "grpo":
        more += ("grpo.max_sampling_rounds=3",)
    start = run_ppo if kind == "ppo" else run_grpo
    straight = start(online(kind, tmp_path, base, judge, prompt_file, "straight", *more))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "should_stop", interrupt_after(3))
        with pytest.raises(Stopped):
            start(online(kind, tmp_path, base, judge, prompt_file, "stopped", *more))
    folder = tmp_path / "stopped"
    resume_run(folder, lambda *_: None)
    assert log_lines(folder) == log_lines(straight.folder)
    wanted, got = (load_file(one / "policy" / "adapter_model.safetensors") for one in (straight.folder, folder))
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


@pytest.mark.parametrize(
    ("kind", "settings_", "words"),
    [
        ("ppo", ("rewards=[{name: process, arguments: {per_step: change}}]", "shaping.clip=1"), "paid step by step"),
        ("ppo", ("rewards=[{name: process, arguments: {per_step: often}}]",), "'probability', 'log_probability' or"),
        ("ppo", ("rewards=[{name: target_string, arguments: {text: red}}]",), "no term of `rewards` is called process"),
        (
            "grpo",
            ("rewards=[{name: process, arguments: {per_step: change}}]", "kl.place=reward", "kl.coefficient=0.1"),
            "add a reward that is paid once per answer",
        ),
    ],
)
def test_settings_without_effect_or_sense_are_refused(
    tmp_path: Path, kind: str, settings_: tuple[str, ...], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        online(kind, tmp_path, Path("base"), Path("judge"), Path("prompts.jsonl"), "run", *settings_)
