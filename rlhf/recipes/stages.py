"""How one stage finds what another left: policies and reward models by run name, folder or hub name.

A run that trains a policy keeps it in `<run>/policy` (adapter in PEFT's format with the tokenizer, or a whole model),
one that trains a reward model in `<run>/reward_model`, a process reward model in `<run>/process_reward_model`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rlhf.infra.config import explicit_keys, given_keys
from rlhf.infra.durable import written_aside
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import RunConfig
from rlhf.infra.run_folder import RUN_INFO, find_run
from rlhf.models.adapter_files import save_adapter
from rlhf.models.backbone import BUNDLED_MODEL, Backbone, ModelConfig
from rlhf.models.lora import LoRAConfig, merge_lora_weights
from rlhf.models.policy import Policy
from rlhf.models.process_reward_model import ProcessRewardModel
from rlhf.models.quantized import read_quantisation, write_quantisation
from rlhf.models.reference import Reference
from rlhf.models.reward_model import AnyReward, RewardEnsemble, load_reward_model
from rlhf.models.scoring import same_base
from rlhf.models.value_head import ValueHead
from rlhf.rewards.combination import CombinationConfig
from rlhf.rewards.learned import LearnedReward, same_tokenizer
from rlhf.rewards.process import process_reward, process_term_config
from rlhf.rewards.protocol import (
    CombinedReward,
    RewardFunction,
    RewardTerm,
    RewardTermConfig,
    StepwiseReward,
    load_function,
)
from rlhf.rewards.rules import RULES, make_rule
from rlhf.rewards.verifiers import VERIFIERS

POLICY, REWARD_MODEL, PROCESS_MODEL = "policy", "reward_model", "process_reward_model"
ADAPTER_CONFIG = "adapter_config.json"
NO_REWARD_MODEL = "the reward `model` needs reward_model=<run, folder or hub name>, or use rules alone"
NO_PROCESS_MODEL = "the reward `process` needs process_model=<run or folder>, or use other rewards"
REFERENCE = "reference"  # the name of its adapter, where it is not what the policy starts from


@dataclass(frozen=True)
class LoadedPolicy:
    """A backbone and the adapter on it that makes it the policy; None is the base as it is."""

    backbone: Backbone
    adapter: str | None


def locate(source: str, output_dir: Path, kind: str) -> str:
    """The folder behind a run's name or path, or the source itself where it is a model folder or a hub name.

    Raises:
        UserError: the run has not produced what is asked of it.
    """
    if source == BUNDLED_MODEL:
        return source
    for place in (Path(source), output_dir / source):
        if (place / RUN_INFO).is_file():
            if not (place / kind).is_dir():
                raise UserError(
                    f"run '{place}' holds no {kind.replace('_', ' ')}: let it finish first, or name another run"
                )
            return str(place / kind)
        if place.is_dir():
            return str(place)
    # owner/name is how hubs spell a model; anything else that is not here can only have been meant as a run.
    return source if source.count("/") == 1 else str(find_run(source, output_dir))


def load_policy(
    source: str,
    config: ModelConfig,
    output_dir: Path,
    device: torch.device,
    dtype: str = "fp32",
    adapter: str = "sft",
    base: str | None = None,
) -> LoadedPolicy:
    """Load base and adapter of a policy; `config` says how the base is to be held, the source which base it is.

    An adapter gets its base as it was trained on, in 4 bits or not, unless `config` was told otherwise. Where every
    weight is to train, the adapter is merged into the original base: it could not be told from it afterwards. `base`
    takes the place of the base that the adapter names.
    """
    folder = locate(source, output_dir, POLICY)
    if not (Path(folder) / ADAPTER_CONFIG).is_file():
        backbone = Backbone.load(config.model_copy(update={"name_or_path": folder}), dtype, device)
        return LoadedPolicy(backbone, None)
    base = base or base_of(folder)
    has_tokenizer = (Path(folder) / "tokenizer_config.json").is_file()
    place = {"name_or_path": base, "tokenizer": folder if has_tokenizer else config.tokenizer}
    if config.train == "lora":
        refuse_other_shape(config.lora, folder)
        config = held_as_trained(config, read_quantisation(Path(folder)))
    backbone = Backbone.load(config.model_copy(update=place), dtype, device)
    backbone.notes += _notes_on_the_base(backbone, folder)
    backbone.load_adapter(folder, adapter)
    if config.train == "full":
        merge_lora_weights(backbone.model, adapter)
        return LoadedPolicy(backbone, None)
    return LoadedPolicy(backbone, adapter)


def refuse_other_shape(asked: LoRAConfig, folder: str) -> None:
    """An adapter that is there keeps its shape: raise `UserError` when the user set another under `model.lora`."""
    found = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    for name in sorted(explicit_keys(asked)):
        wanted, there = dict(asked)[name], found.get(name)
        is_the_same = set(wanted) == set(there or []) if isinstance(wanted, list) else wanted == there
        if wanted is not None and not is_the_same:
            raise UserError(
                f"config key 'model.lora.{name}' is {wanted}, but training goes on with the adapter in {folder}, where "
                f"it is {there}; remove the key, or start from a model without an adapter"
            )


def held_as_trained(config: ModelConfig, recorded: Mapping[str, Any]) -> ModelConfig:
    """The config with the quantisation that an adapter was trained under, in the keys that nobody set."""
    given = given_keys(config)
    if "load_in_4bit" in given and not config.load_in_4bit:
        return config
    return config.model_copy(update={name: value for name, value in recorded.items() if name not in given})


def _notes_on_the_base(backbone: Backbone, adapter_folder: str) -> list[str]:
    trained_on, held = read_quantisation(Path(adapter_folder)), backbone.quantisation
    if trained_on == held:
        return []
    words = [", ".join(f"{name}={value}" for name, value in s.items()) or "as it is" for s in (trained_on, held)]
    return [f"the adapter in {adapter_folder} was trained on its base {words[0]}, and stands on it {words[1]} here"]


def save_policy(backbone: Backbone, adapter: str | None, folder: Path) -> None:
    """Write an adapter in PEFT's format, or the whole model where there is none; the tokenizer beside it.

    The folder gets its name when it is whole, so that no other stage finds half a policy.
    """
    with written_aside(folder) as aside:
        if adapter is None:
            backbone.model.save_pretrained(aside)
        else:
            save_adapter(backbone.model, adapter, aside, backbone.name, task_type="CAUSAL_LM")
            write_quantisation(aside, backbone.quantisation)
        backbone.tokenizer.save_pretrained(aside)


@dataclass(frozen=True)
class StartedPolicy:
    """A policy that is ready to train, the reference it started as, and the value head where one was asked for."""

    policy: Policy
    reference: Reference


def start_policy(
    source: str,
    config: ModelConfig,
    run: RunConfig,
    device: torch.device,
    value_head: Literal["linear", "mlp"] | None = None,
    value_adapter: bool = False,
    reference: str | None = None,
) -> StartedPolicy:
    """Policy and reference from one source, on one frozen base wherever adapters are trained.

    The policy's adapter begins as a copy of the source's; a source without one is its own reference, and the policy
    gets a fresh adapter. Under full fine-tuning the reference is a second, frozen model. `reference` names another
    source for it than the one that the policy starts from.
    """
    loaded = load_policy(source, config, run.output_dir, device, run.dtype)
    other = None if reference is None else _other_reference(reference, loaded.backbone, config, run, device)
    policy = policy_on(loaded, config, run, device, value_head, value_adapter)
    if other is not None:
        return StartedPolicy(policy, other)
    if config.train == "full":
        loaded = load_policy(source, config, run.output_dir, device, run.dtype)
    return StartedPolicy(policy, Reference(loaded.backbone, loaded.adapter))


def _other_reference(
    source: str, backbone: Backbone, config: ModelConfig, run: RunConfig, device: torch.device
) -> Reference:
    """A reference of its own source: on the policy's base where that is frozen and the same, else on another."""
    folder = locate(source, run.output_dir, POLICY)
    has_adapter = (Path(folder) / ADAPTER_CONFIG).is_file()
    if config.train == "lora" and same_base(backbone.name, base_of(folder) if has_adapter else folder):
        if not has_adapter:
            return Reference(backbone, None)
        if read_quantisation(Path(folder)) == backbone.quantisation:
            backbone.load_adapter(folder, REFERENCE)
            return Reference(backbone, REFERENCE)
    # The shape of its adapter is its own affair.
    as_it_is = config.model_copy(update={"lora": LoRAConfig()})
    loaded = load_policy(source, as_it_is, run.output_dir, device, run.dtype, REFERENCE)
    if not same_tokenizer(loaded.backbone.tokenizer, backbone.tokenizer):
        raise UserError(
            f"the reference '{source}' has another tokenizer than the policy, so their log-probabilities cannot be "
            "compared; name a reference that the policy comes from"
        )
    return Reference(loaded.backbone, loaded.adapter)


