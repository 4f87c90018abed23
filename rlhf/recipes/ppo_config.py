"""Every setting of PPO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from rlhf.algo.kl import KLConfig
from rlhf.recipes.online_config import OnlineConfig, UpdateSettings, refuse_empty_mini_batches


class PPOSettings(UpdateSettings):
    """The algorithm's own numbers, under the field's names."""

    rollout_batch_size: int = Field(128, ge=1, description="prompts sampled per iteration")
    num_ppo_epochs: int = Field(4, ge=1, description="passes over a rollout")
    clip_range_value: float | None = Field(
        0.2, gt=0, description="how far a value may move from the old one; null: free"
    )
    vf_coef: float = Field(0.1, ge=0, description="weight of the value loss")
    gamma: float = Field(1.0, gt=0, le=1, description="discount per token")
    lam: float = Field(0.95, ge=0, le=1, description="lambda of generalised advantage estimation")
    whiten_advantages: bool = Field(True, description="advantages with mean 0 and variance 1 over the whole batch")
    whiten_rewards: bool = Field(False, description="token rewards with variance 1 over the whole batch, mean kept")
    bootstrap_truncated: bool = Field(
        False, description="value of the last state of a cut-off answer counts as its future"
    )
    value_head: Literal["linear", "mlp"] = Field("linear", description="the critic's last layers")
    value_adapter: bool = Field(False, description="an adapter of the critic's own instead of the policy's trunk")

    @model_validator(mode="after")
    def _mini_batches_have_rows(self) -> PPOSettings:
        refuse_empty_mini_batches("ppo", self.num_mini_batches, self.rollout_batch_size)
        return self

    @property
    def num_updates(self) -> int:
        """See `UpdateSettings.num_updates`."""
        return self.num_ppo_epochs * self.num_mini_batches

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        if self.vf_coef > 0:
            return {}
        reason = "vf_coef is 0, so the critic learns nothing and stays at 0"
        switches = {"value_adapter": self.value_adapter, "bootstrap_truncated": self.bootstrap_truncated}
        names = ["clip_range_value", "value_head", *(name for name, is_on in switches.items() if is_on)]
        return dict.fromkeys(names, reason)


class PPOConfig(OnlineConfig):
    """`rlhf ppo`."""

    ppo: PPOSettings = Field(default_factory=PPOSettings, description="the algorithm")
    kl: KLConfig = Field(default_factory=KLConfig, description="the price of leaving the reference")

    @property
    def updates(self) -> UpdateSettings:
        """See `OnlineConfig.updates`."""
        return self.ppo

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        idle = dict(super().idle_keys())
        if self.model.train == "full" and self.ppo.value_adapter:
            idle["ppo.value_adapter"] = "model.train is full, so there is no adapter"
        return idle | self.idle_in_updates("ppo", ["clip_range", "clip_range_high", "clip_range_value"])
