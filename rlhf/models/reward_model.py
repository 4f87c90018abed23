"""Reward models: a prompt and an answer in, one number out.

Two kinds serve the same call, `model(input_ids_BT, attention_mask_BT) -> scores_B`: `RewardModel`, a backbone under an
adapter with a scalar head trained here, and `ClassifierReward`, a sequence classifier from the hub taken as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.data.chat import prepare_tokenizer
from rlhf.data.collate import Batch
from rlhf.data.forest import Forest
from rlhf.infra.config import Config
from rlhf.infra.device import autocast
from rlhf.infra.errors import UserError
from rlhf.models.backbone import Backbone, ModelConfig, resolve_model
from rlhf.models.scoring import CONFIG_FILE, ScoringModel, TrainMode, last_columns

# In the config.json of a sequence classifier that was exported from here: suffix, mean and deviation of its scores.
SCORING = "rlhf_scoring"
Pooling = Literal["last", "mean"]


class RewardModelConfig(Config):
    """What of the reward model is trained, and what the score is read from."""

    pooling: Pooling = Field("last", description="hidden state of the last token, or the mean over all tokens")
    train: TrainMode = Field("lora", description="adapter and head, every weight, or the head alone")
    suffix: str = Field(
        "",
        description="put behind every answer before the score is read; with the opening of the user's next turn the "
        "score is read where a model that knows conversations expects the user's reaction",
    )


@dataclass(frozen=True)
class ScoreScale:
    """Mean and standard deviation of the scores on held-out answers, for `standardised`."""

    mean: float = 0.0
    std: float = 1.0


class RewardModel(ScoringModel):
    """Backbone, adapter and scalar head. Scores are fp32 and independent of padding, its side and its width."""

    kind = "reward"
    made_by = "rlhf rm"
    task_type = "SEQ_CLS"
    has_bias = False  # no pair can see one

    def __init__(
        self,
        backbone: Backbone | str,
        adapter: str | None = "reward",
        pooling: Pooling = "last",
        train: TrainMode = "lora",
        model_config: ModelConfig | None = None,
        suffix: str = "",
    ) -> None:
        """See `ScoringModel`; `pooling` and `suffix` as in `RewardModelConfig`."""
        super().__init__(backbone, adapter, train, model_config)
        self.pooling, self.suffix, self.scale = pooling, suffix, ScoreScale()
        self.suffix_ids: list[int] = self.tokenizer(suffix, add_special_tokens=False)["input_ids"]

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
        """Raw scores (B,); only their differences mean anything (P(a beats b) = sigma(score_a - score_b))."""
        mask_BT = torch.ones_like(input_ids_BT, dtype=torch.bool) if attention_mask_BT is None else attention_mask_BT
        if self.suffix_ids:
            input_ids_BT, mask_BT = lengthened(input_ids_BT, mask_BT, self.suffix_ids)
        hidden_BTD = self.backbone.hidden(
            input_ids_BT, mask_BT, adapter=self.adapter, wanted_BT=pooled_positions(mask_BT, self.pooling)
        )
        scores_B: Tensor = self.head(pool(hidden_BTD, mask_BT, self.pooling).float()).squeeze(-1)
        return scores_B

    @property
    def takes_forests(self) -> bool:
        """Whether answers to one prompt may share a row: scores are read at one place, and the backbone allows it."""
        return self.pooling == "last" and self.backbone.takes_forests

    def answer_scores(self, batch: Batch | Forest) -> Tensor:
        """Raw scores of every row (B,) or of every branch (K * B,), all first branches before all second ones.

        Branches must have been planted with `suffix_ids`; rows get the suffix here.
        """
        if isinstance(batch, Batch):
            scores: Tensor = self(batch.input_ids_BT, batch.attention_mask_BT)
            return scores
        ends_BT = batch.branch_ends()
        hidden_BTD = self.backbone.hidden_of(batch, adapter=self.adapter, wanted_BT=ends_BT)
        scores_N: Tensor = self.head(hidden_BTD[ends_BT].float()).squeeze(-1)
        return scores_N.view(-1, batch.num_branches).T.reshape(-1)

    def standardised(self, scores_B: Tensor) -> Tensor:
        """Scores with mean 0 and standard deviation 1 on the answers the scale was taken from."""
        return (scores_B - self.scale.mean) / self.scale.std

    def settings(self) -> dict[str, Any]:
        return {
            "pooling": self.pooling,
            "suffix": self.suffix,
            "scale": {"mean": self.scale.mean, "std": self.scale.std},
        }

    @classmethod
    def with_settings(cls, backbone: Backbone, adapter: str | None, description: dict[str, Any]) -> RewardModel:
        model = cls(backbone, adapter, description["pooling"], "frozen", suffix=description.get("suffix", ""))
        model.scale = ScoreScale(**description["scale"])
        return model


class ClassifierReward(nn.Module):
    """A hub sequence classifier with one label, used as a frozen reward model."""

    def __init__(self, name_or_path: str, dtype_name: str = "fp32") -> None:
        super().__init__()
        try:
            config = AutoConfig.from_pretrained(resolve_model(name_or_path))
            self.model = AutoModelForSequenceClassification.from_pretrained(resolve_model(name_or_path))
            self.tokenizer = AutoTokenizer.from_pretrained(resolve_model(name_or_path))
        except (OSError, ValueError) as error:
            raise UserError(f"{name_or_path} is no sequence classifier that transformers can load: {error}") from error
        if config.num_labels != 1:
            raise UserError(
                f"{name_or_path} has {config.num_labels} labels; a reward model has exactly 1 (num_labels=1)"
            )
        prepare_tokenizer(self.tokenizer)
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        scoring = {"suffix": "", "mean": 0.0, "std": 1.0} | config.to_dict().get(SCORING, {})
        self.dtype_name, self.scale = dtype_name, ScoreScale(scoring["mean"], scoring["std"])
        self._suffix_ids: list[int] = self.tokenizer(scoring["suffix"], add_special_tokens=False)["input_ids"]
        self.model.eval().requires_grad_(False)

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
        if self._suffix_ids:
            if attention_mask_BT is None:
                attention_mask_BT = torch.ones_like(input_ids_BT, dtype=torch.bool)
            input_ids_BT, attention_mask_BT = lengthened(input_ids_BT, attention_mask_BT, self._suffix_ids)
            # transformers looks for the last token that is not padding, whatever the mask says.
            input_ids_BT = input_ids_BT.masked_fill(~attention_mask_BT, self.tokenizer.pad_token_id)
        with autocast(input_ids_BT.device, self.dtype_name):
            scores_B: Tensor = self.model(input_ids=input_ids_BT, attention_mask=attention_mask_BT).logits[:, 0]
        return scores_B.float()

    def standardised(self, scores_B: Tensor) -> Tensor:
        """As of a `RewardModel` where the classifier was exported from one; otherwise the scores as they are."""
        return (scores_B - self.scale.mean) / self.scale.std


def load_reward_model(
    name_or_path: str, backbone: Backbone | None = None, dtype_name: str = "fp32"
) -> RewardModel | ClassifierReward:
    """A reward model saved here (folder with `reward_config.json`), or any sequence classifier of the hub's form."""
    if (Path(name_or_path) / CONFIG_FILE).is_file():
        return RewardModel.load(Path(name_or_path), backbone, dtype_name=dtype_name)
    model = ClassifierReward(name_or_path, dtype_name)
    return model if backbone is None else model.to(backbone.device)


