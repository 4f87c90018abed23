"""Which stages a config is made of, and what each of them would start from: bases, adapters and reward models.

Nothing but descriptions is read: `config.json` of a base, `adapter_config.json` and `reward_config.json` of runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.infra.config import Config
from rlhf.infra.errors import UserError
from rlhf.models.attention import MAX_SHORT
from rlhf.models.backbone import ModelConfig
from rlhf.models.ensemble import member_folders
from rlhf.models.hollow import read_shape
from rlhf.models.lora import LoRAConfig
from rlhf.models.quantized import read_quantisation
from rlhf.models.reward_model import CONFIG_FILE as REWARD_CONFIG
from rlhf.recipes.dpo import DPOConfig
from rlhf.recipes.evaluate_config import EvaluateConfig
from rlhf.recipes.grpo_config import GRPOConfig
from rlhf.recipes.kto import KTOConfig
from rlhf.recipes.online_config import OnlineConfig
from rlhf.recipes.pipeline import PipelineConfig
from rlhf.recipes.plan_online import trace_evaluation, trace_grpo, trace_ppo
from rlhf.recipes.plan_stages import (
    pretrained_shape,
    trace_dpo,
    trace_kto,
    trace_pretrain,
    trace_prm,
    trace_reward,
    trace_sft,
)
from rlhf.recipes.plan_trace import Phase, RewardStart, Start, Tracer
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.pretrain import PretrainConfig
from rlhf.recipes.prm import ProcessRewardConfig
from rlhf.recipes.reward import RewardConfig
from rlhf.recipes.sft import SFTConfig
from rlhf.recipes.stages import ADAPTER_CONFIG, POLICY, PROCESS_MODEL, REWARD_MODEL, base_of, locate

StageConfig = (
    PretrainConfig
    | SFTConfig
    | RewardConfig
    | ProcessRewardConfig
    | DPOConfig
    | KTOConfig
    | PPOConfig
    | GRPOConfig
    | EvaluateConfig
)
RewardUser = OnlineConfig | EvaluateConfig


@dataclass(frozen=True)
class Stage:
    """A stage to be planned; `prefix` stands before its keys in the file that the user wrote.

    `others` are models that an evaluation compares with the first.
    """

    name: str
    config: StageConfig
    start: Start
    rewards: tuple[RewardStart, ...] = ()
    prefix: str = ""
    others: tuple[Start, ...] = ()

    def phases(self, *, on_cpu: bool) -> tuple[list[Phase], int]:
        """The peaks of the stage's phases, as on a CPU or as on a GPU, and how many parameters train.

        On a CPU attention is written out in rows up to `MAX_SHORT`, which can take more than longer ones: both are
        tried. Loading is among the phases where more is resident in it than in any other.
        """
        tracer = self.trace(Tracer(on_cpu))
        phases = tracer.phases
        if on_cpu and tracer.widest_row > MAX_SHORT and self.config.model.attn_implementation is None:
            short = self.trace(Tracer(on_cpu, MAX_SHORT))
            phases = [max(pair, key=lambda phase: phase.num_bytes) for pair in zip(phases, short.phases, strict=True)]
        if tracer.load.num_bytes > max(phase.num_bytes for phase in phases):
            phases = [tracer.load, *phases]
        return phases, tracer.num_trained

    def trace(self, tracer: Tracer) -> Tracer:
        """Run the phases of the stage in a tracer's shadow, and return it."""
        config = self.config
        if isinstance(config, PretrainConfig):
            trace_pretrain(tracer, config, self.start)
        elif isinstance(config, SFTConfig):
            trace_sft(tracer, config, self.start)
        elif isinstance(config, RewardConfig):
            trace_reward(tracer, config, self.start)
        elif isinstance(config, ProcessRewardConfig):
            trace_prm(tracer, config, self.start)
        elif isinstance(config, DPOConfig):
            trace_dpo(tracer, config, self.start)
        elif isinstance(config, KTOConfig):
            trace_kto(tracer, config, self.start)
        elif isinstance(config, EvaluateConfig):
            trace_evaluation(tracer, config, (self.start, *self.others), self.rewards)
        elif isinstance(config, GRPOConfig):
            trace_grpo(tracer, config, self.start, self.rewards)
        else:
            trace_ppo(tracer, config, self.start, self.rewards)
        return tracer

    def changed(self, key: str, value: Any) -> Stage:
        """The stage with one setting (`section.key`) changed; reward models stay as they were made."""
        config, rewards = _changed(self.config, key.split("."), value), self.rewards
        if isinstance(config, RewardUser):  # a base that is held otherwise is no longer that of its reward models
            apart = [one.has_own_base or _beside(one.start, self.start, config).has_own_base for one in rewards]
            rewards = tuple(replace(one, has_own_base=own) for one, own in zip(rewards, apart, strict=True))
        return replace(self, config=config, rewards=rewards)

    def setting(self, key: str) -> Any:
        """The value of a setting (`section.key`); None where the stage has no such key."""
        value: Any = self.config
        for name in key.split("."):
            if not isinstance(value, Config) or name not in type(value).model_fields:
                return None
            value = dict(value)[name]
        return value


