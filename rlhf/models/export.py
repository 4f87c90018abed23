"""Adapters folded into plain Hugging Face folders, and how far what is read back is from what was trained.

The sum of base and update is taken in fp32 and rounded once, to the dtype of the folder. What was written is then
loaded as a stranger would load it, and its outputs are held against those of the model that it came from.
Legend: A answer tokens of one row, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.infra.errors import UserError
from rlhf.models.backbone import Backbone
from rlhf.models.lora import merge_lora_weights
from rlhf.models.reward_model import SCORING, RewardModel

ExportDtype = Literal["bf16", "fp32"]
_DTYPES: dict[ExportDtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class CheckRow:
    """A prompt and an answer as ids: the logits that the answer's tokens were drawn from are compared."""

    prompt_ids: list[int]
    answer_ids: list[int]

    @property
    def ids(self) -> list[int]:
        return [*self.prompt_ids, *self.answer_ids]


@dataclass(frozen=True)
class Agreement:
    """How far the distributions of two policies are apart over the answer tokens of some rows.

    `max_abs_difference` is of centred logits (each distribution's minus their mean: a constant means nothing),
    `mean_kl` KL(first, second) in nats per token, `same_choice` the share of tokens for which both have the same
    likeliest token.
    """

    max_abs_difference: float
    mean_kl: float
    same_choice: float
    num_tokens: int


@dataclass(frozen=True)
class ScoreAgreement:
    """How far two reward models' scores are apart, in standard deviations of the first one's over the rows."""

    max_abs_difference: float
    mean_abs_difference: float
    num_answers: int


def write_policy(
    backbone: Backbone, adapter: str | None, folder: Path, dtype: ExportDtype, stop_token_ids: Sequence[int]
) -> None:
    """Merge the adapter and write weights, tokenizer with its template, and when to stop; the backbone is used up.

    Raises:
        UserError: the base is quantised, or a merged weight would not be finite.
    """
    model = merged_model(backbone, adapter, dtype)
    tokenizer = backbone.tokenizer
    # A base's own sampling defaults (temperature, a penalty on repetition) are not those the policy was trained under.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=list(stop_token_ids), pad_token_id=tokenizer.pad_token_id
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    tokenizer.save_pretrained(folder)


def write_classifier(reward: RewardModel, folder: Path, dtype: ExportDtype) -> None:
    """Write a reward model as a sequence classifier with one label; the reward model is used up.

    What a plain classifier has no place for (the suffix, mean and deviation of the scores) stands in `config.json`
    under `rlhf_scoring`, where this package finds it again.

    Raises:
        UserError: such a classifier would read its score elsewhere than the reward model does.
    """
    refuse_other_pooling(reward)
    trunk = merged_model(reward.backbone, reward.adapter, dtype).base_model
    config = trunk.config
    config.num_labels, config.pad_token_id = 1, reward.tokenizer.pad_token_id
    scale = reward.scale
    setattr(config, SCORING, {"suffix": reward.suffix, "mean": scale.mean, "std": scale.std})  # a key of config.json
    with torch.device("meta"):
        classifier: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    classifier.set_submodule(classifier.base_model_prefix, trunk)
    classifier.score = nn.Linear(trunk.config.hidden_size, 1, bias=False, dtype=_DTYPES[dtype])
    classifier.score.weight.data.copy_(reward.head.weight.data)
    classifier.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    reward.tokenizer.save_pretrained(folder)


def refuse_other_pooling(reward: RewardModel) -> None:
    """Raise `UserError` where transformers' classifier of the architecture would read the score elsewhere."""
    cannot = "this reward model cannot be a sequence classifier of transformers"
    if reward.pooling != "last":
        raise UserError(
            f"{cannot}: its score is read from the {reward.pooling} over all tokens, theirs from the last one; train "
            "it with reward.pooling=last, or use its run as it is"
        )
    config, tokenizer = reward.backbone.model.config, reward.tokenizer
    known = type(config) in AutoModelForSequenceClassification._model_mapping
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config) if known else None
    if not isinstance(dict(classifier.named_children()).get("score") if classifier else None, nn.Linear):
        raise UserError(
            f"{cannot}: theirs for a {type(reward.backbone.model).__name__} has no plain linear head on the last token "
            "(encoders read the first token through a pooler); use its run as it is"
        )
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"{cannot}: theirs takes the last token that is not padding, and '{tokenizer.eos_token}' both pads and "
            "ends an answer here; train it with a tokenizer that has a padding token of its own"
        )


