"""KTO: single answers with a thumb up or down train the policy; preference pairs serve as two such answers each.

What an answer gained over the reference is measured from a reference point z_0, an estimate of KL(policy || reference)
from answers put behind other prompts of the same optimizer step. It costs one more forward pass a step.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlhf.algo.kto_loss import kto_balance, kto_kl, kto_loss
from rlhf.algo.trainer import LossOutput, OptimizerConfig
from rlhf.data.chat import ChatEncoder
from rlhf.data.collate import Batch, batches_by_tokens, pad_right
from rlhf.data.data_config import DataConfig
from rlhf.data.order import epoch_order
from rlhf.data.unpaired_dataset import Mismatch, UnpairedDataset
from rlhf.infra.config import Config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run, RunConfig
from rlhf.models.backbone import ModelConfig
from rlhf.models.policy import Policy
from rlhf.models.reference import Reference
from rlhf.recipes.launch import launch
from rlhf.recipes.offline import answer_logprobs, idle_policy_keys, kept_logprobs, summed_logprobs, train_policy
from rlhf.recipes.sft import announce
from rlhf.recipes.stages import start_policy
from rlhf.recipes.supervised import Method, TrainingConfig, Validation

# What arXiv:2402.01306 section 4.2 asks of desirable_weight * desirable answers / (undesirable_weight * undesirable).
BALANCE = (1.0, 1.5)


class KTOConfig(Config):
    """`rlhf kto`."""

    run: RunConfig = Field(default_factory=RunConfig, description="name, place, seed, device")
    policy: str = Field(
        "tinychat", description="what the policy starts from and is compared with: a run, a folder, a hub name"
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="adapters, where the policy brings none")
    data: DataConfig = Field(
        default_factory=DataConfig, description="answers with a label, or preference pairs, whose sides become such"
    )
    beta: float = Field(0.1, gt=0, description="pull towards the reference: how soon a gain over it is enough")
    desirable_weight: float = Field(1.0, gt=0, description="weight of answers with the thumb up")
    undesirable_weight: float = Field(1.0, gt=0, description="weight of answers with the thumb down")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="length and batches")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW and its schedule")

    @model_validator(mode="after")
    def _can_be_trained(self) -> KTOConfig:
        if self.model.random_init:
            raise ValueError("model.random_init: KTO starts from a policy that has learnt to answer; train it first")
        if self.training.rows_per_step < 2:
            raise ValueError(
                "training.per_device_train_batch_size is 1: KTO measures its KL on answers put behind other prompts of "
                "the same step, and a step of one row has none; take 2 or more, or accumulate"
            )
        return self

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        return idle_policy_keys(self.model, self.training, self.data.has_validation)


@dataclass(frozen=True)
class KTOBatch:
    """B answers of a micro-batch, what the reference gives them (B,), in nats, and which of them are desirable (B,)."""

    batch: Batch
    reference_B: Tensor
    desirable_B: Tensor

    def to(self, device: torch.device | str) -> KTOBatch:
        """Return the batch on `device`."""
        return KTOBatch(self.batch.to(device), self.reference_B.to(device), self.desirable_B.to(device))


@dataclass(frozen=True)
class ReferencePass:
    """log pi_ref of every row's answer (N,), and of the mismatched pairs that the steps of the run ask for."""

    logprobs_N: Tensor
    mismatched: Mapping[Mismatch, float]


@dataclass(frozen=True)
class StepCounts:
    """What a micro-batch cannot know: rows and labels of its whole optimizer step, and the step's reference point."""

    num_rows: int
    num_desirable: int
    num_mismatched: int
    kl: Tensor


@dataclass(frozen=True)
class KTOParts:
    """Policy, reference and tokenised answers, loaded and found usable."""

    policy: Policy
    reference: Reference
    train: UnpairedDataset
    validation: UnpairedDataset | None


def run_kto(config: KTOConfig, resume: Path | None = None) -> Run:
    """Train on labelled answers; the policy with the best validation loss is in `<run>/policy`."""
    return launch(
        "kto",
        config,
        prepare,
        train,
        settings=config.run,
        lineage={"policy": config.policy},
        data_files=config.data.files(),
        resume=resume,
    )


