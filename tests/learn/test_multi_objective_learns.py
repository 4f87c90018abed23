"""Two reward models, each trained on its own subset of one file, pull a policy as their weights say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toy_runs import WriteRows, column, interrupt_after, log_lines, pairs, prompts, settings

from rlhf.infra.config import load_config
from rlhf.infra.experiment import Run
from rlhf.infra.interrupt import Stopped
from rlhf.recipes.ppo import run_ppo
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.resume import resume_run
from rlhf.recipes.reward import RewardConfig, run_reward

pytestmark = pytest.mark.slow


def opposed(count: int) -> list[dict[str, Any]]:
    """Half of the raters prefer "good" to "bad", the other half the other way round: no answer pleases both."""
    rows: list[dict[str, Any]] = [{**row, "subset": "helpful"} for row in pairs(count)]
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs(count, seed=1)]
    return rows + [{**row, "subset": "harmless"} for row in turned]


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """Both reward models, by the names of their subsets."""
    folder = tmp_path_factory.mktemp("heads")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in opposed(64)), encoding="utf-8")
    for subset in ("helpful", "harmless"):
        more = [f"backbone={base}", f"data.train_files={folder / 'rows.jsonl'}", f"data.where={{subset: {subset}}}"]
        more += ["model.lora.r=4", "training.num_train_epochs=10", "optimizer.learning_rate=0.01", "data.min_length=1"]
        run = run_reward(load_config(RewardConfig, overrides=settings(folder, subset, *more)))
        # Of both subsets together nothing could be learnt.
        assert column(run.folder, "validation/accuracy")[-1] > 0.9
    return folder


def ppo(heads: Path, base: Path, name: str, data: Path, *more: str, helpful: float = 0.5) -> Run:
    weights = {"helpful": helpful, "harmless": 1 - helpful}
    terms = ", ".join(f"{{name: {term}, model: {term}, weight: {weight}}}" for term, weight in weights.items())
    shared = [
        f"policy={base}",
        f"rewards=[{terms}]",
        f"data.train_files={data}",
        "generation.max_new_tokens=3",
        "ppo.num_iterations=8",
        "ppo.rollout_batch_size=32",
        "optimizer.learning_rate=0.02",
        "shaping.missing_eos_penalty=0",
        "kl.coefficient=0.01",
    ]
    return run_ppo(load_config(PPOConfig, overrides=settings(heads, name, *shared, *more)))


def change(run: Run, term: str) -> float:
    values = column(run.folder, f"reward/term/{term}")
    return values[-1] - values[0]


def test_the_weight_decides_which_of_two_aims_is_served(heads: Path, base: Path, write_rows: WriteRows) -> None:
    data = write_rows([{"prompt": prompt} for prompt in prompts(24)])
    first, second = (ppo(heads, base, f"weight_{weight}", data, helpful=weight) for weight in (0.9, 0.1))
    assert change(first, "helpful") > 0.2 > change(first, "harmless")
    assert change(second, "harmless") > 0.2 > change(second, "helpful")
    found = json.loads((first.folder / "run.json").read_text(encoding="utf-8"))
    assert found["lineage"] == {
        "policy": str(base),
        "reward_model_helpful": "helpful",
        "reward_model_harmless": "harmless",
    }
    assert len(set(found["fingerprints"].values())) == 3


def test_a_gate_is_logged_and_an_interrupted_run_ends_as_an_uninterrupted_one(
    heads: Path, base: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    subsets = ["harmless", "helpful", "helpful", "helpful"] * 6
    rows = [{"prompt": prompt, "subset": subset} for prompt, subset in zip(prompts(24), subsets, strict=True)]
    more = ["combination.rule=gate", "combination.gate=harmless", "combination.always={subset: harmless}"]
    more += ["combination.threshold=-9", "ppo.num_iterations=3", "data.validation_fraction=0"]
    data = write_rows(rows)
    straight = ppo(heads, base, "straight", data, *more)
    closed = column(straight.folder, "reward/detail/harmless/closed")
    assert sum(closed) / 3 == pytest.approx(0.25, abs=0.05)  # the prompts of that subset, 4 epochs of 24
    with monkeypatch.context() as patch:
        patch.setattr(Run, "should_stop", interrupt_after(2))
        with pytest.raises(Stopped):
            ppo(heads, base, "stopped", data, *more)
    resumed = resume_run(heads / "stopped", lambda *_: None)
    assert resumed is not None and log_lines(resumed.folder) == log_lines(straight.folder)