def coding(backbone: Backbone) -> dict[str, Any]:
    """How the base is quantised, whether it was on loading or is stored so; empty where it is not."""
    if not backbone.is_quantised or backbone.quantisation:
        return backbone.quantisation
    stored: dict[str, Any] = backbone.model.config.to_dict()["quantization_config"]
    names = ("load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    return {name: stored[name] for name in names if stored.get(name)}


def refuse_codes(backbone: Backbone) -> None:
    """Raise `UserError` where the base is quantised: an export stands on original weights."""
    if backbone.is_quantised:
        raise UserError(
            f"the weights of {backbone.name} are codes of fewer bits, and an adapter is merged onto original weights "
            "only; name the model that it was quantised from with --base"
        )


def merged_model(backbone: Backbone, adapter: str | None, dtype: ExportDtype) -> PreTrainedModel:
    """The backbone's model with plain layers in the dtype, base plus adapter; it is changed in place.

    Raises:
        UserError: the base is quantised: an export stands on original weights.
    """
    refuse_codes(backbone)
    model = backbone.model
    if adapter is not None:
        merge_lora_weights(model, adapter)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and model.config.tie_word_embeddings and head.weight is not embeddings.weight:
        model.config.tie_word_embeddings = False  # an adapter stood on the head, or on the embeddings, alone
    return model.to(_DTYPES[dtype])


# ---------------------------------------------------------------- what is read back


@torch.no_grad()
def answer_logits(backbone: Backbone, adapter: str | None, rows: Sequence[CheckRow]) -> list[Tensor]:
    """Logits (A, V) that each row's answer was drawn from, fp32, on the CPU."""

    def of(ids_1T: Tensor, first: int) -> Tensor:
        hidden_1TD = backbone.hidden(ids_1T, adapter=adapter)
        return backbone.logits(hidden_1TD[:, first:-1], adapter=adapter)

    return _per_row(of, rows, backbone.device)


@torch.no_grad()
def answer_logits_of_folder(folder: Path, rows: Sequence[CheckRow], device: torch.device) -> list[Tensor]:
    """The same by plain transformers, from what lies in a folder, in the dtype in which it lies there."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
    return _per_row(lambda ids_1T, first: model(input_ids=ids_1T).logits[:, first:-1], rows, device)


def _per_row(of: Callable[[Tensor, int], Tensor], rows: Sequence[CheckRow], device: torch.device) -> list[Tensor]:
    return [of(torch.tensor([row.ids], device=device), len(row.prompt_ids) - 1)[0].float().cpu() for row in rows]


def agreement(first: Sequence[Tensor], second: Sequence[Tensor]) -> Agreement:
    """Compare two policies by their logits (A, V) of the same rows; KL is of the first against the second."""
    largest, total_kl, same, count = 0.0, 0.0, 0, 0
    for one_AV, other_AV in zip(first, second, strict=True):
        centred_AV = (one_AV - one_AV.mean(dim=-1, keepdim=True)) - (other_AV - other_AV.mean(dim=-1, keepdim=True))
        largest = max(largest, float(centred_AV.abs().max()))
        log_p_AV, log_q_AV = (logits_AV.double().log_softmax(dim=-1) for logits_AV in (one_AV, other_AV))
        total_kl += float((log_p_AV.exp() * (log_p_AV - log_q_AV)).sum())
        same += int((one_AV.argmax(dim=-1) == other_AV.argmax(dim=-1)).sum())
        count += len(one_AV)
    return Agreement(largest, total_kl / count, same / count, count)


@torch.no_grad()
def reward_scores(reward: RewardModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Raw scores (N,) of dialogues as ids, on the CPU; the suffix is put behind them."""
    return torch.cat([reward(torch.tensor([list(row)], device=reward.backbone.device)).float().cpu() for row in rows])


@torch.no_grad()
def scores_of_folder(folder: Path, rows: Sequence[Sequence[int]], suffix: str, device: torch.device) -> Tensor:
    """The same by plain transformers, from what lies in a folder."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto").to(device).eval()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    behind = tokenizer(suffix, add_special_tokens=False)["input_ids"] if suffix else []
    inputs = [torch.tensor([[*row, *behind]], device=device) for row in rows]
    return torch.cat([model(input_ids=ids_1T).logits[:, 0].float().cpu() for ids_1T in inputs])


def score_agreement(first_N: Tensor, second_N: Tensor) -> ScoreAgreement:
    """Compare two reward models' scores of the same answers."""
    apart_N = (first_N - second_N).abs() / first_N.std()
    return ScoreAgreement(float(apart_N.max()), float(apart_N.mean()), len(first_N))
