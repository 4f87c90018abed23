"""What `rlhf eval` compares, and on what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator, model_validator

from rlhf.data.data_config import Names, PromptDataConfig
from rlhf.eval.benchmarks import HarnessConfig, is_benchmark
from rlhf.eval.suites import SuiteConfig
from rlhf.infra.config import Config
from rlhf.infra.experiment import RunConfig
from rlhf.models.backbone import ModelConfig
from rlhf.models.decoding import GenerationConfig
from rlhf.recipes.judging import Judges


class EvaluateConfig(Config):
    """`rlhf eval`."""

    run: RunConfig = Field(default_factory=RunConfig, description="name, place, seed, device")
    models: dict[str, str] = Field(
        default={"base": "tinychat"},
        description="what is compared, in order of training: {name shown: run, folder or hub name}",
    )
    reference: str | None = Field(
        None, description="the model the others are compared with; null: sft, or else the first"
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="how base models are held")
    reward_model: str | None = Field(
        None, description="run or folder of a reward model; null: answers get no such score"
    )
    suites: Names = Field(
        (),
        description="fixed suites to run instead of the full report: their names, files, folders, FORMAT:PATH or "
        "lm-eval:TASK",
    )
    max_items: int | None = Field(None, ge=1, description="at most this many items of each suite; null: all")
    baseline: str | None = Field(
        None, description="an earlier run of suites whose results the models are compared with; null: `reference`"
    )
    tax: Names | None = Field(
        None,
        description="suites with choices (mmlu:FOLDER, lm-eval:TASK) whose accuracy before and after is the alignment "
        "tax; null: the built-in world's where the data are that world; []: none",
    )
    num_tax_items: int = Field(100, ge=1, description="at most this many questions of each of them")
    harness: HarnessConfig = Field(
        default_factory=HarnessConfig, description="how tasks of the lm-evaluation-harness (lm-eval:TASK) are asked"
    )
    data: PromptDataConfig = Field(
        default_factory=PromptDataConfig, description="prompts; tinychat has suites of its own"
    )
    num_reward_pairs: int = Field(1_000, ge=0, description="held-out pairs that the reward model is measured on")
    suite: SuiteConfig = Field(default_factory=SuiteConfig, description="how many prompts of each kind")
    generation: GenerationConfig = Field(default_factory=GenerationConfig, description="how answers are drawn")
    greedy: bool = Field(
        True, description="also answer the held-out prompts greedily; suites: answer greedily instead of sampling"
    )
    use_cache: bool = Field(
        True, description="keep answers under <output_dir>/cache and reuse those of the same weights"
    )
    histories: dict[str, str] = Field(default={}, description="runs whose training curves are shown: {title: run}")
    judges: Judges = Field((), description="further judges of the held-out answers, beside gold or reward model")
    title: str = Field("Evaluation report", description="heading of the report")

    @field_validator("suites", "tax", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _models_have_weights(self) -> EvaluateConfig:
        if self.model.random_init:
            raise ValueError("model.random_init: an evaluation compares trained weights, not new random ones")
        return self

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        in_one_piece, names_them = "an evaluation runs in one piece", "`models` names them"
        idle = dict.fromkeys(["run.max_minutes", "run.save_every_steps", "run.keep_checkpoints"], in_one_piece)
        idle |= dict.fromkeys(["run.profile", "run.profile_steps"], "an evaluation has no steps")
        idle["model.name_or_path"] = names_them
        idle |= dict.fromkeys(["model.train", "model.lora", "model.gradient_checkpointing"], "nothing trains")
        if self.reference is not None and self.reference not in self.models:
            idle["reference"] = f"`models` has only {', '.join(self.models)}"
        if len(self.models) < 2:
            idle["judges"] = "there is only one model, and nothing to compare it with"
        if self.reward_model is None:
            idle["num_reward_pairs"] = "reward_model is null"
        if self.run.dtype != "fp32":
            idle["generation.merge_adapter"] = f"run.dtype is {self.run.dtype}, and only fp32 weights are merged"
        if self.model.load_in_4bit:
            idle["generation.merge_adapter"] = "model.load_in_4bit is true, and 4-bit weights take no adapter in"
        if not any(map(is_benchmark, self.suites or self.tax_suites)):
            idle["harness"] = "no suite is named lm-eval:TASK"
        return idle | (self._idle_with_suites() if self.suites else self._idle_with_data())

    @property
    def tax_suites(self) -> tuple[str, ...]:
        """The ranked suites of the alignment tax."""
        if self.tax is None:
            return ("tinychat_choices",) if self.data.is_tinychat else ()
        return self.tax

    def _idle_with_suites(self) -> dict[str, str]:
        """Suites bring their questions along, and no training is shown."""
        reason = "`suites` names what is asked"
        idle = dict.fromkeys(["suite", "num_reward_pairs", "histories", "judges", "tax", "num_tax_items"], reason)
        idle |= {f"data.{name}": reason for name in PromptDataConfig.model_fields if name != "system_prompt"}
        if self.greedy:
            why = "suites are answered greedily (greedy=false samples)"
            idle |= dict.fromkeys(["generation.temperature", "generation.top_p", "generation.top_k"], why)
        if self.baseline is not None:
            idle["reference"] = "`baseline` names what the models are compared with"
        return idle

    def _idle_with_data(self) -> dict[str, str]:
        """The built-in world is asked through `suite`, other data through `data`."""
        idle = dict.fromkeys(["max_items", "baseline"], "`suites` is empty")
        if not self.tax_suites:
            idle["num_tax_items"] = "no suite for the alignment tax is named in `tax`"
        if self.data.is_tinychat:
            reason = "the prompts of the built-in world are chosen in `suite`; name data.train_files or data.name"
            names = ["max_samples", "max_validation_samples", "max_prompt_length", "split_seed", "families"]
            names += ["where", "validation_files", "validation_fraction"]
            return idle | dict.fromkeys([f"data.{name}" for name in names], reason)
        names = ["suite.num_ood", "suite.num_probes", "suite.seed"]
        idle |= dict.fromkeys(names, "the data are not the built-in world")
        if self.data.has_validation:
            idle["data.max_samples"] = "the prompts are those of the validation side"
        else:
            idle["num_reward_pairs"] = "data has no validation side to take pairs from"
        return idle

    @property
    def reference_name(self) -> str:
        """The model that the others are compared with: the one named, else sft, else the first."""
        names = list(self.models)
        return self.reference or ("sft" if "sft" in names else names[0])
