"""Reward models: a prompt and an answer in, one number out.

Two kinds serve the same call, `model(input_ids_BT, attention_mask_BT) -> scores_B`: `RewardModel`, a backbone under an
adapter with a scalar head trained here, and `ClassifierReward`, a sequence classifier from the hub taken as it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from rlhf.data.chat import prepare_tokenizer
from rlhf.infra.config import Config
from rlhf.infra.device import autocast
from rlhf.infra.errors import UserError
from rlhf.models.adapter_files import save_adapter
from rlhf.models.backbone import Backbone, ModelConfig, resolve_model

CONFIG_FILE = "reward_config.json"
HEAD_FILE = "reward_head.safetensors"
Pooling = Literal["last", "mean"]


class RewardModelConfig(Config):
    """What of the reward model is trained, and what the score is read from."""

    pooling: Pooling = Field("last", description="hidden state of the last token, or the mean over all tokens")
    train: Literal["lora", "full", "frozen"] = Field(
        "lora", description="adapter and head, every weight, or the head alone"
    )
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


class RewardModel(nn.Module):
    """Backbone, adapter and scalar head. Scores are fp32 and independent of padding, its side and its width."""

    def __init__(
        self,
        backbone: Backbone | str,
        adapter: str | None = "reward",
        pooling: Pooling = "last",
        train: Literal["lora", "full", "frozen"] = "lora",
        model_config: ModelConfig | None = None,
        suffix: str = "",
    ) -> None:
        """A backbone, or the name or folder of one to load; an adapter that is missing is added under `train="lora"`.

        With `train="frozen"` the score is read from `adapter` as it is (an SFT adapter, or None for the bare base), and
        only the head learns.
        """
        super().__init__()
        model_config = model_config or ModelConfig()
        if isinstance(backbone, str):
            backbone = Backbone.load(ModelConfig(name_or_path=backbone, train="full" if train == "full" else "lora"))
        self.backbone, self.pooling, self.train_mode = backbone, pooling, train
        self.adapter = None if train == "full" else adapter
        self.scale = ScoreScale()
        self.suffix = suffix
        self._suffix_ids: list[int] = backbone.tokenizer(suffix, add_special_tokens=False)["input_ids"]
        self.head = nn.Linear(backbone.width, 1, bias=False).to(backbone.device)
        # N(0, 1 / (width + 1)): scores start with unit order of magnitude whatever the width (arXiv:1909.08593).
        nn.init.normal_(self.head.weight, std=(backbone.width + 1) ** -0.5)
        if train == "lora":
            assert adapter is not None
            if adapter not in backbone.adapter_names:
                backbone.add_adapter(adapter, model_config.lora)
            backbone.train_only([adapter])
        elif train == "full":
            backbone.model.requires_grad_(True)

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
        """Raw scores (B,); only their differences mean anything (P(a beats b) = sigma(score_a - score_b))."""
        mask_BT = torch.ones_like(input_ids_BT, dtype=torch.bool) if attention_mask_BT is None else attention_mask_BT
        if self._suffix_ids:
            input_ids_BT, mask_BT = lengthened(input_ids_BT, mask_BT, self._suffix_ids)
        hidden_BTD = self.backbone.hidden(
            input_ids_BT, mask_BT, adapter=self.adapter, wanted_BT=pooled_positions(mask_BT, self.pooling)
        )
        scores_B: Tensor = self.head(pool(hidden_BTD, mask_BT, self.pooling).float()).squeeze(-1)
        return scores_B

    def standardised(self, scores_B: Tensor) -> Tensor:
        """Scores with mean 0 and standard deviation 1 on the answers the scale was taken from."""
        return (scores_B - self.scale.mean) / self.scale.std

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.backbone.tokenizer

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        named = {f"head.{name}": p for name, p in self.head.named_parameters()}
        named |= {f"backbone.{name}": p for name, p in self.backbone.named_parameters() if p.requires_grad}
        return named

    def save(self, folder: Path) -> None:
        """Write adapter (PEFT's format, task SEQ_CLS) or full weights, the head and what is needed to load them."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"head.weight": self.head.weight.detach().cpu().contiguous()}, folder / HEAD_FILE)
        if self.train_mode == "full":
            self.backbone.model.save_pretrained(folder)
        elif self.adapter is not None:
            save_adapter(
                self.backbone.model,
                self.adapter,
                folder,
                self.backbone.name,
                task_type="SEQ_CLS",
                extra={"score.weight": self.head.weight.detach()},
            )
        self.tokenizer.save_pretrained(folder)
        description = {
            "base_model_name_or_path": self.backbone.name,
            "train": self.train_mode,
            "has_adapter": self.adapter is not None,
            "pooling": self.pooling,
            "suffix": self.suffix,
            "scale": {"mean": self.scale.mean, "std": self.scale.std},
        }
        (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls, folder: Path, backbone: Backbone | None = None, adapter: str = "reward", dtype_name: str = "fp32"
    ) -> RewardModel:
        """Read what `save` wrote, frozen: onto a shared backbone where that is the same base and its own weights do not
        train (the scores would move with them), else with a base of its own.

        Raises:
            UserError: the folder holds no reward model, or one without its head.
        """
        description = _read_description(folder)
        if not (folder / HEAD_FILE).is_file():
            raise UserError(f"{folder} has no {HEAD_FILE}: its scores would be those of a random head; train it again")
        full = description["train"] == "full"
        base = str(folder) if full else description["base_model_name_or_path"]
        if backbone is None or full or not backbone.base_is_frozen or not same_base(backbone.name, base):
            source = ModelConfig(name_or_path=base, tokenizer=str(folder))
            backbone = Backbone.load(source, dtype_name, backbone.device if backbone else None)
        name = adapter if description["has_adapter"] else None
        if name is not None:
            backbone.load_adapter(folder, name, "SEQ_CLS")
        model = cls(backbone, name, description["pooling"], "frozen", suffix=description.get("suffix", ""))
        model.head.weight.data.copy_(load_file(folder / HEAD_FILE)["head.weight"])
        model.scale = ScoreScale(**description["scale"])
        model.head.requires_grad_(False)  # and no more: other adapters of a shared backbone may be in training
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
        self.dtype_name, self.scale = dtype_name, ScoreScale()
        self.model.eval().requires_grad_(False)

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
        with autocast(input_ids_BT.device, self.dtype_name):
            scores_B: Tensor = self.model(input_ids=input_ids_BT, attention_mask=attention_mask_BT).logits[:, 0]
        return scores_B.float()

    def standardised(self, scores_B: Tensor) -> Tensor:
        return scores_B


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


def last_columns(mask_BT: Tensor) -> Tensor:
    """Column (B,) of the last attended token of every row, whatever the side of the padding."""
    columns_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return (mask_BT.long() * columns_T).argmax(dim=1)


def same_base(one: str, other: str) -> bool:
    """Whether two names mean the same base weights: equal, or the same folder on disk."""
    first, second = Path(resolve_model(one)), Path(resolve_model(other))
    return one == other or (first.is_dir() and second.is_dir() and first.resolve() == second.resolve())


def _read_description(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"{folder} holds no reward model: {CONFIG_FILE} is missing; give the folder of an `rlhf rm` run"
        )
    description: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return description
