"""Fixed suites: every model answers the same questions, functions read and judge the answers, a table says how well.

The light way to evaluate: `rlhf eval suites=[reasoning, code] 'models={sft: sft, ppo: ppo}'`. In its order of events a
model writes (or ranks) its answers, the suite's extractor finds the answer in each, its scorer judges them all. A set
that must not get worse is compared item by item, and `SuiteReport.worse` says what fell.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from rlhf.data.chat import ChatEncoder
from rlhf.data.rows import Message, Prompt
from rlhf.eval.extractors import EXTRACTORS
from rlhf.eval.report import ReportPaths
from rlhf.eval.suite_items import Item, Suite
from rlhf.eval.suite_library import files_of
from rlhf.eval.suite_report import SuiteReport, write_report
from rlhf.eval.suite_results import (
    Answered,
    Comparison,
    SuiteResult,
    compare_results,
    read_results,
    suite_result,
    write_results,
)
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run
from rlhf.infra.run_folder import RUN_INFO
from rlhf.models.reward_model import AnyReward
from rlhf.recipes.answers import AnsweringStopped, askable, cached_answers, stop_if_asked, texts_of
from rlhf.recipes.evaluate import load_scorer, run_evaluation
from rlhf.recipes.evaluate_config import EvaluateConfig
from rlhf.recipes.launch import launch
from rlhf.recipes.ranked import last_ids, measured_answers, named_suite, room_for, score_items
from rlhf.recipes.stages import LoadedPolicy, PolicyShelf
from rlhf.rewards.learned import LearnedReward
from rlhf.rollout.cache import CachedAnswer

ANSWERS_FILE = "answers.jsonl"
Answers = dict[tuple[str, str], dict[str, Answered]]


@dataclass(frozen=True)
class SuiteParts:
    """Suites, models, a reward model where one is asked for, and the results of an earlier run to compare with."""

    suites: list[Suite]
    models: dict[str, LoadedPolicy]
    scorer: AnyReward | None
    baseline: list[SuiteResult]
    baseline_answers: Answers


@dataclass(frozen=True)
class _Written:
    """One item's exchange: the prompt as it was last asked, the last answer, and its text."""

    prompt: Prompt
    answer: CachedAnswer
    text: str


def run_eval(config: EvaluateConfig) -> tuple[Run, ReportPaths | SuiteReport]:
    """The full report, or the suites that `suites` names."""
    return run_suites(config) if config.suites else run_evaluation(config)


def run_suites(config: EvaluateConfig) -> tuple[Run, SuiteReport]:
    """Run every suite on every model; results, answers and `SUITES.md` lie in the run folder."""
    written: list[SuiteReport] = []

    def evaluate(settings: EvaluateConfig, run: Run, parts: SuiteParts) -> tuple[int, int]:
        try:
            answers = answer_suites(parts, settings, run)
        except AnsweringStopped:
            return 0, 0
        results = [
            suite_result(name, suite, list(answers[name, suite.name].values()), settings.run.seed)
            for name in settings.models
            for suite in parts.suites
        ]
        report = SuiteReport(
            settings.title,
            settings.baseline or (settings.reference_name if len(settings.models) > 1 else None),
            tuple(results),
            tuple(comparisons(results, answers, parts, settings)),
            suite_notes(settings, run, parts),
        )
        guards = [suite.name for suite in parts.suites if suite.guard]
        write_answers(run.folder / ANSWERS_FILE, answers)
        write_results(run.folder, results, report.comparisons)
        write_report(run.folder, report, guards)
        written.append(report)
        return 0, sum(a.num_tokens or 0 for of_suite in answers.values() for a in of_suite.values())

    run = launch(
        "eval",
        config,
        prepare,
        evaluate,
        settings=config.run,
        lineage=dict(config.models),
        data_files=files_of(config.suites),
    )
    return run, written[0]


