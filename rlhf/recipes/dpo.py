"""Direct preference optimisation and its relatives: pairs train the policy, without a reward model or sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlhf.algo.preference_loss import PREFERENCE_LOSSES, LossSettings, PairLogRatios, PreferenceLoss
from rlhf.algo.trainer import LossOutput, OptimizerConfig
from rlhf.data.chat import ChatEncoder
from rlhf.data.collate import PairBatch, batches_by_tokens, pair_batch, pair_forest
from rlhf.data.data_config import DataConfig
from rlhf.data.preference_dataset import PreferenceDataset, PreferenceExample
from rlhf.infra.config import Config
from rlhf.infra.experiment import Run, RunConfig
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.models.policy import Policy
from rlhf.models.reference import Reference
from rlhf.recipes.launch import launch
from rlhf.recipes.offline import idle_policy_keys, kept_logprobs, summed_logprobs, train_policy
from rlhf.recipes.reward import num_tokens, row_width, tokens_read
from rlhf.recipes.sft import announce
from rlhf.recipes.stages import start_policy, start_policy_alone
from rlhf.recipes.supervised import Method, TrainingConfig, Validation


class PreferenceLossConfig(Config):
    """Which loss pairs are learnt by, and its numbers."""

    loss: str = Field(
        "sigmoid",
        pattern=f"^({'|'.join(PREFERENCE_LOSSES)})$",
        description="sigmoid is DPO; simpo and orpo have no reference; KTO is a recipe of its own, `rlhf kto`",
    )
    beta: float | None = Field(
        None,
        gt=0,
        description="pull towards the reference; simpo: scale of the margin; orpo: weight of the odds ratio; "
        "null: as is usual for the loss, 0.1, simpo 2",
    )
    label_smoothing: float = Field(
        0.1, gt=0, lt=0.5, description="cdpo and robust: share of the pairs held to be labelled the wrong way round"
    )
    simpo_gamma: float = Field(1.0, ge=0, description="simpo: margin that beta times the difference is to exceed")

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        idle = {}
        for name in ("label_smoothing", "simpo_gamma"):
            if name not in self.preference_loss.settings:
                readers = [loss for loss, about in PREFERENCE_LOSSES.items() if name in about.settings]
                idle[name] = f"loss is {self.loss}; {' and '.join(readers)} would read it"
        return idle

    @property
    def preference_loss(self) -> PreferenceLoss:
        """The loss that `loss` names."""
        return PREFERENCE_LOSSES[self.loss]

    @property
    def loss_settings(self) -> LossSettings:
        """The numbers that it reads."""
        return LossSettings(
            self.preference_loss.beta if self.beta is None else self.beta, self.label_smoothing, self.simpo_gamma
        )


class DPOConfig(PreferenceLossConfig):
    """`rlhf dpo`."""

    run: RunConfig = Field(default_factory=RunConfig, description="name, place, seed, device")
    policy: str = Field("tinychat", description="what the policy starts from: a run, a folder, a hub name")
    reference: str | None = Field(
        None, description="what the policy is compared with, where that is not what it starts from"
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="adapters, where the policy brings none")
    data: DataConfig = Field(default_factory=DataConfig, description="preference pairs")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="length and batches")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW and its schedule")

    @model_validator(mode="after")
    def _policy_has_weights(self) -> DPOConfig:
        if self.model.random_init:
            raise ValueError("model.random_init: DPO starts from a policy that has learnt to answer; train it first")
        return self

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        idle = dict(super().idle_keys()) | idle_policy_keys(self.model, self.training, self.data.has_validation)
        if not self.preference_loss.has_reference:
            idle["reference"] = f"loss is {self.loss}, which compares with none"
        return idle


@dataclass(frozen=True)
class ReferencePass:
    """Summed response log-probabilities of every pair under the reference: (N, 2), chosen and rejected.

    Zeros for a loss that has no reference: log-ratios are then log-probabilities.
    """

    logprobs_N2: Tensor


@dataclass(frozen=True)
class DPOParts:
    """Policy, reference (None: the loss asks none) and tokenised pairs, loaded and found usable."""

    policy: Policy
    reference: Reference | None
    train: PreferenceDataset
    validation: PreferenceDataset | None


def run_dpo(config: DPOConfig, resume: Path | None = None) -> Run:
    """Train on pairs; the policy with the best validation loss is in `<run>/policy`."""
    return launch(
        "dpo",
        config,
        prepare,
        train,
        settings=config.run,
        lineage={"policy": config.policy} | ({"reference": config.reference} if config.reference else {}),
        data_files=config.data.files(),
        resume=resume,
    )


def prepare(config: DPOConfig, device: torch.device, rejected_rows: Path) -> DPOParts:
    """Policy and reference on one base, and the pairs."""
    source = (config.policy, config.model, config.run, device)
    if config.preference_loss.has_reference:
        started = start_policy(*source, reference=config.reference)
        policy, reference = started.policy, started.reference
    else:
        policy, reference = start_policy_alone(*source), None
    encoder = ChatEncoder(policy.backbone.tokenizer, config.data.system_prompt)
    data, validation = PreferenceDataset.load(config.data, encoder, rejected_rows)
    return DPOParts(policy, reference, data, validation)


def train(config: DPOConfig, run: Run, parts: DPOParts) -> tuple[int, int]:
    """The reference pass, the loop, then the policy into the run folder."""
    announce(run, parts.policy.backbone, str(parts.train.report))
    limit = config.training.max_tokens_per_micro_batch
    held = parts.validation.examples if parts.validation else []
    with run.timer("reference"):
        train_pass = reference_pass(parts.reference, parts.train, limit, run)
        validation_pass = reference_pass(parts.reference, parts.validation, limit, run)
    method = dpo_method(parts.policy, parts.train.examples, held, train_pass, validation_pass, config)
    return train_policy(run, parts.policy, method, config.training, config.optimizer, "DPO")


def dpo_method(
    policy: Policy,
    examples: Sequence[PreferenceExample],
    validation: Sequence[PreferenceExample],
    reference: ReferencePass,
    validation_reference: ReferencePass,
    config: DPOConfig,
) -> Method[tuple[PairBatch, Tensor]]:
    """The preference loss on log-ratios to the reference; chosen and rejected go through the policy in one batch."""
    limit, device = config.training.max_tokens_per_micro_batch, policy.backbone.device
    width, read = row_width(policy.backbone.takes_forests), tokens_read(policy.backbone.takes_forests)
    preference_loss, settings = config.preference_loss, config.loss_settings

    def collate(part: Sequence[PreferenceExample], reference_n2: Tensor) -> list[tuple[PairBatch, Tensor]]:
        groups = batches_by_tokens([width(example) for example in part], limit)
        return [(collated(policy.backbone, [part[i] for i in g]), reference_n2[g].to(device)) for g in groups]

    def terms(batch: tuple[PairBatch, Tensor], num_pairs: int) -> LossOutput:
        pairs, reference_B2 = batch
        logprobs_2B = summed_logprobs(policy.backbone, policy.adapter, pairs.batch)
        chosen_B, rejected_B = logprobs_2B.chunk(2)
        ratios_2B = logprobs_2B - reference_B2.T.flatten()
        if preference_loss.per_token:
            ratios_2B = ratios_2B / pairs.num_answer_tokens
        ratios = PairLogRatios(*ratios_2B.chunk(2))
        loss = preference_loss.of(ratios, settings).sum() / num_pairs
        margin = ratios.margin_B.detach()
        metrics = {
            "train/accuracy": ((margin > 0).float() + 0.5 * (margin == 0).float()).sum() / num_pairs,
            "train/margin": settings.beta * margin.sum() / num_pairs,
            "train/chosen_reward": settings.beta * ratios.chosen_B.detach().sum() / num_pairs,
            "train/rejected_reward": settings.beta * ratios.rejected_B.detach().sum() / num_pairs,
            "train/chosen_logprob": chosen_B.detach().sum() / num_pairs,
            "train/rejected_logprob": rejected_B.detach().sum() / num_pairs,
        }
        return LossOutput(loss, metrics)

    def loss(rows: Sequence[int]) -> Callable[[tuple[PairBatch, Tensor]], LossOutput]:
        return lambda batch: terms(batch, len(rows))

    @torch.no_grad()
    def validate() -> Validation:
        sums: dict[str, float] = {}
        for batch in collate(validation, validation_reference.logprobs_N2):
            output = terms(batch, len(validation))
            for name, value in {"loss": output.loss, **output.metrics}.items():
                sums[name.removeprefix("train/")] = sums.get(name.removeprefix("train/"), 0.0) + float(value)
        return Validation(sums, "loss", lower_is_better=True)

    return Method(
        num_rows=len(examples),
        micro_batches=lambda rows: collate([examples[i] for i in rows], reference.logprobs_N2[list(rows)]),
        loss=loss,
        num_tokens=lambda rows: sum(num_tokens(examples[i]) for i in rows),
        validate=validate if validation else None,
        backbone=policy.backbone,
        num_read=lambda rows: sum(read(examples[i]) for i in rows),
    )


@torch.no_grad()
def reference_pass(
    reference: Reference | None, data: PreferenceDataset | None, max_tokens: int, run: Run
) -> ReferencePass:
    """Reference log-probabilities, once per data set: kept in the run folder under the hash of the tokens."""
    if reference is None or data is None:
        return ReferencePass(torch.zeros(len(data or ()), 2))
    backbone = reference.backbone
    width = row_width(backbone.takes_forests)

    def compute() -> Tensor:
        logprobs_N2 = torch.zeros(len(data), 2)
        for group in batches_by_tokens([width(example) for example in data.examples], 2 * max_tokens):
            pairs = collated(backbone, [data.examples[i] for i in group])
            logprobs_N2[group] = summed_logprobs(backbone, reference.adapter, pairs.batch).view(2, -1).T.cpu()
        return logprobs_N2

    return ReferencePass(kept_logprobs(run, data.content_hash(), compute))


def collated(backbone: Backbone, pairs: Sequence[PreferenceExample]) -> PairBatch:
    """Pairs as the model reads them: their prompts once where it allows that."""
    made = (pair_forest if backbone.takes_forests else pair_batch)(pairs, backbone.tokenizer.pad_token_id)
    return made.to(backbone.device)


def compute_log_probs(
    model: torch.nn.Module, input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor
) -> Tensor:
    """Summed log-probabilities (B,) of the tokens after each prompt, for any causal model with `.logits`.

    Right-padded rows; `prompt_lengths` (B,) counts the prompt tokens of each. This is the plain form for a model that
    is not wrapped in a `Backbone`: it holds all logits at once.
    """
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].float()
    logprobs = logits.log_softmax(dim=-1).gather(-1, input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    places = torch.arange(1, input_ids.shape[1], device=input_ids.device)
    counts = (places >= prompt_lengths.unsqueeze(1)) & attention_mask[:, 1:].bool()
    return torch.where(counts, logprobs, torch.zeros_like(logprobs)).sum(dim=1)
