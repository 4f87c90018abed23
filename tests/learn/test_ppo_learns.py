"""PPO raises a reward, lowers a KL and raises an entropy when each is all there is; resuming changes no bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_some import fast_some
from safetensors.torch import load_file
from toy_runs import WriteRows, column, demonstrations, interrupt_after, log_lines, mean, pairs, prompts, settings

from rlhf.data.chat import ChatEncoder
from rlhf.data.prompt_dataset import PromptExample
from rlhf.data.rows import Prompt
from rlhf.infra.config import load_config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run
from rlhf.infra.interrupt import Stopped
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.models.lora import LoRAConfig, get_lora_parameters
from rlhf.models.policy import Policy
from rlhf.models.reference import Reference
from rlhf.models.value_head import ValueHead
from rlhf.recipes.ppo import PPO, run_ppo
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.resume import resume_run
from rlhf.recipes.reward import RewardConfig, run_reward
from rlhf.recipes.rollouts import OnlineParts
from rlhf.recipes.sft import SFTConfig, run_sft
from rlhf.rewards.protocol import CombinedReward, RewardFunction, RewardTerm

RED = "rewards=[{name: target_string, arguments: {text: red}}]"


def ppo_config(tmp_path: Path, data: Path, name: str, *more: str) -> PPOConfig:
    shared = [
        f"data.train_files={data}",
        "data.validation_fraction=0",
        "generation.max_new_tokens=6",
        "ppo.rollout_batch_size=64",
        "optimizer.learning_rate=0.01",
        "optimizer.lr_scheduler_type=constant",
        "model.lora.r=8",
        "shaping.missing_eos_penalty=0",
    ]
    return load_config(PPOConfig, overrides=settings(tmp_path, name, *shared, *more))


@pytest.fixture
def prompt_file(write_rows: WriteRows) -> Path:
    return write_rows([{"prompt": prompt} for prompt in prompts(24)])


@pytest.mark.parametrize(
    "more",
    fast_some(
        [
            (),
            ("model.train=full", "model.lora=null", "optimizer.learning_rate=0.003"),
            ("ppo.value_adapter=true", "ppo.value_head=mlp", "ppo.num_mini_batches=2", "ppo.num_ppo_epochs=2"),
        ],
        (),
    ),
    ids=["lora", "full", "own_critic"],
)
def test_a_rule_reward_is_learnt(tmp_path: Path, base: Path, prompt_file: Path, more: tuple[str, ...]) -> None:
    iterations = ("ppo.num_iterations=10", "kl.coefficient=0.01")
    run = run_ppo(ppo_config(tmp_path, prompt_file, "ppo", f"policy={base}", RED, *iterations, *more))
    rewards = column(run.folder, "reward/mean")
    assert rewards[0] < 0.5  # six random words of twenty-seven rarely hold one of them
    assert mean(rewards[-2:]) > 0.85
    first, last = log_lines(run.folder)[0], log_lines(run.folder)[-1]
    assert first["kl/mean"] == pytest.approx(0, abs=1e-4)
    assert first["policy/logprob_gap"] < 1e-4  # the ratio of the first update is one
    assert 0 < last["kl/mean"] < 20
    assert all(math.isfinite(value) for line in log_lines(run.folder) for value in line.values())
    assert (run.folder / "policy").is_dir()


def nothing(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    return [0.0] * len(completions)


def always_two(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    return [2.0] * len(completions)


class Bench:
    """PPO on parts made by hand: a policy that was pushed away from its reference, rewarded with nothing else said."""

    def __init__(self, base: Path, config: PPOConfig, reward: RewardFunction = nothing) -> None:
        backbone = Backbone.load(ModelConfig(name_or_path=str(base)))
        with torch.no_grad():
            backbone.model.base_model.norm.weight *= 3  # an untrained model is hardly decided about anything
        backbone.add_adapter("policy", LoRAConfig(r=8))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in get_lora_parameters(backbone.model, "policy"):
                parameter.copy_(0.45 * torch.randn(parameter.shape, generator=generator))
        backbone.train_only(["policy"])
        self.policy = Policy(backbone, "policy", ValueHead(backbone.width, config.ppo.value_head))
        encoder = ChatEncoder(backbone.tokenizer)
        examples = [PromptExample(encoder.prompt_ids(text), text, {}) for text in prompts(24)]
        rewards = CombinedReward([RewardTerm("reward", reward)])
        self.run = Run.create("ppo", config, config.run)
        self.ppo = PPO(
            config, self.run, OnlineParts(self.policy, Reference(backbone, None), rewards, examples, encoder)
        )

    def train(self) -> Path:
        with self.run:
            self.ppo.train()
        return self.run.folder


def test_with_the_kl_alone_the_policy_returns_to_the_reference(tmp_path: Path, base: Path, prompt_file: Path) -> None:
    config = ppo_config(
        tmp_path, prompt_file, "kl", "ppo.num_iterations=12", "kl.coefficient=1", "shaping.normalise=false"
    )
    kl = column(Bench(base, config).train(), "kl/mean")
    assert kl[0] > 10
    assert mean(kl[-3:]) < 0.6 * mean(kl[:2])


def test_with_the_entropy_bonus_alone_entropy_rises(tmp_path: Path, base: Path, prompt_file: Path) -> None:
    more = ("ppo.num_iterations=6", "kl.coefficient=0", "ppo.entropy_coef=1", "ppo.target_kl=null", "ppo.vf_coef=0")
    config = ppo_config(tmp_path, prompt_file, "entropy", "shaping.normalise=false", *more)
    folder = Bench(base, config).train()
    entropy = column(folder, "entropy/mean")
    assert entropy[-1] > entropy[0] + 0.3
    assert entropy == sorted(entropy)
    assert column(folder, "policy/loss") == pytest.approx([0.0] * 6, abs=1e-6)  # no reward, no advantage


def test_the_critic_learns_what_can_be_foreseen(tmp_path: Path, base: Path, prompt_file: Path) -> None:
    more = ("ppo.num_iterations=6", "kl.coefficient=0", "ppo.vf_coef=1", "ppo.clip_range_value=0.5")
    config = ppo_config(tmp_path, prompt_file, "critic", "shaping.normalise=false", *more)
    folder = Bench(base, config, always_two).train()
    values, errors = column(folder, "value/mean"), column(folder, "value/loss")
    assert values[0] == 0.0 and values[-1] == pytest.approx(2.0, abs=0.4)
    assert errors[-1] < 0.2 * errors[0]


def test_the_adaptive_controller_moves_towards_its_target(tmp_path: Path, base: Path, prompt_file: Path) -> None:
    more = ("ppo.num_iterations=3", "kl.controller=adaptive", "kl.target=1000", "kl.horizon=640", "kl.coefficient=0.1")
    config = ppo_config(tmp_path, prompt_file, "adaptive", "shaping.normalise=false", *more)
    # The KL stays far below the target, so every 64 answers lower the coefficient by a fifth of 64 / 640.
    found = column(Bench(base, config).train(), "kl/coefficient")
    assert found == pytest.approx([0.1 * 0.98, 0.1 * 0.98**2, 0.1 * 0.98**3])


@pytest.mark.slow
def test_inner_epochs_end_once_the_policy_has_moved(tmp_path: Path, base: Path, prompt_file: Path) -> None:
    def updates(name: str, bound: str) -> list[float]:
        more = ("ppo.num_iterations=2", "ppo.num_ppo_epochs=5", f"ppo.target_kl={bound}", f"policy={base}", RED)
        return column(run_ppo(ppo_config(tmp_path, prompt_file, name, *more)).folder, "train/updates_this_iteration")

    assert updates("free", "null") == [5, 5]
    assert max(updates("bound", "1e-6")) == 2  # the first step measures a KL of zero, the second what the first did


def test_the_gradient_does_not_depend_on_the_micro_batches(tmp_path: Path, base: Path, prompt_file: Path) -> None:
    def gradients(name: str, tokens: int) -> dict[str, torch.Tensor]:
        more = (f"ppo.max_tokens_per_micro_batch={tokens}", "ppo.entropy_coef=0.1", "optimizer.max_grad_norm=1000")
        bench = Bench(base, ppo_config(tmp_path, prompt_file, name, "kl.coefficient=1", *more))
        ppo = bench.ppo
        batch = ppo.next_prompts()
        trajectory = ppo.sample(batch)
        scores = ppo.rollouts.score(batch, trajectory)
        shaped = ppo.rollouts.shape(trajectory, scores, ppo.progress.moments)
        experience = ppo.estimate_advantages(trajectory, scores, shaped)
        ppo.updates.trainer.step(ppo.updates.micro_batches(experience), ppo.loss(experience))
        bench.run.finish()
        assert (len(ppo.updates.micro_batches(experience)) == 1) == (tokens > 1000)
        return {name: p.grad for name, p in ppo.updates.trainer.parameters.items() if p.grad is not None}

    whole, parts = gradients("whole", 10_000), gradients("parts", 45)
    assert whole.keys() == parts.keys() and len(whole) == 30
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-5, rtol=1e-3)


def test_values_behind_cut_off_answers_and_recomputed_quantities(tmp_path: Path, base: Path, prompt_file: Path) -> None:
    config = ppo_config(tmp_path, prompt_file, "parts")
    bench = Bench(base, config)
    torch.nn.init.normal_(bench.policy.value_head.last.weight)  # type: ignore[union-attr]
    trajectory = bench.ppo.sample(bench.ppo.next_prompts())
    again = bench.ppo.rollouts.recomputed(trajectory, logprobs=True)
    assert trajectory.values_BR is not None and again.values_BR is not None
    torch.testing.assert_close(again.values_BR, trajectory.values_BR, atol=1e-3, rtol=1e-4)
    behind = bench.ppo._values_after_end(trajectory)
    backbone, head = bench.policy.backbone, bench.policy.value_head
    assert head is not None and not bool(trajectory.finished_B.all())
    for row, finished in enumerate(trajectory.finished_B.tolist()):
        ids = torch.tensor([trajectory.prompts()[row] + trajectory.responses()[row]])
        expected = 0.0 if finished else float(head(backbone.hidden(ids, adapter="policy")[0, -1]).detach())
        assert float(behind[row]) == pytest.approx(expected, abs=1e-3)
    bench.run.finish()


# ---------------------------------------------------------------- with a reward model, and resumed


@pytest.fixture
def trained_parts(tmp_path: Path, base: Path, write_rows: WriteRows) -> tuple[str, ...]:
    """An SFT run and a reward model on top of it, both of a few steps."""
    few = ["training.max_steps=12", "optimizer.learning_rate=0.01", "data.min_length=1", "model.lora.r=4"]
    data = f"data.train_files={write_rows(demonstrations(16))}"
    run_sft(load_config(SFTConfig, overrides=settings(tmp_path, "sft", f"model.name_or_path={base}", data, *few)))
    data = f"data.train_files={write_rows(pairs(48))}"
    run_reward(load_config(RewardConfig, overrides=settings(tmp_path, "reward", "backbone=sft", data, *few)))
    return "policy=sft", "reward_model=reward", "model.lora=null"  # the policy brings its adapter


@pytest.mark.parametrize("train", fast_some(["lora", "full"], "lora"))
def test_a_reward_model_is_followed_and_neither_it_nor_the_reference_moves(
    tmp_path: Path, prompt_file: Path, trained_parts: tuple[str, ...], train: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[PPO, list[torch.Tensor]]] = []
    ids, mask = torch.tensor([[14, 3, 8, 5, 1]]), torch.ones(1, 5, dtype=torch.bool)

    def outputs(ppo: PPO) -> list[torch.Tensor]:
        model = ppo.rollouts.parts.reward.terms[0].function.model  # type: ignore[attr-defined]
        with torch.no_grad():
            return [model(ids, mask), ppo.rollouts.parts.reference.logprobs(ids, mask, mask[:, 2:], 1.0)]

    original: Callable[[PPO], object] = PPO.train

    def train_and_look(ppo: PPO) -> object:
        seen.append((ppo, outputs(ppo)))
        return original(ppo)

    monkeypatch.setattr(PPO, "train", train_and_look)
    rate = "optimizer.learning_rate=0.003" if train == "full" else "optimizer.learning_rate=0.02"
    more = ("ppo.num_iterations=8", "kl.coefficient=0.01", f"model.train={train}", rate)
    more += ("model.lora=null",) if train == "full" else ()
    run = run_ppo(ppo_config(tmp_path, prompt_file, "ppo", *trained_parts, *more))
    rewards = column(run.folder, "reward/mean")
    assert mean(rewards[-2:]) > rewards[0] + 0.3
    ((ppo, before),) = seen
    for then, now in zip(before, outputs(ppo), strict=True):
        assert torch.equal(then, now)
    moved = ppo.policy.backbone.hidden(ids, adapter=ppo.policy.adapter)
    reference = ppo.rollouts.parts.reference.backbone.hidden(ids, adapter=ppo.rollouts.parts.reference.adapter)
    assert not torch.allclose(moved, reference, atol=1e-2)


@pytest.mark.parametrize(
    "more",
    fast_some(
        [("ppo.value_head=mlp",), ("model.train=full", "model.lora=null", "optimizer.learning_rate=0.003")],
        ("ppo.value_head=mlp",),
    ),
)
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    tmp_path: Path,
    prompt_file: Path,
    trained_parts: tuple[str, ...],
    more: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = (
        "ppo.num_iterations=4",
        "ppo.rollout_batch_size=10",
        "ppo.num_mini_batches=2",
        "kl.controller=adaptive",
        "optimizer.lr_scheduler_type=linear",
        *trained_parts,
    )
    straight = run_ppo(ppo_config(tmp_path, prompt_file, "straight", *shared, *more))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "should_stop", interrupt_after(2))
        with pytest.raises(Stopped, match="rlhf resume"):
            run_ppo(ppo_config(tmp_path, prompt_file, "stopped", *shared, *more))
    folder = tmp_path / "stopped"
    assert len(log_lines(folder)) == 2
    resume_run(folder, lambda *_: None)
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
    assert log_lines(folder) == log_lines(straight.folder)
    wanted, found = (load_file(next((place / "policy").glob("*.safetensors"))) for place in (straight.folder, folder))
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_settings_that_cannot_serve_are_refused_before_anything_is_sampled(
    tmp_path: Path, base: Path, prompt_file: Path
) -> None:
    more = ("ppo.rollout_batch_size=2", "ppo.num_mini_batches=3", f"policy={base}", RED)
    with pytest.raises(UserError, match=r"ppo\.num_mini_batches is 3, but a rollout has only 2 rows"):
        run_ppo(ppo_config(tmp_path, prompt_file, "ppo", *more))
    with pytest.raises(UserError, match="the reward `model` needs reward_model"):
        run_ppo(ppo_config(tmp_path, prompt_file, "other", f"policy={base}"))
    assert not (tmp_path / "other").exists()
