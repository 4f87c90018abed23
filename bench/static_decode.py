"""Decoding with fixed shapes, so that one token is one compiled graph (and on a GPU one CUDA graph).

The product's own loop (`rlhf/models/decoding.py`) lets finished rows leave and looks only at the columns that are
filled: the least arithmetic, but every step has other shapes, and each of its hundreds of kernels is launched from
Python. Here the cache has its full length from the start, rows stay until all have finished, and nothing of a step
waits for the device; what is drawn is the same. Which of the two is faster depends on model and device, and is what
`gpu.py` measures.

Legend: N rows, P prompt columns, R response columns, C = P + R columns of the cache, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from rlhf.infra.device import autocast
from rlhf.models.backbone import Backbone
from rlhf.models.decoding import Decoded, Drawn, GenerationConfig, draw
from rlhf.models.policy import Policy
from rlhf.models.value_head import ValueHead

# How a step is compiled, by name: CUDA graphs, kernels of torch's compiler alone, and two that only trace.
BACKENDS: dict[str, dict[str, Any]] = {
    "cuda-graphs": {"mode": "reduce-overhead"},
    "inductor": {},
    "aot_eager": {"backend": "aot_eager"},
    "eager": {"backend": "eager"},
}
# Steps between two looks at whether all rows have finished.
LOOK_EVERY = 16
Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Drawn]]


class StaticPolicy(Policy):
    """A policy that samples with fixed shapes; one compiled step for each shape that it is asked for."""

    def __init__(
        self, backbone: Backbone, adapter: str | None, value_head: ValueHead | None = None, *, backend: str
    ) -> None:
        super().__init__(backbone, adapter, value_head)
        self.backend = backend
        self._decoders: dict[tuple[int, int], StaticDecoder] = {}

    def generate(
        self,
        prompt_ids_NP: Tensor,
        prompt_mask_NP: Tensor,
        uniforms_NR: Tensor,
        config: GenerationConfig,
        stop: list[int],
    ) -> Decoded:
        """See `Policy.generate`."""
        shape = (len(prompt_ids_NP), prompt_ids_NP.shape[1] + config.max_new_tokens)
        if shape not in self._decoders:
            self._decoders[shape] = StaticDecoder(self.backbone, self.adapter, *shape, config, self.backend)
        return self._decoders[shape].decode(prompt_ids_NP, prompt_mask_NP, uniforms_NR, stop, self.value_head)


class StaticDecoder:
    """Samples for N rows into C columns; the step is compiled when it first runs, and kept."""

    def __init__(
        self,
        backbone: Backbone,
        adapter: str | None,
        num_rows: int,
        capacity: int,
        config: GenerationConfig,
        backend: str,
    ) -> None:
        if config.stop:
            raise ValueError("stop strings are looked for in texts, which a compiled step does not have")
        self.backbone, self.adapter, self.config, device = backbone, adapter, config, backbone.device
        self.cache = StaticCache(config=backbone.model.config, max_cache_len=capacity)
        self.columns_C = torch.arange(capacity, device=device)
        self.allowed_NC = torch.ones(num_rows, capacity, dtype=torch.bool, device=device)
        self.step: Step = torch.compile(self._step, dynamic=False, fullgraph=True, **BACKENDS[backend])

    def _step(self, tokens_N: Tensor, positions_N: Tensor, column: Tensor, uniforms_N: Tensor) -> tuple[Tensor, Drawn]:
        """Feed a token of each row, which goes to the given column of the cache, and draw the next."""
        backbone, visible_NC = self.backbone, self.allowed_NC & (self.columns_C <= column)
        with autocast(tokens_N.device, backbone.dtype_name):
            hidden_N1D = backbone.model.base_model(
                input_ids=tokens_N.unsqueeze(-1),
                attention_mask=visible_NC[:, None, None],
                position_ids=positions_N.unsqueeze(-1),
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state
        hidden_ND = hidden_N1D[:, -1]
        return hidden_ND, draw(backbone, self.adapter, hidden_ND, uniforms_N, self.config)

    @torch.no_grad()
    def decode(
        self,
        prompt_ids_NP: Tensor,
        prompt_mask_NP: Tensor,
        uniforms_NR: Tensor,
        stop_token_ids: Sequence[int],
        value_head: ValueHead | None = None,
    ) -> Decoded:
        """One response per left-padded prompt; arguments and result as those of `rlhf.models.decoding.decode`."""
        backbone, adapter, prompt_width = self.backbone, self.adapter, prompt_ids_NP.shape[1]
        self.cache.reset()
        self.allowed_NC.fill_(True)
        self.allowed_NC[:, :prompt_width] = prompt_mask_NP
        stops = torch.tensor(list(stop_token_ids), device=backbone.device, dtype=torch.long)
        start_N, columns, found = prompt_mask_NP.sum(dim=1), _Columns(), uniforms_NR.shape[1]
        merge = self.config.merge_adapter and backbone.dtype_name == "fp32"
        with backbone.merged(adapter) if merge else backbone.using(adapter):
            hidden_ND = self._prefilled(prompt_ids_NP, prompt_mask_NP)
            drawn = draw(backbone, adapter, hidden_ND, uniforms_NR[:, 0], self.config)
            for t in range(found):
                columns.add(drawn, stops, None if value_head is None else value_head(hidden_ND))
                if t == found - 1 or (t % LOOK_EVERY == LOOK_EVERY - 1 and bool(columns.done_N.all())):
                    break
                torch.compiler.cudagraph_mark_step_begin()
                column = self.columns_C[prompt_width + t]
                hidden_ND, drawn = self.step(columns.tokens[-1], start_N + t, column, uniforms_NR[:, t + 1])
                backbone.num_tokens_through += len(hidden_ND)
        return columns.decoded(backbone.tokenizer.pad_token_id)

    def _prefilled(self, prompt_ids_NP: Tensor, prompt_mask_NP: Tensor) -> Tensor:
        """Hidden states (N, D) at the prompts' last tokens; the cache holds the prompts then."""
        last_NP = torch.zeros_like(prompt_mask_NP)
        last_NP[:, -1] = True
        return self.backbone.hidden(
            prompt_ids_NP, prompt_mask_NP, adapter=self.adapter, cache=self.cache, wanted_BT=last_NP
        )[:, -1]


