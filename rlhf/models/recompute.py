"""Blocks that are computed again in the backward pass (gradient checkpointing, arXiv:1604.06174).

transformers' layers do this by themselves, but only in training mode, which would switch dropout on as well. Here a
layer is in training mode for the moment in which it decides, and in evaluation mode while it computes, both times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.infra.errors import UserError

Setting = Callable[[], AbstractContextManager[None]]


def enable_recomputation(model: nn.Module, setting_now: Callable[[], Setting]) -> list[nn.Module]:
    """Make ready the blocks that transformers can compute again, and return them; nothing changes before `recomputing`.

    `setting_now` is called when a block is computed first. It returns how to make the context in which the block is
    computed again: of whatever decides what it computes and may have changed since, such as the active adapter.

    Raises:
        UserError: the model has no such blocks.
    """
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"model.gradient_checkpointing: a {type(model).__name__} has no blocks that transformers can compute "
            "again; set model.gradient_checkpointing=false and training.max_tokens_per_micro_batch lower"
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(_checkpointed, layer, setting_now)
    return layers


@contextmanager
def recomputing(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Keep only the inputs of these blocks in forwards inside the block."""
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def _checkpointed(layer: nn.Module, setting_now: Callable[[], Setting], body: Callable[..., Any], *args: Any) -> Any:
    setting = setting_now()

    def quiet(*inputs: Any) -> Any:
        former, layer.training = layer.training, False
        try:
            with setting():
                return body(*inputs)
        finally:
            layer.training = former

    return checkpoint(quiet, *args, use_reentrant=False)
