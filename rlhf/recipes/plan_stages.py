"""What each supervised stage and pre-training do with their memory: their phases, run in a shadow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import Qwen2Config

from rlhf.algo.trainer import OptimizerConfig
from rlhf.data.chat import ChatEncoder, TokenExample
from rlhf.data.rows import LabelledRow, StepRow
from rlhf.data.step_dataset import StepExample
from rlhf.data.unpaired_dataset import UnpairedDataset
from rlhf.infra.experiment import RunConfig
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.models.ensemble import member_adapters
from rlhf.models.hollow import Shape
from rlhf.models.policy import Policy
from rlhf.models.process_reward_model import ProcessRewardModel
from rlhf.models.reward_model import RewardEnsemble, RewardModel
from rlhf.models.scoring import TrainMode
from rlhf.recipes.dpo import DPOConfig, ReferencePass, collated, dpo_method
from rlhf.recipes.kto import KTOConfig, kto_method
from rlhf.recipes.kto import ReferencePass as KTOReferencePass
from rlhf.recipes.language_model import language_model_method
from rlhf.recipes.offline import answer_logprobs, summed_logprobs
from rlhf.recipes.plan_trace import (
    ADAPTERS,
    MANY,
    PlannedTrainer,
    Rows,
    Start,
    Tracer,
    pair_examples,
    text_examples,
    trace_supervised,
    trained,
)
from rlhf.recipes.pretrain import ArchitectureConfig, PretrainConfig
from rlhf.recipes.prm import ProcessRewardConfig, step_method
from rlhf.recipes.reward import RewardConfig, RewardParts, reward_method
from rlhf.recipes.reward_ensemble import start_ensemble
from rlhf.recipes.scoring import held
from rlhf.recipes.sft import ADAPTER, SFTConfig
from rlhf.recipes.stages import LoadedPolicy, policy_on
from rlhf.recipes.supervised import Validation
from rlhf.rewards.process import score_steps


def trace_pretrain(tracer: Tracer, config: PretrainConfig, start: Start) -> None:
    """Every weight of a small model on every token."""
    held = ModelConfig(train="full", attn_implementation=config.architecture.attn_implementation)
    backbone = tracer.backbone(start, held, config.run.dtype)
    backbone.model.requires_grad_(True)
    _trace_language_model(tracer, backbone, None, config)


def trace_sft(tracer: Tracer, config: SFTConfig, start: Start) -> None:
    """An adapter or every weight on the answers."""
    backbone = tracer.backbone(start, config.model, config.run.dtype)
    if config.model.train == "full":
        backbone.model.requires_grad_(True)
        _trace_language_model(tracer, backbone, None, config)
        return
    if start.adapter is None:
        tracer.add_adapter(backbone, ADAPTER, config.model.lora)
    backbone.train_only([ADAPTER])
    with backbone.adapter_dropout(config.model.lora.lora_dropout):
        _trace_language_model(tracer, backbone, ADAPTER, config)


def _trace_language_model(
    tracer: Tracer, backbone: Backbone, adapter: str | None, config: SFTConfig | PretrainConfig
) -> None:
    packed_length = config.data.max_length if config.packing else None
    training = config.training
    rows = tracer.largest_rows(training.max_tokens_per_micro_batch, config.data.max_length, training.rows_per_step)
    examples = text_examples(rows) if packed_length is None else _packed_examples(rows, packed_length, config)
    held = examples if config.data.has_validation else []
    method = language_model_method(backbone, adapter, examples, held, config.training, packed_length)
    trace_supervised(tracer, method, _trainer(tracer, trained(backbone), config.optimizer, config.run.dtype, rows))


def _packed_examples(rows: Rows, packed_length: int, config: SFTConfig | PretrainConfig) -> list[TokenExample]:
    """Two examples to a row, so that attention has to be kept inside them, in as many rows as pass at once."""
    at_once = max(1, config.training.max_tokens_per_micro_batch // packed_length)
    return text_examples(Rows(2 * min(at_once, config.training.rows_per_step), packed_length // 2, rows.is_accumulated))


def trace_reward(tracer: Tracer, config: RewardConfig, start: Start) -> None:
    """A head, with an adapter or every weight, on pairs of answers."""
    settings, members = config.reward, config.reward.ensemble.members
    name = "reward" if members == 1 else member_adapters("reward", members)[0]
    backbone, adapter = _scored_backbone(tracer, start, config.model, settings.train, config.run.dtype, name)
    with tracer.shadow:
        if members == 1:
            model: RewardModel | RewardEnsemble = RewardModel(
                backbone, adapter, settings.pooling, settings.train, config.model, suffix=settings.suffix
            )
        else:
            model = start_ensemble(backbone, adapter, settings, config.model, config.run)
    tracer.count_as_adapters(backbone)
    tracer.shadow.relabel((p for name, p in model.trainable_parameters().items() if "head." in name), ADAPTERS)
    rows = _pairs(tracer, config)
    examples = pair_examples(rows)
    with tracer.shadow:
        parts = RewardParts(model, examples, examples if config.data.has_validation else [], "")
        method = reward_method(parts, config)
    with backbone.adapter_dropout(config.model.lora.lora_dropout):
        trainer = _trainer(tracer, model.trainable_parameters(), config.optimizer, config.run.dtype, rows)
        trace_supervised(tracer, method, trainer)


def trace_prm(tracer: Tracer, config: ProcessRewardConfig, start: Start) -> None:
    """A head that reads the end of every step, with an adapter or every weight, on worked solutions."""
    train = config.prm.train
    backbone, adapter = _scored_backbone(tracer, start, config.model, train, config.run.dtype, "process")
    with tracer.shadow:
        model = ProcessRewardModel(backbone, adapter, config.data.separator, train, config.model)
    model.looks_ahead = backbone.is_encoder  # it is tried out with numbers, which are not there
    tracer.shadow.relabel(model.head.parameters(), ADAPTERS)
    limit = config.training.max_tokens_per_micro_batch
    rows = tracer.largest_rows(limit, config.data.max_length, config.training.rows_per_step)
    # One step each: an encoder, which sees a solution once for every step, then takes as many tokens in rows as long.
    none = StepRow(prompt="", completions=[], labels=[])
    examples = [
        StepExample(example.input_ids, 1, [len(example.input_ids) - 1], [1.0], none) for example in text_examples(rows)
    ]
    with tracer.shadow:
        method = step_method(model, examples, [], limit)
    if config.data.has_validation:
        ids, ends = [one.input_ids for one in examples], [one.ends for one in examples]
        method = replace(method, validate=lambda: _measured_steps(model, ids, ends, limit))
    with backbone.adapter_dropout(config.model.lora.lora_dropout):
        trainer = _trainer(tracer, model.trainable_parameters(), config.optimizer, config.run.dtype, rows)
        trace_supervised(tracer, method, trainer)


def _measured_steps(
    model: ProcessRewardModel, ids: Sequence[list[int]], ends: Sequence[list[int]], max_tokens: int
) -> Validation:
    """The pass over the model that a validation is; what is computed from a few logits takes nothing."""
    score_steps(model, ids, ends, max_tokens)
    return Validation({"loss": 0.0}, "loss", lower_is_better=True)


def _scored_backbone(
    tracer: Tracer, start: Start, model: ModelConfig, train: TrainMode, dtype: str, name: str
) -> tuple[Backbone, str | None]:
    """Backbone and adapter of a model with a head, as `scoring.start_backbone` and `ScoringModel` put them together."""
    backbone = tracer.backbone(start, held(model, train), dtype)
    sft = None if start.adapter is None or train == "full" else "sft"
    if train == "lora" and sft is None:
        tracer.add_adapter(backbone, name, model.lora)
    elif train == "lora" and sft is not None:
        with tracer.shadow:
            backbone.copy_adapter(sft, name)
        tracer.count_as_adapters(backbone)
    return backbone, sft if train == "frozen" else name


def trace_dpo(tracer: Tracer, config: DPOConfig, start: Start) -> None:
    """The reference over the data, then the policy on pairs."""
    if config.preference_loss.has_reference:
        policy, reference, adapter = start_policy(tracer, start, config.model, config.run)
        wide = tracer.largest_rows(2 * config.training.max_tokens_per_micro_batch, 2 * config.data.max_length, MANY)
        with tracer.phase("reference"), torch.no_grad():
            summed_logprobs(reference, adapter, collated(reference, pair_examples(wide)).batch)
    else:
        policy = start_policy_alone(tracer, start, config.model, config.run)
    rows = _pairs(tracer, config)
    examples = pair_examples(rows)
    held = examples if config.data.has_validation else []
    with tracer.shadow:
        passed = ReferencePass(torch.zeros(rows.count, 2))
        method = dpo_method(policy, examples, held, passed, passed, config)
    trace_supervised(
        tracer, method, _trainer(tracer, policy.trainable_parameters(), config.optimizer, config.run.dtype, rows)
    )


def trace_kto(tracer: Tracer, config: KTOConfig, start: Start) -> None:
    """The reference over answers and strangers' answers, then the policy on both."""
    policy, reference, adapter = start_policy(tracer, start, config.model, config.run)
    limit, length = config.training.max_tokens_per_micro_batch, config.data.max_length
    wide = tracer.largest_rows(2 * limit, length, MANY)
    with tracer.phase("reference"):
        answer_logprobs(reference, adapter, text_examples(wide), 2 * limit)
    rows = tracer.largest_rows(limit, length, config.training.rows_per_step)
    data = _labelled_answers(rows, policy.backbone, config)
    with tracer.shadow:
        passed = KTOReferencePass(torch.zeros(len(data)), defaultdict(float))
        method = kto_method(policy, data, data if config.data.has_validation else None, passed, passed, config)
    trace_supervised(
        tracer, method, _trainer(tracer, policy.trainable_parameters(), config.optimizer, config.run.dtype, rows)
    )


