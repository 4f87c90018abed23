"""The command `rlhf`: one verb per recipe; it reads a config, calls the recipe and says where things are.

Exit codes: 0 done, 1 failed, 2 refused or stopped (one sentence says why), 130 interrupted (a checkpoint was written).
Recipes are imported inside the verbs, so that `rlhf --help` does not wait for torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rlhf.cli_judge import app as judge_app
from rlhf.infra.errors import UserError

if TYPE_CHECKING:
    from rlhf.eval.report import ReportPaths
    from rlhf.eval.suite_report import SuiteReport
    from rlhf.infra.experiment import Run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Reinforcement learning from human feedback, from a base model to a report.",
)
config_app = typer.Typer(no_args_is_help=True, help="Look at configurations.")
app.add_typer(config_app, name="config")
app.add_typer(judge_app, name="judge")

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file of differences from the defaults.")
]
Recipe = Annotated[
    str,
    typer.Argument(
        help="pretrain, sft, rm, prm, prm-label, dpo, kto, ppo, grpo, pairs, online-dpo, best-of-n, eval, pipeline, "
        "ablate or overoptimize.",
        show_default=False,
        metavar="RECIPE",
    ),
]

Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as section.key=value.", show_default=False)]


@app.command()
def pretrain(config: ConfigOption = None, overrides: Overrides = None) -> None:
    """Train a small base model and its tokenizer from nothing."""
    from rlhf.infra.config import load_config
    from rlhf.recipes.pretrain import PretrainConfig, run_pretrain

    _say(run_pretrain(load_config(PretrainConfig, config, overrides or ())))


@app.command()
def sft(config: ConfigOption = None, overrides: Overrides = None) -> None:
    """Supervised fine-tuning on answers."""
    from rlhf.infra.config import load_config
    from rlhf.recipes.sft import SFTConfig, run_sft

    _say(run_sft(load_config(SFTConfig, config, overrides or ())))


@app.command()
def rm(config: ConfigOption = None, overrides: Overrides = None) -> None:
    """Train a reward model on preference pairs."""
    from rlhf.infra.config import load_config
    from rlhf.recipes.reward import RewardConfig, run_reward

    _say(run_reward(load_config(RewardConfig, config, overrides or ())))


@app.command()
def prm(config: ConfigOption = None, overrides: Overrides = None) -> None:
    """Train a process reward model on labelled steps."""
    from rlhf.infra.config import load_config
    from rlhf.recipes.prm import ProcessRewardConfig, run_prm

    _say(run_prm(load_config(ProcessRewardConfig, config, overrides or ())))


@app.command("prm-label")
def prm_label(config: ConfigOption = None, overrides: Overrides = None) -> None:
    """Label steps without people: sample solutions, complete every step several times, check the answers."""
    from rlhf.infra.config import load_config
    from rlhf.recipes.prm_label import LABELS, run_prm_label
    from rlhf.recipes.prm_label_config import StepLabelConfig

    run = run_prm_label(load_config(StepLabelConfig, config, overrides or ()))
    _say(run)
    if run.stop_reason is None:
        typer.echo(f"labels: {run.folder / LABELS}")


@app.command("rm-report")
def rm_report(config: ConfigOption = None, overrides: Overrides = None) -> None:
    """Measure a reward model: accuracy, calibration, biases, bad answers; writes a report and a model card."""
    from rlhf.eval.reward_card import CARD_FILE, REPORT_FILE
    from rlhf.eval.reward_report import percent, worries
    from rlhf.infra.config import load_config
    from rlhf.recipes.reward_report import RewardReportConfig, run_reward_report

    run, report = run_reward_report(load_config(RewardReportConfig, config, overrides or ()))
    typer.echo(f"accuracy {percent(report.accuracy.accuracy)} on {report.accuracy.num_pairs} pairs")
    for sentence in worries(report):
        typer.echo(f"note: {sentence}")
    _say(run)
    typer.echo(f"report: {run.folder / REPORT_FILE}; model card: {run.folder / CARD_FILE}")


@app.command()
def dpo(config: ConfigOption = None, overrides: Overrides = None) -> None:
    """Preference pairs without a reward model: DPO, IPO, SimPO, ORPO and their kin, by loss=NAME."""
    from rlhf.infra.config import load_config
    from rlhf.recipes.dpo import DPOConfig, run_dpo

    _say(run_dpo(load_config(DPOConfig, config, overrides or ())))


@app.command()
def kto(config: ConfigOption = None, overrides: Overrides = None) -> None:
    """KTO: learn from answers with a thumb up or down."""
    from rlhf.infra.config import load_config
    from rlhf.recipes.kto import KTOConfig, run_kto

    _say(run_kto(load_config(KTOConfig, config, overrides or ())))


@app.command()
def ppo(config: ConfigOption = None, overrides: Overrides = None) -> None:
    """PPO against a reward model, rules or functions."""
    from rlhf.infra.config import load_config
    from rlhf.recipes.ppo import run_ppo
    from rlhf.recipes.ppo_config import PPOConfig

    _say(run_ppo(load_config(PPOConfig, config, overrides or ())))


@app.command()
def grpo(config: ConfigOption = None, overrides: Overrides = None) -> None:
    """GRPO, RLOO, Dr. GRPO or DAPO: answers compared with each other, by verifiers, a reward model or functions."""
    from rlhf.infra.config import load_config
    from rlhf.recipes.grpo import run_grpo
    from rlhf.recipes.grpo_config import GRPOConfig

    _say(run_grpo(load_config(GRPOConfig, config, overrides or ())))


@app.command()
def pairs(config: ConfigOption = None, overrides: Overrides = None) -> None:
    """Make preference pairs of a policy's own answers, labelled by a reward model, verifiers or functions."""
    from rlhf.infra.config import load_config
    from rlhf.recipes.pairs import PAIRS, run_pairs
    from rlhf.recipes.pairs_config import PairsConfig

    run = run_pairs(load_config(PairsConfig, config, overrides or ()))
    _say(run)
    if (run.folder / PAIRS).is_file():
        typer.echo(f"pairs: {run.folder / PAIRS}")


