"""An ensemble learns as its members would alone, knows where it is unsure, resumes bit for bit and serves PPO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import WriteRows, column, interrupt_after, log_lines, pairs, prompts, settings

from rlhf.infra.config import Config, load_config
from rlhf.infra.experiment import Run
from rlhf.infra.interrupt import Stopped
from rlhf.models.reward_model import RewardEnsemble, load_reward_model
from rlhf.recipes.best_of_n import run_best_of_n
from rlhf.recipes.best_of_n_config import BestOfNConfig
from rlhf.recipes.doctor import run_doctor
from rlhf.recipes.evaluate import run_evaluation
from rlhf.recipes.evaluate_config import EvaluateConfig
from rlhf.recipes.grpo import run_grpo
from rlhf.recipes.grpo_config import GRPOConfig
from rlhf.recipes.ppo import run_ppo
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.resume import config_class, resume_run
from rlhf.recipes.reward import RewardConfig, run_reward
from rlhf.recipes.reward_report import RewardReportConfig, run_reward_report
from rlhf.rewards.learned import LearnedReward

pytestmark = pytest.mark.slow
ConfigT = TypeVar("ConfigT", bound=Config)


def reward(tmp_path: Path, base: Path, data: Path, name: str, *more: str) -> Run:
    shared = settings(tmp_path, name, f"backbone={base}", f"data.train_files={data}", "data.min_length=1")
    return run_reward(load_config(RewardConfig, overrides=[*shared, "model.lora.r=4", *more]))


def test_members_learn_and_differ_where_they_know_nothing(tmp_path: Path, base: Path, write_rows: WriteRows) -> None:
    run = reward(
        tmp_path,
        base,
        write_rows(pairs(96)),
        "reward",
        f"data.validation_files={write_rows(pairs(40, seed=1))}",
        "reward.ensemble.members=3",
        "training.num_train_epochs=12",
        "optimizer.learning_rate=0.01",
    )
    assert column(run.folder, "validation/accuracy")[-1] > 0.95
    assert all(column(run.folder, f"validation/accuracy_member_{k}")[-1] > 0.9 for k in range(3))
    report = json.loads((run.folder / "reward_report.json").read_text(encoding="utf-8"))
    assert report["accuracy"]["estimate"] > 0.95 and len(report["ensemble"]["accuracies"]) == 3
    assert report["ensemble"]["disagreement"]["of_scores"] > 0
    model = load_reward_model(str(run.folder / "reward_model"))
    assert isinstance(model, RewardEnsemble)
    learned = LearnedReward(model)
    known, details = learned.detailed(["one red cat"] * 2, ["good dog", "bad dog"])
    assert known[0] > known[1] + 0.5
    # Words that no pair held: the members have not been told what to think of them.
    _, strange = learned.detailed(["one red cat"] * 3, ["very very very", "white horse four five", "is not the small"])
    assert min(strange["disagreement"]) > max(details["disagreement"])


def test_a_member_is_the_model_that_its_seed_alone_makes(tmp_path: Path, base: Path, write_rows: WriteRows) -> None:
    more = ("training.per_device_train_batch_size=5", "optimizer.learning_rate=0.01", "data.validation_fraction=0")
    data = write_rows(pairs(24))
    ensemble = reward(tmp_path, base, data, "ensemble", "reward.ensemble.members=2", *more)
    single = reward(tmp_path, base, data, "single", *more)
    folders = [ensemble.folder / "reward_model" / f"member_{k}" for k in range(2)]
    for file in ("adapter_model.safetensors", "reward_head.safetensors"):
        first, second = (load_file(folder / file) for folder in folders)
        alone = load_file(single.folder / "reward_model" / file)
        assert all(torch.equal(first[name], tensor) for name, tensor in alone.items())
        assert not any(torch.equal(second[name], tensor) for name, tensor in alone.items())


def test_an_interrupted_ensemble_ends_as_an_uninterrupted_one(
    tmp_path: Path, base: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(pairs(24))
    more = (
        "reward.ensemble.members=2",
        "reward.ensemble.rule=penalised",
        "training.per_device_train_batch_size=5",
        "training.num_train_epochs=2",
        "training.eval_steps=2",
        "optimizer.learning_rate=0.01",
        "data.validation_fraction=0.2",
        "model.lora.lora_dropout=0.3",
    )
    straight = reward(tmp_path, base, data, "straight", *more)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "should_stop", interrupt_after(3))
        with pytest.raises(Stopped):
            reward(tmp_path, base, data, "stopped", *more)
    resumed = resume_run(tmp_path / "stopped", lambda *_: None)
    assert resumed is not None
    assert log_lines(resumed.folder) == log_lines(straight.folder)
    for k in range(2):
        for file in ("adapter_model.safetensors", "reward_head.safetensors"):
            place = Path("reward_model") / f"member_{k}" / file
            wanted, found = load_file(straight.folder / place), load_file(resumed.folder / place)
            assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.fixture
def judges(tmp_path: Path, base: Path, write_rows: WriteRows) -> Path:
    more = ("training.num_train_epochs=4", "optimizer.learning_rate=0.01")
    return reward(tmp_path, base, write_rows(pairs(48)), "judges", "reward.ensemble.members=2", *more).folder


def test_ppo_climbs_an_ensemble_logs_its_disagreement_and_resumes(
    tmp_path: Path, base: Path, judges: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows([{"prompt": prompt} for prompt in prompts(24)])

    def ppo(name: str) -> Run:
        more = [
            f"policy={base}",
            "reward_model=judges",
            "rewards=[{name: model, rule: penalised, penalty: 0.2}]",
            f"data.train_files={rows}",
            "generation.max_new_tokens=4",
            "ppo.num_iterations=8",
            "ppo.rollout_batch_size=32",
            "optimizer.learning_rate=0.02",
            "kl.coefficient=0.01",
            "shaping.missing_eos_penalty=0",
        ]
        return run_ppo(load_config(PPOConfig, overrides=settings(tmp_path, name, *more)))

    straight = ppo("straight")
    scores = column(straight.folder, "reward/mean")
    assert scores[-1] > scores[0] + 0.3
    apart = column(straight.folder, "reward/detail/model/disagreement")
    assert len(apart) == 8 and all(value > 0 for value in apart)
    first = log_lines(straight.folder)[0]
    of_members = [first[f"reward/detail/model/member_{k}"] for k in range(2)]
    assert first["reward/term/model"] < sum(of_members) / 2  # the variance was subtracted
    assert set(json.loads((straight.folder / "run.json").read_text())["fingerprints"]) == {"policy", "reward_model"}
    with monkeypatch.context() as patch:
        patch.setattr(Run, "should_stop", interrupt_after(3))
        with pytest.raises(Stopped):
            ppo("stopped")
    resumed = resume_run(tmp_path / "stopped", lambda *_: None)
    assert resumed is not None and log_lines(resumed.folder) == log_lines(straight.folder)


def test_grpo_takes_an_ensemble_as_it_is(tmp_path: Path, base: Path, judges: Path, write_rows: WriteRows) -> None:
    rows = write_rows([{"prompt": prompt} for prompt in prompts(24)])
    more = [
        f"policy={base}",
        f"reward_model={judges / 'reward_model'}",
        f"data.train_files={rows}",
        "generation.max_new_tokens=4",
        "grpo.num_iterations=2",
        "grpo.num_prompts=4",
    ]
    run = run_grpo(load_config(GRPOConfig, overrides=settings(tmp_path, "grpo", *more)))
    assert len(column(run.folder, "reward/detail/model/disagreement")) == 2


def test_whoever_takes_a_reward_model_takes_an_ensemble(
    tmp_path: Path, base: Path, judges: Path, write_rows: WriteRows
) -> None:
    # An evaluation asks for pairs of ten tokens or more.
    rows = write_rows([row | {"prompt": f"{row['prompt']} {row['prompt']} {row['prompt']}"} for row in pairs(24)])

    def config(cls: type[ConfigT], name: str, *more: str) -> ConfigT:
        shared = [f"data.train_files={rows}", "reward_model=judges", *more]
        return load_config(cls, overrides=settings(tmp_path, name, *shared))

    short = "generation.max_new_tokens=4"
    run, _ = run_evaluation(config(EvaluateConfig, "eval", f"models={{base: {base}}}", short))
    assert json.loads((run.folder / "report.json").read_text(encoding="utf-8"))["reward_model"]["num_pairs"] > 0
    _, report = run_reward_report(config(RewardReportConfig, "report", "data.min_length=1", "num_planted=4"))
    assert report.model["kind"] == "ensemble of 2, rule mean"
    assert report.accuracy.accuracy.estimate > 0.9
    assert report.padding.right < 1e-4 and report.padding.left is not None and report.padding.left < 1e-4
    worst = ["best_of_n.num_answers=4", "rewards=[{name: model, rule: worst}]", f"policy={base}", short]
    run = run_best_of_n(config(BestOfNConfig, "best", *worst))
    assert len((run.folder / "best.jsonl").read_text(encoding="utf-8").splitlines()) > 0


@pytest.mark.parametrize("recipe", ["rm", "ppo"])
def test_the_doctor_examines_an_ensemble(
    tmp_path: Path, base: Path, judges: Path, write_rows: WriteRows, recipe: str
) -> None:
    rows = write_rows(pairs(24))
    if recipe == "rm":
        more = [f"backbone={base}", "reward.ensemble.members=2", "data.min_length=1", "model.lora.r=4"]
    else:
        term = "{name: careful, model: judges, rule: penalised}"
        more = [f"policy={base}", f"rewards=[{term}, {{name: model}}]", "reward_model=judges"]
        more += ["generation.max_new_tokens=4"]
    shared = settings(tmp_path, "run", f"data.train_files={rows}", *more)
    found = run_doctor(recipe, load_config(config_class(recipe), overrides=shared)).findings
    heads = [one.finding for one in found if one.finding.id in ("V8", "V9")]
    assert len(heads) == (2 if recipe == "rm" else 4)
    assert all(finding.level == "green" for finding in heads), [finding.seen for finding in heads]
