"""Next-token training as a `Method` for the supervised loop: SFT (answers only) and pre-training (every token)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from rlhf.algo.sft_loss import sft_loss
from rlhf.algo.trainer import LossOutput
from rlhf.data.chat import TokenExample
from rlhf.data.collate import Batch, batches_by_tokens, collate_packed, pack, pad_right
from rlhf.models.backbone import Backbone
from rlhf.models.policy import masked_logprobs
from rlhf.recipes.supervised import Method, TrainingConfig, Validation


def language_model_method(
    backbone: Backbone,
    adapter: str | None,
    examples: Sequence[TokenExample],
    validation: Sequence[TokenExample],
    training: TrainingConfig,
    packed_length: int | None = None,
) -> Method[Batch]:
    """Negative log-likelihood of the tokens under each example's loss mask.

    `packed_length` puts several examples into rows of at most that many tokens (attention stays inside an example),
    which saves padding where rows differ much in length.
    """

    def batches(part: Sequence[TokenExample]) -> list[Batch]:
        pad = backbone.tokenizer.pad_token_id
        if packed_length is not None:
            rows = [[part[i] for i in group] for group in pack(part, packed_length)]
            at_once = max(1, training.max_tokens_per_micro_batch // packed_length)
            made = [collate_packed(rows[i : i + at_once], pad) for i in range(0, len(rows), at_once)]
        else:
            groups = batches_by_tokens([len(e.input_ids) for e in part], training.max_tokens_per_micro_batch)
            made = [pad_right([part[i] for i in group], pad) for group in groups]
        return [batch.to(backbone.device) for batch in made]

    def loss(rows: Sequence[int]) -> Callable[[Batch], LossOutput]:
        num_tokens = sum(_num_trained(examples[i]) for i in rows)
        return lambda batch: LossOutput(sft_loss(_logprobs(backbone, adapter, batch), num_tokens))

    @torch.no_grad()
    def validate() -> Validation:
        total = sum(float(_logprobs(backbone, adapter, batch).sum()) for batch in batches(validation))
        nll = -total / sum(_num_trained(example) for example in validation)
        return Validation({"loss": nll, "perplexity": math.exp(min(nll, 50.0))}, "loss", lower_is_better=True)

    return Method(
        num_rows=len(examples),
        micro_batches=lambda rows: batches([examples[i] for i in rows]),
        loss=loss,
        num_tokens=lambda rows: sum(len(examples[i].input_ids) for i in rows),
        validate=validate if validation else None,
        backbone=backbone,
    )


def _logprobs(backbone: Backbone, adapter: str | None, batch: Batch) -> torch.Tensor:
    return masked_logprobs(
        backbone, adapter, batch.input_ids_BT, batch.attention_mask_BT, batch.loss_mask_BT, batch.position_ids_BT
    )


def _num_trained(example: TokenExample) -> int:
    """Trained tokens; the first token of an example has nothing before it and never counts."""
    return sum(example.loss_mask[1:])
