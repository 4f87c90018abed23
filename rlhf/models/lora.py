"""LoRA on a whole model: several named adapters on one frozen base.

Policy, reference, value and reward model of a run are four names on one backbone, so memory is one model and a few
small matrices, and training one adapter never moves another's outputs. The layer itself is in ``lora_layer.py``, files
in PEFT's format are in ``adapter_files.py``.

Left out on purpose: DoRA, adapters on embeddings and convolutions, several adapters active at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf.infra.config import Config
from rlhf.infra.errors import UserError
from rlhf.models.lora_layer import AdapterSettings, LoRALinear, check_adapter_name, is_supported
from rlhf.models.quantized import count_parameters

__all__ = [
    "LoRAConfig",
    "LoRALinear",
    "active_adapter",
    "adapter_names",
    "adapter_state_dict",
    "apply_lora_to_model",
    "copy_adapter",
    "default_target_modules",
    "delete_adapter",
    "find_target_modules",
    "get_lora_parameters",
    "install_adapter",
    "load_adapter_state_dict",
    "lora_layers",
    "merge_adapter",
    "merge_lora_weights",
    "print_trainable_parameters",
    "set_active_adapter",
    "set_trainable_adapter",
    "unmerge_adapter",
]

ALL_LINEAR = "all-linear"


class LoRAConfig(Config):
    """Shape and place of one adapter; the names are PEFT's."""

    r: int = Field(16, ge=1, description="rank of the update")
    lora_alpha: float | None = Field(None, gt=0, description="numerator of the scaling alpha / r; null: 2 r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input while training")
    target_modules: list[str] | Literal["all-linear"] | None = Field(
        None, description="layer names or dotted suffixes; null: every linear layer inside the transformer blocks"
    )
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(r) (arXiv:2312.03732) instead of alpha / r")


# Adapters are switched at every decoding step, and a walk over all modules would cost a few per cent of it. So the walk
# is remembered per model, until a LoRALinear is made (the count kept here) or replaced anywhere.
_walks: WeakKeyDictionary[nn.Module, tuple[int, dict[str, LoRALinear]]] = WeakKeyDictionary()


def lora_layers(model: nn.Module, adapter_name: str | None = None) -> Mapping[str, LoRALinear]:
    """LoRA layers by dotted path; with a name, those that carry it (``UserError`` when none does)."""
    num_created, layers = _walks.get(model, (-1, {}))
    if num_created != LoRALinear.num_created:
        layers = {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}
        _walks[model] = (LoRALinear.num_created, layers)
    if adapter_name is None:
        return layers
    _check_known(model, adapter_name)
    return {path: layer for path, layer in layers.items() if adapter_name in layer.settings}


def lora_sites(model: nn.Module) -> dict[str, nn.Linear | Conv1D | LoRALinear]:
    """Dotted path of every layer that carries an adapter or could, in model order."""
    wrapped = tuple(f"{path}." for path in lora_layers(model))
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, LoRALinear) or (is_supported(module) and not path.startswith(wrapped))
    }


