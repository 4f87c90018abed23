"""Supervised fine-tuning: the base model learns to answer, from the chosen side of pairs or from any demonstrations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field, model_validator

from rlhf.algo.trainer import OptimizerConfig, Trainer
from rlhf.data.chat import ChatEncoder, TokenExample
from rlhf.data.data_config import InstructionDataConfig
from rlhf.data.instruction_dataset import InstructionDataset
from rlhf.infra.config import Config
from rlhf.infra.experiment import Run, RunConfig
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.models.quantized import count_parameters
from rlhf.recipes.language_model import language_model_method
from rlhf.recipes.launch import launch, stage_cost
from rlhf.recipes.stages import POLICY, load_policy, save_policy
from rlhf.recipes.supervised import SupervisedLoop, TrainingConfig

ADAPTER = "sft"


class SFTConfig(Config):
    """`rlhf sft`."""

    run: RunConfig = Field(default_factory=RunConfig, description="name, place, seed, device")
    model: ModelConfig = Field(default_factory=ModelConfig, description="the base model and its adapters")
    data: InstructionDataConfig = Field(
        default_factory=InstructionDataConfig, description="demonstrations; of pairs, the chosen side"
    )
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="length and batches")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW and its schedule")
    packing: bool = Field(False, description="several examples in one row of data.max_length tokens")

    @model_validator(mode="after")
    def _random_base_is_saved(self) -> SFTConfig:
        if self.model.random_init and self.model.train == "lora":
            raise ValueError(
                "model.random_init=true with model.train=lora saves an adapter without the random base that it "
                "belongs to; use model.train=full"
            )
        return self

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        packed_length = self.data.max_length if self.packing else None
        return self.training.idle_keys_with(self.data.has_validation, packed_length)


@dataclass(frozen=True)
class SFTParts:
    """Model and tokenised data, loaded and found usable."""

    backbone: Backbone
    adapter: str | None
    train: list[TokenExample]
    validation: list[TokenExample]
    report: str


def run_sft(config: SFTConfig, resume: Path | None = None) -> Run:
    """Train an adapter (or every weight) on the answers; the policy is in `<run>/policy`, the best by validation."""
    return launch(
        "sft",
        config,
        prepare,
        train,
        settings=config.run,
        lineage={"base": config.model.name_or_path},
        data_files=config.data.files(),
        resume=resume,
    )


def prepare(config: SFTConfig, device: torch.device, rejected_rows: Path) -> SFTParts:
    """Load the base, give it a fresh adapter, tokenise the data."""
    loaded = load_policy(
        config.model.name_or_path, config.model, config.run.output_dir, device, config.run.dtype, ADAPTER
    )
    backbone, adapter = loaded.backbone, loaded.adapter
    encoder = ChatEncoder(backbone.tokenizer, config.data.system_prompt)
    data, validation = InstructionDataset.load(config.data, encoder, rejected_rows)
    torch.manual_seed(config.run.seed)
    if config.model.train == "full":
        backbone.model.requires_grad_(True)
    else:
        if adapter is None:
            adapter = ADAPTER
            backbone.add_adapter(adapter, config.model.lora)
        backbone.train_only([adapter])
    return SFTParts(backbone, adapter, data.examples, validation.examples if validation else [], str(data.report))


def train(config: SFTConfig, run: Run, parts: SFTParts) -> tuple[int, int]:
    """The loop, then the policy with its tokenizer into the run folder."""
    announce(run, parts.backbone, parts.report)
    packed_length = config.data.max_length if config.packing else None
    method = language_model_method(
        parts.backbone, parts.adapter, parts.train, parts.validation, config.training, packed_length
    )
    trainer = Trainer(
        {name: p for name, p in parts.backbone.named_parameters() if p.requires_grad},
        config.optimizer,
        config.training.num_steps(len(parts.train)),
        scale_loss=config.run.dtype == "fp16",
    )
    with parts.backbone.adapter_dropout(config.model.lora.lora_dropout):
        progress = SupervisedLoop(run, trainer, config.training, method, "SFT").train()
    if run.stop_reason != "interrupted":
        with run.timer("save"):
            save_policy(parts.backbone, parts.adapter, run.folder / POLICY)
    return stage_cost(progress)


def announce(run: Run, backbone: Backbone, report: str) -> None:
    """Say what was loaded: choices made for the tokenizer, rows kept and dropped, how much trains."""
    for note in backbone.notes:
        run.logger.info(note)
    run.logger.info(f"data: {report}")
    trainable, total = count_parameters(backbone)
    run.logger.info(f"training {trainable:,} of {total:,} parameters ({trainable / total:.2%}) of {backbone.name}")
