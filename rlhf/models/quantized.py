"""A frozen base held in 4 bits by bitsandbytes, for adapters to train on (QLoRA, arXiv:2305.14314).

The linear layers of the blocks are stored as 4-bit codes with one scale per 64 weights, and are raised to the compute
dtype in every product. Embeddings and the head stay as they are: that is where transformers draws the line too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from rlhf.infra.durable import write_json
from rlhf.infra.errors import UserError
from rlhf.models.lora_layer import is_quantized, linear_features

QuantType = Literal["nf4", "fp4"]
# Beside an adapter: how the base was held that it was trained on, as keys of `ModelConfig`.
QUANTISATION_FILE = "quantization.json"


def quantization_config(
    quant_type: QuantType, use_double_quant: bool, compute_dtype: torch.dtype, device: torch.device
) -> BitsAndBytesConfig:
    """What `from_pretrained` needs to load a base in 4 bits.

    Raises:
        UserError: bitsandbytes is not installed, or does not know the device.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            f"model.load_in_4bit needs the package bitsandbytes, which cannot be imported ({error}): pip install "
            "'rlhf[quant]', or set model.load_in_4bit=false"
        ) from error
    if device.type not in bitsandbytes.supported_torch_devices:
        known = ", ".join(sorted(bitsandbytes.supported_torch_devices))
        raise UserError(
            f"model.load_in_4bit: bitsandbytes {bitsandbytes.__version__} does not run on {device.type}, only on "
            f"{known}; choose another run.device, or set model.load_in_4bit=false"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=use_double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def quantised_layers(model: nn.Module) -> list[nn.Module]:
    """The linear layers whose weights are codes."""
    return [module for module in model.modules() if is_quantized(module)]


def keep_codes_as_loaded(model: nn.Module) -> None:
    """Forbid bitsandbytes to repack the weights of a model in evaluation mode.

    On processors with AVX512-BF16 the first forward without gradients would put them into a layout for inference: the
    scales are rounded to bf16 on the way, and that layout's product has no gradient. Here a model samples and trains in
    turn, in evaluation mode throughout.
    """
    for layer in quantised_layers(model):
        layer.support_avx512bf16_for_cpu = False


def bytes_of_codes(model: nn.Module) -> tuple[int, int]:
    """Bytes that the quantised weights take with their scales, and what the same weights would take at 2 bytes each."""
    layers = quantised_layers(model)
    held = sum(layer.weight.nbytes + sum(t.nbytes for t in scales_of(layer.weight).values()) for layer in layers)
    return held, sum(2 * num_in * num_out for num_in, num_out in map(linear_features, layers))


def describe_quantised(model: nn.Module) -> str:
    """One sentence for the log: how many layers, and their memory in MB (10^6 bytes)."""
    held, dense = bytes_of_codes(model)
    return (
        f"the base is quantised: {len(quantised_layers(model))} linear layers take {held / 1e6:.1f} MB instead of "
        f"{dense / 1e6:.1f} MB in half precision; embeddings and head stay as they are"
    )


def scales_of(weight: Tensor) -> dict[str, Tensor]:
    """The tensors without which the codes of a weight mean nothing, by name; none for an ordinary weight."""
    packed: Any = weight  # one of the library's own parameter classes
    if type(weight).__name__ == "Params4bit":
        return dict(packed.quant_state.as_dict(packed=True))
    return {"SCB": packed.SCB} if type(weight).__name__ == "Int8Params" else {}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters train, of how many; packed 4-bit weights count as two per byte."""
    trainable = total = 0
    for parameter in model.parameters():
        packed = type(parameter).__name__ == "Params4bit" and not parameter.is_floating_point()
        count = parameter.numel() * (2 * parameter.element_size() if packed else 1)
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def write_quantisation(folder: Path, settings: Mapping[str, Any]) -> None:
    """Say beside an adapter how the base was held that it was trained on; nothing for an ordinary base."""
    if settings:
        write_json(folder / QUANTISATION_FILE, dict(settings))


def read_quantisation(folder: Path) -> dict[str, Any]:
    """The settings of `ModelConfig` under which the adapter in a folder was trained; empty for an ordinary base."""
    path = folder / QUANTISATION_FILE
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a JSON object: {error}; train the adapter again") from error
