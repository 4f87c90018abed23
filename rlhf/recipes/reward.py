"""Reward modelling: a scalar head learns from pairs which answer people preferred (Bradley-Terry)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlhf.algo.reward_loss import bradley_terry_loss
from rlhf.algo.trainer import LossOutput, OptimizerConfig, Trainer
from rlhf.data.chat import ChatEncoder
from rlhf.data.collate import PairBatch, batches_by_tokens, pair_batch, pair_forest
from rlhf.data.data_config import DataConfig
from rlhf.data.forest import row_length
from rlhf.data.preference_dataset import PreferenceDataset, PreferenceExample
from rlhf.eval.reward_accuracy import RewardPair, reward_accuracy
from rlhf.infra.config import Config
from rlhf.infra.durable import written_aside
from rlhf.infra.experiment import Run, RunConfig
from rlhf.models.backbone import ModelConfig
from rlhf.models.ensemble import member_adapters
from rlhf.models.reward_model import RewardEnsemble, RewardModel, RewardModelConfig, ScoreScale
from rlhf.recipes.launch import launch, stage_cost
from rlhf.recipes.reward_ensemble import MemberScores, member_rows, side_by_side, start_ensemble
from rlhf.recipes.scoring import held, idle_model_keys, refuse_lost_weights, start_backbone
from rlhf.recipes.sft import announce
from rlhf.recipes.stages import REWARD_MODEL
from rlhf.recipes.supervised import Method, SupervisedLoop, TrainingConfig, Validation

REWARD_REPORT = "reward_report.json"


class RewardConfig(Config):
    """`rlhf rm`."""

    run: RunConfig = Field(default_factory=RunConfig, description="name, place, seed, device")
    backbone: str = Field("tinychat", description="what the score is read from: an SFT run, a folder or a hub name")
    model: ModelConfig = Field(default_factory=ModelConfig, description="adapters and how the base is held")
    reward: RewardModelConfig = Field(default_factory=RewardModelConfig, description="pooling and what is trained")
    data: DataConfig = Field(default_factory=DataConfig, description="preference pairs")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="length and batches")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW and its schedule")
    use_margin: bool = Field(True, description="subtract a pair's margin, where the data has one, inside the sigmoid")

    @model_validator(mode="after")
    def _weights_train_and_are_saved(self) -> RewardConfig:
        refuse_lost_weights(self.model, self.reward.train, "reward")
        return self

    def in_effect(self) -> RewardConfig:
        """What trains is said in `reward`; `model.train` follows it."""
        return self.model_copy(update={"model": held(self.model, self.reward.train)})

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        idle = self.training.idle_keys_with(self.data.has_validation)
        idle |= idle_model_keys(self.reward.train, "reward")
        if self.data.is_tinychat:
            idle["use_margin"] = "pairs of the built-in world have no margins"
        return idle


@dataclass(frozen=True)
class PairScores:
    """Raw scores of validation pairs, (B,) each, and the milliseconds one answer took in batches."""

    chosen_B: Tensor
    rejected_B: Tensor
    ms_per_sample: float

    @property
    def accuracy(self) -> float:
        """Share of pairs ordered as labelled, ties half."""
        difference = self.chosen_B - self.rejected_B
        return float(((difference > 0).float() + 0.5 * (difference == 0).float()).mean())


@dataclass(frozen=True)
class RewardParts:
    """Model and tokenised pairs, loaded and found usable."""

    model: RewardModel | RewardEnsemble
    train: list[PreferenceExample]
    validation: list[PreferenceExample]
    report: str


def run_reward(config: RewardConfig, resume: Path | None = None) -> Run:
    """Train on pairs; the model with the best validation loss is in `<run>/reward_model`."""
    return launch(
        "reward",
        config,
        prepare,
        train,
        settings=config.run,
        lineage={"backbone": config.backbone},
        data_files=config.data.files(),
        resume=resume,
    )


def prepare(config: RewardConfig, device: torch.device, rejected_rows: Path) -> RewardParts:
    """Backbone with adapter and head; a LoRA adapter starts from the SFT adapter's weights where there is one."""
    settings, members = config.reward, config.reward.ensemble.members
    name = "reward" if members == 1 else member_adapters("reward", members)[0]
    start = start_backbone(config.backbone, config.model, settings.train, config.run, device, name)
    if members == 1:
        model: RewardModel | RewardEnsemble = RewardModel(
            start.backbone, start.adapter, settings.pooling, settings.train, config.model, suffix=settings.suffix
        )
    else:
        model = start_ensemble(start.backbone, start.adapter, settings, config.model, config.run)
    encoder = ChatEncoder(model.tokenizer, config.data.system_prompt)
    data, validation = PreferenceDataset.load(config.data, encoder, rejected_rows)
    return RewardParts(model, data.examples, validation.examples if validation else [], str(data.report))


