"""What outcome and process reward models share: a backbone under an adapter with a linear head of one number.

They differ in where the head reads and in what is saved beside the weights; construction, training, saving and loading
are here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from typing_extensions import Self

from rlhf.infra.errors import UserError
from rlhf.models.adapter_files import TaskType, save_adapter
from rlhf.models.backbone import Backbone, ModelConfig, resolve_model

CONFIG_FILE = "reward_config.json"
HEAD_FILE = "reward_head.safetensors"
TrainMode = Literal["lora", "full", "frozen"]


class ScoringModel(nn.Module):
    """Backbone, adapter and head; a subclass says where the head reads (`forward`) and what else it is made of."""

    kind: ClassVar[str]  # as in the description on disk, and in errors
    made_by: ClassVar[str]  # the verb that trains one
    task_type: ClassVar[TaskType]
    has_bias: ClassVar[bool]

    def __init__(
        self, backbone: Backbone | str, adapter: str | None, train: TrainMode, model_config: ModelConfig | None
    ) -> None:
        """A backbone, or the name or folder of one to load; an adapter that is missing is added under `train="lora"`.

        With `train="frozen"` the head reads `adapter` as it is (an SFT adapter, or None for the bare base), and only
        the head learns.
        """
        super().__init__()
        model_config = model_config or ModelConfig()
        if isinstance(backbone, str):
            held = {"name_or_path": backbone, "train": "full" if train == "full" else "lora"}
            backbone = Backbone.load(model_config.model_copy(update=held))
        self.backbone, self.train_mode = backbone, train
        self.adapter = None if train == "full" else adapter
        self.head = nn.Linear(backbone.width, 1, bias=self.has_bias, device=backbone.device)
        # N(0, 1 / (width + 1)): scores start with unit order of magnitude whatever the width (arXiv:1909.08593).
        nn.init.normal_(self.head.weight, std=(backbone.width + 1) ** -0.5)
        if self.has_bias:
            nn.init.zeros_(self.head.bias)
        if train == "lora":
            assert adapter is not None
            if adapter not in backbone.adapter_names:
                backbone.add_adapter(adapter, model_config.lora)
            backbone.train_only([adapter])
        elif train == "full":
            backbone.model.requires_grad_(True)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.backbone.tokenizer

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        named = {f"head.{name}": p for name, p in self.head.named_parameters()}
        named |= {f"backbone.{name}": p for name, p in self.backbone.named_parameters() if p.requires_grad}
        return named

    def settings(self) -> dict[str, Any]:
        """What a subclass needs on disk beside the weights, as JSON values."""
        raise NotImplementedError

    @classmethod
    def with_settings(cls, backbone: Backbone, adapter: str | None, description: dict[str, Any]) -> Self:
        """A frozen model with a fresh head, of what `settings` left in the description."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write adapter (PEFT's format, a classifier's task) or full weights, the head and what is needed to load."""
        folder.mkdir(parents=True, exist_ok=True)
        head = {name: tensor.detach() for name, tensor in self.head.named_parameters()}
        save_file({f"head.{name}": tensor.cpu().contiguous() for name, tensor in head.items()}, folder / HEAD_FILE)
        if self.train_mode == "full":
            self.backbone.model.save_pretrained(folder)
        elif self.adapter is not None:
            save_adapter(
                self.backbone.model,
                self.adapter,
                folder,
                self.backbone.name,
                task_type=self.task_type,
                extra={f"score.{name}": tensor for name, tensor in head.items()},
            )
        self.tokenizer.save_pretrained(folder)
        description = {
            "kind": self.kind,
            "base_model_name_or_path": self.backbone.name,
            "quantization": self.backbone.quantisation,
            "train": self.train_mode,
            "has_adapter": self.adapter is not None,
            **self.settings(),
        }
        (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls,
        folder: Path,
        backbone: Backbone | None = None,
        adapter: str = "reward",
        dtype_name: str = "fp32",
        original_weights: bool = False,
        base: str | None = None,
    ) -> Self:
        """Read what `save` wrote, frozen: onto a shared backbone where that is the same base, held in as many bits, and
        its own weights do not train (the scores would move with them), else with a base of its own. `original_weights`:
        that is not quantised, even where the head was trained on one that was. `base` takes the place of the base that
        the adapter names.

        Raises:
            UserError: the folder holds no such model, one of the other kind, or one without its head.
        """
        description = cls._description(folder)
        if not (folder / HEAD_FILE).is_file():
            raise UserError(f"{folder} has no {HEAD_FILE}: its scores would be those of a random head; train it again")
        full = description["train"] == "full"
        base = str(folder) if full else base or description["base_model_name_or_path"]
        coded = {} if original_weights else description.get("quantization", {})
        if backbone is None or full or not backbone.base_is_frozen or not same_base(backbone.name, base):
            backbone = _base_of_its_own(folder, base, coded, dtype_name, backbone)
        elif backbone.quantisation != coded:
            backbone.notes.append(
                f"the {cls.kind} model in {folder} was trained on another coding of this base ({coded or 'none'}), so "
                "it gets a base of its own; train it with the policy's model.load_in_4bit to share one"
            )
            backbone = _base_of_its_own(folder, base, coded, dtype_name, backbone)
        name = adapter if description["has_adapter"] else None
        if name is not None:
            backbone.load_adapter(folder, name, cls.task_type)
        model = cls.with_settings(backbone, name, description)
        model.head.load_state_dict(
            {name.removeprefix("head."): tensor for name, tensor in load_file(folder / HEAD_FILE).items()}
        )
        model.head.requires_grad_(False)  # and no more: other adapters of a shared backbone may be in training
        return model

    @classmethod
    def _description(cls, folder: Path) -> dict[str, Any]:
        if not (folder / CONFIG_FILE).is_file():
            raise UserError(
                f"{folder} holds no {cls.kind} model: {CONFIG_FILE} is missing; give the folder of an `{cls.made_by}` "
                "run"
            )
        description: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        found = description.get("kind", "reward")
        if found != cls.kind:
            raise UserError(
                f"{folder} holds a {found} model, but a {cls.kind} model is needed here; give the folder of an "
                f"`{cls.made_by}` run, or that of one member where it is an ensemble"
            )
        return description


def same_base(one: str, other: str) -> bool:
    """Whether two names mean the same base weights: equal, or the same folder on disk."""
    first, second = Path(resolve_model(one)), Path(resolve_model(other))
    return one == other or (first.is_dir() and second.is_dir() and first.resolve() == second.resolve())


def last_columns(mask_BT: Tensor) -> Tensor:
    """Column (B,) of the last attended token of every row, whatever the side of the padding."""
    columns_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return (mask_BT.long() * columns_T).argmax(dim=1)


def _base_of_its_own(
    folder: Path, base: str, quantisation: Mapping[str, Any], dtype_name: str, beside: Backbone | None
) -> Backbone:
    source = ModelConfig(name_or_path=base, tokenizer=str(folder), **quantisation)
    return Backbone.load(source, dtype_name, beside.device if beside else None)