def planned_stages(config: Config, stand_in: Path | None = None) -> list[Stage]:
    """The stages of a config in order: one, or those of a pipeline.

    Raises:
        UserError: a base or a run cannot be found.
    """
    if isinstance(config, PipelineConfig):
        return _of_pipeline(config, stand_in)
    if isinstance(config, PretrainConfig):
        return [Stage("pretrain", config, Start(pretrained_shape(config.architecture)))]
    if isinstance(config, SFTConfig):
        return [Stage("sft", config, start_from(config.model.name_or_path, config.run.output_dir, stand_in))]
    if isinstance(config, RewardConfig):
        return [Stage("rm", config.in_effect(), start_from(config.backbone, config.run.output_dir, stand_in))]
    if isinstance(config, ProcessRewardConfig):
        return [Stage("prm", config.in_effect(), start_from(config.backbone, config.run.output_dir, stand_in))]
    if isinstance(config, DPOConfig):
        return [Stage("dpo", config, start_from(config.policy, config.run.output_dir, stand_in))]
    if isinstance(config, KTOConfig):
        return [Stage("kto", config, start_from(config.policy, config.run.output_dir, stand_in))]
    if isinstance(config, EvaluateConfig):
        first, *others = [start_from(one, config.run.output_dir, stand_in) for one in config.models.values()]
        named = () if config.reward_model is None else (_saved_reward(config.reward_model, config, first, stand_in),)
        return [Stage("eval", config, first, named, others=tuple(others))]
    assert isinstance(config, PPOConfig | GRPOConfig)
    start = start_from(config.policy, config.run.output_dir, stand_in)
    name = "ppo" if isinstance(config, PPOConfig) else "grpo"
    return [Stage(name, config, start, _rewards_of(config, start, None, stand_in))]


def start_from(source: str, output_dir: Path, stand_in: Path | None = None) -> Start:
    """What a run, a folder or a hub name has to start from, by the rules of `load_policy`."""
    folder = locate(source, output_dir, POLICY)
    if not (Path(folder) / ADAPTER_CONFIG).is_file():
        return Start(read_shape(folder, stand_in))
    return Start(read_shape(base_of(folder), stand_in), _saved_adapter(folder), read_quantisation(Path(folder)))


def _of_pipeline(config: PipelineConfig, stand_in: Path | None) -> list[Stage]:
    whole = config.in_effect()
    sft, output_dir = whole.sft, whole.run.output_dir
    stages = []
    if whole.pretrain is not None:
        start = Start(pretrained_shape(whole.pretrain.architecture))
        stages.append(Stage("pretrain", whole.pretrain, start, prefix="pretrain."))
    else:
        start = start_from(sft.model.name_or_path, output_dir, stand_in)
    stages.append(Stage("sft", sft, start, prefix="sft."))
    policy = _trained_policy(start, sft.model, "sft")
    compared = [policy]
    own_base = whole.reward.backbone != "sft"
    scored = start_from(whole.reward.backbone, output_dir, stand_in) if own_base else policy
    stages.append(Stage("reward", whole.reward.in_effect(), scored, prefix="reward."))
    if whole.dpo is not None:
        stages.append(Stage("dpo", whole.dpo, policy, prefix="dpo."))
        compared.append(_trained_policy(policy, whole.dpo.model, "dpo"))
    if whole.ppo is not None:
        made = _trained_reward(whole.reward, scored, policy, whole.ppo)
        stages.append(Stage("ppo", whole.ppo, policy, _rewards_of(whole.ppo, policy, made, stand_in), prefix="ppo."))
        compared.append(_trained_policy(policy, whole.ppo.model, "ppo"))
    reward = _trained_reward(whole.reward, scored, start, whole.evaluate)
    stages.append(Stage("evaluate", whole.evaluate, start, (reward,), prefix="evaluate.", others=tuple(compared)))
    return stages


