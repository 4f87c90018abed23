"""Two models' answers, side by side before any number of judges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from rlhf.data.comparison_rows import AnswerRow, read_answers
from rlhf.data.data_config import Names
from rlhf.data.reading import data_files
from rlhf.eval.judge import Judge, JudgingStopped, Pair
from rlhf.eval.judge_figures import Agreement, Judged, JudgedModels, JudgeLine, agreement_over, lines_of
from rlhf.eval.judge_report import JUDGEMENTS, write_judge_report, write_judgements
from rlhf.eval.judge_tables import agreement_between, behaviour_by_judge, wins_by_judge
from rlhf.eval.tables import Table
from rlhf.infra.config import Config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run, RunConfig
from rlhf.infra.run_folder import RUN_INFO
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

SAMPLES = "samples.jsonl"
# An evaluation stores every prompt set and both ways of decoding; these are the ones its report leads with.
MAIN_ANSWERS = {"mode": "sampled", "split": "heldout"}


class CompareConfig(Config):
    """`rlhf judge compare`, where the answers are there already."""

    run: RunConfig = Field(default_factory=RunConfig, description="name, place, seed, device")
    first: str = Field("", description="answers of the model in question: a file, or EVALUATION:MODEL")
    second: str = Field("", description="answers of the model it is compared with")
    judges: Judges = Field((), description="who judges, as a list of kinds with their settings")
    rule: Literal["averaged", "agreed"] = Field(
        "averaged", description="two orders become one preference: their mean, or a tie unless they agree"
    )
    where: dict[str, str] | None = Field(
        None, description="only rows with these values; null: of an evaluation the sampled answers to held-out prompts"
    )
    panel: Names = Field((), description="names of judges whose mean is shown as one more, called panel")
    max_pairs: int | None = Field(None, ge=1, description="at most so many pairs, the first ones")
    title: str = Field("Answers compared", description="heading of the report")

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        return IDLE_RUN_KEYS


@dataclass(frozen=True)
class CompareParts:
    """Answers paired by prompt, and the judges."""

    pairs: list[Pair]
    num_alone: int
    judges: list[Judge]


@dataclass(frozen=True)
class JudgeReport:
    """What judging came to: tables for the terminal, the report's path."""

    tables: Sequence[Table]
    markdown: Path


def run_compare(config: CompareConfig) -> tuple[Run, JudgeReport | None]:
    """Pair, judge, report; the report is None where the time ran out, and the same command goes on.

    Raises:
        UserError: answers or judges are not to be had, or a judge gave up.
        Stopped: Ctrl-C.
    """
    written: list[JudgeReport] = []

    def judge(settings: CompareConfig, run: Run, parts: CompareParts) -> tuple[int, int]:
        try:
            judged = judge_all(parts.judges, parts.pairs, run)
        except JudgingStopped:
            return 0, tokens_of(parts.judges)
        written.append(report(settings, run, parts, judged))
        return 0, tokens_of(parts.judges)

    if not config.first or not config.second:
        raise UserError("two sides are compared: set first and second to files of answers, or to EVALUATION:MODEL")
    if not config.judges:
        raise UserError(NO_JUDGE)
    files = [*answer_files(config.first, config.run.output_dir), *answer_files(config.second, config.run.output_dir)]
    run = launch("judge_compare", config, prepare, judge, settings=config.run, data_files=files)
    return run, written[0] if written else None


def prepare(config: CompareConfig, device: torch.device, rejected_rows: Path) -> CompareParts:
    """The answers of both, matched by prompt, and the judges."""
    one, two = (answers_of(source, config) for source in (config.first, config.second))
    pairs, num_alone = paired(one, two)
    if not pairs:
        raise UserError(
            f"'{config.first}' ({len(one)} answers) and '{config.second}' ({len(two)} answers) share no prompt; let "
            "both models answer the same prompts, or give their rows the same prompt_id"
        )
    judges = build_judges(config.judges, config.run.output_dir, device, config.run.dtype)
    check_panel(judges, config.panel)
    return CompareParts(pairs[: config.max_pairs], num_alone, judges)