def _labelled_answers(rows: Rows, backbone: Backbone, config: KTOConfig) -> UnpairedDataset:
    """Answers as long as rows may be, behind prompts that differ; in the bundled tokenizer a digit is a token."""
    texts = [
        LabelledRow(f"{number:06d}", "1" * max(1, rows.width - 8), number % 2 == 0)
        for number in range(max(2, rows.count))
    ]
    return UnpairedDataset(texts, ChatEncoder(backbone.tokenizer), config.data.model_copy(update={"max_samples": None}))


def _pairs(tracer: Tracer, config: RewardConfig | DPOConfig) -> Rows:
    training = config.training
    return tracer.largest_rows(training.max_tokens_per_micro_batch, 2 * config.data.max_length, training.rows_per_step)


def start_policy(
    tracer: Tracer, start: Start, model: ModelConfig, run: RunConfig, *, value_adapter: bool = False
) -> tuple[Policy, Backbone, str | None]:
    """Policy, and the backbone and adapter of its reference, as `stages.start_policy` puts them together."""
    policy = start_policy_alone(tracer, start, model, run, value_adapter=value_adapter)
    if model.train == "full":
        return policy, tracer.backbone(start, model, run.dtype), None
    return policy, policy.backbone, None if start.adapter is None else "sft"


def start_policy_alone(
    tracer: Tracer, start: Start, model: ModelConfig, run: RunConfig, *, value_adapter: bool = False
) -> Policy:
    """The policy of a method that asks no reference."""
    backbone = tracer.backbone(start, model, run.dtype)
    adapter = "sft" if start.adapter is not None and model.train == "lora" else None
    with tracer.shadow:
        policy = policy_on(
            LoadedPolicy(backbone, adapter), model, run, torch.device("cpu"), value_adapter=value_adapter
        )
    tracer.count_as_adapters(backbone)
    return policy


def pretrained_shape(shape: ArchitectureConfig) -> Shape:
    """The architecture that pre-training makes; the tokenizer is taken to reach the vocabulary it is allowed."""
    config = Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=True,
    )
    return Shape("pretrain", config, "architecture", torch.float32)


def _trainer(
    tracer: Tracer, parameters: Mapping[str, nn.Parameter], optimizer: OptimizerConfig, dtype: str, rows: Rows
) -> PlannedTrainer:
    return PlannedTrainer(tracer, parameters, optimizer, scale_loss=dtype == "fp16", is_accumulated=rows.is_accumulated)
