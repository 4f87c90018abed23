"""Process reward modelling: a head learns from labelled steps which steps of a worked solution are right."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlhf.algo.process_loss import AGGREGATIONS, step_loss
from rlhf.algo.trainer import LossOutput, OptimizerConfig, Trainer
from rlhf.data.chat import ChatEncoder
from rlhf.data.collate import StepBatch, batches_by_tokens, step_batch
from rlhf.data.data_config import StepDataConfig
from rlhf.data.rows import prompt_key
from rlhf.data.step_dataset import StepDataset, StepExample
from rlhf.eval import step_metrics
from rlhf.eval.intervals import Interval
from rlhf.eval.step_accuracy import JudgedSolution, StepAccuracy, step_accuracy
from rlhf.infra.config import Config
from rlhf.infra.durable import written_aside
from rlhf.infra.experiment import Run, RunConfig
from rlhf.models.backbone import ModelConfig
from rlhf.models.process_reward_model import ProcessRewardModel, ProcessRewardModelConfig
from rlhf.recipes.launch import launch, stage_cost
from rlhf.recipes.scoring import held, idle_model_keys, refuse_lost_weights, start_backbone
from rlhf.recipes.sft import announce
from rlhf.recipes.stages import PROCESS_MODEL
from rlhf.recipes.supervised import Method, SupervisedLoop, TrainingConfig, Validation
from rlhf.rewards.process import aggregated_score, score_steps

REPORT = "process_report.json"


class ProcessRewardConfig(Config):
    """`rlhf prm`."""

    run: RunConfig = Field(default_factory=RunConfig, description="name, place, seed, device")
    backbone: str = Field("tinychat", description="what the score is read from: an SFT run, a folder or a hub name")
    model: ModelConfig = Field(default_factory=ModelConfig, description="adapters and how the base is held")
    prm: ProcessRewardModelConfig = Field(default_factory=ProcessRewardModelConfig, description="what is trained")
    data: StepDataConfig = Field(default_factory=StepDataConfig, description="worked solutions with step labels")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="length and batches")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW and its schedule")

    @model_validator(mode="after")
    def _weights_train_and_are_saved(self) -> ProcessRewardConfig:
        refuse_lost_weights(self.model, self.prm.train, "prm")
        return self

    def in_effect(self) -> ProcessRewardConfig:
        """What trains is said in `prm`; `model.train` follows it."""
        return self.model_copy(update={"model": held(self.model, self.prm.train)})

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        idle = self.training.idle_keys_with(self.data.has_validation)
        idle |= idle_model_keys(self.prm.train, "prm")
        if self.data.is_tinychat:
            idle["data.neutral"] = "the built-in world has no neutral steps"
            idle["data.soft_labels"] = "labels of the built-in world are 0 and 1"
        return idle


@dataclass(frozen=True)
class ProcessParts:
    """Model and tokenised solutions, loaded and found usable."""

    model: ProcessRewardModel
    train: list[StepExample]
    validation: list[StepExample]
    report: str


def run_prm(config: ProcessRewardConfig, resume: Path | None = None) -> Run:
    """Train on step labels; the model with the best validation loss is in `<run>/process_reward_model`."""
    return launch(
        "prm",
        config,
        prepare,
        train,
        settings=config.run,
        lineage={"backbone": config.backbone},
        data_files=config.data.files(),
        resume=resume,
    )


def prepare(config: ProcessRewardConfig, device: torch.device, rejected_rows: Path) -> ProcessParts:
    """Backbone with adapter and head; a LoRA adapter starts from the SFT adapter's weights where there is one."""
    start = start_backbone(config.backbone, config.model, config.prm.train, config.run, device, "process")
    model = ProcessRewardModel(start.backbone, start.adapter, config.data.separator, config.prm.train, config.model)
    encoder = ChatEncoder(model.tokenizer, config.data.system_prompt)
    data, validation = StepDataset.load(config.data, encoder, rejected_rows)
    return ProcessParts(model, data.examples, validation.examples if validation else [], str(data.report))


def train(config: ProcessRewardConfig, run: Run, parts: ProcessParts) -> tuple[int, int]:
    """The loop, the report on held-out steps, then the model into the run folder."""
    model = parts.model
    announce(run, model.backbone, parts.report)
    method = step_method(model, parts.train, parts.validation, config.training.max_tokens_per_micro_batch)
    trainer = Trainer(
        model.trainable_parameters(),
        config.optimizer,
        config.training.num_steps(len(parts.train)),
        scale_loss=config.run.dtype == "fp16",
    )
    with model.backbone.adapter_dropout(config.model.lora.lora_dropout):
        progress = SupervisedLoop(run, trainer, config.training, method, "process reward model").train()
    if run.stop_reason != "interrupted":
        if parts.validation:
            with run.timer("validate"):
                report(model, parts, config.training.max_tokens_per_micro_batch, run)
        with run.timer("save"), written_aside(run.folder / PROCESS_MODEL) as aside:
            model.save(aside)
    return stage_cost(progress)