@app.command("online-dpo")
def online_dpo(config: ConfigOption = None, overrides: Overrides = None) -> None:
    """Online or iterative DPO: sample, label, train, repeat by rounds."""
    from rlhf.infra.config import load_config
    from rlhf.recipes.online_dpo import run_online_dpo
    from rlhf.recipes.online_dpo_config import OnlineDPOConfig

    _say(run_online_dpo(load_config(OnlineDPOConfig, config, overrides or ())))


@app.command("best-of-n")
def best_of_n(config: ConfigOption = None, overrides: Overrides = None) -> None:
    """Best-of-n and rejection sampling: answer each prompt many times, score, keep the best for SFT and as pairs."""
    from rlhf.infra.config import load_config
    from rlhf.recipes.best_of_n import BEST, PAIRS, run_best_of_n
    from rlhf.recipes.best_of_n_config import BestOfNConfig

    run = run_best_of_n(load_config(BestOfNConfig, config, overrides or ()))
    _say(run)
    if run.stop_reason is None:
        typer.echo(f"kept: {run.folder / BEST}; pairs: {run.folder / PAIRS}")


@app.command()
def overoptimize(config: ConfigOption = None, overrides: Overrides = None) -> None:
    """Fit the over-optimisation law to gold against KL: of PPO and GRPO runs, best-of-n pools or files of points."""
    from rlhf.eval.overoptimisation_report import PLOT, REPORT, cautions, verdict
    from rlhf.infra.config import load_config
    from rlhf.recipes.overoptimize import OveroptimizeConfig, run_overoptimize

    run, fits = run_overoptimize(load_config(OveroptimizeConfig, config, overrides or ()))
    for fit in fits:
        typer.echo(f"{fit.curve.name}: {verdict(fit)}")
        for sentence in cautions(fit):
            typer.echo(f"  note: {sentence}")
    _say(run)
    typer.echo(f"report: {run.folder / REPORT}; figure: {run.folder / PLOT}")


