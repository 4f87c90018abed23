"""Judging the judges: how far each agrees with people, and what sways it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from rlhf.data.comparison_rows import ComparisonRow, read_comparisons
from rlhf.data.data_config import Names
from rlhf.data.reading import data_files
from rlhf.data.rows import prompt_key
from rlhf.eval.judge import Judge, JudgingStopped, Pair
from rlhf.eval.judge_figures import (
    Accuracy,
    Duel,
    Judged,
    JudgedModels,
    JudgeLine,
    accuracy_of,
    agreement_of,
    behaviour_of,
    duel_of,
)
from rlhf.eval.judge_report import JUDGEMENTS, write_judge_report, write_judgements
from rlhf.eval.judge_tables import agreement_between, agreement_with_people, behaviour_by_judge, duels_of, length_bias
from rlhf.infra.config import Config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run, RunConfig
from rlhf.recipes.judge_compare import JudgeReport
from rlhf.recipes.judge_pairs import (
    IDLE_RUN_KEYS,
    check_panel,
    cost_notes,
    judge_all,
    settings_notes,
    tokens_of,
    with_panel,
)
from rlhf.recipes.judging import NO_JUDGE, Judges, build_judges
from rlhf.recipes.launch import launch


class ValidateConfig(Config):
    """`rlhf judge validate`."""

    run: RunConfig = Field(default_factory=RunConfig, description="name, place, seed, device")
    labels: Names = Field((), description="files of two answers to a prompt with a person's label, such as LLMBar's")
    judges: Judges = Field((), description="who is measured, as a list of kinds with their settings")
    rule: Literal["averaged", "agreed"] = Field(
        "averaged", description="two orders become one preference: their mean, or a tie unless they agree"
    )
    panel: Names = Field((), description="names of judges whose mean is shown as one more, called panel")
    max_pairs: int | None = Field(None, ge=1, description="at most so many pairs of each file, the first ones")
    title: str = Field("Judges measured against people", description="heading of the report")

    @field_validator("labels", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        return IDLE_RUN_KEYS


@dataclass(frozen=True)
class ValidateParts:
    """Labelled pairs of all sets, and the judges."""

    pairs: list[Pair]
    judges: list[Judge]


def run_validate(config: ValidateConfig) -> tuple[Run, JudgeReport | None]:
    """Judge every labelled pair and compare; the report is None where the time ran out, and the same command goes on.

    Raises:
        UserError: labels or judges are not to be had, or a judge gave up.
        Stopped: Ctrl-C.
    """
    written: list[JudgeReport] = []

    def judge(settings: ValidateConfig, run: Run, parts: ValidateParts) -> tuple[int, int]:
        try:
            judged = judge_all(parts.judges, parts.pairs, run)
        except JudgingStopped:
            return 0, tokens_of(parts.judges)
        written.append(report(settings, run, parts, judged))
        return 0, tokens_of(parts.judges)

    if not config.labels:
        raise UserError("labels names no file; give at least one, such as labels=[llmbar/dataset.json]")
    if not config.judges:
        raise UserError(NO_JUDGE)
    files = [file for source in config.labels for file in data_files(source)]
    run = launch("judge_validate", config, prepare, judge, settings=config.run, data_files=files)
    return run, written[0] if written else None


def prepare(config: ValidateConfig, device: torch.device, rejected_rows: Path) -> ValidateParts:
    """The labelled pairs and the judges."""
    pairs = labelled_pairs(read_comparisons(config.labels, rejected_rows), config.max_pairs)
    if not any(pair.label not in (None, 0.5) for pair in pairs):
        raise UserError(f"no pair in {', '.join(config.labels)} has a label that prefers one answer")
    judges = build_judges(config.judges, config.run.output_dir, device, config.run.dtype)
    check_panel(judges, config.panel)
    return ValidateParts(pairs, judges)


def labelled_pairs(rows: Sequence[ComparisonRow], max_of_each: int | None = None) -> list[Pair]:
    """Rows as pairs, each set's under its file's name."""
    taken: dict[str, int] = {}
    pairs = []
    for row in rows:
        taken[row.source] = taken.get(row.source, 0) + 1
        if max_of_each is None or taken[row.source] <= max_of_each:
            key = f"{row.source}/{prompt_key(row.prompt)}"
            pairs.append(Pair(key, row.prompt, row.first, row.second, row.preference, row.source, row.columns))
    return pairs


def report(config: ValidateConfig, run: Run, parts: ValidateParts, judged: Sequence[Judged]) -> JudgeReport:
    """Every number, in tables and files."""
    rule, seed = config.rule, config.run.seed
    everybody = with_panel(judged, config.panel)
    accuracies = accuracies_of(everybody, rule, seed)
    lines = [JudgeLine("", "", one.judge, None, behaviour_of(one, seed)) for one in everybody]
    duels = [found for one, two in combinations(judged, 2) if (found := duel_of(one, two, rule, seed)) is not None]
    agreement = agreement_of(judged, rule, seed, either_way=True)
    tables = [agreement_with_people(accuracies), length_bias(accuracies), behaviour_by_judge(lines)]
    tables += [duels_of(duels)] if duels else []
    tables += [agreement_between(agreement)] if agreement is not None else []
    write_judgements(run.folder / JUDGEMENTS, [JudgedModels("", "", everybody)], rule)
    groups = list(dict.fromkeys(pair.group for pair in parts.pairs))
    path = write_judge_report(
        run.folder,
        config.title,
        [f"{len(parts.pairs)} pairs of answers from {len(groups)} sets: {', '.join(groups)}."],
        tables,
        numbers(accuracies, lines, duels) | {"agreement_between_judges": agreement, "rule": rule},
        {"labels": ", ".join(config.labels)} | settings_notes(config.run, run) | cost_notes(parts.judges),
    )
    return JudgeReport(tables, path)


def accuracies_of(judged: Sequence[Judged], rule: str, seed: int) -> dict[tuple[str, str], Accuracy]:
    """By judge and set, all sets together first where there are several."""
    found = {}
    for one in judged:
        groups = list(dict.fromkeys(pair.group for pair in one.pairs))
        if len(groups) > 1:
            found[one.judge, "all sets"] = accuracy_of(one, rule, seed)
        for group in groups:
            part = one.only(group)
            if any(pair.label not in (None, 0.5) for pair in part.pairs):
                found[one.judge, group] = accuracy_of(part, rule, seed)
    return found


def numbers(
    accuracies: Mapping[tuple[str, str], Accuracy], lines: Sequence[JudgeLine], duels: Sequence[Duel]
) -> dict[str, Any]:
    """What goes into the JSON file."""
    return {
        "agreement_with_people": [
            {"judge": judge, "set": group, "figures": found} for (judge, group), found in accuracies.items()
        ],
        "behaviour": lines,
        "duels": duels,
    }
