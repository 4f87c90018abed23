"""Settings of `rlhf pairs`: answers of a policy to prompts, and which of them become preference pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, model_validator

from rlhf.infra.config import Config
from rlhf.recipes.judging import Judges
from rlhf.recipes.online_config import SamplingConfig
from rlhf.rewards.protocol import RewardTermConfig

JUDGES = "who says which of two answers is better, in place of `rewards`; several as a panel, by the mean"
RULE = "two orders become one preference: their mean, or alike unless they agree"
SCORES, BY_JUDGES = ("rewards", "reward_model", "process_model", "combination"), "`judges` say which answer is better"
NOBODY_JUDGES = "`judges` is empty, so `rewards` decide"


class ComparisonSettings(Config):
    """How many answers there are, and which of them are compared."""

    num_prompts: int = Field(256, ge=1, description="prompts that are answered")
    num_generations: int = Field(4, ge=1, description="answers to each prompt")
    choose: Literal["best_and_worst", "neighbours", "all_pairs"] = Field(
        "best_and_worst",
        description="what is compared: the best answer with the worst, the first with the second and so on, or all",
    )
    cut_off: Literal["worst", "leave_out", "as_it_is"] = Field(
        "worst",
        description="an answer that was cut off is worse than every finished one, is compared with none, or counts "
        "like any other",
    )
    min_gap: float = Field(0.0, ge=0, description="scores that differ by no more than this are alike and make no pair")

    @model_validator(mode="after")
    def _answers_can_be_compared(self) -> ComparisonSettings:
        if self.num_generations < 2:
            raise ValueError("num_generations is 1, but a pair has two answers to the same prompt; use at least 2")
        return self

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        if self.num_generations == 2:
            return {"choose": "num_generations is 2, and the two answers are compared with each other"}
        return {}


class PairSettings(ComparisonSettings):
    """The same for one set of pairs."""

    first_prompt: int = Field(
        0, ge=0, description="prompts of the seed's endless order that are passed over; earlier pairs used them"
    )


def refuse_paid_steps(terms: Sequence[RewardTermConfig]) -> None:
    """Raise `ValueError` where a term is paid step by step: whole answers are compared."""
    if any(term.name == "process" and term.arguments.get("per_step") for term in terms):
        raise ValueError("per_step pays steps in PPO and GRPO; answers that are compared need aggregation")


class PairsConfig(SamplingConfig):
    """`rlhf pairs`."""

    reference: str | None = Field(None, description="run or folder to measure the policy's KL from; null: not measured")
    pairs: PairSettings = Field(default_factory=PairSettings, description="how many answers, and which are compared")
    judges: Judges = Field((), description=JUDGES)
    rule: Literal["averaged", "agreed"] = Field("averaged", description=RULE)

    @model_validator(mode="after")
    def _judges_need_no_scores(self) -> PairsConfig:
        if self.judges:
            refuse_choice_by_scores("pairs", self.pairs)
        return self

    @property
    def lineage(self) -> dict[str, str]:
        """See `SamplingConfig.lineage`."""
        asked = {"policy": self.policy} if self.judges else super().lineage
        return asked | ({"reference": self.reference} if self.reference is not None else {})

    @model_validator(mode="after")
    def _answers_have_one_score(self) -> PairsConfig:
        refuse_paid_steps(self.rewards)
        return self

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        names = ["model.train", "model.lora", "model.gradient_checkpointing"]
        idle = dict(super().idle_keys()) | dict.fromkeys(names, "nothing trains")
        if not self.judges:
            return idle | {"rule": NOBODY_JUDGES}
        return idle | dict.fromkeys([*SCORES, "pairs.min_gap"], BY_JUDGES)


def refuse_choice_by_scores(section: str, settings: ComparisonSettings) -> None:
    """Raise `ValueError` where judges are to find the best of many answers, which takes scores."""
    if settings.choose == "best_and_worst" and settings.num_generations > 2:
        raise ValueError(
            f"{section}.choose is best_and_worst, which takes scores, but judges only compare two answers; use "
            f"{section}.choose=neighbours or all_pairs, or {section}.num_generations=2"
        )