@app.command("eval")
def evaluate(config: ConfigOption = None, overrides: Overrides = None) -> None:
    """Compare models on the same prompts and write a report, or run fixed suites (suites=[...])."""
    from rlhf.infra.config import load_config
    from rlhf.recipes.evaluate import run_evaluation
    from rlhf.recipes.evaluate_config import EvaluateConfig
    from rlhf.recipes.suites import run_suites

    settings = load_config(EvaluateConfig, config, overrides or ())
    if settings.suites:
        _show_suites(*run_suites(settings))
        return
    run, report = run_evaluation(settings)
    _show(report)
    _say(run)
    typer.echo(f"report: {report.html}")


@app.command()
def pipeline(config: ConfigOption = None, overrides: Overrides = None) -> None:
    """All stages in one go: SFT, reward model, DPO, PPO, evaluation, report."""
    from rlhf.infra.config import load_config
    from rlhf.recipes.pipeline import PipelineConfig

    _pipeline(load_config(PipelineConfig, config, overrides or ()))


@app.command()
def ablate(config: ConfigOption = None, overrides: Overrides = None) -> None:
    """Compare training methods: the same start, data and seconds for each, several seeds; one table, one figure."""
    from rlhf.infra.config import load_config
    from rlhf.recipes.ablation_config import AblationConfig

    _ablate(load_config(AblationConfig, config, overrides or ()))


