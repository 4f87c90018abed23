"""The methods that `rlhf ablate` knows: which recipe each is, which file of settings it has, what its length counts.

No recipe is copied: a method is a config of a recipe that stands alone, with the ablation's own policy, rows and reward
model in it, and as many steps as the time allows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf.data.data_config import SourceConfig
from rlhf.infra.config import Config, given_keys, load_config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run, RunConfig
from rlhf.infra.yaml_tree import merged
from rlhf.recipes.best_of_n import BEST, run_best_of_n
from rlhf.recipes.best_of_n_config import BestOfNConfig
from rlhf.recipes.dpo import DPOConfig, run_dpo
from rlhf.recipes.grpo import run_grpo
from rlhf.recipes.grpo_config import GRPOConfig
from rlhf.recipes.kto import KTOConfig, run_kto
from rlhf.recipes.online_dpo import run_online_dpo
from rlhf.recipes.online_dpo_config import OnlineDPOConfig
from rlhf.recipes.ppo import run_ppo
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.sft import SFTConfig, run_sft

Start = Callable[[Path | None], Run]
IMITATION = "configs/sft_best_of_n.yaml"
FILE, LIKE, SFT = "config", "like", "sft"  # of a method's settings, beside those of its recipe


@dataclass(frozen=True)
class Recipe:
    """A recipe as the ablation drives it.

    `reads` names the section of rows it learns from; `unit` is what its length counts, `trial` the shortest that is
    timed, `at_length` sets the length, which is in the keys `length_keys`.
    """

    config: type[Any]
    run: Callable[[Any, Path | None], Run]
    reads: Literal["pairs", "prompts"]
    unit: str
    trial: int
    length_keys: tuple[str, ...]
    at_length: Callable[[Any, int], Any]


@dataclass(frozen=True)
class Method:
    """A recipe with a file of settings, and what it sets besides."""

    recipe: str
    file: str
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shared:
    """What all methods have in common: the start, the scores, the rows, how models are held and answers drawn."""

    policy: str
    reward_model: str | None
    sections: Mapping[str, Config]  # pairs, prompts, model, generation


@dataclass(frozen=True)
class Arm:
    """A method ready to be run at any length; `imitation` is what follows where answers are chosen to be imitated."""

    name: str
    recipe: Recipe
    config: Any
    imitation: SFTConfig | None = None

    @property
    def stage_names(self) -> list[str]:
        """The names of the method's runs, in order."""
        return [self.name] if self.imitation is None else [self.name, f"{self.name}_{SFT}"]

    def stages(self, place: Path, run: RunConfig, length: int) -> dict[str, Start]:
        """The runs of the method inside a folder, in order; the last one leaves the policy behind."""
        config = self.recipe.at_length(self.config, length)
        config = config.model_copy(update={"run": _named(run, place, self.name)})
        made: dict[str, Start] = {self.name: lambda resume: self.recipe.run(config, resume)}
        if self.imitation is not None:
            name, kept = self.stage_names[-1], (str(place / self.name / BEST),)
            data = self.imitation.data.model_copy(update={"train_files": kept})
            sft = self.imitation.model_copy(update={"run": _named(run, place, name), "data": data})
            made[name] = lambda resume: run_sft(sft, resume)
        return made


def make_arm(name: str, settings: Mapping[str, Any], shared: Shared) -> Arm:
    """The method of that name, or like the one that its settings name, with these settings.

    Raises:
        UserError: a setting is unknown, without effect, or not the method's to decide.
    """
    own = {key: value for key, value in settings.items() if key not in (FILE, LIKE, SFT)}
    method = METHODS[settings.get(LIKE, name)]
    recipe = RECIPES[method.recipe]
    _refuse_reserved(name, own, recipe)
    changes = merged(method.changes, own)
    loaded = _loaded(name, recipe.config, settings.get(FILE, method.file), changes)
    config = _filled(loaded, recipe, changes, shared)
    if method.recipe != "best_of_n":
        _refuse_imitation(name, settings)
        return Arm(name, recipe, config)
    of_sft = settings.get(SFT, {})
    _refuse_reserved(f"{name}.{SFT}", of_sft, None)
    imitation = _loaded(f"{name}.{SFT}", SFTConfig, of_sft.get(FILE, IMITATION), _without(of_sft, FILE))
    model = _with_shared(imitation.model, shared.sections["model"], of_sft.get("model", {}))
    model = model.model_copy(update={"name_or_path": shared.policy})
    imitation = SFTConfig().model_copy(update=dict(imitation) | {"model": model})
    # What an earlier run sampled would come for nothing, and time is what is compared.
    return Arm(name, recipe, config.model_copy(update={"use_cache": False}), imitation)


def _loaded(name: str, cls: type[Any], file: str, changes: Mapping[str, Any]) -> Any:
    try:
        return load_config(cls, file, [f"{key}={json.dumps(value)}" for key, value in _leaves(changes)])
    except UserError as error:
        raise UserError(f"settings.{name}: {error}") from None


