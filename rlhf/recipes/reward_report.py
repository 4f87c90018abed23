"""A reward model on the bench: accuracy, honesty, biases, bad answers, padding; a report and a model card.

Nothing trains. The pairs should be ones that the model has not been trained on; whether that is so, only its user
knows, and the card names the files of both sides by their checksums.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from rlhf.data.chat import ChatEncoder, TokenExample
from rlhf.data.collate import pad_left, pad_right
from rlhf.data.data_config import DataConfig
from rlhf.data.loading import rows_from_memory, split_by_prompt
from rlhf.data.preference_dataset import PreferenceDataset, PreferenceExample
from rlhf.data.tinychat import preference_pairs
from rlhf.eval.reward_accuracy import RewardPair, reward_accuracy
from rlhf.eval.reward_biases import (
    ScoredPair,
    Variant,
    bad_answers,
    edited,
    feature_biases,
    planted_biases,
    spoiled,
    standard_deviation,
)
from rlhf.eval.reward_card import write_reward_report
from rlhf.eval.reward_report import PaddingCheck, RewardReport, distributions_of, worst_disagreements
from rlhf.eval.suites import shown
from rlhf.eval.temperature import TemperatureFit, temperature_report
from rlhf.infra.config import Config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run, RunConfig
from rlhf.infra.run_folder import RUN_INFO, read_run_info
from rlhf.models.reward_model import AnyReward, ClassifierReward, RewardEnsemble, load_reward_model
from rlhf.recipes.answers import AnsweringStopped, askable, stop_if_asked
from rlhf.recipes.launch import launch
from rlhf.recipes.stages import REWARD_MODEL, locate
from rlhf.rewards.learned import SCORING_TOKENS, LearnedReward

_MIN_FITTED = 20
_PADDED_ROWS = 32
_EXTRA_COLUMNS = 7


class HeldOutPairsConfig(DataConfig):
    """Pairs to measure on; all of them, unless a validation side is named."""

    validation_fraction: float = Field(
        0.0, ge=0.0, lt=1.0, description="measure on this share of the prompts alone, as training held it back; 0: all"
    )


class RewardReportConfig(Config):
    """`rlhf rm-report`."""

    run: RunConfig = Field(default_factory=RunConfig, description="name, place, seed, device")
    reward_model: str = Field("reward", description="run, folder or hub name of the reward model")
    data: HeldOutPairsConfig = Field(
        default_factory=HeldOutPairsConfig, description="labelled pairs; tinychat: its held-out tasks"
    )
    num_pairs: int = Field(1_000, ge=2, description="at most this many pairs")
    num_planted: int = Field(200, ge=0, description="answers that are edited and spoiled; 0: none")
    num_disagreements: int = Field(10, ge=0, description="pairs shown that the model orders against their label")
    world_seed: int = Field(1_000, ge=0, description="chooses pairs of the built-in world; not a seed of training")

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        reason = "nothing trains, and a report is made in one piece"
        names = ["max_minutes", "save_every_steps", "keep_checkpoints", "profile", "profile_steps"]
        idle = dict.fromkeys([f"run.{name}" for name in names], reason)
        if self.data.is_tinychat:
            names = ["max_samples", "max_validation_samples", "split_seed", "validation_files", "validation_fraction"]
            idle |= dict.fromkeys([f"data.{name}" for name in names], "num_pairs and world_seed choose the pairs")
            return idle
        idle["world_seed"] = "the data are not the built-in world"
        if self.data.has_validation:
            idle["data.max_samples"] = "the pairs are those of the validation side"
        return idle


@dataclass(frozen=True)
class ReportParts:
    """The model and the pairs it is measured on."""

    model: AnyReward
    pairs: list[PreferenceExample]
    dropped: str


def run_reward_report(config: RewardReportConfig) -> tuple[Run, RewardReport]:
    """Measure the reward model; report, card, numbers and plots lie in the run folder."""
    made: list[RewardReport] = []

    def measure(settings: RewardReportConfig, run: Run, parts: ReportParts) -> tuple[int, int]:
        try:
            report, num_tokens = reward_report(settings, run, parts)
        except AnsweringStopped:
            return 0, 0
        write_reward_report(run.folder, report)
        made.append(report)
        return 0, num_tokens

    run = launch(
        "rm-report",
        config,
        prepare,
        measure,
        settings=config.run,
        lineage={"reward_model": config.reward_model},
        data_files=config.data.files(),
    )
    return run, made[0]


def prepare(config: RewardReportConfig, device: torch.device, rejected_rows: Path) -> ReportParts:
    """Load the model, then the pairs with its tokenizer."""
    folder = locate(config.reward_model, config.run.output_dir, REWARD_MODEL)
    model = load_reward_model(folder, None, config.run.dtype).to(device)
    encoder = ChatEncoder(model.tokenizer, config.data.system_prompt)
    if config.data.is_tinychat:
        rows = rows_from_memory(preference_pairs("heldout", config.num_pairs, config.world_seed), config.data)
        data = PreferenceDataset.from_rows(rows, encoder, config.data)
    else:
        every, held = PreferenceDataset.load(config.data, encoder, rejected_rows)
        data = held or every
    pairs = data.examples[: config.num_pairs]
    if len(pairs) < 2:
        raise UserError(f"a report needs at least 2 pairs, got {len(pairs)} ({data.report}); name more data")
    return ReportParts(model, pairs, str(data.report))


def reward_report(config: RewardReportConfig, run: Run, parts: ReportParts) -> tuple[RewardReport, int]:
    """Every measurement in order, and the number of tokens scored."""
    learned = LearnedReward(parts.model, None, config.data.system_prompt, standardise=False)
    encoder = learned.encoder
    rows = [[*pair.prompt_ids, *ids] for pair in parts.pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    with run.logger.progress("pairs", None):
        started = time.perf_counter()
        scores = learned.score_ids(rows).tolist()
        milliseconds = 1000 * (time.perf_counter() - started) / len(rows)
    pairs = [
        ScoredPair(shown(pair.prompt), pair.chosen, pair.rejected, *scores[2 * i : 2 * i + 2], group_of(pair))
        for i, pair in enumerate(parts.pairs)
    ]
    accuracy = reward_accuracy(as_pairs(parts.pairs, pairs), milliseconds)  # refuses scores that are not finite
    std = standard_deviation(scores)
    chosen = range(min(config.num_planted, len(pairs)))
    stop_if_asked(run)
    planted, bad = edited([pairs[i] for i in chosen]), spoiled([pairs[i] for i in chosen], config.run.seed)
    with run.logger.progress("planted answers", None):
        changed = score_variants([*planted, *bad], parts.pairs, learned, encoder, config.data.max_length)
    base = [pairs[variant.prompt_index].chosen_score for variant in (*planted, *bad)]
    cut = len(planted)
    report = RewardReport(
        name=config.reward_model,
        accuracy=accuracy,
        temperature=fitted_temperature(parts.pairs, pairs, config.run.seed),
        features=tuple(feature_biases(pairs, config.run.seed)),
        planted=tuple(planted_biases(planted, base[:cut], changed[:cut], std, config.run.seed)),
        bad=tuple(bad_answers(bad, base[cut:], changed[cut:], std, config.run.seed)),
        distributions=distributions_of(pairs),
        padding=padding_check(parts.model, rows, std, config.data.max_length),
        disagreements=worst_disagreements(pairs, config.num_disagreements),
        margins=tuple(pair.chosen_score - pair.rejected_score for pair in pairs),
        model=model_facts(parts.model, config, run),
        training=training_facts(config),
        notes=report_notes(config, run, parts),
    )
    return report, sum(map(len, rows))


def score_variants(
    variants: Sequence[Variant],
    examples: Sequence[PreferenceExample],
    learned: LearnedReward,
    encoder: ChatEncoder,
    max_length: int,
) -> list[float]:
    """Scores of changed answers, each behind its pair's prompt, the end of which is kept where all is too long."""
    prompts = [askable(examples[variant.prompt_index].prompt, encoder) for variant in variants]
    answers = encoder.response_ids_batch(prompts, [variant.changed for variant in variants])
    # The pairs' own prompt ids: they may have been cut to length.
    starts = [examples[variant.prompt_index].prompt_ids for variant in variants]
    rows = []
    for start, answer in zip(starts, answers, strict=True):
        kept = answer[: max_length - 1]
        rows.append([*encoder.shorten_prompt(start, max_length - len(kept)), *kept])
    scores: list[float] = learned.score_ids(rows).tolist()
    return scores