def prepare(config: KTOConfig, device: torch.device, rejected_rows: Path) -> KTOParts:
    """Policy and reference on one base, and the answers.

    Raises:
        UserError: the answers have all the same label, or no two of them different prompts.
    """
    start = start_policy(config.policy, config.model, config.run, device)
    encoder = ChatEncoder(start.policy.backbone.tokenizer, config.data.system_prompt)
    data, validation = UnpairedDataset.load(config.data, encoder, rejected_rows)
    if data.num_desirable in (0, len(data)):
        kind = "desirable" if data.num_desirable else "undesirable"
        raise UserError(
            f"all {len(data)} answers are labelled {kind}: KTO learns from answers of both kinds; look at the label "
            "column, or imitate good answers with `rlhf sft`"
        )
    if not data.mismatches(range(len(data))):
        raise UserError(
            f"no answer of the {len(data)} can stand behind the prompt of another: KTO measures its KL on such pairs; "
            "bring rows with different prompts, or raise data.max_length"
        )
    return KTOParts(start.policy, start.reference, data, validation)


def train(config: KTOConfig, run: Run, parts: KTOParts) -> tuple[int, int]:
    """The reference pass, the loop, then the policy into the run folder."""
    announce(run, parts.policy.backbone, str(parts.train.report))
    run.logger.info(balance_sentence(parts.train, config))
    limit, num_rows = config.training.max_tokens_per_micro_batch, len(parts.train)
    steps = [
        config.training.rows_of_step(num_rows, config.run.seed, step)
        for step in range(config.training.num_steps(num_rows))
    ]
    validation_pass = None
    with run.timer("reference"):
        train_pass = reference_pass(parts.reference, parts.train, steps, limit, run)
        if parts.validation is not None:
            validation_pass = reference_pass(parts.reference, parts.validation, [in_one(parts.validation)], limit, run)
    method = kto_method(parts.policy, parts.train, parts.validation, train_pass, validation_pass, config)
    return train_policy(run, parts.policy, method, config.training, config.optimizer, "KTO")


def kto_method(
    policy: Policy,
    data: UnpairedDataset,
    validation: UnpairedDataset | None,
    reference: ReferencePass,
    validation_reference: ReferencePass | None,
    config: KTOConfig,
) -> Method[KTOBatch]:
    """The KTO loss of each answer against the reference point of its whole optimizer step."""
    limit = config.training.max_tokens_per_micro_batch

    def collate(part: UnpairedDataset, rows: Sequence[int], known: ReferencePass) -> list[KTOBatch]:
        examples = [part.examples[row] for row in rows]
        answers, references_n = [example.tokens for example in examples], known.logprobs_N[list(rows)]
        desirable_n = torch.tensor([example.desirable for example in examples])
        groups = batches_by_tokens([len(answer.input_ids) for answer in answers], limit)
        pad, device = policy.backbone.tokenizer.pad_token_id, policy.backbone.device
        return [
            KTOBatch(pad_right([answers[i] for i in g], pad), references_n[g], desirable_n[g]).to(device)
            for g in groups
        ]

    def counted(part: UnpairedDataset, rows: Sequence[int], known: ReferencePass) -> StepCounts:
        """One pass over the mismatched pairs of these rows, without a gradient."""
        pairs = part.mismatches(rows)
        backbone, answers = policy.backbone, [part.mismatched(pair) for pair in pairs]
        logprobs_M = answer_logprobs(backbone, policy.adapter, answers, 2 * limit)
        log_ratios_M = logprobs_M - torch.tensor([known.mismatched[pair] for pair in pairs], dtype=logprobs_M.dtype)
        num_desirable = sum(part.examples[row].desirable for row in rows)
        return StepCounts(len(rows), num_desirable, len(pairs), kto_kl(log_ratios_M).to(backbone.device))

    def terms(batch: KTOBatch, step: StepCounts) -> LossOutput:
        logprobs_B = summed_logprobs(policy.backbone, policy.adapter, batch.batch)
        ratios_B = logprobs_B - batch.reference_B
        weights = config.desirable_weight, config.undesirable_weight
        losses_B = kto_loss(ratios_B, batch.desirable_B, step.kl, config.beta, *weights)
        return LossOutput(
            losses_B.sum() / step.num_rows,
            kto_metrics(logprobs_B.detach(), ratios_B.detach(), batch.desirable_B, step, config.beta),
        )

    def loss(rows: Sequence[int]) -> Callable[[KTOBatch], LossOutput]:
        step = counted(data, rows, reference)
        return lambda batch: terms(batch, step)

    @torch.no_grad()
    def validate() -> Validation:
        assert validation is not None and validation_reference is not None
        step = counted(validation, in_one(validation), validation_reference)
        sums: dict[str, float] = {}
        for batch in collate(validation, range(len(validation)), validation_reference):
            output = terms(batch, step)
            for name, value in {"loss": output.loss, **output.metrics}.items():
                sums[name.removeprefix("train/")] = sums.get(name.removeprefix("train/"), 0.0) + float(value)
        return Validation(sums, "loss", lower_is_better=True)

    def num_tokens(rows: Sequence[int]) -> int:
        """Tokens of the answers with their prompts, and of the mismatched pairs."""
        pairs = [*((row, row) for row in rows), *data.mismatches(rows)]
        return sum(len(data.examples[i].prompt_ids) + len(data.examples[j].answer_ids) for i, j in pairs)

    return Method(
        num_rows=len(data),
        micro_batches=lambda rows: collate(data, rows, reference),
        loss=loss,
        num_tokens=num_tokens,
        validate=validate if validation is not None else None,
        backbone=policy.backbone,
    )