def report(config: CompareConfig, run: Run, parts: CompareParts, judged: Sequence[Judged]) -> JudgeReport:
    """Every number, in tables and files."""
    names, seed = model_names(config.first, config.second), config.run.seed
    compared = [JudgedModels(*names, with_panel(judged, config.panel))]
    agreement = agreement_over([JudgedModels(*names, judged)], config.rule, seed)
    lines = lines_of(compared, config.rule, seed)
    tables = tables_of(lines, agreement, config.rule)
    write_judgements(run.folder / JUDGEMENTS, compared, config.rule)
    num_prompts = len({pair.prompt_id for pair in parts.pairs})
    alone = f" {parts.num_alone} prompts have an answer of one of them only." if parts.num_alone else ""
    path = write_judge_report(
        run.folder,
        config.title,
        [f"{names[0]} against {names[1]}: {len(parts.pairs)} pairs of answers to {num_prompts} prompts.{alone}"],
        tables,
        {"lines": lines, "agreement": agreement, "rule": config.rule, "num_alone": parts.num_alone},
        {"first": config.first, "second": config.second} | settings_notes(config.run, run) | cost_notes(parts.judges),
    )
    return JudgeReport(tables, path)


def tables_of(lines: Sequence[JudgeLine], agreement: Agreement | None, rule: str) -> list[Table]:
    """Win-rates, how the judges judge, and how far they agree where there are several."""
    tables = [wins_by_judge(lines, rule), behaviour_by_judge(lines)]
    return tables if agreement is None else [*tables, agreement_between(agreement)]


def paired(one: Sequence[AnswerRow], two: Sequence[AnswerRow]) -> tuple[list[Pair], int]:
    """Answers to the same prompt side by side, several answers in their order; and how many prompts only one has."""
    firsts, seconds = _by_prompt(one), _by_prompt(two)
    pairs = [
        Pair(
            prompt_id=key,
            prompt=first.prompt,
            first=first.response,
            second=second.response,
            columns={name: value for name, value in first.columns.items() if second.columns.get(name) == value},
            first_columns=first.columns,
            second_columns=second.columns,
        )
        for key, of_first in firsts.items()
        for first, second in zip(of_first, seconds.get(key, []), strict=False)
    ]
    return pairs, len(set(firsts) ^ set(seconds))


def answers_of(source: str, config: CompareConfig) -> list[AnswerRow]:
    """The answers of one side, filtered as the config says."""
    place, model, is_run = split_source(source, config.run.output_dir)
    rows = read_answers(place, model)
    where = config.where if config.where is not None else (MAIN_ANSWERS if is_run else {})
    for name, value in where.items():
        seen = Counter(str(row.columns.get(name)) for row in rows)
        rows = [row for row in rows if str(row.columns.get(name)) == value]
        if not rows:
            there = ", ".join(f"{found} ({number})" for found, number in seen.most_common(5))
            raise UserError(f"'{source}' has no answer whose {name} is '{value}'; there are: {there}; change `where`")
    return rows


def are_answers(source: str, output_dir: Path) -> bool:
    """Whether a source names answers (a file, or an evaluation), not a model that could give some."""
    place, _, _ = split_source(source, output_dir)
    return place.is_file()


def answer_files(source: str, output_dir: Path) -> list[Path]:
    """The files on disk behind a source. Raises `UserError` where there are none."""
    return data_files(split_source(source, output_dir)[0])


def split_source(source: str, output_dir: Path) -> tuple[Path, str | None, bool]:
    """(file, model or None, whether it is an evaluation's) of `file`, `file:model` or `evaluation:model`."""
    for text, model in ((source, None), source.rpartition(":")[::2]):
        if not text:
            continue
        for folder in (Path(text), output_dir / text):
            if (folder / RUN_INFO).is_file() and (folder / SAMPLES).is_file():
                return folder / SAMPLES, model, True
        if Path(text).is_file():
            return Path(text), model, False
    return Path(source), None, False


def model_names(first: str, second: str) -> tuple[str, str]:
    """What tables call the two: the model behind the colon or the file's name; all of it where these are equal."""
    short = [_short(first), _short(second)]
    return (short[0], short[1]) if short[0] != short[1] else (first, second)


def _short(source: str) -> str:
    file, _, model = source.rpartition(":")
    if file and not Path(source).is_file():
        return model
    return Path(source).name.removesuffix(".gz").rsplit(".", 1)[0]


def _by_prompt(rows: Sequence[AnswerRow]) -> dict[str, list[AnswerRow]]:
    found: dict[str, list[AnswerRow]] = {}
    for row in rows:
        found.setdefault(row.key, []).append(row)
    return found