def train(config: RewardConfig, run: Run, parts: RewardParts) -> tuple[int, int]:
    """The loop, the scale of the scores, then the model into the run folder."""
    model = parts.model
    announce(run, model.backbone, parts.report)
    trainer = Trainer(
        model.trainable_parameters(),
        config.optimizer,
        config.training.num_steps(len(parts.train)),
        scale_loss=config.run.dtype == "fp16",
        clipped_apart=model.parameters_by_member() if isinstance(model, RewardEnsemble) else (),
    )
    method = reward_method(parts, config)
    with model.backbone.adapter_dropout(config.model.lora.lora_dropout):
        progress = SupervisedLoop(run, trainer, config.training, method, "reward model").train()
    if run.stop_reason != "interrupted":
        with run.timer("validate"):
            report(model, parts.validation or parts.train[:256], config, run)
        with run.timer("save"), written_aside(run.folder / REWARD_MODEL) as aside:
            model.save(aside)
    return stage_cost(progress)


def reward_method(parts: RewardParts, config: RewardConfig) -> Method[Any]:
    """The pairs for one model, or for every member of an ensemble in an order of its own."""
    if isinstance(parts.model, RewardModel):
        return pair_method(parts.model, parts.train, parts.validation, config)
    ensemble, seed, limit = parts.model, config.run.seed, config.training.max_tokens_per_micro_batch
    methods = [
        pair_method(member, member_rows(parts.train, seed, k), (), config) for k, member in enumerate(ensemble.members)
    ]

    def validate() -> Validation:
        return ensemble_validation(ensemble, [score_pairs(m, parts.validation, limit) for m in ensemble.members])

    return side_by_side(methods, validate if parts.validation else None)


def pair_method(
    model: RewardModel,
    examples: Sequence[PreferenceExample],
    validation: Sequence[PreferenceExample],
    config: RewardConfig,
) -> Method[PairBatch]:
    """Bradley-Terry on pairs; both answers of a pair go through the model in one batch."""
    limit, width = config.training.max_tokens_per_micro_batch, row_width(model.takes_forests)
    read = tokens_read(model.takes_forests, len(model.suffix_ids))

    def micro_batches(rows: Sequence[int]) -> list[PairBatch]:
        part = [examples[i] for i in rows]
        groups = batches_by_tokens([width(example) for example in part], limit)
        return [collated(model, [part[i] for i in group]) for group in groups]

    def loss(rows: Sequence[int]) -> Callable[[PairBatch], LossOutput]:
        num_pairs = len(rows)

        def one(pairs: PairBatch) -> LossOutput:
            chosen_B, rejected_B = model.answer_scores(pairs.batch).chunk(2)
            losses_B = bradley_terry_loss(chosen_B, rejected_B, pairs.margins_B if config.use_margin else None)
            difference = (chosen_B - rejected_B).detach()
            metrics = {
                "train/accuracy": ((difference > 0).float() + 0.5 * (difference == 0).float()).sum() / num_pairs,
                "train/margin": difference.sum() / num_pairs,
                "train/chosen_reward": chosen_B.detach().sum() / num_pairs,
                "train/rejected_reward": rejected_B.detach().sum() / num_pairs,
            }
            return LossOutput(losses_B.sum() / num_pairs, metrics)

        return one

    def validate() -> Validation:
        scores = score_pairs(model, validation, limit)
        both, difference = torch.cat([scores.chosen_B, scores.rejected_B]), scores.chosen_B - scores.rejected_B
        metrics = {
            "accuracy": scores.accuracy,
            "loss": float(bradley_terry_loss(scores.chosen_B, scores.rejected_B).mean()),
            "margin": float(difference.mean()),
            "reward_mean": float(both.mean()),
            "reward_std": float(both.std()),
            "reward_min": float(both.min()),
            "reward_max": float(both.max()),
        }
        # Loss rather than accuracy: it is smoother on a few hundred pairs and sees over-confidence as well.
        return Validation(metrics, "loss", lower_is_better=True)

    return Method(
        num_rows=len(examples),
        micro_batches=micro_batches,
        loss=loss,
        num_tokens=lambda rows: sum(num_tokens(examples[i]) for i in rows),
        validate=validate if validation else None,
        backbone=model.backbone,
        num_read=lambda rows: sum(read(examples[i]) for i in rows),
    )


