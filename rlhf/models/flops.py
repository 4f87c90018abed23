"""How many floating-point operations the matrix products of a pass through a backbone take.

Counted is what the mathematics needs: a product of (m, k) with (k, n) is 2 m k n, and of the backward pass those
products whose gradients somebody wants. Not counted are elementwise work, scalar heads, and what is computed a second
time to save memory. Attention counts the whole square of queries times keys, as the field does; a kernel that skips the
half hidden by a causal mask computes less. For dense transformers: of a mixture of experts only those are seen that a
few probing tokens reach. The last MLP is taken to run everywhere, though a caller may want it at some places only.

Legend: I in, O out, r rank, of one linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from rlhf.infra.determinism import restore_rng_state, rng_state
from rlhf.models.backbone import Backbone
from rlhf.models.lora_layer import LoRALinear, linear_features

PROBE_TOKENS = 4


@dataclass(frozen=True)
class PassFlops:
    """Flops of one pass by what they grow with: tokens, pairs of query and key, positions of the vocabulary head."""

    per_token: int
    per_pair: int
    per_prediction: int

    def total(self, num_tokens: int, num_pairs: int, num_predictions: int) -> int:
        """Flops of a pass of that many; padding counts, since it is multiplied like everything else."""
        return num_tokens * self.per_token + num_pairs * self.per_pair + num_predictions * self.per_prediction


def training_flops(
    backbone: Backbone, adapter: str | None, num_rows: int, width: int, num_predictions: int | None = None
) -> int:
    """Flops of forward and backward over `num_rows` rows of `width` tokens, for whatever requires gradients now.

    `num_predictions` is the number of positions that the vocabulary head runs at; None: everywhere, 0: never.
    """
    tokens = num_rows * width
    predictions = tokens if num_predictions is None else num_predictions
    return pass_flops(backbone, adapter, backward=True).total(tokens, tokens * width, predictions)


def forward_flops(
    backbone: Backbone,
    adapter: str | None,
    num_rows: int,
    width: int,
    num_predictions: int | None = None,
    *,
    num_cached: int = 0,
    merged: bool = False,
) -> int:
    """Flops of a forward pass alone; `num_cached` tokens stand in a cache before the `width` new ones of every row.

    `merged`: the adapter is folded into the weights and costs nothing.
    """
    tokens = num_rows * width
    predictions = tokens if num_predictions is None else num_predictions
    flops = pass_flops(backbone, adapter, backward=False, merged=merged)
    return flops.total(tokens, tokens * (num_cached + width), predictions)


def pass_flops(backbone: Backbone, adapter: str | None, *, backward: bool, merged: bool = False) -> PassFlops:
    """What a pass under this adapter costs, with the backward pass or without.

    A few tokens are sent through to see which layers run and which of them must hand a gradient on: those below the
    first weight in training need not.
    """
    probe = _Probe.of(backbone, adapter, backward)
    trunk, head = 0, 0
    for layer, has_gradient in probe.layers:
        flops = _linear_flops(layer, None if merged else adapter, backward, has_gradient)
        if layer is backbone.model.get_output_embeddings():
            head += flops
        else:
            trunk += flops
    return PassFlops(trunk, probe.flops_per_pair or _full_attention(backbone, backward), head)


@dataclass
class _Probe:
    """What a few tokens met on their way: linear layers with whether a gradient flows back through each, attention."""

    layers: list[tuple[nn.Module, bool]]
    flops_per_pair: int = 0

    @classmethod
    def of(cls, backbone: Backbone, adapter: str | None, backward: bool) -> _Probe:
        probe = cls([])

        def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if x.numel() // x.shape[-1] >= PROBE_TOKENS:  # a pooler that looks at one token is none of them
                probe.layers.append((layer, x.requires_grad))

        handles = [layer.register_forward_pre_hook(note) for layer in _linear_layers(backbone.model)]
        drawn_so_far = rng_state()  # an adapter's dropout draws
        try:
            with torch.set_grad_enabled(backward), _AttentionSeen(probe):
                ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=backbone.device)
                hidden = backbone.hidden(ids, torch.ones_like(ids, dtype=torch.bool), adapter=adapter)
                if not backbone.is_encoder:
                    backbone.logits(hidden, adapter=adapter)
        finally:
            restore_rng_state(drawn_so_far)
            for handle in handles:
                handle.remove()
        return probe


class _AttentionSeen(TorchFunctionMode):
    """Counts queries times keys and weights times values, fused or as products of four-dimensional tensors."""

    def __init__(self, probe: _Probe) -> None:
        super().__init__()
        self.probe = probe

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            query, key, value = args[:3]
            gradients = [t.requires_grad for t in (query, key, value)]
            weights_have = query.requires_grad or key.requires_grad
            self._add(2 + sum(gradients) + int(weights_have), query.shape[1], value.shape[-1])
        elif func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__) and args[0].dim() == 4:
            left, right = args[:2]
            # Two of the three sizes of the product are numbers of tokens, the third is the width of a head.
            width = left.shape[-2] * left.shape[-1] * right.shape[-1] // PROBE_TOKENS**2
            self._add(1 + int(left.requires_grad) + int(right.requires_grad), left.shape[1], width)
        return func(*args, **(kwargs or {}))

    def _add(self, num_products: int, num_heads: int, width: int) -> None:
        self.probe.flops_per_pair += num_products * 2 * num_heads * width


def _full_attention(backbone: Backbone, backward: bool) -> int:
    """By the configuration, for attention kernels that the probe cannot see; a gradient flows through every layer."""
    config = backbone.model.config
    heads = config.num_attention_heads
    head_dim = config.to_dict().get("head_dim") or config.hidden_size // heads
    return int(4 * heads * head_dim * config.num_hidden_layers * (3 if backward else 1))


def _linear_layers(model: nn.Module) -> list[nn.Module]:
    """Linear layers, those under adapters once: by their wrapper."""
    kinds = (nn.Linear, Conv1D, LoRALinear)
    inner = {id(module.base) for module in model.modules() if isinstance(module, LoRALinear)}
    return [module for module in model.modules() if isinstance(module, kinds) and id(module) not in inner]


def _linear_flops(layer: nn.Module, adapter: str | None, backward: bool, has_gradient: bool) -> int:
    """Flops per token of one layer; `has_gradient`: its input wants one."""
    assert isinstance(layer, (nn.Linear, Conv1D, LoRALinear))
    num_in, num_out = linear_features(layer)
    weight = 2 * num_in * num_out
    total = weight
    if backward:
        total += weight * (int(has_gradient) + int(layer.weight.requires_grad))
    if not isinstance(layer, LoRALinear) or adapter is None or adapter not in layer.settings:
        return total
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    into, out_of = 2 * num_in * layer.settings[adapter].r, 2 * num_out * layer.settings[adapter].r
    total += into + out_of
    if backward:
        wants_hidden = has_gradient or down.requires_grad
        total += out_of * (int(wants_hidden) + int(up.requires_grad))
        total += into * (int(has_gradient) + int(down.requires_grad))
    return total