def start_policy_alone(source: str, config: ModelConfig, run: RunConfig, device: torch.device) -> Policy:
    """The policy of `start_policy` for a method that asks no reference: under full fine-tuning half the memory."""
    return policy_on(load_policy(source, config, run.output_dir, device, run.dtype), config, run, device)


def policy_on(
    loaded: LoadedPolicy,
    config: ModelConfig,
    run: RunConfig,
    device: torch.device,
    value_head: Literal["linear", "mlp"] | None = None,
    value_adapter: bool = False,
) -> Policy:
    """The policy of `start_policy` on a base, and the adapter to start from, that are loaded."""
    backbone = loaded.backbone
    torch.manual_seed(run.seed)
    head = None if value_head is None else ValueHead(backbone.width, value_head).to(device)
    if config.train == "full":
        backbone.model.requires_grad_(True)
        return Policy(backbone, None, head)
    trained = ["policy"] + (["value"] if value_adapter else [])
    for name in trained:
        if loaded.adapter is None:
            backbone.add_adapter(name, config.lora)
        else:
            backbone.copy_adapter(loaded.adapter, name)
    backbone.train_only(trained)
    return Policy(backbone, "policy", head, "value" if value_adapter else None)


def build_reward(
    terms: Sequence[RewardTermConfig],
    reward_model: str | None,
    output_dir: Path,
    backbone: Backbone,
    system_prompt: str | None = None,
    process_model: str | None = None,
    combination: CombinationConfig | None = None,
) -> CombinedReward:
    """Rules, verifiers, functions and reward models; a reward model of the same base joins the policy's backbone.

    Raises:
        UserError: a name means nothing, or a reward model is asked for and none is named.
    """
    check_reward_names(terms, reward_model, process_model)
    made, rules = [], RULES | VERIFIERS
    for place, term in enumerate(terms):
        if term.name == "process":
            process_term_config(term.arguments)
            judge = load_process_model(term.model or process_model, output_dir, backbone, f"process_of_term_{place}")
            function: RewardFunction | StepwiseReward = process_reward(judge, term.arguments, system_prompt)
        elif term.is_learned:
            if term.model is not None and term.name in rules:
                raise UserError(
                    f"the reward '{term.name}' is a rule; give the term with model={term.model} another name"
                )
            # Adapters of several reward models stand on the one base.
            adapter = "reward" if place == 0 else f"reward_of_term_{place}"
            model = load_term_model(term, reward_model, output_dir, backbone, adapter)
            function = LearnedReward(model, backbone.tokenizer, system_prompt)
        elif term.name in rules:
            function = make_rule(term.name, term.arguments, rules)
        else:
            function = load_function(term.name)
        made.append(RewardTerm(term.name, function, term.weight))
    return CombinedReward(made, combination)