def ensemble_validation(ensemble: RewardEnsemble, scores: Sequence[PairScores]) -> Validation:
    """What the combined score achieves, by its own accuracy; the best weights are those of the lowest mean loss."""
    found = together(scores)
    combined = PairScores(*ensemble.combined(found.standardised_K2N), 0.0)
    metrics = {
        "accuracy": combined.accuracy,
        "loss": sum(float(bradley_terry_loss(s.chosen_B, s.rejected_B).mean()) for s in scores) / len(scores),
        "margin": float((combined.chosen_B - combined.rejected_B).mean()),
        "disagreement": float(found.disagreement_2N.mean()),
    }
    metrics |= {f"accuracy_member_{k}": accuracy for k, accuracy in enumerate(found.accuracies)}
    return Validation(metrics, "loss", lower_is_better=True)


def together(scores: Sequence[PairScores]) -> MemberScores:
    """The members' scores of the same pairs, each also on its own scale."""
    raw_K2N = torch.stack([torch.stack([one.chosen_B, one.rejected_B]) for one in scores])
    scales = [scale_of(one) for one in scores]
    standardised = [(raw - scale.mean) / scale.std for raw, scale in zip(raw_K2N, scales, strict=True)]
    return MemberScores(raw_K2N, torch.stack(standardised))


def scale_of(scores: PairScores) -> ScoreScale:
    """Mean and deviation over both answers of all pairs; a deviation of 0 counts as 1."""
    both = torch.cat([scores.chosen_B, scores.rejected_B])
    return ScoreScale(float(both.mean()), float(both.std()) if float(both.std()) > 0 else 1.0)


@torch.no_grad()
def score_pairs(
    model: RewardModel | RewardEnsemble, examples: Sequence[PreferenceExample], max_tokens: int
) -> PairScores:
    """Scores of both answers of every pair, in the order given, in batches of like length."""
    width, scores_2N = row_width(model.takes_forests), torch.zeros(2, len(examples), device=model.backbone.device)
    started = time.perf_counter()
    for group in batches_by_tokens([width(example) for example in examples], max_tokens):
        scores_2N[:, group] = model.answer_scores(collated(model, [examples[i] for i in group]).batch).view(2, -1)
    scores_2N = scores_2N.cpu()
    seconds = time.perf_counter() - started
    return PairScores(scores_2N[0], scores_2N[1], 1000 * seconds / max(1, 2 * len(examples)))


def collated(model: RewardModel | RewardEnsemble, pairs: Sequence[PreferenceExample]) -> PairBatch:
    """Pairs as the model scores them: their prompts are read once where it allows that."""
    pad = model.tokenizer.pad_token_id
    made = pair_forest(pairs, pad, model.suffix_ids) if model.takes_forests else pair_batch(pairs, pad)
    return made.to(model.backbone.device)


def row_width(shares_prompts: bool) -> Callable[[PreferenceExample], int]:
    """How many columns a pair takes in a batch: its prompt read once, or both answers in rows of their own."""
    if shares_prompts:
        return lambda pair: row_length(len(pair.prompt_ids), [len(pair.chosen_ids), len(pair.rejected_ids)])
    return lambda pair: 2 * longest_side(pair)


def tokens_read(shares_prompts: bool, num_suffix: int = 0) -> Callable[[PreferenceExample], int]:
    """How many of the columns that a pair takes are no padding; the suffix stands behind both answers."""
    if shares_prompts:
        return lambda pair: row_length(len(pair.prompt_ids), [len(pair.chosen_ids), len(pair.rejected_ids)], num_suffix)
    return lambda pair: num_tokens(pair) + 2 * num_suffix