def kto_metrics(
    logprobs_B: Tensor, ratios_B: Tensor, desirable_B: Tensor, step: StepCounts, beta: float
) -> dict[str, Tensor]:
    """Metrics that add up over a step: rewards beta * log-ratio and log-probs by label, each over its own answers.

    An answer is right where it is above the reference point and desirable, or below it and not. A label that the step
    has no answer of has no metrics; `train/one_label` is 1 for such a step, so that its mean says how many there were.
    """
    share = len(desirable_B) / step.num_rows  # of the step, for what all micro-batches have in common
    gain_B = torch.where(desirable_B, 1.0, -1.0) * (ratios_B - step.kl)
    one_label = step.num_desirable in (0, step.num_rows)
    metrics = {
        "train/accuracy": ((gain_B > 0).float() + 0.5 * (gain_B == 0).float()).sum() / step.num_rows,
        "train/kl": share * step.kl,
        "train/num_mismatched": torch.tensor(share * step.num_mismatched),
        "train/desirable_share": desirable_B.float().sum() / step.num_rows,
        "train/one_label": torch.tensor(share * one_label),
    }
    kinds = {
        "desirable": (desirable_B, step.num_desirable),
        "undesirable": (~desirable_B, step.num_rows - step.num_desirable),
    }
    for kind, (has_label_B, count) in kinds.items():
        if count:
            metrics[f"train/{kind}_reward"] = beta * ratios_B[has_label_B].sum() / count
            metrics[f"train/{kind}_logprob"] = logprobs_B[has_label_B].sum() / count
    if not one_label:
        signs_B = desirable_B.float() / step.num_desirable - (~desirable_B).float() / (
            step.num_rows - step.num_desirable
        )
        metrics["train/margin"] = beta * (signs_B * ratios_B).sum()
    return metrics


def reference_pass(
    reference: Reference, data: UnpairedDataset, steps: Sequence[Sequence[int]], max_tokens: int, run: Run
) -> ReferencePass:
    """What the reference gives to every answer and to the mismatched pairs of these steps, once for the whole run.

    Kept in the run folder under the hash of tokens and pairs.
    """
    pairs = sorted({pair for rows in steps for pair in data.mismatches(rows)})
    answers = [example.tokens for example in data.examples] + [data.mismatched(pair) for pair in pairs]
    numbers = array("q", [number for pair in pairs for number in pair])
    key = hashlib.sha256(data.content_hash().encode() + numbers.tobytes()).hexdigest()
    logprobs = kept_logprobs(
        run, key, lambda: answer_logprobs(reference.backbone, reference.adapter, answers, 2 * max_tokens)
    )
    return ReferencePass(logprobs[: len(data)], dict(zip(pairs, logprobs[len(data) :].tolist(), strict=True)))


def in_one(data: UnpairedDataset) -> Sequence[int]:
    """All rows as one step, shuffled: next to pairs that lie side by side there would be answers of one kind only."""
    return epoch_order(len(data), seed=0, epoch=0)


def balance_sentence(data: UnpairedDataset, config: KTOConfig) -> str:
    """How the labels are balanced under the weights, and which weight the paper would have."""
    up, down = data.num_desirable, len(data) - data.num_desirable
    balance = kto_balance(up, down, config.desirable_weight, config.undesirable_weight)
    low, high = BALANCE
    said = f"labels: {up} desirable, {down} undesirable; weighted ratio {balance:.2f}"
    if low <= balance <= high:
        return f"{said}, inside the {low:g} to {high:g} that arXiv:2402.01306 advises"
    name = "desirable_weight" if balance < low else "undesirable_weight"
    weight = config.desirable_weight if balance < low else config.undesirable_weight
    factors = (low / balance, high / balance) if balance < low else (balance / high, balance / low)
    return (
        f"{said}, outside the {low:g} to {high:g} that arXiv:2402.01306 advises: set {name} between "
        f"{weight * factors[0]:.3g} and {weight * factors[1]:.3g}"
    )