def check_reward_names(
    terms: Sequence[RewardTermConfig], reward_model: str | None, process_model: str | None = None
) -> None:
    """Raise `UserError` where a term's name means nothing, or a reward model is asked for and none is named."""
    rules = RULES | VERIFIERS
    for term in terms:
        if term.name == "process":
            if term.model is None and process_model is None:
                raise UserError(NO_PROCESS_MODEL)
        elif term.is_learned:
            if term.model is None and reward_model is None:
                raise UserError(NO_REWARD_MODEL)
        elif term.name not in rules and ":" not in term.name:
            raise UserError(
                f"no reward '{term.name}': take `model`, `process`, module:function, or one of "
                f"{', '.join(sorted(rules))}"
            )


def load_process_model(
    source: str | None, output_dir: Path, backbone: Backbone, adapter: str = "process"
) -> ProcessRewardModel:
    """The process reward model of a run or folder, on the backbone where it has that base; UserError without one."""
    if source is None:
        raise UserError(NO_PROCESS_MODEL)
    folder = Path(locate(source, output_dir, PROCESS_MODEL))
    return ProcessRewardModel.load(folder, backbone, adapter, backbone.dtype_name)


def load_term_model(
    term: RewardTermConfig, reward_model: str | None, output_dir: Path, backbone: Backbone, adapter: str = "reward"
) -> AnyReward:
    """The reward model behind a term, its own or the recipe's; an ensemble combines its members as the term says.

    Raises:
        UserError: no model is named, or the term says how to combine the members of what has none.
    """
    source = term.model or reward_model
    if source is None:
        raise UserError(NO_REWARD_MODEL)
    model = load_reward_model(locate(source, output_dir, REWARD_MODEL), backbone, backbone.dtype_name, adapter)
    if isinstance(model, RewardEnsemble):
        model.rule = term.rule or model.rule
        model.penalty = model.penalty if term.penalty is None else term.penalty
        if term.penalty is not None and model.rule != "penalised":
            raise UserError(
                f"the reward '{term.name}' has a penalty, but the rule of the ensemble '{source}' is {model.rule}; "
                "give the term rule: penalised too"
            )
    elif term.rule is not None or term.penalty is not None:
        raise UserError(
            f"the reward '{term.name}' says how an ensemble is combined, but '{source}' is a single reward model; "
            "train one with `rlhf rm reward.ensemble.members=4`, or leave rule and penalty out"
        )
    return model


