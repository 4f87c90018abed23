"""Every setting of making step labels by sampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from rlhf.data.data_config import Names, PromptDataConfig
from rlhf.data.step_splitter import LINES
from rlhf.infra.config import Config
from rlhf.infra.experiment import RunConfig
from rlhf.models.backbone import ModelConfig
from rlhf.models.decoding import GenerationConfig
from rlhf.rewards.protocol import RewardTermConfig


class SamplingSettings(Config):
    """What is sampled for a question, and what its steps are labelled with."""

    num_solutions: int = Field(4, ge=1, description="solutions sampled for each question")
    num_completions: int = Field(8, ge=1, description="completions sampled from the end of each of their steps")
    split: str = Field(LINES, description="regular expression of what stands between two steps of an answer")
    right_from: float = Field(0.5, description="an answer is right where the rewards together reach this")
    estimate: Literal["soft", "hard"] = Field(
        "soft", description="a step's label: share of its completions that are right, or 1 where any is"
    )
    questions_at_once: int = Field(32, ge=1, description="questions whose solutions are completed together")


class QuestionDataConfig(PromptDataConfig):
    """Prompts with a checkable answer."""

    families: Names = Field(
        default=("arithmetic",), description="of the built-in world: those whose answers the rewards can check"
    )


class StepLabelConfig(Config):
    """`rlhf prm-label`."""

    run: RunConfig = Field(default_factory=RunConfig, description="name, place, seed, device")
    policy: str = Field("tinychat", description="who solves and completes: a run, a folder or a hub name")
    model: ModelConfig = Field(default_factory=ModelConfig, description="how the base is held")
    data: QuestionDataConfig = Field(
        default_factory=QuestionDataConfig,
        description="the questions, with the columns that the rewards check answers against",
    )
    rewards: list[RewardTermConfig] = Field(
        default_factory=lambda: [RewardTermConfig(name="rlhf.data.tinychat:answer_reward")],
        description="who says whether an answer is right: weighted rules and functions",
    )
    sampling: SamplingSettings = Field(default_factory=SamplingSettings, description="solutions, completions, labels")
    generation: GenerationConfig = Field(default_factory=GenerationConfig, description="how answers are drawn")
    use_cache: bool = Field(
        True, description="keep what was sampled under <output_dir>/cache and reuse that of the same weights"
    )

    @model_validator(mode="after")
    def _policy_answers(self) -> StepLabelConfig:
        if self.model.random_init:
            raise ValueError("model.random_init: solutions are sampled from trained weights; name a policy")
        if self.generation.temperature == 0 and (self.sampling.num_solutions > 1 or self.sampling.num_completions > 1):
            raise ValueError(
                "generation.temperature is 0, so all solutions of a question and all completions of a step are the "
                "same; raise it, or set sampling.num_solutions and sampling.num_completions to 1"
            )
        return self

    def in_effect(self) -> StepLabelConfig:
        """Nothing trains; an adapter stays an adapter."""
        return self.model_copy(update={"model": self.model.model_copy(update={"train": "lora"})})

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        idle = dict.fromkeys(["model.train", "model.lora", "model.gradient_checkpointing"], "nothing trains")
        idle["model.name_or_path"] = "`policy` names the model"
        idle["data.max_validation_samples"] = "questions held back are left out"
        if self.run.dtype != "fp32":
            idle["generation.merge_adapter"] = f"run.dtype is {self.run.dtype}, and only fp32 weights are merged"
        elif self.model.load_in_4bit:
            idle["generation.merge_adapter"] = "model.load_in_4bit is true, and 4-bit weights take no adapter in"
        return idle
