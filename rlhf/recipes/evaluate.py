"""Evaluation: every model answers the same prompts, the answers are judged, and a report says what came of it."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlhf.data.chat import ChatEncoder
from rlhf.data.data_config import SourceConfig
from rlhf.data.preference_dataset import PreferenceDataset, PreferenceExample
from rlhf.data.prompt_dataset import PromptDataset
from rlhf.data.tinychat import GoldScorer
from rlhf.eval.judge import Judge, JudgingStopped
from rlhf.eval.judge_report import JUDGEMENTS, write_judgements
from rlhf.eval.report import ReportPaths, write_report
from rlhf.eval.report_data import ReportInput
from rlhf.eval.reward_accuracy import RewardPair
from rlhf.eval.samples import Mode, ModelResult, Sample, write_samples
from rlhf.eval.suite_items import Suite
from rlhf.eval.suite_library import files_of
from rlhf.eval.suite_results import SuiteResult, suite_result
from rlhf.eval.suites import EvalPrompt, gold_scores, prompt_suite, shown, tinychat_suite
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run
from rlhf.models.backbone import Backbone
from rlhf.models.reference import Reference
from rlhf.models.reward_model import AnyReward, ClassifierReward, RewardEnsemble, RewardModel, load_reward_model
from rlhf.recipes.answers import AnsweringStopped, askable, cached_answers, stop_if_asked, texts_of
from rlhf.recipes.evaluate_config import EvaluateConfig
from rlhf.recipes.evaluation_judges import judge_models
from rlhf.recipes.evaluation_sources import StageSources, stage_sources
from rlhf.recipes.judge_pairs import cost_notes
from rlhf.recipes.judging import build_judges
from rlhf.recipes.launch import launch
from rlhf.recipes.ranked import measured_answers, named_suite
from rlhf.recipes.reward import as_reward_pairs, score_pairs
from rlhf.recipes.stages import REWARD_MODEL, LoadedPolicy, PolicyShelf, locate
from rlhf.rewards.detectors import refusal_flags
from rlhf.rewards.learned import SCORING_TOKENS, LearnedReward, same_tokenizer
from rlhf.rollout.cache import CachedAnswer


@dataclass(frozen=True)
class Parts:
    """Prompts, models and reward model, loaded and found usable."""

    prompts: list[EvalPrompt]
    pairs: list[PreferenceExample]
    models: dict[str, LoadedPolicy]
    reward: RewardModel | RewardEnsemble | None
    scorer: AnyReward | None
    judges: list[Judge]
    tax: list[Suite]
    stages: StageSources


def run_evaluation(config: EvaluateConfig) -> tuple[Run, ReportPaths]:
    """Answer, judge, report; the report lies in the run folder."""
    written: list[ReportPaths] = []

    def evaluate(settings: EvaluateConfig, run: Run, parts: Parts) -> tuple[int, int]:
        try:
            results = [answer_all(name, parts, settings, run) for name in settings.models]
            taxed = tax_results(settings, parts, run)
        except AnsweringStopped:
            return 0, 0
        with run.timer("score"):
            pairs, milliseconds = reward_pairs(parts)
        write_samples(run.folder / "samples.jsonl", (s for result in results for s in result.samples))
        num_tokens = sum(s.num_tokens for result in results for s in result.samples)
        try:
            judged = judge_models(results, parts.prompts, parts.judges, settings.reference, run)
        except JudgingStopped:
            return 0, num_tokens
        if judged:
            write_judgements(run.folder / JUDGEMENTS, judged)
        source = ReportInput(
            models=results,
            title=settings.title,
            reference=settings.reference,
            reward_pairs=pairs,
            reward_ms_per_sample=milliseconds,
            histories=parts.stages.histories,
            costs=parts.stages.costs,
            notes=notes(settings, run, parts) | cost_notes(parts.judges),
            judged=judged,
            tax_results=taxed,
            hacking=parts.stages.hacking,
            stages=parts.stages.facts,
            seed=settings.run.seed,
        )
        written.append(write_report(run.folder, source))
        return 0, num_tokens

    run = launch(
        "eval",
        config,
        prepare,
        evaluate,
        settings=config.run,
        lineage=dict(config.models),
        data_files=[*config.data.files(), *files_of(config.tax_suites)],
    )
    return run, written[0]


def prepare(config: EvaluateConfig, device: torch.device, rejected_rows: Path) -> Parts:
    """Models on as few bases as possible, the reward model, the prompts and the held-out pairs."""
    shelf = PolicyShelf(config.model, config.run.output_dir, device, config.run.dtype)
    models = {name: shelf.load(source) for name, source in config.models.items()}
    backbone = next(iter(models.values())).backbone
    encoder = ChatEncoder(backbone.tokenizer, config.data.system_prompt)
    scorer = load_scorer(config, backbone)
    reward = None if isinstance(scorer, ClassifierReward) else scorer
    if config.data.is_tinychat:
        prompts = tinychat_suite(config.suite)
    else:
        data, held = PromptDataset.load(config.data, encoder, rejected_rows)
        prompts = prompt_suite((held or data).examples, config.suite.num_heldout)
    pairs = held_out_pairs(config, reward, rejected_rows) if reward is not None and config.num_reward_pairs else []
    judges = build_judges(config.judges, config.run.output_dir, device, config.run.dtype)
    stages = stage_sources(config.models, config.histories, config.run.output_dir)
    return Parts(prompts, pairs, models, reward, scorer, judges, load_tax_suites(config), stages)


def load_tax_suites(config: EvaluateConfig) -> list[Suite]:
    """The suites of the alignment tax. Raises UserError for one whose answers are written instead of ranked."""
    suites = [named_suite(name, config, config.num_tax_items) for name in config.tax_suites]
    written = [suite.name for suite in suites if not suite.ranked]
    if written:
        raise UserError(f"tax names the suite '{written[0]}', which has no choices to rank; run it by suites=[...]")
    return suites


def tax_results(config: EvaluateConfig, parts: Parts, run: Run) -> list[SuiteResult]:
    """Every model on every benchmark of the alignment tax."""
    found = []
    with run.logger.progress("alignment tax", len(config.models) * len(parts.tax)) as advance:
        for name, loaded in parts.models.items():
            encoder = ChatEncoder(loaded.backbone.tokenizer, config.data.system_prompt)
            for suite in parts.tax:
                answers = measured_answers(suite, loaded, encoder, config, partial(stop_if_asked, run))
                found.append(suite_result(name, suite, answers, config.run.seed))
                advance()
    return found


def load_scorer(config: EvaluateConfig, backbone: Backbone) -> AnyReward | None:
    """The reward model that scores answers, on the first model's base where it is of the same; None without one."""
    if config.reward_model is None:
        return None
    return load_reward_model(
        locate(config.reward_model, config.run.output_dir, REWARD_MODEL), backbone, config.run.dtype
    )


