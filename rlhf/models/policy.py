"""The policy: a backbone seen through one adapter, with an optional critic on its hidden states.

Legend: B sequences, P prompt, R response, T = P + R, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from rlhf.algo.logprobs import logprobs_from_hidden
from rlhf.data.forest import Forest
from rlhf.models.backbone import Backbone
from rlhf.models.decoding import Decoded, GenerationConfig, decode
from rlhf.models.response_rows import ResponseRows
from rlhf.models.value_head import ValueHead


@dataclass(frozen=True)
class ResponseStatistics:
    """Of every response token: log-probability, entropy and the value of the state before it; (B, R), 0 on padding."""

    logprobs_BR: Tensor
    entropy_BR: Tensor
    values_BR: Tensor | None


class Policy(nn.Module):
    """`adapter` None is the bare base, or the whole model under full fine-tuning."""

    def __init__(
        self,
        backbone: Backbone,
        adapter: str | None,
        value_head: ValueHead | None = None,
        value_adapter: str | None = None,
    ) -> None:
        """`value_adapter`: an adapter of the critic's own, at the price of a second pass; None shares the policy's."""
        super().__init__()
        self.backbone, self.adapter = backbone, adapter
        self.value_head, self.value_adapter = value_head, value_adapter

    def logprobs(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor, action_mask_BT: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """log pi(token t | tokens before t) at the positions where `action_mask_BT` is True, 0 elsewhere; (B, T).

        The first column has nothing before it and must not be an action. The vocabulary head runs at action positions
        only.
        """
        return masked_logprobs(
            self.backbone, self.adapter, input_ids_BT, attention_mask_BT, action_mask_BT, temperature=temperature
        )

    def response_statistics(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        response_mask_BR: Tensor,
        temperature: float,
        trees: Sequence[int] = (),
        *,
        entropy_gradient: bool = True,
    ) -> ResponseStatistics:
        """Log-probabilities, entropies and values of the last R columns, from one pass (two with a value adapter).

        `trees` as in `ResponseRows.of`.
        `entropy_gradient` False: the entropies are for looking at, which is cheaper.
        """
        rows = ResponseRows.of(self.backbone, input_ids_BT, attention_mask_BT, response_mask_BR, trees)
        hidden_MD = rows.hidden(self.adapter)
        found = rows.statistics(self.adapter, hidden_MD, _scored_at(temperature), entropy_gradient=entropy_gradient)
        logprobs_BR, entropy_BR = rows.scattered(found.logprobs_M), rows.scattered(found.entropy_M)
        if self.value_head is None:
            return ResponseStatistics(logprobs_BR, entropy_BR, None)
        if self.value_adapter is not None:
            hidden_MD = rows.hidden(self.value_adapter)
        return ResponseStatistics(logprobs_BR, entropy_BR, rows.scattered(self.value_head(hidden_MD)))

    def generate(
        self,
        prompt_ids_NP: Tensor,
        prompt_mask_NP: Tensor,
        uniforms_NR: Tensor,
        config: GenerationConfig,
        stop: list[int],
    ) -> Decoded:
        """Sample one response per left-padded prompt; tokens, log-probabilities, entropies and values come together."""
        # A critic with an adapter of its own would need a cache of its own: its values are computed after sampling.
        head = self.value_head if self.value_adapter is None else None
        return decode(self.backbone, self.adapter, prompt_ids_NP, prompt_mask_NP, uniforms_NR, config, stop, head)

    def values_after(self, input_ids_BT: Tensor, attention_mask_BT: Tensor, columns_B: Tensor) -> Tensor:
        """V of the state after the token in each row's column (B,): what the critic expects of going on from there."""
        assert self.value_head is not None
        hidden_BTD = self.backbone.hidden(input_ids_BT, attention_mask_BT, adapter=self.value_adapter or self.adapter)
        values_B: Tensor = self.value_head(hidden_BTD[torch.arange(len(columns_B), device=columns_B.device), columns_B])
        return values_B

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves: the adapter (or every weight), the value head, the value adapter."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def masked_logprobs(
    backbone: Backbone,
    adapter: str | None,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor | None,
    action_mask_BT: Tensor,
    position_ids_BT: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probabilities (B, T) of the tokens under `action_mask_BT`, 0 elsewhere; the head runs at those only."""
    if bool(action_mask_BT[:, 0].any()):
        raise ValueError("the first token of a row cannot be an action: nothing comes before it")
    read_BT = action_mask_BT.roll(-1, dims=1)  # a token is predicted from the place before it
    hidden_BTD = backbone.hidden(input_ids_BT, attention_mask_BT, position_ids_BT, adapter=adapter, wanted_BT=read_BT)
    logprobs_M = logprobs_from_hidden(
        partial(backbone.logits, adapter=adapter),
        hidden_BTD[read_BT],
        input_ids_BT[action_mask_BT],
        backbone.vocab_size,
        temperature,
    )
    return logprobs_M.new_zeros(input_ids_BT.shape).masked_scatter(action_mask_BT, logprobs_M)


def forest_logprobs(backbone: Backbone, adapter: str | None, forest: Forest) -> Tensor:
    """`masked_logprobs` (B, T) of rows whose answers share a prompt."""
    return masked_logprobs(
        backbone,
        adapter,
        forest.input_ids_BT,
        forest.attention_mask(backbone.model.dtype),
        forest.loss_mask_BT,
        forest.position_ids_BT,
    )


def response_logprobs(
    backbone: Backbone,
    adapter: str | None,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    response_mask_BR: Tensor,
    temperature: float,
    trees: Sequence[int] = (),
) -> Tensor:
    """Log-probabilities (B, R) of the last R columns under any adapter: what a reference is asked for."""
    rows = ResponseRows.of(backbone, input_ids_BT, attention_mask_BT, response_mask_BR, trees)
    return rows.scattered(rows.logprobs(adapter, rows.hidden(adapter), _scored_at(temperature)))


def _scored_at(temperature: float) -> float:
    """A greedy sample has no temperature; it is scored as the plain distribution would."""
    return temperature or 1.0
