"""Pre-training a small model from nothing, tokenizer included: for machines and data without ready weights.

The loop is that of SFT with the loss on every token and every weight in training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rlhf.algo.trainer import OptimizerConfig, Trainer
from rlhf.data.chat import ChatEncoder
from rlhf.data.data_config import InstructionDataConfig
from rlhf.data.instruction_dataset import InstructionDataset
from rlhf.data.loading import load_splits
from rlhf.data.rows import InstructionRow, PreferenceRow, Row, TextRow
from rlhf.infra.config import Config
from rlhf.infra.experiment import Run, RunConfig
from rlhf.models.backbone import Backbone
from rlhf.recipes.language_model import language_model_method
from rlhf.recipes.launch import launch, stage_cost
from rlhf.recipes.sft import SFTParts, announce
from rlhf.recipes.stages import POLICY, save_policy
from rlhf.recipes.supervised import SupervisedLoop, TrainingConfig

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ArchitectureConfig(Config):
    """Shape of a small Qwen2: rotary positions, grouped-query attention, tied embeddings."""

    hidden_size: int = Field(192, ge=8, description="width of the residual stream")
    num_hidden_layers: int = Field(4, ge=1, description="transformer blocks")
    num_attention_heads: int = Field(6, ge=1, description="query heads; the width divided by it is a head's width")
    num_key_value_heads: int = Field(2, ge=1, description="key and value heads, shared by groups of query heads")
    intermediate_size: int = Field(512, ge=8, description="width inside the MLP")
    max_position_embeddings: int = Field(2048, ge=16, description="context length")
    vocab_size: int = Field(1024, ge=300, description="tokens of the byte-level BPE trained on the data")
    tokenizer: str | None = Field(None, description="use this tokenizer instead of training one")
    attn_implementation: str | None = Field(None, description="as in transformers; null picks its default")

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> ArchitectureConfig:
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
                f"{self.num_attention_heads}, and that of num_key_value_heads {self.num_key_value_heads}"
            )
        return self

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        return {} if self.tokenizer is None else {"vocab_size": "architecture.tokenizer brings its vocabulary"}


class PretrainDataConfig(InstructionDataConfig):
    """Texts of which every token is learnt."""

    train_on: Literal["every_token"] = Field("every_token", description="fixed: pre-training learns from every token")

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        return dict(super().idle_keys()) | {"system_prompt": "pre-training reads prompts as they stand in the data"}


class PretrainConfig(Config):
    """`rlhf pretrain`."""

    run: RunConfig = Field(default_factory=RunConfig, description="name, place, seed, device")
    architecture: ArchitectureConfig = Field(default_factory=ArchitectureConfig, description="shape of the model")
    data: PretrainDataConfig = Field(default_factory=PretrainDataConfig, description="texts of any format")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="length and batches")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW and its schedule")
    packing: bool = Field(True, description="several texts in one row of data.max_length tokens")

    @model_validator(mode="after")
    def _rows_fit_the_context(self) -> PretrainConfig:
        if self.data.max_length > self.architecture.max_position_embeddings:
            raise ValueError(
                f"data.max_length {self.data.max_length} is more than the context of the model, "
                f"architecture.max_position_embeddings {self.architecture.max_position_embeddings}"
            )
        return self

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        packed_length = self.data.max_length if self.packing else None
        return self.training.idle_keys_with(self.data.has_validation, packed_length)


def run_pretrain(config: PretrainConfig, resume: Path | None = None) -> Run:
    """Train tokenizer and model; a plain Hugging Face folder is left in `<run>/policy`."""
    return launch(
        "pretrain", config, prepare, train, settings=config.run, data_files=config.data.files(), resume=resume
    )


def prepare(config: PretrainConfig, device: torch.device, rejected_rows: Path) -> SFTParts:
    """Read the texts, train the tokenizer on them unless one is named, build the model with random weights."""
    shape = config.architecture
    rows, validation_rows = load_splits(config.data, rejected_rows)
    if shape.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(shape.tokenizer)
    else:
        tokenizer = train_tokenizer(_texts(rows.rows), shape.vocab_size)
    encoder = ChatEncoder(tokenizer)
    data = InstructionDataset.from_rows(rows, encoder, config.data)
    held = config.data.model_copy(update={"max_samples": config.data.max_validation_samples})
    validation = None if validation_rows is None else InstructionDataset.from_rows(validation_rows, encoder, held)
    torch.manual_seed(config.run.seed)
    backbone = Backbone(build_model(shape, tokenizer), tokenizer, "pretrained", config.run.dtype).to(device)
    backbone.model.requires_grad_(True)
    return SFTParts(backbone, None, data.examples, validation.examples if validation else [], str(data.report))


def train(config: PretrainConfig, run: Run, parts: SFTParts) -> tuple[int, int]:
    """The supervised loop over every token, then the whole model into the run folder."""
    announce(run, parts.backbone, parts.report)
    packed_length = config.data.max_length if config.packing else None
    method = language_model_method(parts.backbone, None, parts.train, parts.validation, config.training, packed_length)
    trainer = Trainer(
        dict(parts.backbone.named_parameters()),
        config.optimizer,
        config.training.num_steps(len(parts.train)),
        scale_loss=config.run.dtype == "fp16",
    )
    progress = SupervisedLoop(run, trainer, config.training, method, "pre-training").train()
    if run.stop_reason != "interrupted":
        with run.timer("save"):
            save_policy(parts.backbone, None, run.folder / POLICY)
    return stage_cost(progress)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE with ChatML; every digit is a token of its own, so that sums can be learnt digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Markers of the chat template stand in the texts; they are tokens already and must not teach merges.
    cleaned = (text.replace(START, "\n").replace(END, "\n") for text in texts)
    tokenizer.train_from_iterator(cleaned, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, additional_special_tokens=[START], padding_side="left"
    )
    fast.chat_template = CHATML
    return fast


def build_model(shape: ArchitectureConfig, tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights of this shape, its special tokens those of the tokenizer."""
    config = Qwen2Config(
        attn_implementation=shape.attn_implementation,
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def _texts(rows: Iterable[Row]) -> Iterator[str]:
    """The texts a tokenizer learns from: prompts as they are read and the answers to imitate."""
    for row in rows:
        if isinstance(row, TextRow):
            yield row.text
            continue
        prompt = row.prompt if isinstance(row.prompt, str) else "\n".join(turn["content"] for turn in row.prompt)
        answer = (
            row.chosen if isinstance(row, PreferenceRow) else row.response if isinstance(row, InstructionRow) else ""
        )
        yield f"{prompt} {answer}"
