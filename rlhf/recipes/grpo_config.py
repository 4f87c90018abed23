"""Every setting of critic-free reinforcement learning: GRPO, and by its settings RLOO, Dr. GRPO and DAPO.

`configs/grpo.yaml`, `rloo.yaml`, `dr_grpo.yaml` and `dapo.yaml` are the four of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from rlhf.algo.kl import KLConfig
from rlhf.recipes.online_config import OnlineConfig, UpdateSettings, refuse_empty_mini_batches
from rlhf.rewards.shaping import ShapingConfig


class GRPOSettings(UpdateSettings):
    """The algorithm's own numbers, under the field's names."""

    num_prompts: int = Field(16, ge=1, description="prompts per iteration")
    num_generations: int = Field(
        8, ge=1, description="answers to each prompt: a group, within which an answer is compared with the others"
    )
    num_epochs: int = Field(1, ge=1, description="passes over a rollout")
    advantage: Literal["group_relative", "leave_one_out", "group_centred"] = Field(
        "group_relative", description="score against its group: mean and deviation (GRPO), the others (RLOO), the mean"
    )
    loss_mean: Literal["sequence_mean", "token_mean", "constant_length"] = Field(
        "sequence_mean", description="over answers (GRPO), over tokens (DAPO), by the longest answer allowed (Dr. GRPO)"
    )
    max_sampling_rounds: int = Field(
        1, ge=1, description="draws of prompts to replace groups with equal scores (DAPO); 1: such groups stay"
    )
    target_kl: float | None = Field(
        None, gt=0, description="mean k3 of KL(old, new) that ends the inner epochs; null: never"
    )

    @model_validator(mode="after")
    def _answers_can_be_compared(self) -> GRPOSettings:
        if self.num_generations < 2:
            raise ValueError(
                "grpo.num_generations is 1, but an answer is compared with the others to its prompt; use at least 2"
            )
        refuse_empty_mini_batches("grpo", self.num_mini_batches, self.num_prompts * self.num_generations)
        return self

    @property
    def num_updates(self) -> int:
        """See `UpdateSettings.num_updates`."""
        return self.num_epochs * self.num_mini_batches


class GRPOKLConfig(KLConfig):
    """How the distance from the reference is paid for: in the loss, or in the reward of each answer."""

    coefficient: float = Field(0.04, ge=0, description="beta: the weight of KL(policy || reference)")
    place: Literal["loss", "reward"] = Field(
        "loss", description="a term of the loss (GRPO), or taken off an answer's score before it is compared (RLOO)"
    )
    estimator: Literal["k1", "k2", "k3"] | None = Field(  # type: ignore[assignment]
        None, description="per-token estimate; null: k3 in the loss, k1 in the reward"
    )

    @model_validator(mode="after")
    def _estimator_has_a_gradient(self) -> GRPOKLConfig:
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError(
                "kl.estimator is k1, whose gradient in the loss is zero on average; use k2 or k3, or kl.place=reward"
            )
        return self

    @property
    def estimator_name(self) -> str:
        """The estimator that is used."""
        return self.estimator or ("k3" if self.place == "loss" else "k1")

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        idle = dict(super().idle_keys())
        if self.coefficient == 0:
            idle["place"] = "kl.coefficient is 0, so nothing is paid anywhere"
        return idle


class GRPOShapingConfig(ShapingConfig):
    """What happens to a score before it is compared; scores are taken as they are, where nothing else is said."""

    normalise: bool = Field(
        False, description="subtract the running mean of all scores so far and divide by their deviation"
    )
    clip: float | None = Field(None, gt=0, description="clip the (normalised) score to +- this; null: no clip")
    missing_eos_penalty: float = Field(0.0, ge=0, description="subtracted where an answer was cut off")


class GRPOConfig(OnlineConfig):
    """`rlhf grpo`."""

    shaping: GRPOShapingConfig = Field(default_factory=GRPOShapingConfig, description="from score to reward")
    grpo: GRPOSettings = Field(default_factory=GRPOSettings, description="the algorithm")
    kl: GRPOKLConfig = Field(default_factory=GRPOKLConfig, description="the price of leaving the reference")

    @model_validator(mode="after")
    def _the_kl_is_compared_with_something(self) -> GRPOConfig:
        if self.kl.place == "reward" and self.kl.coefficient > 0 and not self.pays_once:
            raise ValueError(
                "kl.place=reward takes the KL off the score of an answer, but every reward is paid step by step; use "
                "kl.place=loss, or add a reward that is paid once per answer"
            )
        return self

    @property
    def updates(self) -> UpdateSettings:
        """See `OnlineConfig.updates`."""
        return self.grpo

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        return dict(super().idle_keys()) | self.idle_in_updates("grpo", ["clip_range", "clip_range_high"])