class PolicyShelf:
    """Several policies side by side; those on the same base share it, each under an adapter name of its own."""

    def __init__(self, config: ModelConfig, output_dir: Path, device: torch.device, dtype: str) -> None:
        # Nothing trains here; a base with one adapter merged into it could not carry the others.
        self.config = config.model_copy(update={"train": "lora"})
        self.output_dir, self.device, self.dtype = output_dir, device, dtype
        self._backbones: dict[str, Backbone] = {}
        self._count = 0

    def load(self, source: str) -> LoadedPolicy:
        """The policy of a run, folder or hub name; its base is loaded once however many policies stand on it."""
        folder = locate(source, self.output_dir, POLICY)
        if not (Path(folder) / ADAPTER_CONFIG).is_file():
            if folder not in self._backbones:
                self._backbones[folder] = Backbone.load(
                    self.config.model_copy(update={"name_or_path": folder}), self.dtype, self.device
                )
            return LoadedPolicy(self._backbones[folder], None)
        base = f"{base_of(folder)} {held_as_trained(self.config, read_quantisation(Path(folder))).quantisation}"
        self._count += 1
        name = f"policy_{self._count}"
        if base in self._backbones:
            self._backbones[base].load_adapter(folder, name)
            return LoadedPolicy(self._backbones[base], name)
        loaded = load_policy(source, self.config, self.output_dir, self.device, self.dtype, name)
        self._backbones[base] = loaded.backbone
        return loaded


def base_of(adapter_folder: str) -> str:
    """Name or folder of the base model that an adapter was trained on."""
    description = json.loads((Path(adapter_folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return str(description["base_model_name_or_path"])
