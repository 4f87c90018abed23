"""Every setting of PPO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from rlhf.algo.kl import KLConfig
from rlhf.algo.trainer import OptimizerConfig
from rlhf.data.data_config import PromptDataConfig
from rlhf.infra.config import Config
from rlhf.infra.experiment import RunConfig
from rlhf.models.backbone import ModelConfig
from rlhf.models.decoding import GenerationConfig
from rlhf.rewards.protocol import RewardTermConfig
from rlhf.rewards.shaping import ShapingConfig


class PPOSettings(Config):
    """The algorithm's own numbers, under the field's names."""

    num_iterations: int = Field(100, ge=1, description="rollouts, each followed by an update")
    rollout_batch_size: int = Field(128, ge=1, description="prompts sampled per iteration")
    num_ppo_epochs: int = Field(4, ge=1, description="passes over a rollout")
    num_mini_batches: int = Field(1, ge=1, description="optimizer steps per pass")
    max_tokens_per_micro_batch: int = Field(16_384, ge=1, description="tokens of one forward and backward pass")
    clip_range: float = Field(0.2, gt=0, lt=1, description="the ratio new / old is clipped to 1 - this ... 1 + this")
    clip_range_high: float | None = Field(None, gt=0, description="another upper bound of the ratio; null: the same")
    clip_range_value: float | None = Field(
        0.2, gt=0, description="how far a value may move from the old one; null: free"
    )
    vf_coef: float = Field(0.1, ge=0, description="weight of the value loss")
    entropy_coef: float = Field(0.0, ge=0, description="weight of the entropy bonus")
    gamma: float = Field(1.0, gt=0, le=1, description="discount per token")
    lam: float = Field(0.95, ge=0, le=1, description="lambda of generalised advantage estimation")
    whiten_advantages: bool = Field(True, description="advantages with mean 0 and variance 1 over the whole batch")
    whiten_rewards: bool = Field(False, description="token rewards with variance 1 over the whole batch, mean kept")
    target_kl: float | None = Field(
        0.02, gt=0, description="mean k3 of KL(old, new) that ends the inner epochs; null: never"
    )
    bootstrap_truncated: bool = Field(
        False, description="value of the last state of a cut-off answer counts as its future"
    )
    recompute_logprobs: bool = Field(False, description="old log-probs from a forward pass instead of from generation")
    value_head: Literal["linear", "mlp"] = Field("linear", description="the critic's last layers")
    value_adapter: bool = Field(False, description="an adapter of the critic's own instead of the policy's trunk")
    save_every_updates: int | None = Field(
        None, ge=1, description="optimizer steps between checkpoints inside an iteration; null: at its end only"
    )

    @model_validator(mode="after")
    def _mini_batches_have_rows(self) -> PPOSettings:
        if self.num_mini_batches > self.rollout_batch_size:
            raise ValueError(
                f"ppo.num_mini_batches is {self.num_mini_batches}, but a rollout has only {self.rollout_batch_size} "
                "rows; use at most that many"
            )
        return self

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        if self.vf_coef > 0:
            return {}
        reason = "vf_coef is 0, so the critic learns nothing and stays at 0"
        switches = {"value_adapter": self.value_adapter, "bootstrap_truncated": self.bootstrap_truncated}
        names = ["clip_range_value", "value_head", *(name for name, is_on in switches.items() if is_on)]
        return dict.fromkeys(names, reason)


class PPOConfig(Config):
    """`rlhf ppo`."""

    run: RunConfig = Field(default_factory=RunConfig, description="name, place, seed, device")
    policy: str = Field(
        "tinychat", description="what the policy starts from and is held near: a run, a folder or a hub name"
    )
    model: ModelConfig = Field(
        default_factory=ModelConfig, description="adapters, where the policy brings none; dtype of weights"
    )
    reward_model: str | None = Field(None, description="run or folder behind the reward `model`, or a hub classifier")
    rewards: list[RewardTermConfig] = Field(
        default_factory=lambda: [RewardTermConfig(name="model")], description="what an answer is worth: weighted terms"
    )
    data: PromptDataConfig = Field(default_factory=PromptDataConfig, description="the prompts")
    generation: GenerationConfig = Field(default_factory=GenerationConfig, description="how answers are drawn")
    ppo: PPOSettings = Field(default_factory=PPOSettings, description="the algorithm")
    kl: KLConfig = Field(default_factory=KLConfig, description="the price of leaving the reference")
    shaping: ShapingConfig = Field(default_factory=ShapingConfig, description="from score to reward")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW and its schedule")

    @model_validator(mode="after")
    def _policy_has_weights(self) -> PPOConfig:
        if self.model.random_init:
            raise ValueError("model.random_init: PPO starts from a policy that has learnt to answer; train it first")
        return self

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        idle = {
            "model.name_or_path": "`policy` names the model",
            "data.max_validation_samples": "PPO validates on nothing; prompts held back are left out",
        }
        if self.model.lora.lora_dropout > 0:
            idle["model.lora.lora_dropout"] = "dropout acts in SFT and reward modelling only"
        if all(term.name != "model" for term in self.rewards):
            idle["reward_model"] = "no term of `rewards` is called model"
        if self.model.train == "full":
            idle["generation.merge_adapter"] = "model.train is full, so there is no adapter"
            if self.ppo.value_adapter:
                idle["ppo.value_adapter"] = "model.train is full, so there is no adapter"
        return idle | self._idle_in_rollouts() | self._idle_in_updates()

    def _idle_in_rollouts(self) -> dict[str, str]:
        idle = {}
        if self.run.dtype != "fp32":
            idle["generation.merge_adapter"] = f"run.dtype is {self.run.dtype}, and only fp32 weights are merged"
        if self.model.load_in_4bit:
            idle["generation.merge_adapter"] = "model.load_in_4bit is true, and 4-bit weights take no adapter in"
        longest, budget = self.generation.max_new_tokens, self.shaping.length_budget
        if budget is not None and budget >= longest:
            reason = f"no answer is longer than generation.max_new_tokens, {longest}"
            idle |= dict.fromkeys(["shaping.length_budget", "shaping.length_penalty"], reason)
        return idle

    def _idle_in_updates(self) -> dict[str, str]:
        num_updates = self.ppo.num_ppo_epochs * self.ppo.num_mini_batches
        every, is_only_one = self.ppo.save_every_updates, num_updates == 1
        saved = {}
        if every is not None and every >= num_updates:
            saved["ppo.save_every_updates"] = f"an iteration has {num_updates} update(s): no place inside it is reached"
        # In half precision the rounding of training differs from that of sampling, and clipping sees it.
        is_exact = self.run.dtype == "fp32" or self.ppo.recompute_logprobs
        if not is_only_one:
            return saved
        reason = "there is one update per rollout, at which policy and critic are still those that sampled"
        bounds = ["clip_range", "clip_range_high", "clip_range_value"] if is_exact else []
        return saved | dict.fromkeys([f"ppo.{name}" for name in ["target_kl", *bounds]], reason)

    @property
    def num_optimizer_steps(self) -> int:
        return self.ppo.num_iterations * self.ppo.num_ppo_epochs * self.ppo.num_mini_batches