def step_method(
    model: ProcessRewardModel, examples: Sequence[StepExample], validation: Sequence[StepExample], max_tokens: int
) -> Method[StepBatch]:
    """Cross-entropy at the judged steps; a step weighs the same whatever solution it stands in."""

    def micro_batches(rows: Sequence[int]) -> list[StepBatch]:
        part = [examples[i] for i in rows]
        groups = batches_by_tokens([model.cost(len(one.input_ids), len(one.ends)) for one in part], max_tokens)
        return [collated([part[i] for i in group], model) for group in groups]

    def loss(rows: Sequence[int]) -> Callable[[StepBatch], LossOutput]:
        num_steps = sum(examples[i].num_labels for i in rows)

        def one(batch: StepBatch) -> LossOutput:
            logits_BT = model(batch.input_ids_BT, batch.attention_mask_BT, batch.step_mask_BT)
            mask_BT = batch.judged_mask_BT
            total = step_loss(logits_BT, batch.labels_BT, mask_BT, num_steps)
            is_right_BT = (logits_BT.detach() > 0) == (batch.labels_BT >= 0.5)
            metrics = {
                "train/accuracy": (is_right_BT & mask_BT).sum() / num_steps,
                "train/probability": logits_BT.detach()[mask_BT].sigmoid().sum() / num_steps,
                "train/share_right": batch.labels_BT[mask_BT].sum() / num_steps,
            }
            return LossOutput(total, metrics)

        return one

    def validate() -> Validation:
        logits = score_steps(model, [e.input_ids for e in validation], [e.ends for e in validation], max_tokens)
        return Validation(validation_metrics(validation, logits), "loss", lower_is_better=True)

    return Method(
        num_rows=len(examples),
        micro_batches=micro_batches,
        loss=loss,
        num_tokens=lambda rows: sum(model.cost(len(examples[i].input_ids), len(examples[i].ends)) for i in rows),
        validate=validate if validation else None,
        backbone=model.backbone,
    )


def collated(examples: Sequence[StepExample], model: ProcessRewardModel) -> StepBatch:
    """The examples as one batch on the model's device."""
    ids, ends, labels = ([getattr(e, name) for e in examples] for name in ("input_ids", "ends", "labels"))
    return step_batch(ids, ends, labels, model.tokenizer.pad_token_id).to(model.backbone.device)


def validation_metrics(examples: Sequence[StepExample], logits: Sequence[Tensor]) -> dict[str, float]:
    """Loss as in training, and how right and wrong steps are told apart (a label of one half or more is right)."""
    pairs = [
        (float(logit), label)
        for example, row in zip(examples, logits, strict=True)
        for logit, label in zip(row, example.labels, strict=True)
        if label is not None
    ]
    logits_N, labels_N = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    everywhere = torch.ones_like(logits_N, dtype=torch.bool)
    right, scores, weights = (labels_N >= 0.5).numpy(), logits_N.sigmoid().numpy(), np.ones(len(pairs))
    found, true = zip(*(first_errors(e, row) for e, row in zip(examples, logits, strict=True)), strict=True)
    return {
        "loss": float(step_loss(logits_N, labels_N, everywhere, len(pairs))),
        "accuracy": step_metrics.accuracy(scores, right, weights),
        "balanced_accuracy": step_metrics.balanced_accuracy(scores, right, weights),
        "auc": step_metrics.area_under_curve(scores, right, weights),
        "first_error_accuracy": sum(a == b for a, b in zip(found, true, strict=True)) / len(found),
        "probability_mean": float(scores.mean()),
    }


def first_errors(example: StepExample, logits_S: Tensor) -> tuple[int | None, int | None]:
    """Index among the judged steps of the first that the model thinks wrong, and of the first that is."""
    judged = [
        (float(logit.sigmoid()), label)
        for logit, label in zip(logits_S, example.labels, strict=True)
        if label is not None
    ]
    return step_metrics.first_error([p for p, _ in judged]), step_metrics.first_error([label for _, label in judged])


def report(model: ProcessRewardModel, parts: ProcessParts, max_tokens: int, run: Run) -> StepAccuracy:
    """Say how well the model tells held-out steps apart beside what position and length alone achieve.

    The numbers are kept in `<run>/process_report.json`.
    """
    held = parts.validation
    logits = score_steps(model, [e.input_ids for e in held], [e.ends for e in held], max_tokens)
    aggregated = {name: [aggregated_score(row, one) for row in logits] for name, one in AGGREGATIONS.items()}
    measured = step_accuracy(
        [as_judged(example) for example in held],
        [row.double().sigmoid().tolist() for row in logits],
        [as_judged(example) for example in parts.train],
        aggregated,
    )
    (run.folder / REPORT).write_text(json.dumps(asdict(measured), indent=1) + "\n", encoding="utf-8")
    run.logger.info(
        f"{measured.num_steps} judged steps of {measured.num_solutions} solutions to {measured.num_questions} held-out "
        f"questions, {measured.share_right:.3f} right"
    )
    for name, values in (("model", measured.model), ("constant", measured.constant), ("position", measured.position)):
        run.logger.info(f"  {name}: " + ", ".join(f"{metric} {_shown(one)}" for metric, one in values.items()))
    for name, values in (("constant", measured.lead_over_constant), ("position", measured.lead_over_position)):
        run.logger.info(f"  better than {name} by " + ", ".join(f"{m} {_shown(one)}" for m, one in values.items()))
    run.logger.info("  whole solutions, auc: " + ", ".join(f"{n} {_shown(v)}" for n, v in measured.solutions.items()))
    return measured


def as_judged(example: StepExample) -> JudgedSolution:
    """A solution as evaluation takes it."""
    prompt = example.row.prompt
    starts = [example.prompt_length, *(end + 1 for end in example.ends)]
    lengths = [end + 1 - start for start, end in zip(starts, example.ends, strict=False)]
    return JudgedSolution(prompt_key(prompt), example.prompt_length, lengths, example.labels)


def _shown(value: Interval) -> str:
    return f"{value.estimate:.3f} [{value.low:.3f}, {value.high:.3f}]"