@app.command()
def doctor(
    recipe: Annotated[
        str, typer.Argument(help="sft, rm, dpo, kto, ppo, grpo or pipeline.", show_default=False, metavar="RECIPE")
    ],
    config: ConfigOption = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Check model, tokenizer, template, data and config as a recipe would use them; exit code 1 where one is red."""
    from rlhf.eval.doctor.show import show
    from rlhf.infra.config import load_config
    from rlhf.infra.logger import terminal
    from rlhf.recipes.doctor import doctor_config, run_doctor

    settings = load_config(doctor_config(recipe), config, overrides or ())
    several = recipe == "pipeline"
    diagnosis = run_doctor(
        recipe,
        settings,
        lambda found: None if as_json else show(terminal(), found.finding, found.stage if several else ""),
    )
    typer.echo(diagnosis.to_json() if as_json else diagnosis.summary())
    if diagnosis.level == "red":
        raise typer.Exit(1)


@app.command()
def bench(
    config_a: Annotated[Path, typer.Argument(help="YAML file of the one side.", show_default=False)],
    config_b: Annotated[Path, typer.Argument(help="YAML file of the other side.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings of both as section.key=value.", show_default=False)
    ] = None,
    of_a: Annotated[list[str] | None, typer.Option("--a", help="A setting of A alone.", show_default=False)] = None,
    of_b: Annotated[list[str] | None, typer.Option("--b", help="A setting of B alone.", show_default=False)] = None,
    recipe: Annotated[str | None, typer.Option(help="What is run; default: the recipe that takes the files.")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Runs of each side.")] = 5,
    warmup: Annotated[int, typer.Option(min=1, help="Steps at the start of every run that do not count.")] = 1,
    unequal_work: Annotated[bool, typer.Option("--unequal-work", help="Compare per token where work differs.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all numbers to this file.")] = None,
) -> None:
    """Compare the speed of two configurations on the same work, pair by pair in fresh processes."""
    from rlhf.recipes.bench import check_writable, compare, write_comparison
    from rlhf.recipes.bench_sides import read_sides
    from rlhf.recipes.bench_table import table

    if json_file is not None:
        check_writable(json_file)
    settings = [[*(overrides or ()), *(of_one or ())] for of_one in (of_a, of_b)]
    name, sides = read_sides((config_a, config_b), settings, recipe)
    found = compare(name, sides, num_pairs=pairs, num_warmup=warmup, unequal_work=unequal_work, say=typer.echo)
    typer.echo(f"\n{table(found)}")
    if json_file is not None:
        write_comparison(found, json_file)


@app.command()
def plan(
    what: Annotated[
        str,
        typer.Argument(
            help="Config file, run folder, or a recipe with --config.", show_default=False, metavar="CONFIG"
        ),
    ],
    config: ConfigOption = None,
    overrides: Overrides = None,
    memory_gb: Annotated[
        float | None, typer.Option(min=0.1, help="Memory of the device in GB (10^9 bytes); default: this machine's.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps instead of run.device.")] = None,
    shape: Annotated[
        Path | None, typer.Option(help="config.json of a base that cannot be found here.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Predict the peak memory of every phase, and what to change where it does not fit (exit code 1)."""
    from rlhf.infra.device import device_name
    from rlhf.recipes.plan import make_plan, read_plan_config
    from rlhf.recipes.plan_predict import Machine
    from rlhf.recipes.plan_show import advice_lines, stage_lines

    recipe, settings = read_plan_config(what, config, overrides or [])
    machine = Machine.of(device_name(device or dict(settings)["run"].device), memory_gb)

    def say(lines: Iterable[str]) -> None:
        for line in lines if not as_json else ():
            typer.echo(line)

    plan = make_plan(
        recipe,
        settings,
        machine,
        shape,
        lambda stage: say(stage_lines(stage, machine)),
        lambda advice: say(advice_lines(advice, machine)),
    )
    if as_json:
        typer.echo(plan.to_json())
    if not plan.fits:
        raise typer.Exit(1)


@app.command()
def resume(folder: Annotated[Path, typer.Argument(help="Folder of the run.", show_default=False)]) -> None:
    """Take an interrupted run up where its last checkpoint is."""
    from rlhf.recipes.resume import resume_run

    run = resume_run(folder, _composed)
    if run is not None:
        _say(run)


@app.command()
def generate(
    source: Annotated[str, typer.Argument(help="Run, folder or hub name.", show_default=False)],
    prompts: Annotated[list[str], typer.Argument(help="What to ask.", show_default=False)],
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    output_dir: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = Path("runs"),
) -> None:
    """Answer prompts with any model."""
    from rlhf.recipes.generate import Responder

    responder = Responder.load(source, output_dir, temperature, max_new_tokens, system)
    for prompt, answer in zip(prompts, responder.answers([[_user(p)] for p in prompts], seed), strict=True):
        typer.echo(f"> {prompt}\n{answer}\n")


@app.command("export")
def export_model(
    source: Annotated[str, typer.Argument(help="Run, or folder of a policy or a reward model.", show_default=False)],
    to: Annotated[Path | None, typer.Option(help="Folder to write; default: exports/<name of the run>.")] = None,
    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="Number format of the weights.")] = "bf16",
    base: Annotated[
        str | None, typer.Option(help="Original weights, where the base on record is quantised or gone.")
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="Where the models are loaded and compared.")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    max_abs_difference: Annotated[float | None, typer.Option(min=0.0, help="Tolerance of logits or scores.")] = None,
    max_mean_kl: Annotated[float | None, typer.Option(min=0.0, help="Tolerance in nats per token.")] = None,
    output_dir: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = Path("runs"),
) -> None:
    """Write a model as a plain Hugging Face folder with its card, checked against the run."""
    from rlhf.recipes.export import ExportConfig, run_export

    settings = {
        "source": source, "target": to, "dtype": dtype, "base": base, "device": device, "overwrite": overwrite,
        "max_abs_difference": max_abs_difference, "max_mean_kl": max_mean_kl, "output_dir": output_dir,
    }  # fmt: skip
    done = run_export(ExportConfig.model_validate(settings))
    typer.echo(f"export: {done.folder} ({done.report['kind'].replace('_', ' ')}, {dtype})")
    typer.echo(done.summary())


@app.command()
def chat(
    source: Annotated[str, typer.Argument(help="Run, folder or hub name.", show_default=False)],
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    output_dir: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = Path("runs"),
) -> None:
    """Talk to a model; an empty line or end of file ends it."""
    from rlhf.recipes.generate import Responder

    responder = Responder.load(source, output_dir, temperature, max_new_tokens, system)
    messages: list[dict[str, str]] = []
    while said := _ask():
        messages.append(_user(said))
        answer = responder.answers([messages], seed + len(messages))[0]
        messages.append({"role": "assistant", "content": answer})
        typer.echo(answer)


@config_app.command("show")
def config_show(recipe: Recipe, config: ConfigOption = None, overrides: Overrides = None) -> None:
    """Print a recipe's resolved configuration: a YAML file with a comment on every setting."""
    from rlhf.infra.config import load_config
    from rlhf.infra.config_view import view
    from rlhf.infra.logger import terminal
    from rlhf.recipes.resume import config_class

    lines = view(load_config(config_class(recipe), config, overrides or ()), recipe)
    for line in lines:
        if terminal().is_terminal:
            terminal().print(line.rich())
        else:
            typer.echo(line.plain())