class _Columns:
    """What has been drawn so far. A CUDA graph's results are gone with its next run, so all of it is copied."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._drawn: list[Drawn] = []
        self._values: list[Tensor] = []
        self.done_N = torch.zeros(())

    def add(self, drawn: Drawn, stops: Tensor, values_N: Tensor | None) -> None:
        if not self.tokens:
            self.done_N = torch.zeros_like(drawn.tokens_N, dtype=torch.bool)
        self.tokens.append(drawn.tokens_N.clone())
        self._drawn.append(Drawn(*(tensor.clone() for tensor in vars(drawn).values())))
        self._counts.append(~self.done_N)
        if values_N is not None:
            self._values.append(values_N.clone())
        self.done_N = self.done_N | torch.isin(self.tokens[-1], stops)

    def decoded(self, pad_token_id: int) -> Decoded:
        mask_NR = torch.stack(self._counts, dim=1)
        width = max(1, int(mask_NR.any(dim=0).sum()))
        mask_NR = mask_NR[:, :width]

        def masked(columns: Sequence[Tensor], fill: float = 0.0) -> Tensor:
            return torch.stack(list(columns), dim=1)[:, :width].masked_fill(~mask_NR, fill)

        lost_NR = masked([drawn.lost_mass_N for drawn in self._drawn])
        return Decoded(
            masked(self.tokens, pad_token_id),
            mask_NR,
            masked([drawn.logprobs_N for drawn in self._drawn]),
            masked([drawn.entropy_N for drawn in self._drawn]),
            masked(self._values) if self._values else None,
            self.done_N,
            float(lost_NR.sum() / mask_NR.sum()),
        )