def _trained_policy(start: Start, model: ModelConfig, stage: str) -> Start:
    """What a stage leaves: an adapter on the base, or a model of its own where every weight trained."""
    if model.train == "full":
        return Start(replace(start.shape, name=f"{start.shape.name} after {stage}"))
    return Start(start.shape, start.adapter or model.lora, start.held(model).quantisation)


def _trained_reward(config: RewardConfig, start: Start, policy: Start, user: RewardUser) -> RewardStart:
    """The reward model that such a stage leaves, as PPO, GRPO or an evaluation takes it up."""
    settings = config.reward
    if settings.train == "full":
        return RewardStart(Start(start.shape), has_own_base=True)
    adapter = start.adapter or (config.model.lora if settings.train == "lora" else None)
    left = Start(start.shape, adapter, start.held(config.model).quantisation)
    return _beside(left, policy, user, settings.ensemble.members)


def _rewards_of(
    config: OnlineConfig, policy: Start, made: RewardStart | None, stand_in: Path | None
) -> tuple[RewardStart, ...]:
    """The reward models behind the terms. `made` is that of a pipeline.

    Where a term names none yet, it is taken to be one with an adapter like the policy's on its base.
    """
    like = Start(policy.shape, policy.adapter or config.model.lora, policy.held(config.model).quantisation)
    found = []
    for term in config.rewards:
        source = term.model or (None if made is not None else config.reward_model)
        if term.name == "process":  # takes what a reward model takes
            source = term.model or config.process_model
            saved = None if source is None else _saved_reward(source, config, policy, stand_in, PROCESS_MODEL)
            found.append(saved or _beside(like, policy, config))
        elif term.is_learned and source is not None:
            found.append(_saved_reward(source, config, policy, stand_in))
        elif term.is_learned:
            found.append(made or _beside(like, policy, config))
    return tuple(found)


def _saved_reward(
    source: str, config: RewardUser, policy: Start, stand_in: Path | None, kind: str = REWARD_MODEL
) -> RewardStart:
    """A reward model or an ensemble of a run or a folder, or a classifier of the hub."""
    folder = Path(locate(source, config.run.output_dir, kind))
    if not (folder / REWARD_CONFIG).is_file():
        return RewardStart(Start(read_shape(str(folder), stand_in)), has_own_base=True, is_classifier=True)
    members = member_folders(folder) or [folder]
    description = json.loads((members[0] / REWARD_CONFIG).read_text(encoding="utf-8"))
    if description["train"] == "full":
        return RewardStart(Start(read_shape(str(folder), stand_in)), has_own_base=True)
    adapter = _saved_adapter(str(members[0])) if description["has_adapter"] else None
    shape = read_shape(description["base_model_name_or_path"], stand_in)
    return _beside(Start(shape, adapter, description.get("quantization", {})), policy, config, len(members))


def _beside(reward: Start, policy: Start, config: RewardUser, num_members: int = 1) -> RewardStart:
    """The reward model on the policy's base where `RewardModel.load` would put it there."""
    same = reward.shape.name == policy.shape.name
    same = same and dict(reward.quantisation) == policy.held(config.model).quantisation
    is_frozen = isinstance(config, EvaluateConfig) or config.model.train == "lora"
    return RewardStart(reward, has_own_base=not (same and is_frozen), num_members=num_members)


def _saved_adapter(folder: str) -> LoRAConfig:
    saved = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    try:
        return LoRAConfig(r=saved["r"], lora_alpha=saved["lora_alpha"], target_modules=saved["target_modules"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{folder}/{ADAPTER_CONFIG} does not say rank and layers of its adapter: {error}") from error


def _changed(config: Config, names: list[str], value: Any) -> Any:
    first, *rest = names
    below = _changed(dict(config)[first], rest, value) if rest else value
    return config.model_copy(update={first: below})