@config_app.command("schema")
def config_schema(
    recipe: Recipe,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: print it.")] = None,
) -> None:
    """Write the JSON schema of a recipe's files, for editors."""
    from rlhf.infra.config_view import json_schema
    from rlhf.recipes.resume import config_class

    text = json.dumps(json_schema(config_class(recipe), recipe), indent=2) + "\n"
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"'{output}' cannot be written: {error.strerror}; choose another --output") from None
    typer.echo(f"schema: {output}; name it in a config file's first line: # yaml-language-server: $schema={output}")


def main() -> None:
    """Entry point: errors that the user can mend become one sentence and exit code 2."""
    from rlhf.infra.interrupt import Stopped

    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"rlhf: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(f"rlhf: {stopped}", file=sys.stderr)
        sys.exit(130)
    except SystemExit as leaving:
        # A second Ctrl-C, or one between runs: the command-line library makes it an abort with code 1.
        sys.exit(130 if isinstance(leaving.__context__, typer.Abort) else leaving.code)


def _composed(config: object, folder: Path) -> None:
    from rlhf.recipes.pipeline import PipelineConfig

    (_pipeline if isinstance(config, PipelineConfig) else _ablate)(config, folder)


def _pipeline(config: object, folder: Path | None = None) -> None:
    from rlhf.recipes.pipeline import PipelineConfig, run_pipeline

    assert isinstance(config, PipelineConfig)
    run, report = run_pipeline(config, folder)
    if report is not None:
        _show(report)
    _say(run)
    if report is not None:
        typer.echo(f"report: {report.html}")


def _ablate(config: object, folder: Path | None = None) -> None:
    from rlhf.eval.ablation_report import FIGURE_FILE, TABLE_FILE, brief_table, sentences
    from rlhf.eval.report import console_table
    from rlhf.infra.logger import terminal
    from rlhf.recipes.ablation import run_ablation
    from rlhf.recipes.ablation_config import AblationConfig

    assert isinstance(config, AblationConfig)
    run, found = run_ablation(config, folder)
    if found is not None:
        terminal().print(console_table(brief_table(found)))
        for sentence in sentences(found):
            typer.echo(sentence)
    _say(run)
    if found is not None:
        typer.echo(f"table: {run.folder / TABLE_FILE}; figure: {run.folder / FIGURE_FILE}")


def _show(report: ReportPaths) -> None:
    from rlhf.eval.report import summary_table
    from rlhf.infra.logger import terminal

    console = terminal()
    console.print(summary_table(report.report, intervals_below=console.width < 120))


def _show_suites(run: Run, report: SuiteReport) -> None:
    """Print what suites say; exit code 1 where something got worse that must not."""
    from rlhf.eval.report import console_table
    from rlhf.eval.suite_report import REPORT_FILE, cautions_of, changes_of, scores_of
    from rlhf.infra.logger import terminal

    console = terminal()
    console.print(console_table(scores_of(report), intervals_below=console.width < 120))
    if report.comparisons:
        console.print(console_table(changes_of(report)))
    for sentence in cautions_of(report):
        typer.echo(f"note: {sentence}")
    _say(run)
    typer.echo(f"report: {run.folder / REPORT_FILE}")
    for found in report.worse:
        names = ", ".join(worse.item_id for worse in found.worse)
        print(
            f"rlhf: {found.suite}: {found.model} is worse than {found.reference} on {len(found.worse)} prompts that "
            f"must not get worse: {names}; both answers are in the report",
            file=sys.stderr,
        )
    if report.worse:
        raise typer.Exit(1)


def _say(run: Run) -> None:
    cost = run.info.get("cost", {})
    typer.echo(f"run: {run.folder} ({cost.get('seconds', 0):.1f} s)")
    if run.stop_reason == "max_minutes":
        typer.echo(f"the time budget is spent; go on with: {run.resume_command}")
    if run.stop_reason == "reward_hacking":
        typer.echo(f"stopped by a sign of reward hacking: see {run.folder / 'hacking.json'} and hacking.png")


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    main()
