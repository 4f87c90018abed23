"""The two sides of a comparison: whose configuration, for which recipe, with what forced upon it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.infra.config import Config, load_config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run, RunConfig
from rlhf.recipes.dpo import run_dpo
from rlhf.recipes.grpo import run_grpo
from rlhf.recipes.kto import run_kto
from rlhf.recipes.ppo import run_ppo
from rlhf.recipes.pretrain import run_pretrain
from rlhf.recipes.prm import run_prm
from rlhf.recipes.resume import config_class
from rlhf.recipes.reward import run_reward
from rlhf.recipes.sft import run_sft

SIDES = ("A", "B")
# What trains in steps, and can be measured.
TRAINERS: Mapping[str, Callable[..., Run]] = {
    "pretrain": run_pretrain,
    "sft": run_sft,
    "reward": run_reward,
    "prm": run_prm,
    "dpo": run_dpo,
    "kto": run_kto,
    "ppo": run_ppo,
    "grpo": run_grpo,
}
# Of a run that is measured: a line per step, nothing that stops it early, nothing that is recorded beside.
_FORCED = ("overwrite", "wandb", "max_minutes", "profile", "profile_steps")


@dataclass(frozen=True)
class Side:
    """One of the two: its config file and overrides, and the configuration that they make."""

    label: str
    path: str
    overrides: tuple[str, ...]
    config: Config

    @property
    def run(self) -> RunConfig:
        section = dict(self.config)["run"]
        assert isinstance(section, RunConfig)
        return section


def read_sides(
    paths: Sequence[Path], overrides: Sequence[Sequence[str]], recipe: str | None = None
) -> tuple[str, dict[str, Side]]:
    """The recipe, by its name or else the one that takes both files, and the sides by label.

    Raises:
        UserError: a configuration is wrong, is for a recipe without steps, or the two are for different recipes.
    """
    given = list(zip(SIDES, paths, overrides, strict=True))
    if recipe is not None:
        recipe = {"rm": "reward"}.get(recipe, recipe)
        if recipe not in TRAINERS:
            raise UserError(f"--recipe got '{recipe}', expected one that trains in steps: {', '.join(TRAINERS)}")
    else:
        (_, first, texts), (_, second, others) = given
        recipe, other = recipe_of(first, texts), recipe_of(second, others)
        if recipe != other:
            raise UserError(
                f"A ('{first}') is for {recipe} and B ('{second}') for {other}; give two configurations of one recipe"
            )
    return recipe, {label: read_side(label, path, recipe, texts) for label, path, texts in given}


def read_side(label: str, path: Path, recipe: str, overrides: Sequence[str]) -> Side:
    """The side as it will be run; raises `UserError` where a run would."""
    cls = config_class(recipe)
    load_config(cls, path, overrides)  # as the user wrote it: its errors are the user's
    forced = [f"run.{name}=null" for name in _FORCED]
    forced += ["training.logging_steps=1"] if "training" in cls.model_fields else []
    return Side(label, str(path), (*overrides, *forced), load_config(cls, path, [*overrides, *forced]))


def recipe_of(path: Path, overrides: Sequence[str]) -> str:
    """The recipe that a config file is for: the only one that takes it, or the one of those that its name begins with.

    Raises:
        UserError: no recipe with steps takes it, or several do.
    """
    found, refused = [], dict[str, str]()
    for recipe in TRAINERS:
        try:
            load_config(config_class(recipe), path, overrides)
            found.append(recipe)
        except UserError as error:
            refused[recipe] = str(error)
    word = path.stem.replace("-", "_").split("_")[0]
    named = [recipe for recipe in found if recipe == {"rm": "reward"}.get(word, word)]
    if len(named or found) == 1:
        return (named or found)[0]
    if found:
        raise UserError(f"'{path}' could be for {' or '.join(found)}; say which with --recipe")
    if len(set(refused.values())) == 1:  # a file that is not there is none for every recipe
        raise UserError(next(iter(refused.values())))
    raise UserError(
        f"'{path}' is a config file of none of {', '.join(TRAINERS)}; name the recipe with --recipe to hear why"
    )


def differing_keys(first: Config, second: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted names of the settings in which two configurations differ, with both values."""
    one, other = _leaves(first.model_dump(mode="json")), _leaves(second.model_dump(mode="json"))
    return {
        name: (one.get(name), other.get(name))
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
    }


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found