def find_target_modules(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Dotted paths of the linear layers whose path is one of ``names`` or ends in ``.name``; empty when none does."""
    suffixes = tuple(f".{name}" for name in names)
    return [path for path in lora_sites(model) if path in names or path.endswith(suffixes)]


def default_target_modules(model: nn.Module) -> list[str]:
    """Dotted paths of attention and MLP layers: every linear layer inside the blocks of a ``ModuleList``.

    Output head, pooler and score head stand outside the blocks and are left alone. A model without blocks gives all its
    linear layers.
    """
    lists = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, nn.ModuleList))
    sites = lora_sites(model)
    # `layers.0.mlp.up` lies in a block; `heads.0` is itself an entry of its list, so it is a head.
    blocks = [path for path in sites if any(path.startswith(p) and "." in path.removeprefix(p) for p in lists)]
    return blocks or list(sites)


def apply_lora_to_model(
    model: nn.Module,
    r: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] | Literal["all-linear"] | None = None,
    adapter_name: str = "default",
    use_rslora: bool = False,
) -> nn.Module:
    """Add an adapter to the model in place, make it active and the only thing that trains; returns the model.

    ``alpha`` defaults to 2 r; ``target_modules`` are layer names or dotted suffixes, by default the attention and MLP
    layers. Adapters that are there already stay, frozen. Raises ``UserError``, with nothing changed, when a target
    matches no layer or the name is taken.
    """
    settings = AdapterSettings(r, 2.0 * r if alpha is None else alpha, dropout, use_rslora)
    paths = _resolve_targets(model, target_modules)
    install_adapter(model, adapter_name, dict.fromkeys(paths, settings))
    model.requires_grad_(False)
    set_active_adapter(model, adapter_name)
    set_trainable_adapter(model, adapter_name)
    return model


def install_adapter(model: nn.Module, name: str, settings: Mapping[str, AdapterSettings]) -> None:
    """Add a fresh adapter with its own settings per layer path; neither active nor trainable yet."""
    check_adapter_name(name)
    if name in adapter_names(model):
        raise UserError(f"adapter '{name}' is already on this model; choose another name or delete it first.")
    for path, one in settings.items():
        module, arguments = model.get_submodule(path), (one.r, one.alpha, one.dropout, one.use_rslora)
        if isinstance(module, LoRALinear):
            module.add_adapter(name, *arguments)
        else:
            module = LoRALinear(module, *arguments, adapter_name=name)
            module.active = None
            _replace(model, path, module)
        module.lora_A[name].requires_grad_(False)
        module.lora_B[name].requires_grad_(False)


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all adapters on the model, in the order in which they came."""
    return list(dict.fromkeys(name for layer in lora_layers(model).values() for name in layer.settings))


def set_active_adapter(model: nn.Module, name: str | None) -> None:
    """Choose the adapter that forward passes use; None is the bare base."""
    _check_known(model, name)
    for layer in lora_layers(model).values():
        layer.activate(name)


@contextmanager
def active_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Use an adapter (None: the bare base) inside the block, then return to the former one."""
    layers = list(lora_layers(model).values())
    former = [layer.active for layer in layers]
    try:
        set_active_adapter(model, name)
        yield
    finally:
        for layer, before in zip(layers, former, strict=True):
            layer.activate(before)


def set_trainable_adapter(model: nn.Module, name: str | None) -> None:
    """Let this adapter alone take gradients (None: no adapter); parameters outside LoRA are not touched."""
    _check_known(model, name)
    for layer in lora_layers(model).values():
        for matrices in (layer.lora_A, layer.lora_B):
            for key, parameter in matrices.items():
                parameter.requires_grad_(key == name)


def get_lora_parameters(model: nn.Module, adapter_name: str | None = None) -> list[nn.Parameter]:
    """A and B of every layer, two per layer: the trainable ones, or all of the named adapter."""
    if adapter_name is not None:
        layers = lora_layers(model, adapter_name).values()
        return [parameter for layer in layers for parameter in (layer.lora_A[adapter_name], layer.lora_B[adapter_name])]
    return [
        parameter
        for layer in lora_layers(model).values()
        for name in layer.settings
        for parameter in (layer.lora_A[name], layer.lora_B[name])
        if parameter.requires_grad
    ]


@torch.no_grad()
def copy_adapter(model: nn.Module, source: str, target: str) -> None:
    """Give ``target`` the weights of ``source``: how a policy starts from SFT and a reference follows the policy.

    A new target is frozen and not active; one that exists keeps its parameters and gets other values. Raises
    ``UserError`` when it has other settings or layers.
    """
    settings = {path: layer.settings[source] for path, layer in lora_layers(model, source).items()}
    if target not in adapter_names(model):
        install_adapter(model, target, settings)
    elif {path: layer.settings[target] for path, layer in lora_layers(model, target).items()} != settings:
        raise UserError(f"adapter '{target}' has other settings or layers than '{source}'; delete it first.")
    for layer in lora_layers(model, source).values():
        layer.lora_A[target].copy_(layer.lora_A[source])
        layer.lora_B[target].copy_(layer.lora_B[source])


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter; a layer that carries no other becomes the plain layer again."""
    for path, layer in lora_layers(model, name).items():
        layer.remove_adapter(name)
        if not layer.settings:
            _replace(model, path, layer.base)


def adapter_state_dict(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's tensors (not copies), keyed ``<layer path>.lora_A.weight`` and ``<layer path>.lora_B.weight``."""
    tensors: dict[str, Tensor] = {}
    for path, layer in lora_layers(model, name).items():
        tensors[f"{path}.lora_A.weight"] = layer.lora_A[name].detach()
        tensors[f"{path}.lora_B.weight"] = layer.lora_B[name].detach()
    return tensors


@torch.no_grad()
def load_adapter_state_dict(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy ``adapter_state_dict``'s tensors into an adapter that exists; keys and shapes must be the same.

    Raises ``UserError``, with nothing changed, naming the first layer that differs.
    """
    own = adapter_state_dict(model, name)
    strangers = sorted(own.keys() ^ tensors.keys())
    if strangers:
        side = "missing from" if strangers[0] in own else "not expected in"
        raise UserError(f"{strangers[0]} is {side} the weights given for adapter '{name}'.")
    for key, tensor in tensors.items():
        if tensor.shape != own[key].shape:
            raise UserError(f"{key} has shape {tuple(tensor.shape)}; adapter '{name}' expects {tuple(own[key].shape)}.")
    for key, tensor in tensors.items():
        own[key].copy_(tensor)


def merge_lora_weights(model: nn.Module, adapter_name: str | None = None) -> nn.Module:
    """Fold an adapter (the active one by default) into the base for good and return the model with plain layers.

    All other adapters are dropped. Quantised layers become ordinary ones in their compute dtype, so memory grows.
    Raises ``UserError`` naming the layer, with nothing changed, when a merged weight would not be finite.
    """
    name = adapter_name or _only_active(model)
    unmerge_adapter(model)
    _merged_weights(model, name)  # all of them are sound before the first is replaced
    for path, layer in lora_layers(model).items():
        _replace(model, path, layer.plain_layer(name))
    return model


def merge_adapter(model: nn.Module, adapter_name: str | None = None) -> None:
    """Fold an adapter (the active one by default) into the base until ``unmerge_adapter``, for faster generation.

    Keeps a copy of the base weights concerned. Until then no other adapter can be active. Raises as
    ``merge_lora_weights``.
    """
    name = adapter_name or _only_active(model)
    for layer in lora_layers(model, name).values():
        layer.check_unmerged()
    weights = _merged_weights(model, name)
    set_active_adapter(model, name)
    for path, layer in lora_layers(model, name).items():
        layer.merge(name, weights[path])


def unmerge_adapter(model: nn.Module) -> None:
    """Undo ``merge_adapter`` bit for bit; nothing happens when nothing is merged."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def print_trainable_parameters(model: nn.Module) -> str:
    """Print and return how many parameters train, of how many; packed 4-bit weights count as two per byte."""
    trainable, total = count_parameters(model)
    sentence = f"Trainable: {trainable / max(total, 1):.2%} ({trainable:,} of {total:,} parameters)"
    print(sentence)
    return sentence


def _check_known(model: nn.Module, name: str | None) -> None:
    if name is not None and not any(name in layer.settings for layer in lora_layers(model).values()):
        raise UserError(f"no adapter '{name}' on this model; it has {adapter_names(model) or 'none'}.")


def _resolve_targets(model: nn.Module, targets: Sequence[str] | None) -> list[str]:
    names = [targets] if isinstance(targets, str) else list(targets or [ALL_LINEAR])
    if names == [ALL_LINEAR]:
        paths = default_target_modules(model)
    else:
        for name in names:
            if not find_target_modules(model, [name]):
                known = sorted({path.rpartition(".")[2] for path in lora_sites(model)})
                raise UserError(f"target module '{name}' is no linear layer of this model; choose from {known}.")
        paths = find_target_modules(model, names)
    if not paths or paths == [""]:
        raise UserError(f"a {type(model).__name__} has no linear layer inside it that could carry an adapter.")
    return paths


def _only_active(model: nn.Module) -> str:
    active = {layer.active for layer in lora_layers(model).values()} - {None}
    if len(active) != 1:
        raise UserError(f"which adapter to merge? None is active; name one of {adapter_names(model)}.")
    return str(active.pop())


def _merged_weights(model: nn.Module, name: str) -> dict[str, Tensor]:
    weights = {}
    for path, layer in lora_layers(model, name).items():
        try:
            weights[path] = layer.merged_weight(name)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    return weights


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    model.get_submodule(parent).register_module(leaf, module)
    _walks.clear()