def pool(hidden_BTD: Tensor, mask_BT: Tensor, pooling: Pooling) -> Tensor:
    """One vector (B, D) per row: the last attended token's, or the mean over the attended ones."""
    if pooling == "mean":
        weights_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
        return (hidden_BTD * weights_BT1).sum(dim=1) / weights_BT1.sum(dim=1).clamp(min=1)
    last_B = last_columns(mask_BT)
    return hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B]


def pooled_positions(mask_BT: Tensor, pooling: Pooling) -> Tensor:
    """Where `pool` reads: (B, T), True at the last attended token or at every one."""
    if pooling == "mean":
        return mask_BT
    return torch.zeros_like(mask_BT).scatter(1, last_columns(mask_BT).unsqueeze(1), True)


def lengthened(input_ids_BT: Tensor, mask_BT: Tensor, suffix_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Ids and mask, (B, T + k), with the k suffix tokens right behind the last attended token of every row."""
    num_rows, k = len(input_ids_BT), len(suffix_ids)
    columns_Bk = last_columns(mask_BT).unsqueeze(1) + torch.arange(1, k + 1, device=mask_BT.device)
    suffix_Bk = torch.tensor(suffix_ids, device=input_ids_BT.device).expand(num_rows, k)
    ids = torch.cat([input_ids_BT, torch.zeros_like(suffix_Bk)], dim=1).scatter(1, columns_Bk, suffix_Bk)
    mask = torch.cat([mask_BT, mask_BT.new_zeros(num_rows, k)], dim=1).scatter(1, columns_Bk, True)
    return ids, mask