def fitted_temperature(
    examples: Sequence[PreferenceExample], pairs: Sequence[ScoredPair], seed: int
) -> TemperatureFit | None:
    """Fit on one half of the prompts, judge on the other; None where there are too few pairs for two halves."""
    prompts = [example.prompt for example in examples]
    if len({shown(prompt) for prompt in prompts}) < 2 or len(pairs) < 2 * _MIN_FITTED:
        return None
    fitted, held = split_by_prompt(prompts, 0.5, seed)
    margins = [pair.chosen_score - pair.rejected_score for pair in pairs]
    return temperature_report([margins[i] for i in fitted], [margins[i] for i in held], seed)


@torch.no_grad()
def padding_check(model: AnyReward, rows: Sequence[Sequence[int]], std: float, max_length: int) -> PaddingCheck:
    """Score rows of different lengths alone and in padded batches, where there is room wider than the longest needs."""
    chosen = sorted(rows, key=len)[:: max(1, len(rows) // _PADDED_ROWS)][:_PADDED_ROWS]
    device, pad = next(model.parameters()).device, model.tokenizer.pad_token_id
    alone = torch.cat([model(torch.tensor([row], device=device), None) for row in map(list, chosen)])
    right = pad_right([TokenExample(list(row), [False] * len(row)) for row in chosen], pad).to(device)
    assert right.attention_mask_BT is not None
    # More columns than a row may have could lie beyond the positions that the model knows.
    extra = max(0, min(_EXTRA_COLUMNS, max_length - max(map(len, chosen))))
    wider = (0, extra)
    on_right = model(
        torch.nn.functional.pad(right.input_ids_BT, wider, value=pad),
        torch.nn.functional.pad(right.attention_mask_BT, wider, value=False),
    )
    gap = float((on_right - alone).abs().max()) / std
    if isinstance(model, ClassifierReward) or model.backbone.is_encoder:
        return PaddingCheck(len(chosen), gap, None)
    left = pad_left(chosen, pad).to(device)
    wider = (extra, 0)
    on_left = model(
        torch.nn.functional.pad(left.input_ids_BP, wider, value=pad),
        torch.nn.functional.pad(left.attention_mask_BP, wider, value=False),
    )
    return PaddingCheck(len(chosen), gap, float((on_left - alone).abs().max()) / std)


def as_pairs(examples: Sequence[PreferenceExample], pairs: Sequence[ScoredPair]) -> list[RewardPair]:
    """The pairs as accuracy is computed from them."""
    return [
        RewardPair(
            pair.group,
            pair.chosen_score,
            pair.rejected_score,
            len(example.chosen_ids),
            len(example.rejected_ids),
            example.row.columns.get("gold_chosen"),
            example.row.columns.get("gold_rejected"),
        )
        for example, pair in zip(examples, pairs, strict=True)
    ]


def group_of(example: PreferenceExample) -> str:
    """The family or subset of a pair, where the data name one."""
    columns = example.row.columns
    return str(columns.get("family", columns.get("subset", "all")))


def model_facts(model: AnyReward, config: RewardReportConfig, run: Run) -> dict[str, str]:
    """What the model is, from its files."""
    num = sum(parameter.numel() for parameter in model.parameters())
    checksum = run.info["fingerprints"]["reward_model"][:16]
    facts = {"name": config.reward_model, "weights": f"{num:,}, checksum {checksum}"}
    if isinstance(model, ClassifierReward):
        return facts | {"kind": "sequence classifier with one label"}
    if isinstance(model, RewardEnsemble):
        facts["kind"] = f"ensemble of {len(model.members)}, rule {model.rule}"
        facts["kind"] += f", penalty {model.penalty:g}" if model.rule == "penalised" else ""
    one = model.members[0] if isinstance(model, RewardEnsemble) else model
    facts |= {"base": one.backbone.name, "pooling": one.pooling, "adapter": str(one.adapter or "none")}
    return facts | ({"suffix": one.suffix} if one.suffix else {})


def training_facts(config: RewardReportConfig) -> dict[str, str]:
    """What it was trained on, from the record of its run; empty where there is none."""
    for place in (Path(config.reward_model), config.run.output_dir / config.reward_model):
        if (place / RUN_INFO).is_file():
            info: dict[str, Any] = read_run_info(place)
            cost = info.get("cost") or {}
            files = {name: found["sha256"][:16] for name, found in info.get("data", {}).items()}
            return {
                "run": str(place),
                "from": ", ".join(f"{role} {source}" for role, source in info.get("lineage", {}).items()),
                "data": json.dumps(files) if files else "the built-in world",
                "seed": str(info["run"]["seed"]),
                "optimizer steps": f"{cost.get('optimizer_steps', 0):,}",
                "tokens": f"{cost.get('tokens', 0):,}",
            }
    return {}


def report_notes(config: RewardReportConfig, run: Run, parts: ReportParts) -> dict[str, str]:
    """How it was measured."""
    files = {name: found["sha256"][:16] for name, found in run.info["data"].items()}
    world = f"held-out tasks of the built-in world, seed {config.world_seed}"
    return {
        "pairs": f"{len(parts.pairs)}: {json.dumps(files) if files else world}",
        "kept and dropped": parts.dropped,
        "edited and spoiled": f"the labelled-better answers of {min(config.num_planted, len(parts.pairs))} pairs",
        "intervals": "95 %: Wilson's for shares (equal scores half), a bootstrap over pairs for means",
        "device": f"{run.device}, {config.run.dtype}, {run.info['num_threads']} threads, {platform.machine()}, "
        f"{run.info['num_cpus']} cores; batches of {SCORING_TOKENS} tokens",
        "versions": ", ".join(f"{name} {version}" for name, version in run.info["versions"].items()),
    }
