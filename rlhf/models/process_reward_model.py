"""Process reward models: a worked solution in, for every step the probability that it is right out.

Legend: B sequences, T tokens, D model width, M steps of all sequences, in row order.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from rlhf.infra.config import Config
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.models.scoring import ScoringModel, TrainMode


class ProcessRewardModelConfig(Config):
    """What of the process reward model is trained."""

    train: TrainMode = Field("lora", description="adapter and head, every weight, or the head alone")


class ProcessRewardModel(ScoringModel):
    """Backbone, adapter and a head that reads the last token of every step; sigma of a logit is P(step is right).

    `separator` is what stood behind every step in training; whoever scores text has to write it too.
    """

    kind = "process reward"
    made_by = "rlhf prm"
    task_type = "TOKEN_CLS"
    has_bias = True  # steps are right far more often than wrong

    def __init__(
        self,
        backbone: Backbone | str,
        adapter: str | None = "process",
        separator: str = "\n",
        train: TrainMode = "lora",
        model_config: ModelConfig | None = None,
    ) -> None:
        """See `ScoringModel`."""
        super().__init__(backbone, adapter, train, model_config)
        self.separator = separator
        self.looks_ahead = looks_ahead(self.backbone)

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor, step_mask_BT: Tensor) -> Tensor:
        """Logits (B, T) where `step_mask_BT` is True, 0 elsewhere; fp32, independent of padding.

        A step is judged by what stands before and in it. A causal model sees no more anyway; an encoder would see what
        follows, if only that nothing does, so every step gets a pass of its own that ends with it.
        """
        if self.looks_ahead:
            rows_M, columns_M = step_mask_BT.nonzero(as_tuple=True)
            columns_T = torch.arange(step_mask_BT.shape[1], device=step_mask_BT.device)
            mask_MT = attention_mask_BT[rows_M] & (columns_T <= columns_M.unsqueeze(1))
            hidden_MTD = self.backbone.hidden(input_ids_BT[rows_M], mask_MT, adapter=self.adapter)
            hidden_MD = hidden_MTD[torch.arange(len(rows_M), device=rows_M.device), columns_M]
        else:
            hidden_MD = self.backbone.hidden(input_ids_BT, attention_mask_BT, adapter=self.adapter)[step_mask_BT]
        logits_M: Tensor = self.head(hidden_MD.float()).squeeze(-1)
        return logits_M.new_zeros(step_mask_BT.shape).masked_scatter(step_mask_BT, logits_M)

    def cost(self, num_tokens: int, num_steps: int) -> int:
        """Tokens that a solution of this length takes in a pass (see `forward`)."""
        return num_tokens * num_steps if self.looks_ahead else num_tokens

    def settings(self) -> dict[str, Any]:
        return {"separator": self.separator}

    @classmethod
    def with_settings(cls, backbone: Backbone, adapter: str | None, description: dict[str, Any]) -> ProcessRewardModel:
        return cls(backbone, adapter, description["separator"], "frozen")


@torch.no_grad()
def looks_ahead(backbone: Backbone) -> bool:
    """Whether a token's hidden state depends on later tokens: tried out, since classes and configs do not tell.

    An encoder such as BERT also comes as a class with a language-model head, and is no causal model for that.
    """
    one, other = backbone.tokenizer.eos_token_id, 0 if backbone.tokenizer.eos_token_id else 1
    ids_BT = torch.tensor([[one, one, one], [one, one, other]], device=backbone.device)
    first, second = backbone.hidden(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))[:, 0].float()
    return float((first - second).norm() / first.norm()) > 1e-3
