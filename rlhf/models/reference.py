"""The reference: the distribution that the policy is held near, as one adapter of the shared base, never trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.models.backbone import Backbone
from rlhf.models.policy import response_logprobs


@dataclass(frozen=True)
class Reference:
    """A frozen snapshot of the SFT policy. `adapter` None is right only where no SFT adapter exists.

    Under full fine-tuning the snapshot is a backbone of its own, since the policy's weights move.
    """

    backbone: Backbone
    adapter: str | None

    @torch.no_grad()
    def logprobs(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        response_mask_BR: Tensor,
        temperature: float,
        trees: Sequence[int] = (),
    ) -> Tensor:
        """Log-probabilities (B, R) of the last R columns at the sampling temperature, 0 where the mask is False.

        `trees` as in `ResponseRows.of`.
        """
        return response_logprobs(
            self.backbone, self.adapter, input_ids_BT, attention_mask_BT, response_mask_BR, temperature, trees
        )
