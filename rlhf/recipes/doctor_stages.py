"""Which checks each supervised stage gets, on what its own `prepare` loads.

Every function yields findings as they are made. `scratch` is a folder for what must not stay; `keep`, inside a
pipeline, is where the untrained stand-in of the stage is left for the stages that start from it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rlhf.data.chat import TokenExample, join
from rlhf.data.collate import Batch, collate_packed, pad_right, pair_batch
from rlhf.data.data_config import DataConfig
from rlhf.data.instruction_dataset import InstructionDataset
from rlhf.data.preference_dataset import PreferenceDataset, PreferenceExample
from rlhf.data.rows import InstructionRow, Prompt
from rlhf.data.token_dataset import TokenDataset
from rlhf.data.unpaired_dataset import UnpairedDataset, UnpairedExample
from rlhf.eval.doctor import model_checks, reward_checks, row_checks, token_checks
from rlhf.eval.doctor.finding import Check, Finding
from rlhf.models.policy import Policy, masked_logprobs
from rlhf.models.reference import Reference
from rlhf.models.reward_model import RewardEnsemble, RewardModel
from rlhf.recipes.doctor_subject import UNLIMITED, ItemT, Subject, drop_adapters, sampled
from rlhf.recipes.dpo import DPOConfig
from rlhf.recipes.dpo import prepare as prepare_dpo
from rlhf.recipes.kto import KTOConfig
from rlhf.recipes.kto import prepare as prepare_kto
from rlhf.recipes.offline import summed_logprobs
from rlhf.recipes.reward import RewardConfig, longest_side
from rlhf.recipes.reward import prepare as prepare_reward
from rlhf.recipes.sft import SFTConfig
from rlhf.recipes.sft import prepare as prepare_sft
from rlhf.recipes.stages import save_policy

START = Check("start", "models and data load", "the run refuses to start")
_RELOADED = "doctor_reloaded"


def examine_sft(config: SFTConfig, device: torch.device, scratch: Path, keep: Path | None = None) -> Iterator[Finding]:
    """Tokens, padding, dropout and learning rate of supervised fine-tuning."""
    subject = Subject.open(config.model.name_or_path, config.model, config.data, config.run.output_dir, scratch)
    examples, finding = subject.within_length(InstructionDataset, config.data, _num_ids)
    yield finding
    yield subject.bos("SFT", [example.input_ids for example in examples])
    # Where every token is trained, there is no answer with an end of its own.
    if config.data.train_on != "every_token" and subject.pairs:
        rows = subject.spread(examples, _num_ids)
        yield from _answers(
            subject, examples, _sft_encode(subject, config), rows, lambda pad: _batch(rows, pad, config)
        )
    limited = config.model_copy(update={"data": sampled(config.data)})
    parts = prepare_sft(limited, device, scratch / "rejected.jsonl")
    yield START.green(f"{parts.backbone.name}; {parts.report}")
    backbone, adapter, rows = parts.backbone, parts.adapter, subject.spread(parts.train, _num_ids)
    batch = _batch(rows, backbone.tokenizer.pad_token_id, config).to(device)
    tensors = batch.input_ids_BT, batch.attention_mask_BT, batch.loss_mask_BT, batch.position_ids_BT
    yield model_checks.left_padding_changes_nothing(backbone, adapter, rows)
    yield model_checks.no_dropout(lambda: masked_logprobs(backbone, adapter, *tensors), backbone)
    trained = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    num_steps = config.training.num_steps(subject.num_rows)
    yield model_checks.learning_rate_moves_weights(trained, config.optimizer, num_steps, config.run.dtype)
    if keep is not None:
        reward_checks.shake(trained.values())
        save_policy(backbone, adapter, keep)


def examine_reward(
    config: RewardConfig, device: torch.device, scratch: Path, keep: Path | None = None
) -> Iterator[Finding]:
    """Tokens of both sides, dropout, place of the score, the head on disk and the learning rate of a reward model."""
    subject = yield from _pair_tokens(config, config.backbone, scratch, "reward model")
    limited = config.model_copy(update={"data": sampled(config.data)})
    parts = prepare_reward(limited, device, scratch / "rejected.jsonl")
    yield START.green(f"{parts.model.backbone.name}; {parts.report}")
    model, dtype = parts.model, config.run.dtype
    pairs = subject.spread(parts.train, longest_side)
    batch = pair_batch(pairs, model.tokenizer.pad_token_id).batch.to(device)
    rows = [example.input_ids for example in _both_sides(pairs)]
    yield model_checks.no_dropout(lambda: model(batch.input_ids_BT, batch.attention_mask_BT), model)
    yield reward_checks.scores_ignore_the_batch(model, rows, dtype)
    yield reward_checks.head_survives_saving(model, rows, lambda folder: _reloaded(folder, model), dtype)
    num_steps = config.training.num_steps(subject.num_rows)
    yield model_checks.learning_rate_moves_weights(model.trainable_parameters(), config.optimizer, num_steps, dtype)
    if keep is not None:
        reward_checks.shake(model.trainable_parameters().values())
        model.save(keep)


def examine_dpo(config: DPOConfig, device: torch.device, scratch: Path) -> Iterator[Finding]:
    """Tokens of both sides, padding, dropout, distance from the reference and learning rate of DPO."""
    subject = yield from _pair_tokens(config, config.policy, scratch, "DPO")
    limited = config.model_copy(update={"data": sampled(config.data)})
    parts = prepare_dpo(limited, device, scratch / "rejected.jsonl")
    yield START.green(f"{parts.policy.backbone.name}; {parts.train.report}")
    pairs = subject.spread(parts.train.examples, longest_side)
    batch = pair_batch(pairs, parts.policy.backbone.tokenizer.pad_token_id).batch.to(device)
    yield from _beside_reference(config, subject, parts.policy, parts.reference, _both_sides(pairs), batch)


def examine_kto(config: KTOConfig, device: torch.device, scratch: Path) -> Iterator[Finding]:
    """Tokens of the answers, padding, dropout, distance from the reference and learning rate of KTO."""

    def tokens(examples: Sequence[UnpairedExample]) -> list[TokenExample]:
        return [example.tokens for example in examples]

    def length(example: UnpairedExample) -> int:
        return len(example.prompt_ids) + len(example.answer_ids)

    subject = yield from _answer_tokens(
        config, config.policy, scratch, "KTO", UnpairedDataset, length, tokens, lambda e, pad: pad_right(tokens(e), pad)
    )
    limited = config.model_copy(update={"data": sampled(config.data)})
    parts = prepare_kto(limited, device, scratch / "rejected.jsonl")
    yield START.green(f"{parts.policy.backbone.name}; {parts.train.report}")
    rows = tokens(subject.spread(parts.train.examples, length))
    batch = pad_right(rows, parts.policy.backbone.tokenizer.pad_token_id).to(device)
    yield from _beside_reference(config, subject, parts.policy, parts.reference, rows, batch)


def _beside_reference(
    config: DPOConfig | KTOConfig,
    subject: Subject,
    policy: Policy,
    reference: Reference | None,
    rows: Sequence[TokenExample],
    batch: Batch,
) -> Iterator[Finding]:
    """T1, P2, P8 and O12 of a policy that trains on answers; `reference` None: its loss asks for none."""

    def under_policy() -> Tensor:
        return summed_logprobs(policy.backbone, policy.adapter, batch)

    yield model_checks.left_padding_changes_nothing(policy.backbone, policy.adapter, rows)
    yield model_checks.no_dropout(under_policy, policy)
    if reference is not None:
        under_reference = partial(summed_logprobs, reference.backbone, reference.adapter, batch)
        yield model_checks.pairs_start_at_reference(under_policy, under_reference)
    num_steps = config.training.num_steps(subject.num_rows)
    yield model_checks.learning_rate_moves_weights(
        policy.trainable_parameters(), config.optimizer, num_steps, config.run.dtype
    )


def _pair_tokens(
    config: RewardConfig | DPOConfig, source: str, scratch: Path, recipe: str
) -> Generator[Finding, None, Subject]:
    return _answer_tokens(
        config,
        source,
        scratch,
        recipe,
        PreferenceDataset,
        longest_side,
        _both_sides,
        lambda pairs, pad: pair_batch(pairs, pad).batch,
    )


def _answer_tokens(
    config: RewardConfig | DPOConfig | KTOConfig,
    source: str,
    scratch: Path,
    recipe: str,
    kind: type[TokenDataset[ItemT, DataConfig]],
    length: Callable[[ItemT], int],
    tokens: Callable[[Sequence[ItemT]], list[TokenExample]],
    collate: Callable[[Sequence[ItemT], int], Batch],
) -> Generator[Finding, None, Subject]:
    """Checks of tokens, before the model is loaded; returns what they were made on.

    `tokens` gives the rows of examples in the order in which `collate` has them.
    """
    subject = Subject.open(source, config.model, config.data, config.run.output_dir, scratch)
    encoder = subject.encoder
    kept, finding = subject.within_length(kind, config.data, length)
    yield finding
    examples, some = tokens(kept), subject.spread(kept, length)
    yield subject.bos(recipe, [example.input_ids for example in examples])

    def encode(prompt: Prompt, answer: str) -> TokenExample:
        return join(encoder.prompt_ids(prompt), encoder.response_ids(prompt, answer))

    yield from _answers(subject, examples, encode, tokens(some), lambda pad: collate(some, pad))
    return subject


def _answers(
    subject: Subject,
    examples: Sequence[TokenExample],
    encode: token_checks.Encode,
    rows: Sequence[TokenExample],
    collate: Callable[[int], Batch],
) -> Iterator[Finding]:
    """T2, T3, T4 and T8 where answers are given; `collate(pad)` makes the batch that holds `rows`."""
    tokenizer, stops = subject.tokenizer, subject.encoder.stop_token_ids
    yield token_checks.masks_survive_padding(rows, collate, stops, tokenizer.pad_token_id)
    yield token_checks.answers_end_at_a_stop(examples, stops, tokenizer, chat=subject.is_chat)
    yield token_checks.end_in_prompt_changes_no_mask(encode, subject.pairs, str(tokenizer.eos_token))
    yield row_checks.answers_are_trained(encode, subject.pairs, tokenizer, stops)


def _sft_encode(subject: Subject, config: SFTConfig) -> token_checks.Encode:
    any_length = config.data.model_copy(update={"max_length": UNLIMITED, "min_length": 1, "max_samples": None})

    def encode(prompt: Prompt, answer: str) -> TokenExample:
        return InstructionDataset.from_rows([InstructionRow(prompt, answer)], subject.encoder, any_length).examples[0]

    return encode


def _batch(rows: Sequence[TokenExample], pad: int, config: SFTConfig) -> Batch:
    return collate_packed([[row] for row in rows], pad) if config.packing else pad_right(rows, pad)


def _both_sides(pairs: Sequence[PreferenceExample]) -> list[TokenExample]:
    """Chosen rows first, as `pair_batch` has them."""
    chosen = [join(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    return chosen + [join(pair.prompt_ids, pair.rejected_ids) for pair in pairs]


def _reloaded(folder: Path, model: RewardModel | RewardEnsemble) -> RewardModel | RewardEnsemble:
    """A saved reward model or ensemble, on the same frozen base where it has one."""
    drop_adapters(model.backbone, _RELOADED)
    return type(model).load(folder, model.backbone, _RELOADED, model.backbone.dtype_name)


def _num_ids(example: TokenExample) -> int:
    return len(example.input_ids)
