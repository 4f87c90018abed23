"""The whole way in one command: data, (pre-training), SFT, reward model, DPO, PPO, evaluation, report.

Every stage is an ordinary run inside the pipeline's folder, made by the same recipe as when it is started alone, and
finds what the stages before it left by name. Taken up again, a pipeline skips what is finished.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, model_validator

from rlhf.data.data_config import SourceConfig
from rlhf.data.tinychat import LabellerConfig, preference_pairs, prompt_rows
from rlhf.eval.report import ReportPaths
from rlhf.infra.config import Config, given_keys
from rlhf.infra.experiment import Run, RunConfig
from rlhf.recipes.chain import chain, run_stage
from rlhf.recipes.dpo import DPOConfig, run_dpo
from rlhf.recipes.evaluate import run_evaluation
from rlhf.recipes.evaluate_config import EvaluateConfig
from rlhf.recipes.ppo import run_ppo
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.pretrain import PretrainConfig, run_pretrain
from rlhf.recipes.reward import RewardConfig, run_reward
from rlhf.recipes.sft import SFTConfig, run_sft

ConfigT = TypeVar("ConfigT", bound=Config)
SOURCE_KEYS = (
    *("name", "train_files", "validation_files", "split", "validation_split", "data_dir", "columns"),
    *("validation_fraction", "hh_as_messages"),
)


class WorldConfig(Config):
    """Data of the built-in world, written into the run before the first stage; unused where data are named."""

    num_pairs: int = Field(3_000, ge=10, description="labelled training pairs; SFT imitates their chosen side")
    num_validation_pairs: int = Field(300, ge=10, description="labelled pairs for early stopping and the best weights")
    num_prompts: int = Field(4_000, ge=10, description="prompts that PPO samples answers to")
    labeller: LabellerConfig = Field(
        default_factory=LabellerConfig, description="who prefers: temperature, noise, biases"
    )


class PipelineConfig(Config):
    """`rlhf pipeline`."""

    run: RunConfig = Field(default_factory=RunConfig, description="name, place, seed, device: for all stages")
    data: SourceConfig | None = Field(None, description="pairs for all stages; null: the built-in world")
    world: WorldConfig = Field(default_factory=WorldConfig, description="how much of the built-in world")
    pretrain: PretrainConfig | None = Field(None, description="make the base model first; null: sft.model names it")
    sft: SFTConfig = Field(default_factory=SFTConfig, description="supervised fine-tuning")
    reward: RewardConfig = Field(default_factory=RewardConfig, description="reward model, on the SFT policy's trunk")
    dpo: DPOConfig | None = Field(
        default_factory=DPOConfig, description="direct preference optimisation; null: left out"
    )
    ppo: PPOConfig | None = Field(default_factory=PPOConfig, description="PPO against the reward model; null: left out")
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, description="the comparison and its report")

    @model_validator(mode="after")
    def _adapters_keep_their_base(self) -> PipelineConfig:
        if self.reward.model.random_init and "backbone" not in given_keys(self.reward):
            raise ValueError("reward.model.random_init=true would put the SFT stage's adapter on random weights")
        return self

    def in_effect(self) -> PipelineConfig:
        """Every stage with the run, the data and the predecessors that the pipeline gives it."""
        update: dict[str, Any] = {}
        for name, stage in self._stages().items():
            changes: dict[str, Any] = {"run": self.run}
            if self.data is not None:
                shared = {key: value for key, value in self.data if key in given_keys(self.data)}
                changes["data"] = stage.data.model_copy(update=shared)
            elif name != "evaluate":
                files = {"train_files": ("world.jsonl",), "validation_files": ("world_validation.jsonl",)}
                changes["data"] = stage.data.model_copy(update=files)
            update[name] = stage.model_copy(update=changes)
        models = ["base", "sft", *(name for name in ("dpo", "ppo") if name in update)]
        update["evaluate"] = update["evaluate"].model_copy(
            update={"models": dict.fromkeys(models, ""), "reward_model": "reward", "suites": ()}
        )
        if "backbone" not in given_keys(self.reward):
            update["reward"] = update["reward"].model_copy(update={"backbone": "sft"})
        if "ppo" in update and "reward_model" not in given_keys(update["ppo"]):
            update["ppo"] = update["ppo"].model_copy(update={"reward_model": "reward"})
        return self.model_copy(update=update)

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        idle = {} if self.data is None else {"world": "data names the rows"}
        for name in self._stages():
            idle[f"{name}.run"] = "the pipeline's own section `run` holds for every stage"
            idle |= self._idle_data_keys(name)
        if self.data is None:
            idle["reward.use_margin"] = "pairs of the built-in world have no margins"
        if self.pretrain is not None:
            idle["sft.model.name_or_path"] = "`pretrain` makes the base model"
        idle |= dict.fromkeys(["dpo.policy", "ppo.policy"], "the SFT stage makes the policy")
        reason = "a pipeline ends with the full report; run `rlhf eval` on its stages for suites"
        idle |= dict.fromkeys(["evaluate.suites", "evaluate.max_items", "evaluate.baseline"], reason)
        compared = ["evaluate.models", "evaluate.reward_model", "evaluate.histories"]
        return idle | dict.fromkeys(compared, "it compares the stages of the pipeline") | self._idle_adapter_keys()

    def _idle_data_keys(self, stage: str) -> dict[str, str]:
        """Sources of one stage that the pipeline's data, or the built-in world, stand before."""
        if self.data is not None:
            names, reason = given_keys(self.data), "the pipeline's own section `data` says it for every stage"
        elif stage != "evaluate":
            names = SOURCE_KEYS
            reason = "every stage reads the built-in world; name other rows in the pipeline's own section `data`"
        else:
            return {}
        return {f"{stage}.data.{name}": reason for name in names}

    def _idle_adapter_keys(self) -> dict[str, str]:
        """Shapes that differ from the SFT adapter's, of which later stages train a copy."""
        if self.sft.model.train == "full":
            return {}
        copies = {"dpo": self.dpo, "ppo": self.ppo}
        copies |= {"reward": self.reward} if "backbone" not in given_keys(self.reward) else {}
        return {
            f"{name}.model.lora.{key}": f"the adapter is a copy of the SFT stage's, where it is {trained}"
            for name, stage in copies.items()
            if stage is not None
            for (key, value), (_, trained) in zip(stage.model.lora, self.sft.model.lora, strict=True)
            # No dropout is a choice of its own.
            if value != trained and not (key == "lora_dropout" and value == 0)
        }

    def _stages(self) -> dict[str, Any]:
        stages = {"pretrain": self.pretrain, "sft": self.sft, "reward": self.reward, "dpo": self.dpo, "ppo": self.ppo}
        return {name: stage for name, stage in stages.items() if stage is not None} | {"evaluate": self.evaluate}