def answer_suites(parts: SuiteParts, config: EvaluateConfig, run: Run) -> Answers:
    """Every model's answers to every suite. Raises AnsweringStopped on Ctrl-C."""
    answers: Answers = {}
    for name in config.models:
        with run.logger.progress(f"answers of {name}", len(parts.suites)) as advance:
            for suite in parts.suites:
                stop_if_asked(run)
                found = answer_suite(name, suite, parts, config, run)
                answers[name, suite.name] = {answer.item_id: answer for answer in found}
                advance()
    return answers


def prepare(config: EvaluateConfig, device: torch.device, rejected_rows: Path) -> SuiteParts:
    """Everything that can be refused is looked at before anything is answered."""
    suites = [named_suite(name, config, config.max_items) for name in config.suites]
    names = [suite.name for suite in suites]
    if len(set(names)) < len(names):
        raise UserError(f"a suite is named twice: {', '.join(names)}; rename one of the files")
    folder = baseline_folder(config)
    baseline = [] if folder is None else read_results(folder)
    if folder is not None and not {result.suite for result in baseline} & set(names):
        raise UserError(f"the baseline '{folder}' has none of the suites {', '.join(names)}; name another run")
    shelf = PolicyShelf(config.model, config.run.output_dir, device, config.run.dtype)
    models = {name: shelf.load(source) for name, source in config.models.items()}
    scorer = load_scorer(config, next(iter(models.values())).backbone)
    earlier = {} if folder is None else read_answers(folder / ANSWERS_FILE)
    return SuiteParts(suites, models, scorer, baseline, earlier)


def answer_suite(name: str, suite: Suite, parts: SuiteParts, config: EvaluateConfig, run: Run) -> list[Answered]:
    """One model's answers to every item of a suite, read and judged."""
    loaded = parts.models[name]
    encoder = ChatEncoder(loaded.backbone.tokenizer, config.data.system_prompt)
    if suite.ranked:
        return measured_answers(suite, loaded, encoder, config, partial(stop_if_asked, run))
    written, lengths, finished = write_turns(suite.items, loaded, encoder, config)
    extracted = [
        EXTRACTORS[item.extractor or suite.extractor](said.text, item)
        for item, said in zip(suite.items, written, strict=True)
    ]
    scores = score_items(suite, extracted)
    rewards = rewards_of(written, loaded, parts, config)
    return [
        Answered(
            item.item_id,
            item.group,
            item.turns[-1],
            said.text,
            found,
            score.value,
            dict(score.parts) | ({} if reward is None else {"reward": reward}),
            score.detail,
            num_tokens,
            is_finished,
        )
        for item, said, found, score, reward, num_tokens, is_finished in zip(
            suite.items, written, extracted, scores, rewards, lengths, finished, strict=True
        )
    ]


def write_turns(
    items: Sequence[Item], loaded: LoadedPolicy, encoder: ChatEncoder, config: EvaluateConfig
) -> tuple[list[_Written], list[int], list[bool]]:
    """The last answer to each item, with the tokens of all its answers and whether all of them ended by themselves.

    A later turn is asked behind the model's own answers to the earlier ones. Of what is too long for the model's
    context the end is read.
    """
    generation = config.generation.model_copy(update={"temperature": 0.0}) if config.greedy else config.generation
    dialogues: list[list[Message]] = [[] for _ in items]
    written: dict[int, _Written] = {}
    lengths, finished = [0] * len(items), [True] * len(items)
    for turn in range(max(len(item.turns) for item in items)):
        asked = [index for index, item in enumerate(items) if turn < len(item.turns)]
        for index in asked:
            dialogues[index].append({"role": "user", "content": items[index].turns[turn]})
        prompts = [askable(list(dialogues[index]), encoder) for index in asked]
        room = room_for(generation.max_new_tokens, loaded, "an answer (generation.max_new_tokens)")
        ids = [last_ids(prompt, room, encoder) for prompt in encoder.prompt_ids_batch(prompts)]
        answers = cached_answers(loaded, ids, generation, encoder, config.run, config.use_cache)
        for index, answer, text in zip(asked, answers, texts_of(answers, encoder, generation), strict=True):
            written[index] = _Written(list(dialogues[index]), answer, text)
            lengths[index] += len(answer.response_ids)
            finished[index] = finished[index] and answer.finished
            dialogues[index].append({"role": "assistant", "content": text})
    return [written[index] for index in range(len(items))], lengths, finished


