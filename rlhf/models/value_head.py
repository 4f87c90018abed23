"""The critic's last layer: from the policy's hidden state to the value of that state."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """V(s) from hidden states (..., D) to (...): one linear layer, or an MLP with one hidden layer of the same width.

    The last layer starts at zero, so that the first advantages are those of no critic at all rather than of a random
    one (arXiv:1909.08593's code does the same). Weights are fp32 whatever the trunk computes in.
    """

    def __init__(self, hidden_size: int, kind: Literal["linear", "mlp"] = "linear") -> None:
        super().__init__()
        self.kind = kind
        self.last = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.first = nn.Linear(hidden_size, hidden_size) if kind == "mlp" else None

    def forward(self, hidden: Tensor) -> Tensor:
        features = hidden.float()
        if self.first is not None:
            features = torch.tanh(self.first(features))
        values: Tensor = self.last(features).squeeze(-1)
        return values