def run_pipeline(config: PipelineConfig, resume: Path | None = None) -> tuple[Run, ReportPaths | None]:
    """Run (or take up) every stage; returns the pipeline's run and its report, None if time ran out before it.

    Raises:
        UserError: a stage cannot start.
        Stopped: Ctrl-C; the command to go on is in the message.
    """
    report: ReportPaths | None = None
    run = Run.open(resume) if resume is not None else Run.create("pipeline", config, config.run)
    with chain(run):
        config = with_sources(config, run.folder)
        for name, start in stages(config).items():
            if run.should_stop():
                break
            run.logger.info(f"stage {name}")
            run_stage(name, start, run)
        else:
            report = evaluated(config, run)
    return run, report


def stages(config: PipelineConfig) -> dict[str, Callable[[Path | None], Run]]:
    """The training stages in order; each takes the folder to resume, or None."""
    sft, reward, dpo, ppo, pretrain = config.sft, config.reward, config.dpo, config.ppo, config.pretrain
    made: dict[str, Callable[[Path | None], Run]] = {}
    if pretrain is not None:
        made["pretrain"] = lambda resume: run_pretrain(pretrain, resume)
    made["sft"] = lambda resume: run_sft(sft, resume)
    made["reward"] = lambda resume: run_reward(reward, resume)
    if dpo is not None:
        made["dpo"] = lambda resume: run_dpo(dpo, resume)
    if ppo is not None:
        made["ppo"] = lambda resume: run_ppo(ppo, resume)
    return made


