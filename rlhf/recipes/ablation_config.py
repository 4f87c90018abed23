"""Settings of `rlhf ablate`: which methods are compared, on what, for how long, and how they are measured."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlhf.data.data_config import DataConfig, PromptDataConfig
from rlhf.infra.config import Config
from rlhf.infra.experiment import RunConfig
from rlhf.models.backbone import ModelConfig
from rlhf.models.decoding import GenerationConfig
from rlhf.recipes.ablation_methods import METHODS
from rlhf.recipes.evaluate_config import EvaluateConfig

USUAL_METHODS = ("ppo", "grpo", "rloo", "dpo", "ipo", "kto", "online_dpo", "best_of_n")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TAKEN = ("sft", "eval", "timing")  # by what the runs are compared with, and by folders


class AblationConfig(Config):
    """`rlhf ablate`."""

    run: RunConfig = Field(default_factory=RunConfig, description="name, place, device: for all methods")
    methods: tuple[str, ...] = Field(
        USUAL_METHODS, min_length=1, description="what is compared: methods by name, and your own from `settings`"
    )
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="each method is trained with each of these")
    seconds: float = Field(
        25.0, gt=0, description="training of each method and seed: sampling, scoring and updates, without start-up"
    )
    clock: Literal["wall", "cpu"] = Field(
        "wall", description="what seconds are: those of the clock, or of one processor, for a machine that is shared"
    )
    lengths: dict[str, int] = Field(
        default={},
        description="iterations, steps, rounds or prompts by method, in place of those timed here",
    )
    settings: dict[str, dict[str, Any]] = Field(
        default={},
        description="changes to one method: {ppo: {kl: {coefficient: 0.1}}}; `config` names another file, `like` "
        "makes a method of your own from one that is there",
    )
    policy: str = Field("sft", description="what every method starts from and is compared with: a run or a folder")
    reward_model: str | None = Field(
        "reward", description="run or folder of the reward model that answers are scored by; null: none"
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="how the base is held, in every method")
    generation: GenerationConfig = Field(
        default_factory=GenerationConfig, description="how answers are drawn, in training and when measured"
    )
    pairs: DataConfig = Field(default_factory=DataConfig, description="preference pairs of the offline methods")
    prompts: PromptDataConfig = Field(
        default_factory=PromptDataConfig, description="prompts that the other methods answer"
    )
    evaluate: EvaluateConfig = Field(
        default_factory=EvaluateConfig, description="the prompts on which all are measured, and how"
    )

    @field_validator("methods", "seeds")
    @classmethod
    def _none_twice(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        twice = sorted({str(value) for value in values if values.count(value) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is there twice; name each once")
        return values

    @field_validator("seeds")
    @classmethod
    def _are_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 0 <= seed < 2**63 for seed in seeds):
            raise ValueError(f"got {list(seeds)}, expected whole numbers from 0 on")
        return seeds

    @field_validator("lengths")
    @classmethod
    def _are_lengths(cls, lengths: dict[str, int]) -> dict[str, int]:
        wrong = [name for name, length in lengths.items() if length < 1]
        if wrong:
            raise ValueError(f"{wrong[0]} is {lengths[wrong[0]]}, expected at least 1")
        return lengths

    @model_validator(mode="after")
    def _one_thread_has_one_processor(self) -> AblationConfig:
        if self.clock == "cpu" and self.run.num_threads != 1:
            raise ValueError("clock=cpu counts the seconds of one thread; set run.num_threads=1 with it")
        return self

    @model_validator(mode="after")
    def _every_name_is_known(self) -> AblationConfig:
        for name in self.methods:
            like = self.settings.get(name, {}).get("like", name)
            if like not in METHODS:
                said = f"there is no method '{like}'"
                near = difflib.get_close_matches(str(like), METHODS, n=1)
                known = f"did you mean '{near[0]}'? " if near else ""
                raise ValueError(
                    f"{said}; {known}there are {', '.join(METHODS)}, and one of your own as settings.NAME.like=METHOD"
                )
            if not _NAME.fullmatch(name) or name in _TAKEN:
                raise ValueError(f"'{name}' cannot be the name of a method, whose runs lie in a folder of that name")
        for section, names in (("lengths", self.lengths), ("settings", self.settings)):
            # Of methods that are known but not compared this time a file may say what it likes.
            known = {*METHODS, *self.methods, *(name for name in self.settings if "like" in self.settings[name])}
            strangers = [name for name in names if name not in known]
            if strangers:
                raise ValueError(f"{section}.{strangers[0]} has no effect: there is no method of that name")
        return self

    def in_effect(self) -> AblationConfig:
        """The evaluation as it will be: of all methods, by the reward model of all."""
        models = dict.fromkeys(["sft", *self.methods], "")
        evaluate = self.evaluate.model_copy(update={"models": models, "reward_model": self.reward_model})
        return self.model_copy(update={"evaluate": evaluate})

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        idle = {"run.seed": "`seeds` names them", "model.name_or_path": "`policy` names the model"}
        for section in ("run", "model", "generation"):
            idle[f"evaluate.{section}"] = f"the ablation's own section `{section}` holds for every part of it"
        idle |= dict.fromkeys(["evaluate.models", "evaluate.reference"], "each method is compared with `policy`")
        idle["evaluate.reward_model"] = "the ablation's own `reward_model` scores"
        idle["evaluate.histories"] = "the curves are those of the methods' own runs"
        idle["evaluate.num_reward_pairs"] = "policies are measured; `rlhf rm-report` measures the reward model"
        reason = "answers are measured; run `rlhf eval` on the methods' runs for suites"
        idle |= dict.fromkeys(["evaluate.suites", "evaluate.max_items", "evaluate.baseline"], reason)
        if set(self.methods) <= set(self.lengths):
            idle["seconds"] = "`lengths` says how long every method trains"
        return idle
