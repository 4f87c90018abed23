"""Sampling from a backbone, token by token, with everything that reinforcement learning needs kept on the way.

The same forward that draws a token gives its log-probability, the entropy it was drawn from and the value of the state,
so that the "old" quantities of PPO cost nothing. Each row owns its random numbers, and finished rows leave the batch:
what is sampled for a prompt depends neither on its neighbours nor on when they finish.

Legend: N rows, P prompt columns (left-padded), R response columns (right-padded), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from rlhf.algo.logprobs import MAX_LOGITS
from rlhf.infra.config import Config
from rlhf.models.backbone import Backbone
from rlhf.models.value_head import ValueHead

# Rows that have finished are carried along until they are this share of the batch: dropping them copies the cache.
LEAVE_SHARE = 0.125
# Probabilities that are held in float64 at once; sorting them for top-p takes several copies.
MAX_FLOAT64 = MAX_LOGITS // 4


class GenerationConfig(Config):
    """How responses are drawn."""

    max_new_tokens: int = Field(64, ge=1, description="response length at which an answer is cut off")
    temperature: float = Field(1.0, ge=0, description="divides the logits; 0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus: keep the likeliest tokens of this total mass")
    top_k: int = Field(0, ge=0, description="keep this many likeliest tokens; 0 keeps all")
    stop: list[str] = Field(
        default_factory=list, description="strings at which an answer ends; cut from its text, not from its tokens"
    )
    merge_adapter: bool = Field(
        True,
        description="fp32 bases: fold the adapter into (a copy of) the weights while sampling; faster, equal to 1e-6",
    )
    batch_size: int = Field(256, ge=1, description="rows generated at once")

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        if self.temperature > 0:
            return {}
        cutting = {"top_p": self.top_p < 1, "top_k": self.top_k > 0}
        return {name: "temperature is 0, which takes the likeliest token" for name, is_on in cutting.items() if is_on}


@dataclass(frozen=True)
class Decoded:
    """Sampled responses; `response_mask_NR` is True on every sampled token, the stop token included.

    `logprobs_NR` and `entropy_NR` belong to the full distribution at the sampling temperature (at temperature 1 when
    greedy); `finished_N` is False where an answer was cut off; `truncated_mass` is the mean probability that top-p and
    top-k took away, 0 without them.
    """

    response_ids_NR: Tensor
    response_mask_NR: Tensor
    logprobs_NR: Tensor
    entropy_NR: Tensor
    values_NR: Tensor | None
    finished_N: Tensor
    truncated_mass: float


class _PreallocatedLayer(DynamicLayer):
    """A cache layer with room for the whole answer: a token is written in place instead of copying all before it.

    Keys lie with positions innermost, as the product with a query reads them; bf16 products are twice as fast so.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        rows, heads, _, width = key_states.shape
        self.keys = key_states.new_empty(rows, heads, width, self.capacity)
        self.values = value_states.new_empty(rows, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.keys[..., start : self.length] = key_states.transpose(-1, -2)
        self.values[:, :, start : self.length] = value_states
        return self.keys[..., : self.length].transpose(-1, -2), self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length


def make_cache(backbone: Backbone, capacity: int) -> Cache:
    """A preallocated cache for plain attention; whatever transformers prescribes for sliding or hybrid layers."""
    standard = DynamicCache(config=backbone.model.config)
    if any(type(layer) is not DynamicLayer for layer in standard.layers):
        return standard
    return Cache(layers=[_PreallocatedLayer(capacity) for _ in range(backbone.model.config.num_hidden_layers)])


@torch.no_grad()
def decode(
    backbone: Backbone,
    adapter: str | None,
    prompt_ids_NP: Tensor,
    prompt_mask_NP: Tensor,
    uniforms_NR: Tensor,
    config: GenerationConfig,
    stop_token_ids: Sequence[int],
    value_head: ValueHead | None = None,
) -> Decoded:
    """Sample one response per row.

    Args:
        prompt_ids_NP: left-padded prompts; `prompt_mask_NP` is True on their tokens.
        uniforms_NR: numbers in [0, 1), column t decides token t of its row; R is `config.max_new_tokens`.
        stop_token_ids: an answer ends with any of these, which is part of it.
    """
    num_rows, prompt_width = prompt_ids_NP.shape
    width, device = config.max_new_tokens, prompt_ids_NP.device
    record = _Record(num_rows, width, backbone.tokenizer.pad_token_id, device, with_values=value_head is not None)
    stops = torch.tensor(list(stop_token_ids), device=device)
    rows = torch.arange(num_rows, device=device)
    mask = torch.cat([prompt_mask_NP, prompt_mask_NP.new_ones(num_rows, width)], dim=1)
    next_position = prompt_mask_NP.sum(dim=1)
    done = torch.zeros(num_rows, dtype=torch.bool, device=device)
    cache = make_cache(backbone, prompt_width + width)
    # A merged weight in half precision would be rounded, and sampling no longer be what training scores.
    merge = config.merge_adapter and backbone.dtype_name == "fp32"
    with backbone.merged(adapter) if merge else backbone.using(adapter):
        hidden = _read_prompts(backbone, adapter, prompt_ids_NP, prompt_mask_NP, cache)
        for t in range(width):
            drawn = draw(backbone, adapter, hidden, uniforms_NR[rows, t], config)
            tokens, values = drawn.tokens_N, None if value_head is None else value_head(hidden)
            record.write(rows, t, drawn, values, ~done)
            done = done | torch.isin(tokens, stops)
            if config.stop:
                done = done | record.ends_with_stop(rows, t, backbone, config.stop)
            record.finished[rows[done]] = True
            if bool(done.all()) or t == width - 1:
                break
            if int(done.sum()) >= LEAVE_SHARE * len(rows):
                keep = (~done).nonzero().squeeze(-1)
                rows, mask, tokens, next_position = rows[keep], mask[keep], tokens[keep], next_position[keep]
                done = done[keep]
                _keep_rows(cache, keep)
            step_mask = mask[:, : prompt_width + t + 1]
            positions = (next_position + t).unsqueeze(-1)
            hidden = backbone.hidden(tokens.unsqueeze(-1), step_mask, positions, adapter=adapter, cache=cache)[:, -1]
    return record.decoded()


@dataclass(frozen=True)
class Drawn:
    """One token of each row, and what its distribution says of it; see `Decoded`."""

    tokens_N: Tensor
    logprobs_N: Tensor
    entropy_N: Tensor
    lost_mass_N: Tensor


def draw(
    backbone: Backbone, adapter: str | None, hidden_ND: Tensor, uniforms_N: Tensor, config: GenerationConfig
) -> Drawn:
    """Draw from the rows' distributions; the head runs on as many rows at a time as have `MAX_LOGITS` logits."""

    def of_rows(hidden_nD: Tensor, uniforms_n: Tensor) -> Drawn:
        log_p_nV = _log_distribution(backbone.logits(hidden_nD, adapter=adapter), config.temperature)
        tokens_n, lost_mass_n = choose_tokens(log_p_nV, uniforms_n, config)
        logprobs_n = log_p_nV.gather(-1, tokens_n.unsqueeze(-1)).squeeze(-1)
        return Drawn(tokens_n, logprobs_n, -(log_p_nV.exp() * log_p_nV).sum(dim=-1), lost_mass_n)

    size = max(1, MAX_LOGITS // backbone.vocab_size)
    if len(hidden_ND) <= size:
        return of_rows(hidden_ND, uniforms_N)
    parts = [of_rows(*chunk) for chunk in zip(hidden_ND.split(size), uniforms_N.split(size), strict=True)]
    columns = ((p.tokens_N, p.logprobs_N, p.entropy_N, p.lost_mass_N) for p in parts)
    return Drawn(*(torch.cat(column) for column in zip(*columns, strict=True)))


def choose_tokens(log_p_NV: Tensor, uniforms_N: Tensor, config: GenerationConfig) -> tuple[Tensor, Tensor]:
    """Draw a token per row by inverting the distribution at the row's uniform; greedy at temperature 0.

    Returns the tokens (N,) and the probability mass (N,) that top-p and top-k cut away.
    """
    if config.temperature == 0:
        return log_p_NV.argmax(dim=-1), torch.zeros_like(uniforms_N)
    rows = max(1, MAX_FLOAT64 // log_p_NV.shape[-1])
    parts = [_inverted(*part, config) for part in zip(log_p_NV.split(rows), uniforms_N.split(rows), strict=True)]
    tokens, lost_mass = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(lost_mass)


def _inverted(log_p_NV: Tensor, uniforms_N: Tensor, config: GenerationConfig) -> tuple[Tensor, Tensor]:
    # float64: a cumulative sum over 150k probabilities in fp32 would lose the rare tokens.
    p_NV = log_p_NV.double().exp_()
    if config.top_p < 1 or config.top_k:
        p_NV = _truncated(p_NV, config.top_p, config.top_k)
    cumulative_NV = p_NV.cumsum(dim=-1)
    total_N = cumulative_NV[:, -1]
    threshold_N1 = (uniforms_N.double() * total_N).unsqueeze(-1)
    tokens_N = torch.searchsorted(cumulative_NV, threshold_N1, right=True).squeeze(-1)
    return tokens_N.clamp(max=p_NV.shape[-1] - 1), (1 - total_N).clamp(min=0)


def text_before_stop(text: str, stop: Sequence[str]) -> str:
    """An answer's text without the first of the stop strings in it, what follows that, and white space before it."""
    places = [text.find(string) for string in stop if string in text]
    return text[: min(places)].rstrip() if places else text


def _truncated(p_NV: Tensor, top_p: float, top_k: int) -> Tensor:
    sorted_NV, order_NV = p_NV.sort(dim=-1, descending=True)
    keep_NV = sorted_NV.cumsum(dim=-1) - sorted_NV < top_p  # the token that crosses the threshold stays
    if top_k:
        keep_NV[:, top_k:] = False
    return torch.zeros_like(p_NV).scatter(-1, order_NV, sorted_NV * keep_NV)


def _log_distribution(logits_NV: Tensor, temperature: float) -> Tensor:
    scaled = logits_NV.float() if temperature in (0.0, 1.0) else logits_NV.float() / temperature
    return scaled.log_softmax(dim=-1)


def _read_prompts(
    backbone: Backbone, adapter: str | None, prompt_ids_NP: Tensor, prompt_mask_NP: Tensor, cache: Cache
) -> Tensor:
    """Hidden states (N, D) of the last prompt tokens, the cache filled; a prompt of several rows is read once."""
    different_nP, number_N = torch.unique(prompt_ids_NP.where(prompt_mask_NP, -1), dim=0, return_inverse=True)
    is_shared = len(different_nP) < len(prompt_ids_NP)
    if is_shared:
        prompt_ids_NP, prompt_mask_NP = different_nP.clamp(min=0), different_nP >= 0
    last_NP = torch.zeros_like(prompt_mask_NP)
    last_NP[:, -1] = True
    hidden = backbone.hidden(prompt_ids_NP, prompt_mask_NP, adapter=adapter, cache=cache, wanted_BT=last_NP)[:, -1]
    if is_shared:
        _keep_rows(cache, number_N)
    return hidden[number_N] if is_shared else hidden


def _keep_rows(cache: Cache, keep_n: Tensor) -> None:
    for layer in cache.layers:
        layer.batch_select_indices(keep_n)


class _Record:
    """The answers so far, in the order of the prompts."""

    def __init__(
        self, num_rows: int, width: int, pad_token_id: int, device: torch.device, *, with_values: bool
    ) -> None:
        self.ids = torch.full((num_rows, width), pad_token_id, device=device)
        self.mask = torch.zeros(num_rows, width, dtype=torch.bool, device=device)
        self.logprobs, self.entropy = torch.zeros(2, num_rows, width, device=device)
        self.values = torch.zeros(num_rows, width, device=device) if with_values else None
        self.finished = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.lost_mass = 0.0

    def write(self, rows: Tensor, t: int, drawn: Drawn, values: Tensor | None, is_wanted: Tensor) -> None:
        rows = rows[is_wanted]
        self.ids[rows, t] = drawn.tokens_N[is_wanted]
        self.mask[rows, t] = True
        self.logprobs[rows, t] = drawn.logprobs_N[is_wanted]
        self.entropy[rows, t] = drawn.entropy_N[is_wanted]
        if self.values is not None and values is not None:
            self.values[rows, t] = values[is_wanted]
        self.lost_mass += float(drawn.lost_mass_N[is_wanted].sum())

    def ends_with_stop(self, rows: Tensor, t: int, backbone: Backbone, stop: Sequence[str]) -> Tensor:
        """Which rows' text holds a stop string by now; the last tokens suffice, since every step is looked at."""
        # A token may be a single byte.
        tail = max(len(text.encode()) for text in stop) + 4
        texts = backbone.tokenizer.batch_decode(self.ids[rows, max(0, t + 1 - tail) : t + 1])
        return torch.tensor([any(s in text for s in stop) for text in texts], device=rows.device)

    def decoded(self) -> Decoded:
        width = max(1, int(self.mask.any(dim=0).sum()))
        return Decoded(
            self.ids[:, :width],
            self.mask[:, :width],
            self.logprobs[:, :width],
            self.entropy[:, :width],
            None if self.values is None else self.values[:, :width],
            self.finished,
            self.lost_mass / max(1, int(self.mask.sum())),
        )
