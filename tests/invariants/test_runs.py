"""Checklist C: checkpoints, adapters, config. Runs that are killed are in tests/integration/test_kill_anywhere.py."""

from __future__ import annotations

import difflib
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import SHAPES, Shape, backbone_of, ppo_on, read_log
from pydantic import BaseModel

from rlhf.infra.checkpoint import CheckpointStore
from rlhf.infra.config import Config, load_config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run
from rlhf.models.policy import Policy
from rlhf.recipes.dpo import DPOConfig
from rlhf.recipes.evaluate_config import EvaluateConfig
from rlhf.recipes.grpo_config import GRPOConfig
from rlhf.recipes.kto import KTOConfig
from rlhf.recipes.online_dpo_config import OnlineDPOConfig
from rlhf.recipes.pairs_config import PairsConfig
from rlhf.recipes.pipeline import PipelineConfig
from rlhf.recipes.ppo import PPO
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.pretrain import PretrainConfig
from rlhf.recipes.reward import RewardConfig
from rlhf.recipes.sft import SFTConfig

# Everything that can be lost: several epochs and mini-batches, an adaptive controller, running moments, a critic.
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"num_iterations": 4, "rollout_batch_size": 6, "num_mini_batches": 2, "num_ppo_epochs": 2},
    "kl": {"controller": "adaptive", "target": 0.01, "horizon": 100.0, "coefficient": 0.2},
}


@pytest.fixture(scope="module", params=SHAPES)
def twice(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PPO, PPO, PPO]:
    """The same PPO without a break, until it was interrupted after two of four iterations, and taken up again."""
    folder = tmp_path_factory.mktemp("runs")
    straight = ppo_on(folder, backbone_of(request.param), "straight", **SETTINGS)
    with straight.run:
        straight.train()
    stopped = ppo_on(folder, backbone_of(request.param), "stopped", **SETTINGS)
    with stopped.run, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "should_stop", lambda run: stopped.progress.step == 2)
        stopped.train()
    resumed = ppo_on(folder, backbone_of(request.param), "stopped", run=Run.open(folder / "stopped"), **SETTINGS)
    with resumed.run:
        resumed.train()
    return straight, stopped, resumed


def test_C3_a_checkpoint_holds_everything_that_trains(twice: tuple[PPO, PPO, PPO]) -> None:
    straight, *_ = twice
    checkpoint = straight.run.checkpoints.latest()
    assert checkpoint is not None and checkpoint.step == 4
    weights, moments = checkpoint.tensors("weights"), checkpoint.tensors("optimizer")
    trainable = straight.policy.trainable_parameters()
    assert weights.keys() == trainable.keys() and any("value_head" in name for name in weights)
    assert all(torch.equal(weights[name], p) for name, p in trainable.items())
    assert all(bool(tensor.isfinite().all()) for tensor in moments.values())
    assert len(moments) >= 2 * len(trainable)  # both moments of every parameter
    assert checkpoint.state["kl_coefficient"] == straight.progress.kl.coefficient != 0.2


def test_C1_C3_P10_a_resumed_run_ends_at_the_same_weights_with_the_same_log(twice: tuple[PPO, PPO, PPO]) -> None:
    straight, stopped, resumed = twice
    assert (stopped.progress.step, resumed.progress.step) == (2, 4)
    wanted, found = straight.policy.trainable_parameters(), resumed.policy.trainable_parameters()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    log = read_log(resumed.run.folder)
    assert log == read_log(straight.run.folder)
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert log[3]["kl/mean"] != log[2]["kl/mean"]  # measured against the reference of the start, at weights that moved


def test_V7_running_moments_and_controller_survive(twice: tuple[PPO, PPO, PPO]) -> None:
    straight, _, resumed = twice
    assert asdict(resumed.progress.moments) == asdict(straight.progress.moments)
    assert straight.progress.moments.count == 4 * 6 and straight.progress.moments.std != 1.0
    assert resumed.progress.kl == straight.progress.kl
    assert (resumed.progress.tokens, resumed.progress.first_length) == (
        straight.progress.tokens,
        straight.progress.first_length,
    )


def test_C8_a_resumed_run_sees_each_prompt_as_often(twice: tuple[PPO, PPO, PPO]) -> None:
    straight, stopped, resumed = twice

    def consumed(ppo: PPO, steps: range) -> list[str]:
        found = []
        for step in steps:
            ppo.updates.progress = replace(ppo.progress, step=step)
            found += [str(example.prompt) for example in ppo.next_prompts()]
        return found

    whole = consumed(straight, range(4))
    assert consumed(stopped, range(2)) + consumed(resumed, range(2, 4)) == whole
    assert set(Counter(whole).values()) == {2}  # 24 rows are two epochs over 12 prompts
    assert set(Counter(whole[:12]).values()) == {1}
    assert whole[:12] != whole[12:]


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_C2_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, {"weights": {"w": torch.full((64,), float(step))}}, {"step": step})
    file = tmp_path / "step_000002" / "weights.safetensors"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-9] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.warns(UserWarning, match=r"step_000002' is damaged and is not used: .*weights\.safetensors"):
        found = store.latest()
    assert found is not None and found.step == 1
    assert torch.equal(found.tensors("weights")["w"], torch.ones(64))