def with_sources(config: PipelineConfig, folder: Path) -> PipelineConfig:
    """The config with every stage's run, data and predecessors filled in."""
    names = {"sft": "sft", "reward": "reward", "dpo": "dpo", "ppo": "ppo", "evaluate": "eval", "pretrain": "pretrain"}
    files = write_world(config, folder) if config.data is None else None
    update: dict[str, Any] = {}
    for section, name in names.items():
        stage = getattr(config, section)
        if stage is None:
            continue
        run = stage.run.model_copy(
            update={
                **config.run.model_dump(exclude={"name", "output_dir", "overwrite"}),
                "name": name,
                "output_dir": folder,
                "overwrite": True,
            }
        )
        changes: dict[str, Any] = {"run": run}
        if files is None:
            changes["data"] = _with_pairs(stage.data, config.data)
        elif section != "evaluate":
            changes["data"] = stage.data.model_copy(update=files["prompts" if section == "ppo" else "pairs"])
        update[section] = stage.model_copy(update=changes)
    return config.model_copy(update=_chained(update))


def write_world(config: PipelineConfig, folder: Path) -> dict[str, dict[str, tuple[str, ...]]]:
    """Draw the built-in world's pairs and prompts into JSONL files, once; returns the data keys that name them."""
    world, seed = config.world, config.run.seed
    makers: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "pairs": lambda: preference_pairs("train", world.num_pairs, seed, world.labeller),
        "validation_pairs": lambda: preference_pairs("validation", world.num_validation_pairs, seed, world.labeller),
        "prompts": lambda: prompt_rows("train", world.num_prompts, seed),
        "validation_prompts": lambda: prompt_rows("validation", world.num_validation_pairs, seed),
    }
    paths = {name: folder / "data" / f"{name}.jsonl" for name in makers}
    for name, make in makers.items():
        if not paths[name].is_file():
            paths[name].parent.mkdir(exist_ok=True)
            partial = paths[name].with_suffix(".part")
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in make())
            partial.replace(paths[name])
    return {
        kind: {"train_files": (str(paths[kind]),), "validation_files": (str(paths[f"validation_{kind}"]),)}
        for kind in ("pairs", "prompts")
    }


def evaluated(config: PipelineConfig, run: Run) -> ReportPaths:
    """All models side by side, on prompts that no stage has seen."""
    run.logger.info("stage eval")
    models = {"base": config.sft.model.name_or_path, "sft": "sft"}
    models |= {name: name for name in ("dpo", "ppo") if getattr(config, name) is not None}
    shown = {"pretrain": "pretrain"} if config.pretrain is not None else {}
    shown |= {"sft": "sft", "reward": "reward"} | {name: name for name in ("dpo", "ppo") if name in models}
    evaluation = config.evaluate.model_copy(update={"models": models, "reward_model": "reward", "histories": shown})
    return run_evaluation(evaluation)[1]


def _chained(update: Mapping[str, Any]) -> dict[str, Any]:
    """Each stage starts from the one before it: SFT from the pre-trained base, the others from SFT."""
    chained = dict(update)
    if "pretrain" in chained:
        model = chained["sft"].model.model_copy(update={"name_or_path": "pretrain"})
        chained["sft"] = chained["sft"].model_copy(update={"model": model})
    chained["reward"] = _defaulting(chained["reward"], "backbone", "sft")
    if "dpo" in chained:
        chained["dpo"] = chained["dpo"].model_copy(update={"policy": "sft"})
    if "ppo" in chained:
        chained["ppo"] = _defaulting(chained["ppo"].model_copy(update={"policy": "sft"}), "reward_model", "reward")
    return chained


def _defaulting(stage: ConfigT, key: str, value: str) -> ConfigT:
    """Fill a key that the user left alone; an encoder of one's own as reward backbone stays."""
    return stage if key in given_keys(stage) else stage.model_copy(update={key: value})


def _with_pairs(stage_data: SourceConfig, shared: SourceConfig | None) -> SourceConfig:
    assert shared is not None
    keys = given_keys(shared) & set(SourceConfig.model_fields)
    return stage_data.model_copy(update={key: getattr(shared, key) for key in keys})
