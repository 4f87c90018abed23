"""Reward models: a prompt and an answer in, one number out.

Three kinds serve the same call, `model(input_ids_BT, attention_mask_BT) -> scores_B`: `RewardModel`, a backbone under
an adapter with a scalar head trained here, `RewardEnsemble`, several of these on one base, and `ClassifierReward`, a
sequence classifier from the hub taken as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from rlhf.algo.reward_combination import ENSEMBLE_RULES
from rlhf.data.chat import prepare_tokenizer
from rlhf.data.collate import Batch
from rlhf.data.forest import Forest
from rlhf.infra.config import Config
from rlhf.infra.device import autocast
from rlhf.infra.errors import UserError
from rlhf.models.backbone import Backbone, ModelConfig, resolve_model
from rlhf.models.dense import use_fast_products
from rlhf.models.ensemble import (
    EnsembleConfig,
    EnsembleRuleName,
    member_adapters,
    member_folders,
    member_name,
    read_ensemble,
    write_ensemble,
)
from rlhf.models.lora import get_lora_parameters
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
    ensemble: EnsembleConfig = Field(default_factory=EnsembleConfig, description="several reward models instead of one")

    @model_validator(mode="after")
    def _members_share_the_base(self) -> RewardModelConfig:
        if self.train == "full" and self.ensemble.members > 1:
            raise ValueError(
                f"ensemble.members is {self.ensemble.members} with train=full: every member would need a base of its "
                "own; use train=lora or frozen, or train single models by run.seed"
            )
        return self


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


class RewardEnsemble(nn.Module):
    """Reward models on one base that are asked together; to whoever uses it, it is one reward model.

    Members differ in how the head started and in the order of the data: they agree where the data speak and differ
    where they do not. Each one's scores are brought to mean 0 and deviation 1 on held-out answers before they are put
    together, since a head's scale and offset are its own. Raw scores are those combined ones times the mean deviation
    of the members, so that differences are log-odds, as one model's are. Legend: K members.
    """

    def __init__(self, members: Sequence[RewardModel], rule: EnsembleRuleName = "mean", penalty: float = 0.5) -> None:
        super().__init__()
        if not members:
            raise ValueError("an ensemble has at least one member")
        self._members = nn.ModuleList(members)
        self.members = list(members)
        self.rule, self.penalty = rule, penalty

    @property
    def backbone(self) -> Backbone:
        return self.members[0].backbone

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.members[0].tokenizer

    @property
    def suffix(self) -> str:
        return self.members[0].suffix

    @property
    def suffix_ids(self) -> list[int]:
        return self.members[0].suffix_ids

    @property
    def takes_forests(self) -> bool:
        """See `RewardModel`; the members were made alike."""
        return self.members[0].takes_forests

    @property
    def scale(self) -> ScoreScale:
        """Of the raw scores: that of the mean of the members."""
        return ScoreScale(0.0, sum(member.scale.std for member in self.members) / len(self.members))

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
        """Raw scores (B,)."""
        return self.combined(self.member_scores(input_ids_BT, attention_mask_BT))

    def member_scores(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
        """Standardised scores (K, B)."""
        return torch.stack([member.standardised(member(input_ids_BT, attention_mask_BT)) for member in self.members])

    def answer_scores(self, batch: Batch | Forest) -> Tensor:
        """Raw scores, in the order of `RewardModel.answer_scores`."""
        scores = [member.standardised(member.answer_scores(batch)) for member in self.members]
        return self.combined(torch.stack(scores))

    def combined(self, scores_KB: Tensor) -> Tensor:
        """Raw scores (B,) of the members' standardised ones."""
        return ENSEMBLE_RULES[self.rule](scores_KB, self.penalty) * self.scale.std

    def standardised(self, scores_B: Tensor) -> Tensor:
        """What the rule gave, in deviations of one member's scores on held-out answers."""
        return scores_B / self.scale.std

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Those of every member, as `member_<k>.<its own name>`."""
        return {name: parameter for part in self.parameters_by_member() for name, parameter in part.items()}

    def parameters_by_member(self) -> list[dict[str, nn.Parameter]]:
        """The same, apart by member."""
        names = {id(parameter): f"backbone.{name}" for name, parameter in self.backbone.named_parameters()}
        found = []
        for k, member in enumerate(self.members):
            own = {f"head.{name}": parameter for name, parameter in member.head.named_parameters()}
            if member.train_mode == "lora":
                own |= {names[id(p)]: p for p in get_lora_parameters(self.backbone.model, member.adapter)}
            found.append({f"{member_name(k)}.{name}": p for name, p in own.items() if p.requires_grad})
        return found

    def save(self, folder: Path) -> None:
        """Write every member, whole, into a folder of its own (see `rlhf.models.ensemble`)."""
        for k, member in enumerate(self.members):
            member.save(folder / member_name(k))
        write_ensemble(folder, len(self.members), self.rule, self.penalty)

    @classmethod
    def load(
        cls, folder: Path, backbone: Backbone | None = None, adapter: str = "reward", dtype_name: str = "fp32"
    ) -> RewardEnsemble:
        """Read what `save` wrote, frozen: all members on one base, the shared one where `RewardModel.load` takes it.

        Raises:
            UserError: the folder holds no ensemble, or not the whole of it.
        """
        description, places = read_ensemble(folder), member_folders(folder)
        if description is None:
            raise UserError(f"{folder} holds no ensemble; give the folder of `rlhf rm` with reward.ensemble.members=4")
        members: list[RewardModel] = []
        for place, name in zip(places, member_adapters(adapter, len(places)), strict=True):
            members.append(RewardModel.load(place, members[0].backbone if members else backbone, name, dtype_name))
        return cls(members, description["rule"], description["penalty"])


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
        use_fast_products(self.model.eval().requires_grad_(False))

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


AnyReward = RewardModel | RewardEnsemble | ClassifierReward


def load_reward_model(
    name_or_path: str, backbone: Backbone | None = None, dtype_name: str = "fp32", adapter: str = "reward"
) -> AnyReward:
    """What `rlhf rm` saved (a folder with `reward_config.json`), or any sequence classifier of the hub's form.

    `adapter` is the name under which it joins a shared backbone; members of an ensemble get a number behind it.
    """
    folder = Path(name_or_path)
    if read_ensemble(folder) is not None:
        return RewardEnsemble.load(folder, backbone, adapter, dtype_name)
    if (folder / CONFIG_FILE).is_file():
        return RewardModel.load(folder, backbone, adapter, dtype_name)
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
