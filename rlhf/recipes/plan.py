"""`rlhf plan`: the memory each phase of a recipe takes at its peak, before anything is loaded or rented.

The recipe's own code runs on a model of the true shape whose numbers are imagined (`rlhf.infra.shadow`), in batches as
large as the config allows. To that comes what no tensor accounts for: interpreter, libraries, CUDA context.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf.infra.config import Config, find_config_file, load_config
from rlhf.infra.errors import UserError
from rlhf.infra.run_folder import CONFIG, RUN_INFO, read_run_info
from rlhf.recipes.plan_advice import Advice, advise
from rlhf.recipes.plan_predict import Machine, StagePlan, plan_stage
from rlhf.recipes.plan_sources import planned_stages
from rlhf.recipes.resume import config_class

RECIPES = ("pretrain", "sft", "rm", "prm", "dpo", "kto", "ppo", "grpo", "eval", "pipeline")


@dataclass(frozen=True)
class Plan:
    """All stages of a config, the machine they were held against, and advice where a stage does not fit."""

    recipe: str
    machine: Machine
    stages: tuple[tuple[StagePlan, tuple[Advice, ...]], ...]

    @property
    def fits(self) -> bool:
        return all(stage.verdict(self.machine.limit) != "does not fit" for stage, _ in self.stages)

    def to_json(self) -> str:
        """One object; memory in bytes."""
        stages = [
            {**asdict(stage), "verdict": stage.verdict(self.machine.limit), "advice": [asdict(one) for one in advice]}
            for stage, advice in self.stages
        ]
        return json.dumps({"recipe": self.recipe, "machine": asdict(self.machine), "stages": stages}, indent=1)


def make_plan(
    recipe: str,
    config: Config,
    machine: Machine,
    stand_in: Path | None = None,
    tell: Callable[[StagePlan], None] = lambda plan: None,
    tell_advice: Callable[[Sequence[Advice]], None] = lambda advice: None,
) -> Plan:
    """Plan every stage of a config; `tell` and `tell_advice` hear of each at once.

    Raises:
        UserError: a base is unknown.
    """
    made = []
    for stage in planned_stages(config, stand_in):
        planned = plan_stage(stage, machine)
        tell(planned)
        advice: tuple[Advice, ...] = ()
        if planned.verdict(machine.limit) == "does not fit":
            advice = tuple(advise(stage, planned, machine))
            tell_advice(advice)
        made.append((planned, advice))
    return Plan(recipe, machine, tuple(made))


def read_plan_config(what: str, file: Path | None, overrides: list[str]) -> tuple[str, Config]:
    """The recipe and its config of `rlhf plan WHAT ...`: WHAT is a recipe, a config file or the folder of a run.

    Raises:
        UserError: it is none of these, or the file could belong to several recipes.
    """
    if what in RECIPES or what == "reward":
        return what, load_config(config_class(what), file, overrides)
    folder = Path(what)
    if (folder / RUN_INFO).is_file():
        recipe, place = str(read_run_info(folder)["recipe"]), folder / CONFIG
        if recipe not in (*RECIPES, "reward"):
            raise UserError(f"'{what}' is a run of `{recipe}`, which is not planned; planned are {', '.join(RECIPES)}")
    elif folder.suffix in (".yaml", ".yml"):
        place = find_config_file(what)
        recipe = _recipe_of(place, overrides)
    else:
        raise UserError(f"'{what}' is no recipe ({', '.join(RECIPES)}), no config file (.yaml) and no folder of a run")
    if file is not None:
        raise UserError(f"'{what}' names the configuration already; leave --config away")
    return recipe, load_config(config_class(recipe), place, overrides)


def _recipe_of(file: Path, overrides: list[str]) -> str:
    """The recipe whose keys a file holds; where several would take it, the one that the file is named after."""
    found, refused = [], {}
    for recipe in RECIPES:
        try:
            load_config(config_class(recipe), file, overrides)
            found.append(recipe)
        except UserError as error:
            refused[recipe] = error
    by_name = [recipe for recipe in RECIPES if file.stem.replace("-", "_").split("_")[0] == recipe]
    if len(found) == 1:
        return found[0]
    if not found and by_name:
        raise refused[by_name[0]]
    if not found:
        raise UserError(f"{file} is a config of none of {', '.join(RECIPES)}; as {RECIPES[-1]}: {refused[RECIPES[-1]]}")
    if by_name and by_name[0] in found:
        return by_name[0]
    raise UserError(f"{file} could be a config of {', '.join(found)}; say which: rlhf plan {found[0]} --config {file}")