def report(
    model: RewardModel | RewardEnsemble, held_out: Sequence[PreferenceExample], config: RewardConfig, run: Run
) -> None:
    """Set the model's scale, and say how well it orders held-out pairs beside what length alone achieves.

    The numbers, also by family or subset of the data, are kept in `<run>/reward_report.json`.
    """
    limit = config.training.max_tokens_per_micro_batch
    members = model.members if isinstance(model, RewardEnsemble) else [model]
    of_each = [score_pairs(member, held_out, limit) for member in members]
    scores, more = of_each[0], dict[str, Any]()
    if isinstance(model, RewardEnsemble):
        for member, its_scores in zip(model.members, of_each, strict=True):
            member.scale = scale_of(its_scores)
        scores, more = ensemble_report(model, of_each, run)
    else:
        model.scale = scale_of(scores)
    measured = reward_accuracy(as_reward_pairs(held_out, scores), scores.ms_per_sample)
    described = json.dumps(asdict(measured) | more, indent=1) + "\n"
    (run.folder / REWARD_REPORT).write_text(described, encoding="utf-8")
    run.logger.info(
        f"accuracy {measured.accuracy.estimate:.3f} [{measured.accuracy.low:.3f}, {measured.accuracy.high:.3f}] on "
        f"{measured.num_pairs} pairs; longer wins {measured.longer_wins.estimate:.3f}, shorter wins "
        f"{measured.shorter_wins.estimate:.3f}; scores {model.scale.mean:.2f} +- {model.scale.std:.2f}; "
        f"{scores.ms_per_sample:.2f} ms per answer"
    )
    for family, accuracy in measured.by_family.items():
        run.logger.info(f"  {family}: accuracy {accuracy.estimate:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}]")


def ensemble_report(
    ensemble: RewardEnsemble, of_each: Sequence[PairScores], run: Run
) -> tuple[PairScores, dict[str, Any]]:
    """The combined scores, and what the members say apart; they should differ most where the ensemble is wrong."""
    found = together(of_each)
    chosen_B, rejected_B = ensemble.combined(found.standardised_K2N)
    scores = PairScores(chosen_B, rejected_B, sum(one.ms_per_sample for one in of_each))
    is_right_N = chosen_B > rejected_B
    apart = {
        "of_scores": float(found.disagreement_2N.mean()),
        "of_margins_where_right": found.disagreement_on(is_right_N),
        "of_margins_where_wrong": found.disagreement_on(~is_right_N),
    }
    run.logger.info(
        f"{len(of_each)} members, accuracies {', '.join(f'{a:.3f}' for a in found.accuracies)}; they differ by "
        f"{apart['of_scores']:.2f} deviations in a score, in a margin by {apart['of_margins_where_right']:.2f} where "
        f"the {ensemble.rule} is right and {apart['of_margins_where_wrong']:.2f} where it is wrong"
    )
    return scores, {"ensemble": {"rule": ensemble.rule, "accuracies": found.accuracies, "disagreement": apart}}


def as_reward_pairs(examples: Sequence[PreferenceExample], scores: PairScores) -> list[RewardPair]:
    """Pairs as evaluation takes them: scores, lengths in tokens, family or subset, and gold where the data has it."""
    pairs = []
    for example, chosen, rejected in zip(examples, scores.chosen_B.tolist(), scores.rejected_B.tolist(), strict=True):
        columns = example.row.columns
        pairs.append(
            RewardPair(
                family=str(columns.get("family", columns.get("subset", "all"))),
                chosen_score=chosen,
                rejected_score=rejected,
                chosen_length=len(example.chosen_ids),
                rejected_length=len(example.rejected_ids),
                gold_chosen=columns.get("gold_chosen"),
                gold_rejected=columns.get("gold_rejected"),
            )
        )
    return pairs


def longest_side(example: PreferenceExample) -> int:
    """Tokens of the prompt with the longer answer."""
    return len(example.prompt_ids) + max(len(example.chosen_ids), len(example.rejected_ids))


def num_tokens(example: PreferenceExample) -> int:
    """Tokens of both sides, the prompt counted twice as it is processed."""
    return 2 * len(example.prompt_ids) + len(example.chosen_ids) + len(example.rejected_ids)