def test_C2_what_was_only_begun_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, {"weights": {"w": torch.ones(4)}}, {})

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf.infra.checkpoint.replace_folder", die)
    with pytest.raises(KeyboardInterrupt):
        store.save(2, {"weights": {"w": torch.zeros(4)}}, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = CheckpointStore(tmp_path).latest()
    assert found is not None and found.step == 1


RECIPES = [
    SFTConfig,
    RewardConfig,
    DPOConfig,
    KTOConfig,
    PPOConfig,
    GRPOConfig,
    PairsConfig,
    OnlineDPOConfig,
    EvaluateConfig,
    PipelineConfig,
    PretrainConfig,
]


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


@pytest.mark.parametrize("recipe", RECIPES)
def test_C9_a_mistyped_key_is_refused_and_the_nearest_named(recipe: type[Config]) -> None:
    """A dozen of the settings, two letters exchanged; that each key does something is in test_config_keys.py."""
    keys = list(keys_of(recipe))
    assert len(keys) > 20
    for key in keys[:: max(1, len(keys) // 12)]:
        section, _, leaf = key.rpartition(".")
        place = len(leaf) // 2
        typed = leaf[: place - 1] + leaf[place] + leaf[place - 1] + leaf[place + 1 :]
        if typed == leaf or len(leaf) < 4:
            continue
        with pytest.raises(UserError) as refusal:
            load_config(recipe, overrides=[f"{section}.{typed}=1".lstrip(".")])
        assert typed in str(refusal.value)
        siblings = [one.rpartition(".")[2] for one in keys if one.rpartition(".")[0] == section]
        assert difflib.get_close_matches(typed, siblings, 1)[0] in str(refusal.value), (key, str(refusal.value))


@pytest.mark.parametrize("shape", SHAPES)
def test_C10_metrics_against_a_direct_recomputation(
    tmp_path: Path, shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every mean of the log once more, by loops over answers and tokens; padding exists and must not count."""
    ppo = ppo_on(
        tmp_path,
        backbone_of(shape),
        ppo={"rollout_batch_size": 24, "num_iterations": 2, "num_ppo_epochs": 1, "max_tokens_per_micro_batch": 60},
        generation={"max_new_tokens": 8, "temperature": 2.5},
    )
    kept = []
    update = ppo.update
    monkeypatch.setattr(ppo, "update", lambda experience: (kept.append(experience), update(experience))[1])
    with ppo.run:
        ppo.train()
    first, second = read_log(ppo.run.folder)
    experience = kept[1]
    trajectory = experience.trajectory
    lengths = [len(answer) for answer in trajectory.responses()]
    assert len(set(lengths)) > 2 and trajectory.values_BR is not None
    places = [(row, t) for row, length in enumerate(lengths) for t in range(length)]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def over_tokens(columns: torch.Tensor) -> list[float]:
        return [float(columns[place]) for place in places]

    log_ratio = (trajectory.logprobs_BR - experience.reference_logprobs_BR).tolist()
    kls = [sum(log_ratio[row][:length]) for row, length in enumerate(lengths)]
    values, returns = over_tokens(trajectory.values_BR), over_tokens(experience.returns_BR)
    raw = [r - v for r, v in zip(returns, values, strict=True)]
    explained = 1 - torch.tensor(raw).var() / torch.tensor(returns).var()
    squares = [(v - r) ** 2 for v, r in zip(values, returns, strict=True)]
    expected = {
        "reward/mean": mean(experience.scores_B.tolist()),
        "reward/std": float(experience.scores_B.std()),
        "kl/mean": mean(kls),
        "length/mean": mean([float(length) for length in lengths]),
        "length/max": max(lengths),
        "length/drift": mean([float(length) for length in lengths]) / first["length/mean"] - 1,
        "length/finished_share": mean([float(end) for end in trajectory.finished_B.tolist()]),
        "entropy/mean": mean(over_tokens(trajectory.entropy_BR)),
        "advantage/mean": mean(raw),
        "advantage/min": min(raw),
        "advantage/max": max(raw),
        "value/mean": mean(values),
        "value/return_mean": mean(returns),
        "value/explained_variance": float(explained),
        # Of the first and only update, at the weights that sampled.
        "value/loss": mean(squares) / 2,
        "policy/loss": -mean(over_tokens(experience.advantages_BR)),
        "policy/entropy_in_update": mean(over_tokens(trajectory.entropy_BR)),
        "policy/clip_fraction": 0.0,
        "train/tokens": first["train/tokens"] + len(places),
    }
    for name, value in expected.items():
        assert second[name] == pytest.approx(value, abs=2e-3, rel=1e-3), name


def test_the_policy_of_these_runs_has_moved(twice: tuple[PPO, PPO, PPO]) -> None:
    """Or equality after a resume would say nothing."""
    straight, *_ = twice
    ids = torch.tensor([[5, 6, 7]])
    backbone = straight.policy.backbone
    assert isinstance(straight.policy, Policy)
    moved = (backbone.hidden(ids, adapter="policy") - backbone.hidden(ids, adapter="sft")).detach()
    assert float(moved.abs().max()) > 1e-2
