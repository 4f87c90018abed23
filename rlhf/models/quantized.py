"""A frozen base held in 4 bits by bitsandbytes, for adapters to train on (QLoRA, arXiv:2305.14314).

The linear layers of the blocks are stored as 4-bit codes with one scale per 64 weights, and are raised to the compute
dtype in every product. Embeddings and the head stay as they are: that is where transformers draws the line too.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from rlhf.infra.errors import UserError
from rlhf.models.lora_layer import is_quantized

QuantType = Literal["nf4", "fp4"]


def quantization_config(
    quant_type: QuantType, use_double_quant: bool, compute_dtype: torch.dtype
) -> BitsAndBytesConfig:
    """What `from_pretrained` needs to load a base in 4 bits.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "model.load_in_4bit needs the package bitsandbytes, which is not installed: pip install 'rlhf[quant]', or "
            "set model.load_in_4bit=false"
        )
    # On import it asks for a kernel that only its inference layout uses (see `keep_codes_as_loaded`).
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
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
