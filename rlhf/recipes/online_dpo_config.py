"""Settings of online DPO: the policy and its prompts, how a round labels its answers, and how it learns from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlhf.algo.trainer import OptimizerConfig
from rlhf.data.data_config import Names
from rlhf.infra.config import Config
from rlhf.models.reward_model import RewardModelConfig
from rlhf.recipes.dpo import PreferenceLossConfig
from rlhf.recipes.judging import Judges
from rlhf.recipes.online_config import SamplingConfig
from rlhf.recipes.pairs_config import (
    BY_JUDGES,
    JUDGES,
    NOBODY_JUDGES,
    RULE,
    SCORES,
    ComparisonSettings,
    refuse_choice_by_scores,
    refuse_paid_steps,
)
from rlhf.recipes.scoring import refuse_lost_weights
from rlhf.recipes.supervised import TrainingConfig


class RoundSettings(ComparisonSettings):
    """How often, on how much, and against what."""

    num_rounds: int = Field(4, ge=1, description="rounds of sampling, labelling and training")
    reference: Literal["start", "previous"] = Field(
        "start", description="what the loss compares with: the run's start, or the policy that sampled the round"
    )


class RefreshConfig(Config):
    """A reward model trained anew in every round, on what judges have said of the policy's own answers so far."""

    num_prompts: int = Field(128, ge=1, description="prompts of each round whose answers the judges compare")
    train_files: Names = Field((), description="pairs that it learns from besides: files, globs, folders or hub names")
    validation_fraction: float = Field(0.05, ge=0.0, lt=1.0, description="share of the prompts it is measured on")
    backbone: str | None = Field(
        None, description="what the score is read from; null: the policy that the run starts from"
    )
    reward: RewardModelConfig = Field(default_factory=RewardModelConfig, description="pooling and what is trained")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="length and batches")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW and its schedule")

    @field_validator("train_files", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        return self.training.idle_keys_with(self.validation_fraction > 0)


class OnlineDPOConfig(PreferenceLossConfig, SamplingConfig):
    """`rlhf online-dpo`."""

    rounds: RoundSettings = Field(default_factory=RoundSettings, description="the rounds, and the answers of one")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="length and batches of one round")
    optimizer: OptimizerConfig = Field(
        default_factory=OptimizerConfig, description="AdamW and its schedule, begun anew in every round"
    )
    judges: Judges = Field((), description=JUDGES)
    rule: Literal["averaged", "agreed"] = Field("averaged", description=RULE)
    refresh: RefreshConfig | None = Field(
        None, description="judges teach a reward model in every round, which labels the pairs; null: no such model"
    )

    @model_validator(mode="after")
    def _somebody_labels(self) -> OnlineDPOConfig:
        if self.judges and self.refresh is None:
            refuse_choice_by_scores("rounds", self.rounds)
        if self.refresh is not None and not self.judges:
            raise ValueError(
                "refresh trains a reward model on what judges say, but `judges` is empty; name one, for example "
                "judges='[{kind: llm, base_url: http://127.0.0.1:8000/v1, model: NAME}]', or refresh=null"
            )
        if self.refresh is not None and not any(term.is_learned and term.model is None for term in self.rewards):
            raise ValueError("refresh trains a reward model, but no term of `rewards` is called model and takes it")
        if self.refresh is not None:
            refuse_lost_weights(self.model, self.refresh.reward.train, "refresh.reward")
        return self

    @property
    def lineage(self) -> dict[str, str]:
        """See `SamplingConfig.lineage`."""
        if self.judges and self.refresh is None:
            return {"policy": self.policy}
        replaced = "reward_model" if self.refresh is not None else None
        return {role: source for role, source in super().lineage.items() if role != replaced}

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
        if self.refresh is not None:
            idle["reward_model"] = "`refresh` trains one in every round"
        elif self.judges:
            idle |= dict.fromkeys([*SCORES, "rounds.min_gap"], BY_JUDGES)
        else:
            idle["rule"] = NOBODY_JUDGES
        return idle
