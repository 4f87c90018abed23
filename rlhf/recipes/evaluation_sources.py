"""What the runs behind an evaluation left: logs, costs, how they ended, and what was seen of reward hacking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf.eval.hacking_record import HackingRecord, read_record
from rlhf.eval.panels import read_history
from rlhf.eval.samples import Cost
from rlhf.eval.stage_facts import StageFacts, read_stage
from rlhf.infra.errors import UserError
from rlhf.infra.run_folder import RUN_INFO, read_run_info
from rlhf.recipes.watch import FILE

_LOG = Path("logs") / "train.jsonl"


@dataclass(frozen=True)
class StageSources:
    """Logs of the stages whose curves are wanted, and costs, endings and looks of all runs, by the name shown."""

    histories: dict[str, list[dict[str, float]]]
    costs: dict[str, Cost]
    facts: list[StageFacts]
    hacking: list[HackingRecord]


def stage_sources(models: Mapping[str, str], stages: Mapping[str, str], output_dir: Path) -> StageSources:
    """Read what is left of `stages`, which must be runs, and of those `models` that are runs.

    Both are {name shown: run or folder}. A run that is both is read once, under its name as a model.

    Raises:
        UserError: a stage is no run, or what a run left cannot be read.
    """
    found: dict[str, Path] = {}
    for name, source in stages.items():
        folder = _run_folder(source, output_dir)
        if folder is None:
            said = f"histories names the run '{source}'"
            raise UserError(f"{said}, but there is none in '{output_dir}'; name one that is there")
        found[name] = folder
    runs = _named_as_models(found, models, output_dir)
    return StageSources(
        histories={name: read_history(folder / _LOG) for name, folder in found.items()},
        costs={name: cost for name, folder in runs.items() if (cost := _cost(folder)) is not None},
        facts=[read_stage(folder, name) for name, folder in runs.items()],
        hacking=[read_record(folder / FILE, name) for name, folder in runs.items() if (folder / FILE).is_file()],
    )


def _named_as_models(stages: Mapping[str, Path], models: Mapping[str, str], output_dir: Path) -> dict[str, Path]:
    folders = {name: _run_folder(source, output_dir) for name, source in models.items()}
    of_models = {name: folder for name, folder in folders.items() if folder is not None}
    runs: dict[str, Path] = {}
    for name, folder in stages.items():
        shown = next((model for model, other in of_models.items() if other.samefile(folder)), name)
        runs[shown] = folder
    return runs | of_models


def _run_folder(source: str, output_dir: Path) -> Path | None:
    return next((place for place in (Path(source), output_dir / source) if (place / RUN_INFO).is_file()), None)


def _cost(folder: Path) -> Cost | None:
    cost = read_run_info(folder).get("cost")
    return None if cost is None else Cost(**cost)