def _filled(loaded: Any, recipe: Recipe, own: Mapping[str, Any], shared: Shared) -> Any:
    """The config with everything that methods share; nothing counts as set by the user, whose keys were examined."""
    values = dict(loaded)
    rows: SourceConfig = shared.sections[recipe.reads]  # type: ignore[assignment]
    update: dict[str, Any] = {"policy": shared.policy, "data": _with_keys(rows, loaded.data, own.get("data", {}))}
    for section in ("model", "generation"):
        if section in values:
            update[section] = _with_shared(values[section], shared.sections[section], own.get(section, {}))
    if "reward_model" in values and "reward_model" not in own:
        update["reward_model"] = shared.reward_model
    return recipe.config().model_copy(update=values | update)


def _with_shared(section: Any, shared: Config, own: Mapping[str, Any]) -> Any:
    """A method's section under what the ablation says for all, and the method's own keys above that."""
    given = {key.partition(".")[0] for key in given_keys(shared)} - set(own)
    return section.model_copy(update={key: dict(shared)[key] for key in given})


def _with_keys(section: Any, other: Any, keys: Mapping[str, Any]) -> Any:
    return section.model_copy(update={key: dict(other)[key] for key in keys})


def _refuse_reserved(name: str, own: Mapping[str, Any], recipe: Recipe | None) -> None:
    reserved = dict.fromkeys(["run"], "the ablation's own section `run` holds for every method")
    reserved["policy"] = "every method starts from the ablation's own `policy`"
    if recipe is None:
        reserved |= {"data.train_files": "it imitates what was kept", "model.name_or_path": reserved.pop("policy")}
    else:
        reason = f"seconds, or lengths.{name}, say how long it trains"
        reserved |= dict.fromkeys(recipe.length_keys, reason)
    for key, _ in _leaves(own):
        for taken, reason in reserved.items():
            if f"{key}.".startswith(f"{taken}."):
                raise UserError(f"settings.{name}.{key} has no effect here because {reason}; remove it")


def _refuse_imitation(name: str, settings: Mapping[str, Any]) -> None:
    if SFT in settings:
        raise UserError(f"settings.{name}.{SFT} has no effect: only best_of_n imitates what it kept; remove it")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of everything in the tree that is not itself a mapping with something in it."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _without(tree: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if name != key}


def _named(run: RunConfig, place: Path, name: str) -> RunConfig:
    return run.model_copy(update={"name": name, "output_dir": place})


def _iterations(section: str) -> Callable[[Any, int], Any]:
    def at_length(config: Any, length: int) -> Any:
        settings = dict(config)[section].model_copy(update={"num_iterations": length})
        return config.model_copy(update={section: settings})

    return at_length


def _steps(config: Any, length: int) -> Any:
    # An epoch has at least one step, so as many epochs are never too few.
    training = config.training.model_copy(update={"max_steps": length, "num_train_epochs": float(length)})
    return config.model_copy(update={"training": training})


def _rounds(config: Any, length: int) -> Any:
    return config.model_copy(update={"rounds": config.rounds.model_copy(update={"num_rounds": length})})


def _prompts(config: Any, length: int) -> Any:
    return config.model_copy(update={"data": config.data.model_copy(update={"max_samples": length})})


STEPS = ("training.max_steps", "training.num_train_epochs")
RECIPES: dict[str, Recipe] = {
    "ppo": Recipe(PPOConfig, run_ppo, "prompts", "iterations", 2, ("ppo.num_iterations",), _iterations("ppo")),
    "grpo": Recipe(GRPOConfig, run_grpo, "prompts", "iterations", 2, ("grpo.num_iterations",), _iterations("grpo")),
    "dpo": Recipe(DPOConfig, run_dpo, "pairs", "steps", 20, STEPS, _steps),
    "kto": Recipe(KTOConfig, run_kto, "pairs", "steps", 20, STEPS, _steps),
    "online_dpo": Recipe(OnlineDPOConfig, run_online_dpo, "prompts", "rounds", 1, ("rounds.num_rounds",), _rounds),
    "best_of_n": Recipe(BestOfNConfig, run_best_of_n, "prompts", "prompts", 32, ("data.max_samples",), _prompts),
}
_PAIRS, _ANSWERS = "configs/dpo_tinychat.yaml", "configs/kto_tinychat.yaml"
METHODS: dict[str, Method] = {
    "ppo": Method("ppo", "configs/ppo.yaml"),
    "grpo": Method("grpo", "configs/grpo.yaml"),
    "rloo": Method("grpo", "configs/rloo.yaml"),
    "dr_grpo": Method("grpo", "configs/dr_grpo.yaml"),
    "dapo": Method("grpo", "configs/dapo.yaml"),
    "dpo": Method("dpo", _PAIRS),
    "cdpo": Method("dpo", _PAIRS, {"loss": "cdpo"}),
    "robust": Method("dpo", _PAIRS, {"loss": "robust"}),
    "hinge": Method("dpo", _PAIRS, {"loss": "hinge"}),
    "ipo": Method("dpo", _PAIRS, {"loss": "ipo"}),
    "ipo_summed": Method("dpo", _PAIRS, {"loss": "ipo_summed"}),
    "simpo": Method("dpo", _PAIRS, {"loss": "simpo"}),
    "orpo": Method("dpo", _PAIRS, {"loss": "orpo"}),
    "kto": Method("kto", _ANSWERS),
    "online_dpo": Method("online_dpo", "configs/online_dpo.yaml"),
    "best_of_n": Method("best_of_n", "configs/best_of_n.yaml"),
}
