"""Every setting of PPO."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

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

    @property
    def num_optimizer_steps(self) -> int:
        return self.ppo.num_iterations * self.ppo.num_ppo_epochs * self.ppo.num_mini_batches
