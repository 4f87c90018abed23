"""Rows of a rollout as they go through a model: without their padding, and where asked for each prompt once.

Prompts are padded on the left and responses on the right, which together makes rows of like length half padding; and
several answers to one prompt would read it again and again.
Legend: B rows, R response columns, T columns, M response tokens of all rows in row order, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from rlhf.algo.logprobs import TokenStatistics, logprobs_from_hidden, statistics_from_hidden
from rlhf.data.forest import PADDING, Forest, plant
from rlhf.models.backbone import Backbone


@dataclass(frozen=True)
class ResponseRows:
    """The rows as laid out for a backbone; `action_mask_BT` is True on the M response tokens, in the rows' order.

    `forest` is there where answers share a prompt; otherwise `attention_mask_BT` is.
    """

    backbone: Backbone
    input_ids_BT: Tensor
    action_mask_BT: Tensor
    response_mask_BR: Tensor
    num_tokens: int  # without padding
    attention_mask_BT: Tensor | None = None
    forest: Forest | None = None

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        response_mask_BR: Tensor,
        trees: Sequence[int] = (),
    ) -> ResponseRows:
        """Lay out rows whose last R columns are their responses.

        `trees`: sizes of runs of rows, one after another, that have the same prompt and are to read it once; all of
        size 1, or none: every row is laid out alone. The backbone must take forests (`Backbone.takes_forests`).
        """
        num_prompt_columns = input_ids_BT.shape[1] - response_mask_BR.shape[1]
        lengths_2B = torch.stack([attention_mask_BT[:, :num_prompt_columns].sum(dim=1), response_mask_BR.sum(dim=1)])
        prompts, responses = lengths_2B.tolist()
        if len(trees) < len(prompts) and trees:
            return cls._planted(backbone, input_ids_BT, response_mask_BR, trees, prompts, responses)
        width = max(map(sum, zip(prompts, responses, strict=True)))
        order_BT = (~attention_mask_BT).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        in_response_BT = torch.zeros_like(attention_mask_BT)
        in_response_BT[:, num_prompt_columns:] = response_mask_BR
        ids_BT, mask_BT, action_BT = (
            tensor.gather(1, order_BT) for tensor in (input_ids_BT, attention_mask_BT, in_response_BT)
        )
        return cls(backbone, ids_BT, action_BT, response_mask_BR, sum(prompts) + sum(responses), mask_BT)

    @classmethod
    def _planted(
        cls,
        backbone: Backbone,
        input_ids_BT: Tensor,
        response_mask_BR: Tensor,
        trees: Sequence[int],
        prompts: list[int],
        responses: list[int],
    ) -> ResponseRows:
        """Every tree is planted with the places of its tokens instead of the tokens, which stay on the device."""
        num_columns = input_ids_BT.shape[1]
        start, ends = num_columns - response_mask_BR.shape[1], list(accumulate(trees))
        firsts = [end - size for end, size in zip(ends, trees, strict=True)]

        def places(row: int, first: int, count: int) -> range:
            return range(row * num_columns + first, row * num_columns + first + count)

        planted = plant(
            [places(row, start - prompts[row], prompts[row]) for row in firsts],
            [
                [places(row, start, responses[row]) for row in range(first, end)]
                for first, end in zip(firsts, ends, strict=True)
            ],
            pad_token_id=0,
        )
        num_tokens = int((planted.branch_BT != PADDING).sum())
        planted = planted.to(input_ids_BT.device)
        ids_BT = input_ids_BT.flatten()[planted.input_ids_BT]
        ids_BT = ids_BT.masked_fill(planted.branch_BT == PADDING, backbone.tokenizer.pad_token_id)
        forest = replace(planted, input_ids_BT=ids_BT)
        return cls(backbone, ids_BT, forest.loss_mask_BT, response_mask_BR, num_tokens, forest=forest)

    def hidden(self, adapter: str | None) -> Tensor:
        """Hidden states (M, D) from which the response tokens were drawn."""
        self.backbone.num_tokens_read += self.num_tokens
        read_BT = self.action_mask_BT.roll(-1, dims=1)  # a token is predicted from the place before it
        if self.forest is not None:
            hidden_BTD = self.backbone.hidden_of(self.forest, adapter=adapter, wanted_BT=read_BT)
        else:
            ids_BT, mask_BT = self.input_ids_BT, self.attention_mask_BT
            hidden_BTD = self.backbone.hidden(ids_BT, mask_BT, adapter=adapter, wanted_BT=read_BT)
        return hidden_BTD[read_BT]

    def statistics(
        self, adapter: str | None, hidden_MD: Tensor, temperature: float, *, entropy_gradient: bool
    ) -> TokenStatistics:
        """Log-probabilities and entropies (M,) of the response tokens."""
        return statistics_from_hidden(
            partial(self.backbone.logits, adapter=adapter),
            hidden_MD,
            self.input_ids_BT[self.action_mask_BT],
            self.backbone.vocab_size,
            temperature,
            entropy_gradient=entropy_gradient,
        )

    def logprobs(self, adapter: str | None, hidden_MD: Tensor, temperature: float) -> Tensor:
        """Log-probabilities (M,) alone."""
        head, tokens_M = partial(self.backbone.logits, adapter=adapter), self.input_ids_BT[self.action_mask_BT]
        return logprobs_from_hidden(head, hidden_MD, tokens_M, self.backbone.vocab_size, temperature)

    def scattered(self, values_M: Tensor) -> Tensor:
        """(M,) back to (B, R), 0 on padding."""
        return values_M.new_zeros(self.response_mask_BR.shape).masked_scatter(self.response_mask_BR, values_M)