def held_out_pairs(
    config: EvaluateConfig, reward: RewardModel | RewardEnsemble, rejected_rows: Path
) -> list[PreferenceExample]:
    """Labelled pairs that no training has seen: of the built-in world's held-out tasks, or the validation side."""
    from rlhf.data.data_config import DataConfig
    from rlhf.data.loading import rows_from_memory
    from rlhf.data.tinychat import preference_pairs

    encoder = ChatEncoder(reward.tokenizer, config.data.system_prompt)
    shared = {name: getattr(config.data, name) for name in SourceConfig.model_fields}
    data = DataConfig(**shared | {"max_samples": None})
    if config.data.is_tinychat:
        rows = rows_from_memory(preference_pairs("heldout", config.num_reward_pairs, config.suite.seed), data)
        return PreferenceDataset.from_rows(rows, encoder, data).examples
    _, held = PreferenceDataset.load(data, encoder, rejected_rows)
    return held.examples[: config.num_reward_pairs] if held is not None else []


def answer_all(name: str, parts: Parts, config: EvaluateConfig, run: Run) -> ModelResult:
    """One model's answers to every prompt, sampled, and greedy ones to the held-out prompts, with all scores.

    Raises AnsweringStopped on Ctrl-C.
    """
    stop_if_asked(run)
    samples: list[Sample] = []
    with run.logger.progress(f"answers of {name}", len(parts.prompts)) as advance:
        samples += answer(name, parts, parts.prompts, "sampled", config, run)
        advance(len(parts.prompts))
        if config.greedy:
            heldout = [prompt for prompt in parts.prompts if prompt.split == "heldout"]
            samples += answer(name, parts, heldout, "greedy", config, run)
    return ModelResult(name, tuple(samples))


