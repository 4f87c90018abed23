"""A backbone without weights: the real code on a model whose numbers are imagined (see `rlhf.infra.shadow`).

Only the architecture's `config.json` is needed, of a folder, of the hub or of the few that come with the package: a
7B model is looked at on a laptop, and one behind a licence before it may be downloaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.infra.device import torch_dtype
from rlhf.infra.errors import UserError
from rlhf.infra.shadow import Shadow
from rlhf.models.backbone import BUNDLED_MODEL, Backbone, ModelConfig, resolve_model
from rlhf.models.lora import default_target_modules

BASE = "base"  # label of a base's weights in a shadow
_SCALE_BLOCK, _DOUBLE_BLOCK = 64, 256  # weights per scale, and scales per scale of their own (arXiv:2305.14314)


@dataclass(frozen=True)
class Shape:
    """An architecture and where its description was found; `file_dtype` is the format that weights are stored in."""

    name: str
    config: PreTrainedConfig
    origin: str
    file_dtype: torch.dtype

    @property
    def num_parameters(self) -> int:
        """Weights of the model, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.on_meta(torch.float32).parameters())

    def on_meta(self, dtype: torch.dtype, attn_implementation: str | None = None) -> PreTrainedModel:
        """The model on the meta device: all of its shapes, none of its memory."""
        kind = AutoModelForCausalLM if type(self.config) in AutoModelForCausalLM._model_mapping else AutoModel
        extra = {"attn_implementation": attn_implementation} if attn_implementation else {}
        with torch.device("meta"):
            model: PreTrainedModel = kind.from_config(self.config, dtype=dtype, **extra)
        return model


def read_shape(name_or_path: str, stand_in: Path | None = None) -> Shape:
    """The architecture behind a folder or hub name, without its weights.

    Looked for in this order: the folder itself, the hub's cache on this machine, `stand_in` (a config.json or a folder
    with one), the shapes that come with the package, the hub.

    Raises:
        UserError: it is in none of these places, or cannot be read.
    """
    if name_or_path == BUNDLED_MODEL or Path(name_or_path).is_dir():
        return _described(name_or_path, resolve_model(name_or_path), "its folder")
    for place, origin, only_local in (
        (name_or_path, "the hub's cache", True),
        (stand_in, f"{stand_in}", True),
        (packaged_shapes().get(name_or_path), "rlhf's own list of shapes", True),
        (name_or_path, "the hub", False),
    ):
        if place is None:
            continue
        try:
            return _described(name_or_path, str(place), origin, only_local)
        except UserError:
            if place is stand_in:
                raise
    known = ", ".join(sorted(packaged_shapes()))
    raise UserError(
        f"the shape of {name_or_path} is unknown: it is no folder here, and its config.json is neither in the hub's "
        f"cache nor to be reached; give one with --shape FILE, or take a model whose shape comes with rlhf ({known})"
    )


def packaged_shapes() -> dict[str, Path]:
    """Hub names whose config.json comes with the package."""
    folder = Path(str(files("rlhf.models") / "shapes"))
    return {file.stem.replace("--", "/"): file for file in folder.glob("*.json")}


def hollow_backbone(shape: Shape, model: ModelConfig, dtype_name: str, shadow: Shadow, *, on_cpu: bool) -> Backbone:
    """What `Backbone.load` would give on a CPU or elsewhere, with imagined weights, labelled `BASE` in the shadow.

    The tokenizer is that of the bundled model: nothing but its padding is asked for.
    """
    dtype = torch_dtype(dtype_name) if model.train == "lora" else torch.float32
    hollow = shape.on_meta(dtype, model.attn_implementation)
    if model.load_in_4bit:
        put_codes(hollow, dtype, double_quant=model.bnb_4bit_use_double_quant)
    shadow.imagine_module(hollow, BASE)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(BUNDLED_MODEL))
    named = model.model_copy(update={"name_or_path": shape.name})
    return Backbone.around(hollow, tokenizer, named, dtype_name, on_cpu=on_cpu)


def put_codes(model: nn.Module, compute_dtype: torch.dtype, *, double_quant: bool) -> None:
    """Replace the linear layers of the blocks by ones that take the memory of bitsandbytes' 4-bit layers."""
    for path in default_target_modules(model):
        parent, _, leaf = path.rpartition(".")
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear | Conv1D)
        model.get_submodule(parent).register_module(leaf, Linear4bit(layer, compute_dtype, double_quant))


class Linear4bit(nn.Linear):
    """Stands for bitsandbytes' layer of this name: as much memory for codes and scales, the same steps in a product."""

    def __init__(self, layer: nn.Linear | Conv1D, compute_dtype: torch.dtype, double_quant: bool) -> None:
        out_features, in_features = (layer.nf, layer.nx) if isinstance(layer, Conv1D) else layer.weight.shape
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.bias, self.compute_dtype = layer.bias, compute_dtype
        count = in_features * out_features
        codes = torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        num_scales = -(-count // _SCALE_BLOCK)
        self.num_scales = num_scales
        scale_dtype = torch.uint8 if double_quant else torch.float32
        self.register_buffer("scales", torch.empty(num_scales, dtype=scale_dtype, device="meta"))
        if double_quant:
            again = torch.empty(-(-num_scales // _DOUBLE_BLOCK), dtype=torch.float32, device="meta")
            self.register_buffer("scales_of_scales", again)

    def forward(self, x: Tensor) -> Tensor:
        wide: Tensor = _ProductWithCodes.apply(x.to(self.compute_dtype), self.bias, self)
        return wide.to(x.dtype)

    def dense(self) -> Tensor:
        """The whole weight in the compute dtype, made for one product; the scales are raised to fp32 on the way."""
        if self.scales.dtype == torch.uint8:
            self.scales.new_empty(self.num_scales, dtype=torch.float32)
        return self.weight.new_empty(self.out_features, self.in_features, dtype=self.compute_dtype)


class _ProductWithCodes(torch.autograd.Function):
    """Like bitsandbytes' `MatMul4Bit`: the dense weight is made twice, and nothing but the codes is kept between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Linear4bit) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.dense(), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad @ ctx.layer.dense().to(grad.dtype), None, None


def _described(name: str, place: str, origin: str, only_local: bool = True) -> Shape:
    try:
        config = AutoConfig.from_pretrained(place, local_files_only=only_local)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        first = (str(error).strip().splitlines() or ["unreadable"])[0]
        raise UserError(f"the shape of {name} cannot be read from {place}: {first}") from error
    # Files say it under either key, and some say nothing: transformers then takes fp32.
    stored = config.to_dict().get("dtype") or config.to_dict().get("torch_dtype") or "float32"
    return Shape(name, config, origin, _DTYPES.get(str(stored).removeprefix("torch."), torch.float32))


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
