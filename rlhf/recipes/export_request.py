"""What an export is asked for: which model, where to; all that can be refused before a weight is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field
from transformers import AutoConfig

from rlhf.infra.config import Config
from rlhf.infra.device import DeviceName
from rlhf.infra.errors import UserError
from rlhf.infra.run_folder import RUN_INFO, read_run_info
from rlhf.models.backbone import resolve_model
from rlhf.models.ensemble import member_folders
from rlhf.models.export import ExportDtype
from rlhf.models.scoring import CONFIG_FILE as REWARD_CONFIG
from rlhf.recipes.export_sources import run_of
from rlhf.recipes.stages import ADAPTER_CONFIG, POLICY, PROCESS_MODEL, REWARD_MODEL, base_of, locate

EXPORT_INFO, CARD, CONFIG_JSON = "export.json", "README.md", "config.json"
Kind = Literal["policy", "reward_model"]


class ExportConfig(Config):
    """`rlhf export`."""

    source: str = Field(description="run, or folder of a policy or a reward model")
    target: Path | None = Field(None, description="folder to write; null: exports/<name of the run>")
    output_dir: Path = Field(Path("runs"), description="folder that holds the runs")
    dtype: ExportDtype = Field("bf16", description="number format of the weights")
    base: str | None = Field(
        None,
        description="original weights where the base on record is quantised or gone; null: those on record",
    )
    device: DeviceName = Field("auto", description="where the models are loaded and compared")
    overwrite: bool = Field(False, description="replace an earlier export in the target")
    max_abs_difference: float | None = Field(None, ge=0, description="of logits, or of scores; null: by number format")
    max_mean_kl: float | None = Field(None, ge=0, description="nats per token; null: by number format")


@dataclass(frozen=True)
class Source:
    """What is exported: its folder, kind, the run that made it, if one did, and the base that its adapter names."""

    folder: str
    kind: Kind
    run: Path | None
    base: str | None
    base_is_there: bool


def find_source(config: ExportConfig) -> Source:
    """The model behind a run's name, or a folder.

    Raises:
        UserError: there is none, it is not trained to its end, or it is of a kind that has no such form.
    """
    kind: Kind = "policy"
    run = next((p for p in (Path(config.source), config.output_dir / config.source) if (p / RUN_INFO).is_file()), None)
    if run is not None:
        kind = _made_by(run)
    folder = locate(config.source, config.output_dir, kind)
    members = member_folders(Path(folder))
    if members:
        raise UserError(
            f"'{folder}' holds an ensemble of {len(members)} reward models, and a sequence classifier is one; name a "
            f"member, such as {members[0]}"
        )
    base = base_of(folder) if (Path(folder) / ADAPTER_CONFIG).is_file() else None
    if (Path(folder) / REWARD_CONFIG).is_file():
        kind = "reward_model"
        described = json.loads((Path(folder) / REWARD_CONFIG).read_text(encoding="utf-8"))
        base = None if described["train"] == "full" else described["base_model_name_or_path"]
    elif (Path(folder) / CONFIG_JSON).is_file():
        _refuse_classifier(Path(folder))
    return Source(folder, kind, run or run_of(folder), base, base is not None and _can_be_loaded(base))


def _made_by(run: Path) -> Kind:
    made = [name for name in (POLICY, REWARD_MODEL, PROCESS_MODEL) if (run / name).is_dir()]
    stages = sorted(str(path.parent) for path in run.glob(f"*/{RUN_INFO}"))
    if not made and stages:
        raise UserError(f"'{run}' is a pipeline; name one of its stages: {', '.join(stages)}")
    if not made:
        info = read_run_info(run)
        if info.get("status") == "finished" and info.get("stop_reason") is None:
            raise UserError(f"run '{run}' ({info.get('recipe')}) trained no model; name one that did")
        raise UserError(
            f"run '{run}' ({info.get('recipe')}) holds no model that was trained to its end; let it finish (rlhf "
            f"resume {run}), or name another run"
        )
    if made[0] == PROCESS_MODEL:
        raise UserError(
            f"'{run}' holds a process reward model, which scores the steps of an answer; transformers' token "
            "classifiers have no place for what separates them, so use the run as it is"
        )
    return "policy" if made[0] == POLICY else "reward_model"


def _can_be_loaded(base: str) -> bool:
    try:
        AutoConfig.from_pretrained(resolve_model(base))
    except (OSError, ValueError):
        return False
    return True


def _refuse_classifier(folder: Path) -> None:
    """A classifier's weights would be read as a language model's, its head passed over."""
    try:
        names = json.loads((folder / CONFIG_JSON).read_text(encoding="utf-8")).get("architectures") or []
    except ValueError as error:
        raise UserError(f"'{folder / CONFIG_JSON}' cannot be read as JSON: {error}") from None
    if any("Classification" in name for name in names):
        raise UserError(f"'{folder}' is a plain Hugging Face classifier ({names[0]}) already; copy the folder as it is")


def refuse_base(config: ExportConfig, source: Source) -> None:
    """Raise `UserError` where the adapter's base is gone, or another is named for weights that stand on none."""
    if config.base is not None and source.base is None:
        raise UserError(f"every weight of '{source.folder}' was trained, so no base is needed; leave --base out")
    if config.base is None and source.base is not None and not source.base_is_there:
        raise UserError(
            f"the adapter in '{source.folder}' was trained on '{source.base}', which cannot be loaded here; put it "
            "back, or name the folder or hub name of the same weights with --base"
        )


def refuse_taken(target: Path, overwrite: bool, source: Source) -> None:
    """Raise `UserError` where writing to the target would cost anything but an earlier export, or that unasked."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise UserError(f"'{target}' already exists; choose another --to, or replace it with --overwrite")
    if not (target / EXPORT_INFO).is_file():
        raise UserError(f"'{target}' is no earlier export (it has no {EXPORT_INFO}), so it is not overwritten")
    needed = [Path(place).resolve() for place in (source.folder, source.base) if place is not None]
    if any(place.is_relative_to(target.resolve()) for place in needed):
        raise UserError(f"'{target}' is what is exported, or stands under it; choose another --to")
    try:
        written = {*json.loads((target / EXPORT_INFO).read_text(encoding="utf-8"))["files"], EXPORT_INFO, CARD}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"'{target / EXPORT_INFO}' does not say what the earlier export wrote; remove the folder, or choose "
            "another --to"
        ) from None
    others = sorted({str(path.relative_to(target)) for path in files_in(target)} - written)
    if others:
        raise UserError(
            f"'{target}' also holds {', '.join(others[:5])}, which the earlier export did not write; move that away, "
            "or choose another --to"
        )


def files_in(folder: Path) -> list[Path]:
    """Every file under a folder, in order."""
    return sorted(path for path in folder.rglob("*") if not path.is_dir())
