"""Settings of online DPO: the policy and its prompts, how a round labels its answers, and how it learns from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from rlhf.algo.trainer import OptimizerConfig
from rlhf.recipes.dpo import PreferenceLossConfig
from rlhf.recipes.online_config import SamplingConfig
from rlhf.recipes.pairs_config import ComparisonSettings, refuse_paid_steps
from rlhf.recipes.supervised import TrainingConfig


class RoundSettings(ComparisonSettings):
    """How often, on how much, and against what."""

    num_rounds: int = Field(4, ge=1, description="rounds of sampling, labelling and training")
    reference: Literal["start", "previous"] = Field(
        "start", description="what the loss compares with: the run's start, or the policy that sampled the round"
    )


class OnlineDPOConfig(SamplingConfig, PreferenceLossConfig):
    """`rlhf online-dpo`."""

    rounds: RoundSettings = Field(default_factory=RoundSettings, description="the rounds, and the answers of one")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="length and batches of one round")
    optimizer: OptimizerConfig = Field(
        default_factory=OptimizerConfig, description="AdamW and its schedule, begun anew in every round"
    )

    @model_validator(mode="after")
    def _answers_have_one_score(self) -> OnlineDPOConfig:
        refuse_paid_steps(self.rewards)
        return self

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        idle = dict(SamplingConfig.idle_keys(self)) | PreferenceLossConfig.idle_keys(self)
        idle |= self.training.idle_keys_with(has_validation=False)
        if not self.preference_loss.has_reference:
            idle["rounds.reference"] = f"loss is {self.loss}, which compares with none"
        elif self.rounds.num_rounds == 1:
            idle["rounds.reference"] = "rounds.num_rounds is 1, and that round is sampled by the start"
        return idle