def answer(
    name: str, parts: Parts, prompts: Sequence[EvalPrompt], mode: Mode, config: EvaluateConfig, run: Run
) -> list[Sample]:
    """Sample (or read from the cache), then judge: gold, reward model, refusal, KL to the reference."""
    loaded = parts.models[name]
    encoder = ChatEncoder(loaded.backbone.tokenizer, config.data.system_prompt)
    generation = config.generation if mode == "sampled" else config.generation.model_copy(update={"temperature": 0.0})
    prompt_ids = encoder.prompt_ids_batch([askable(prompt.prompt, encoder) for prompt in prompts])
    answers = cached_answers(loaded, prompt_ids, generation, encoder, config.run, config.use_cache)
    texts = texts_of(answers, encoder, generation)
    rewards: Sequence[float | None] = [None] * len(answers)
    if parts.scorer is not None:
        columns: Mapping[str, Sequence[Any]] = {
            "prompt_ids": prompt_ids,
            "completion_ids": [answer.response_ids for answer in answers],
            "finished": [answer.finished for answer in answers],
        }
        # Made for each model: whether its ids are those of the reward model is a matter of both tokenizers.
        learned = LearnedReward(parts.scorer, loaded.backbone.tokenizer, config.data.system_prompt)
        rewards = learned([prompt.prompt for prompt in prompts], texts, **columns)
    golds = gold_scores(prompts, texts, _scorer())
    refused = refusal_flags(texts)
    kls = kl_to_reference(name, parts, answers, config) if mode == "sampled" else [None] * len(answers)
    return [
        Sample(
            prompt_id=prompt.prompt_id,
            prompt=shown(prompt.prompt),
            family=prompt.family,
            split=prompt.split,
            kind=prompt.kind,
            response=text,
            num_tokens=len(given.response_ids),
            finished=given.finished,
            mode=mode,
            gold=None if gold is None else gold.total,
            gold_parts={} if gold is None else gold.parts,
            refused=flag if gold is None else gold.refused,
            reward=reward,
            kl=kl,
            entropy=given.entropy,
            model=name,
        )
        for prompt, given, text, gold, flag, reward, kl in zip(
            prompts, answers, texts, golds, refused, rewards, kls, strict=True
        )
    ]


def kl_to_reference(
    name: str, parts: Parts, answers: Sequence[CachedAnswer], config: EvaluateConfig
) -> Sequence[float | None]:
    """Sum over each answer of log pi - log pi_ref (k1, nats); 0 for the reference.

    None for models before it in training order and for those with another tokenizer, whose tokens it does not know.
    """
    names = list(parts.models)
    reference_name = config.reference_name
    loaded = parts.models[reference_name]
    ids_mean_the_same = same_tokenizer(loaded.backbone.tokenizer, parts.models[name].backbone.tokenizer)
    if names.index(name) < names.index(reference_name) or not ids_mean_the_same:
        return [None] * len(answers)
    sums = reference_sums(Reference(loaded.backbone, loaded.adapter), answers, config.generation.temperature)
    return [given.logprob - total for given, total in zip(answers, sums, strict=True)]


def reference_sums(reference: Reference, answers: Sequence[CachedAnswer], temperature: float) -> list[float]:
    """Log-probability of every whole answer under the reference."""
    from rlhf.data.chat import join
    from rlhf.data.collate import batches_by_tokens, pad_right
    from rlhf.models.policy import masked_logprobs

    examples = [join(given.prompt_ids, given.response_ids) for given in answers]
    sums = torch.zeros(len(examples))
    with torch.no_grad():
        for group in batches_by_tokens([len(example.input_ids) for example in examples], SCORING_TOKENS):
            backbone = reference.backbone
            batch = pad_right([examples[i] for i in group], backbone.tokenizer.pad_token_id).to(backbone.device)
            logprobs = masked_logprobs(
                backbone,
                reference.adapter,
                batch.input_ids_BT,
                batch.attention_mask_BT,
                batch.loss_mask_BT,
                temperature=temperature or 1.0,
            )
            sums[group] = logprobs.sum(dim=1).cpu()
    return [float(value) for value in sums]


def reward_pairs(parts: Parts) -> tuple[list[RewardPair], float | None]:
    """The reward model's scores of held-out pairs, and milliseconds per answer."""
    if parts.reward is None or not parts.pairs:
        return [], None
    scores = score_pairs(parts.reward, parts.pairs, SCORING_TOKENS)
    return as_reward_pairs(parts.pairs, scores), scores.ms_per_sample


def notes(config: EvaluateConfig, run: Run, parts: Parts) -> dict[str, str | int | float]:
    """How it was measured."""
    counts: dict[str, int] = {}
    for prompt in parts.prompts:
        counts[prompt.split] = counts.get(prompt.split, 0) + 1
    return {
        "seed": config.run.seed,
        "prompts": ", ".join(f"{number} {split}" for split, number in counts.items()),
        "sampling": f"one answer per prompt at temperature {config.generation.temperature:g}, at most "
        f"{config.generation.max_new_tokens} tokens" + (", and greedy answers" if config.greedy else ""),
        "device": f"{run.device}, {config.run.dtype}, {run.info['num_threads']} threads",
        "machine": f"{platform.machine()}, {run.info['num_cpus']} cores, {platform.system()}",
        "versions": ", ".join(f"{name} {version}" for name, version in run.info["versions"].items()),
    }


def _scorer() -> GoldScorer:
    from rlhf.data.tinychat.rows import shared_scorer

    return shared_scorer()