def rewards_of(
    written: Sequence[_Written], loaded: LoadedPolicy, parts: SuiteParts, config: EvaluateConfig
) -> list[float] | list[None]:
    """The reward model's score of each last answer, where there is one."""
    if parts.scorer is None:
        return [None] * len(written)
    learned = LearnedReward(parts.scorer, loaded.backbone.tokenizer, config.data.system_prompt)
    return learned(
        [said.prompt for said in written],
        [said.text for said in written],
        prompt_ids=[said.answer.prompt_ids for said in written],
        completion_ids=[said.answer.response_ids for said in written],
        finished=[said.answer.finished for said in written],
    )


def comparisons(
    results: Sequence[SuiteResult], answers: Answers, parts: SuiteParts, config: EvaluateConfig
) -> list[Comparison]:
    """Each model against the reference among them, or against the same-named (or only) model of the baseline."""
    guards = {suite.name for suite in parts.suites if suite.guard}
    by_name = {(result.model, result.suite): result for result in results}
    names = list(config.models)
    # What came before the reference in training is no worsening of it.
    later = names if config.baseline is not None else names[names.index(config.reference_name) + 1 :]
    found = []
    for (model, suite), result in by_name.items():
        if config.baseline is not None:
            earlier = [other for other in parts.baseline if other.suite == suite]
            reference = next((other for other in earlier if other.model == model or len(earlier) == 1), None)
            before = parts.baseline_answers.get((reference.model, suite)) if reference is not None else None
        else:
            name = config.reference_name
            reference = by_name[name, suite] if name != model else None
            before = answers.get((name, suite))
        if reference is not None:
            compared = compare_results(
                result, reference, answers[model, suite], before, suite in guards and model in later, config.run.seed
            )
            found += [] if compared is None else [compared]
    return found


def baseline_folder(config: EvaluateConfig) -> Path | None:
    """The run folder that `baseline` names. Raises UserError where there is none."""
    if config.baseline is None:
        return None
    for place in (Path(config.baseline), config.run.output_dir / config.baseline):
        if (place / RUN_INFO).is_file():
            return place
    raise UserError(f"baseline names the run '{config.baseline}', but there is none in '{config.run.output_dir}'")


def write_answers(path: Path, answers: Answers) -> None:
    """One JSON object per answer: model, suite, and everything that was asked, said, read and judged."""
    with path.open("w", encoding="utf-8") as file:
        for (model, suite), of_suite in answers.items():
            for answer in of_suite.values():
                row = {"model": model, "suite": suite} | asdict(answer)
                file.write(json.dumps(row, ensure_ascii=True, allow_nan=False) + "\n")


def read_answers(path: Path) -> Answers:
    """What `write_answers` wrote; empty where the file is gone."""
    found: Answers = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            model, suite = row.pop("model"), row.pop("suite")
            found.setdefault((model, suite), {})[row["item_id"]] = Answered(**row)
    return found


def suite_notes(config: EvaluateConfig, run: Run, parts: SuiteParts) -> dict[str, str]:
    """How it was measured."""
    temperature = config.generation.temperature
    how = "greedy" if config.greedy else f"sampled at temperature {temperature:g} with seed {config.run.seed}"
    found = {
        "answers": f"{how}, at most {config.generation.max_new_tokens} tokens each",
        "suites": ", ".join(f"{suite.label}: {suite.description}" for suite in parts.suites),
        "judged by": ", ".join(f"{suite.name}: {suite.extractor}, then {suite.scorer}" for suite in parts.suites),
        "device": f"{run.device}, {config.run.dtype}, {run.info['num_threads']} threads",
        "machine": f"{platform.machine()}, {run.info['num_cpus']} cores, {platform.system()}",
    }
    return found | {"versions": ", ".join(f"{name} {version}" for name, version in run.info["versions"].items())}
