"""What an export is told about: the runs that a model came from, and rows on which it is compared with its source."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.chat import ChatEncoder
from rlhf.data.data_config import DataConfig, SourceConfig
from rlhf.data.formats import as_prompt
from rlhf.data.loading import load_splits
from rlhf.data.rows import InstructionRow, LabelledRow, PreferenceRow, Prompt, Row
from rlhf.infra.config import Config, explicit_keys, load_config
from rlhf.infra.errors import UserError
from rlhf.infra.run_folder import CONFIG, RUN_INFO, read_run_info
from rlhf.models.backbone import resolve_model
from rlhf.recipes.doctor_subject import sampled
from rlhf.recipes.resume import CONFIGS

NUM_ROWS, LONGEST_PROMPT = 16, 512


@dataclass(frozen=True)
class Stage:
    """One run on the way to a model: its record, what the user set, and the last line of its log."""

    folder: Path
    info: Mapping[str, Any]
    settings: Mapping[str, Any]
    last_measures: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        """What an export says of the stage."""
        kept = ("name", "recipe", "started", "seed", "git", "versions", "lineage", "fingerprints", "data", "cost")
        found = {key: self.info.get(key) for key in kept}
        return found | {"settings": dict(self.settings), "last_measures": dict(self.last_measures)}


@dataclass(frozen=True)
class CheckSource:
    """Prompts with the answers that the data have for them, and where they are from, in words."""

    prompts: list[Prompt]
    answers: list[list[str]]
    words: str


def run_of(folder: str) -> Path | None:
    """The run that left a policy or reward model in this folder; None for any other model."""
    parent = Path(folder).parent
    return parent if (parent / RUN_INFO).is_file() else None


def system_prompt_of(run: Path | None) -> str | None:
    """The system prompt that the run put before its prompts, if it had one."""
    data = _data_of(run)
    return data.model_dump().get("system_prompt") if data is not None else None


def lineage_of(run: Path | None, output_dir: Path) -> list[Stage]:
    """The run and those that it started from, the first of them first; models that no run made end the line."""
    if run is None:
        return []
    info = read_run_info(run)
    earlier = [
        stage
        for source in info.get("lineage", {}).values()
        for stage in lineage_of(_run_behind(source, run, output_dir), output_dir)
    ]
    return _without_repeats([*earlier, _stage(run, info)])


def check_source(run: Path | None, encoder: ChatEncoder) -> CheckSource:
    """A few rows of the run's own data where they can still be read, else of the built-in world."""
    data, words = _data_of(run), "the built-in world tinychat"
    if data is not None and not data.is_tinychat:
        try:
            found = _from_rows(load_splits(sampled(data))[0].rows, encoder, "the data that the run was trained on")
        except UserError:
            found = None
        if found is not None:
            return found
        words += " (the run's own data cannot be read here)"
    rows = load_splits(DataConfig(max_samples=NUM_ROWS, validation_fraction=0.0))[0].rows
    built_in = _from_rows(rows, encoder, words)
    assert built_in is not None
    return built_in


def _from_rows(rows: Sequence[Row], encoder: ChatEncoder, words: str) -> CheckSource | None:
    prompts, answers = [], []
    for row in rows:
        found = as_prompt(row)
        if found is None or len(prompts) == NUM_ROWS:
            continue
        prompt = found.prompt
        if not isinstance(prompt, str) and not encoder.tokenizer.chat_template:
            prompt = str(prompt[-1]["content"])  # a base model knows no turns
        if len(encoder.prompt_ids(prompt)) <= LONGEST_PROMPT:
            prompts.append(prompt)
            answers.append(_answers_in(row))
    return CheckSource(prompts, answers, f"{len(prompts)} prompts of {words}") if prompts else None


def _answers_in(row: Row) -> list[str]:
    if isinstance(row, PreferenceRow):
        return [row.chosen, row.rejected]
    if isinstance(row, InstructionRow):
        return [row.response]
    return [row.completion] if isinstance(row, LabelledRow) else []


def _run_behind(source: str, run: Path, output_dir: Path) -> Path | None:
    """A run by its path, by its name where runs are, or by its name beside the run that names it (in a pipeline)."""
    for place in (Path(source), output_dir / source, run.parent / source):
        if (place / RUN_INFO).is_file():
            return place
    return run_of(source) if Path(resolve_model(source)).is_dir() else None


def _stage(run: Path, info: Mapping[str, Any]) -> Stage:
    config = _config_of(run)
    settings = {} if config is None else {key: _value(config, key) for key in sorted(explicit_keys(config))}
    kept = {key: value for key, value in settings.items() if not key.startswith("run.") or key == "run.dtype"}
    return Stage(run, info, kept, _last_line(run / "logs" / "train.jsonl"))


def _data_of(run: Path | None) -> SourceConfig | None:
    config = _config_of(run) if run is not None else None
    data = dict(config).get("data") if config is not None else None
    return data if isinstance(data, SourceConfig) else None


def _config_of(run: Path) -> Config | None:
    """The run's resolved settings; None where this version no longer understands them."""
    recipe = CONFIGS.get(str(read_run_info(run).get("recipe")))
    try:
        return None if recipe is None else load_config(recipe, run / CONFIG)
    except UserError:
        return None


def _value(config: Config, key: str) -> Any:
    value: Any = config.model_dump(mode="json")
    for name in key.split("."):
        value = value[name]
    return value


def _last_line(path: Path) -> dict[str, float]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    try:
        last: dict[str, float] = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return {key: value for key, value in last.items() if not key.startswith(("time/", "rate/", "memory/"))}


def _without_repeats(stages: Sequence[Stage]) -> list[Stage]:
    return list({stage.folder.resolve(): stage for stage in stages}.values())
