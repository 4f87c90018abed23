"""Every setting of best-of-n and rejection sampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from rlhf.data.data_config import PromptDataConfig
from rlhf.infra.config import Config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import RunConfig
from rlhf.models.backbone import ModelConfig
from rlhf.models.decoding import GenerationConfig
from rlhf.rewards.combination import CombinationConfig
from rlhf.rewards.process import process_term_config
from rlhf.rewards.protocol import RewardTermConfig, reward_sources, term_names


class SelectionSettings(Config):
    """How many answers are sampled, and which of them are kept."""

    num_answers: int = Field(16, ge=2, description="N: answers sampled to each prompt")
    keep: int = Field(1, ge=1, description="answers kept for each prompt, in the mean where selection is overall")
    selection: Literal["per_prompt", "overall"] = Field(
        "per_prompt", description="the best answers to each prompt, or the best of all answers whatever their prompt"
    )
    min_score: float | None = Field(None, description="answers with less are not kept (rejection sampling); null: none")
    keep_unfinished: bool = Field(False, description="answers that were cut off may be kept")
    min_gap: float = Field(0.0, ge=0, description="a pair is made where best and worst answer are further apart")
    prompts_at_once: int = Field(64, ge=1, description="prompts that are answered together")

    @model_validator(mode="after")
    def _there_is_a_choice(self) -> SelectionSettings:
        if self.keep >= self.num_answers:
            raise ValueError(
                f"best_of_n.keep is {self.keep} of best_of_n.num_answers {self.num_answers}, which is no choice; keep "
                "fewer"
            )
        return self


class BestOfNConfig(Config):
    """`rlhf best-of-n`."""

    run: RunConfig = Field(default_factory=RunConfig, description="name, place, seed, device")
    policy: str = Field("tinychat", description="who answers: a run, a folder or a hub name")
    model: ModelConfig = Field(default_factory=ModelConfig, description="how the base is held")
    reward_model: str | None = Field(None, description="run or folder behind the reward `model`, or a hub classifier")
    process_model: str | None = Field(None, description="run or folder of a process reward model, for `process`")
    rewards: list[RewardTermConfig] = Field(
        default_factory=lambda: [RewardTermConfig(name="model")], description="who scores the answers: weighted terms"
    )
    combination: CombinationConfig = Field(
        default_factory=CombinationConfig, description="how several rewards become one score"
    )
    measured_by: list[RewardTermConfig] = Field(
        default=[],
        description="what the best answers are worth besides, such as gold: weighted terms that choose nothing",
    )
    data: PromptDataConfig = Field(default_factory=PromptDataConfig, description="the prompts")
    best_of_n: SelectionSettings = Field(default_factory=SelectionSettings, description="how many, and which are kept")
    generation: GenerationConfig = Field(default_factory=GenerationConfig, description="how answers are drawn")
    use_cache: bool = Field(
        True, description="keep what was sampled under <output_dir>/cache and reuse that of the same weights"
    )

    @model_validator(mode="after")
    def _answers_differ(self) -> BestOfNConfig:
        if self.model.random_init:
            raise ValueError("model.random_init: answers are sampled from trained weights; name a policy")
        if self.generation.temperature == 0:
            raise ValueError(
                "generation.temperature is 0, so all answers to a prompt are the same; raise it, there is nothing to "
                "choose from"
            )
        return self

    @model_validator(mode="after")
    def _answers_have_one_score(self) -> BestOfNConfig:
        for term in [*self.rewards, *self.measured_by]:
            if term.name == "process":
                try:
                    is_stepwise = process_term_config(term.arguments).per_step is not None
                except UserError as error:
                    raise ValueError(str(error)) from error
                if is_stepwise:
                    raise ValueError("per_step pays steps in PPO and GRPO; a choice among answers needs aggregation")
        return self

    @model_validator(mode="after")
    def _rewards_fit_their_combination(self) -> BestOfNConfig:
        terms = zip(term_names(self.rewards), self.rewards, strict=True)
        self.combination.refuse_strangers({name: term.weight for name, term in terms})
        return self

    @property
    def lineage(self) -> dict[str, str]:
        """The models that the run stands on, by what they are to it."""
        terms = [*self.rewards, *self.measured_by]
        return {"policy": self.policy} | reward_sources(terms, self.reward_model, self.process_model)

    def in_effect(self) -> BestOfNConfig:
        """Nothing trains; an adapter stays an adapter."""
        return self.model_copy(update={"model": self.model.model_copy(update={"train": "lora"})})

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        idle = dict.fromkeys(["model.train", "model.lora", "model.gradient_checkpointing"], "nothing trains")
        idle["model.name_or_path"] = "`policy` names the model"
        idle["data.max_validation_samples"] = "prompts held back are left out"
        terms = [*self.rewards, *self.measured_by]
        reason = "no term of `rewards` or `measured_by` is called {}, or each names a model of its own"
        if not any(term.is_learned and term.model is None for term in terms):
            idle["reward_model"] = reason.format("model")
        if not any(term.name == "process" and term.model is None for term in terms):
            idle["process_model"] = reason.format("process")
        if self.run.dtype != "fp32":
            idle["generation.merge_adapter"] = f"run.dtype is {self.run.dtype}, and only fp32 weights are merged"
        elif self.model.load_in_4bit:
            idle["generation.merge_adapter"] = "model.load_in_4bit is true, and 4-bit weights take no adapter in"
        return idle
