"""`rlhf judge`: compare answers, measure judges against people, read stored verdicts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf.infra.errors import UserError

if TYPE_CHECKING:
    from rlhf.eval.tables import Table
    from rlhf.recipes.judge_compare import JudgeReport

app = typer.Typer(no_args_is_help=True, help="Judge answers, and judge the judges.")

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file of differences from the defaults.")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as section.key=value.", show_default=False)]
JUDGES = "judges='[{kind: llm, base_url: http://127.0.0.1:8000/v1, model: NAME}, {kind: length}]'"


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="Answers (file or EVALUATION:MODEL) or a model.", show_default=False)],
    second: Annotated[str, typer.Argument(help="What it is compared with, of the same sort.", show_default=False)],
    config: ConfigOption = None,
    overrides: Overrides = None,
) -> None:
    """Win-rate of the first against the second by any judges; two models answer the evaluation's prompts first."""
    from rlhf.infra.config import load_config
    from rlhf.recipes.judge_compare import CompareConfig, are_answers, run_compare

    settings = list(overrides or ())
    output_dir = _output_dir(settings)
    kinds = {source: are_answers(source, output_dir) for source in (first, second)}
    if all(kinds.values()):
        texts = [f"first={json.dumps(first)}", f"second={json.dumps(second)}", *settings]
        run, report = run_compare(load_config(CompareConfig, config, texts))
        _say(run.folder, report, run.stop_reason, run.resume_command)
        return
    if any(kinds.values()):
        answers, model = sorted((first, second), key=lambda source: not kinds[source])
        raise UserError(
            f"'{answers}' holds answers, but '{model}' does not; give two files of answers (or EVALUATION:MODEL), or "
            "two models, which then answer the same prompts"
        )
    _evaluate(first, second, config, settings)


@app.command()
def validate(config: ConfigOption = None, overrides: Overrides = None) -> None:
    """Measure judges against people's labels: agreement, consistency, what places and lengths do to them."""
    from rlhf.infra.config import load_config
    from rlhf.recipes.judge_validate import ValidateConfig, run_validate

    run, report = run_validate(load_config(ValidateConfig, config, overrides or ()))
    _say(run.folder, report, run.stop_reason, run.resume_command)


@app.command()
def winrate(
    verdicts: Annotated[str, typer.Argument(help="File of judged pairs: AlpacaEval's, or one written here.")],
    difficulty: Annotated[Path | None, typer.Option(help="CSV: index, instruction_difficulty.")] = None,
    regulariser: Annotated[
        Path | None, typer.Option(help="CSV: std_delta_len, instruction_difficulty, expected_preference.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Every number as JSON.")] = False,
) -> None:
    """Raw and length-controlled win-rate of verdicts that are there already."""
    from rlhf.eval.judge_report import as_json as jsonable
    from rlhf.recipes.judge_winrate import stored_win_rates, winrate_table

    found = stored_win_rates(verdicts, difficulty, regulariser, seed)
    if as_json:
        typer.echo(json.dumps(jsonable(found), indent=2))
    else:
        _show([winrate_table(found)])


def _evaluate(first: str, second: str, config: Path | None, settings: Sequence[str]) -> None:
    """Both models answer the same prompts, and the evaluation's report compares them by every judge."""
    from rlhf.eval.judge_tables import wins_by_judge
    from rlhf.eval.tables import win_rates_of
    from rlhf.infra.config import load_config
    from rlhf.recipes.evaluate import run_evaluation
    from rlhf.recipes.evaluate_config import EvaluateConfig

    names = ("first", "second") if Path(first).name == Path(second).name else (Path(first).name, Path(second).name)
    models = {names[1]: second, names[0]: first}
    texts = [f"models={json.dumps(models)}", f"reference={json.dumps(names[1])}", *settings]
    run, written = run_evaluation(load_config(EvaluateConfig, config, texts))
    _show([win_rates_of(written.report), wins_by_judge(written.report.judges)])
    typer.echo(f"run: {run.folder}\nreport: {written.html}")


def _output_dir(overrides: Sequence[str]) -> Path:
    """Where runs lie, as the command line says."""
    from rlhf.infra.experiment import RunConfig

    named = [text.partition("=")[2] for text in overrides if text.partition("=")[0] == "run.output_dir"]
    return Path(named[-1]) if named else RunConfig().output_dir


def _say(folder: Path, report: JudgeReport | None, stop_reason: str | None, resume_command: str) -> None:
    if report is not None:
        _show(report.tables)
        typer.echo(f"report: {report.markdown}")
    typer.echo(f"run: {folder}")
    if stop_reason == "max_minutes":
        typer.echo(f"the time budget is spent; go on with: {resume_command}")


def _show(tables: Sequence[Table]) -> None:
    from rlhf.eval.report import console_table
    from rlhf.infra.logger import terminal

    console = terminal()
    for table in tables:
        if table.rows:
            console.print(console_table(table, intervals_below=console.width < 140))
