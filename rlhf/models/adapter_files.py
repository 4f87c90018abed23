"""Adapters on disk in PEFT's format, both directions: ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT reads what is written here, and the other way round, with equal outputs. What is in the file decides which layers
get an adapter; ``target_modules`` in the configuration is written for PEFT and for engines, never needed for reading.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf.infra.durable import sync_file, write_json
from rlhf.infra.errors import UserError
from rlhf.models.lora import (
    adapter_names,
    adapter_state_dict,
    find_target_modules,
    install_adapter,
    load_adapter_state_dict,
    lora_layers,
    lora_sites,
    set_active_adapter,
)
from rlhf.models.lora_layer import AdapterSettings, check_adapter_name, linear_features

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
LORA_KEY = re.compile(r".+\.lora_[AB]\.weight")

TaskType = Literal["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"]  # a policy, a reward model, a process reward model

# Features that change what an adapter computes: a file that uses one would load quietly and give other numbers.
_REFUSED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "velora_config",
)
# Other initialisations of PEFT (PiSSA, OLoRA, LoftQ ...) take the update out of the base weight first.
_BASE_KEEPING_INITS = (True, False, "gaussian", "eva", "orthogonal")


def save_adapter(
    model: nn.Module,
    name: str,
    folder: str | Path,
    base_model_name: str | None,
    task_type: TaskType = "CAUSAL_LM",
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an adapter as PEFT does.

    ``extra`` holds tensors trained beside it, by their name in the PEFT model (``score.weight`` for the head of a
    sequence classifier); PEFT loads them as ``modules_to_save``. Raises ``UserError`` when the folder cannot be
    written.
    """
    folder, extra = Path(folder), dict(extra or {})
    tensors = {PREFIX + key: tensor for key, tensor in (adapter_state_dict(model, name) | extra).items()}
    heads = sorted({key.rpartition(".")[0] for key in extra})
    config = _peft_config(model, name) | {
        "base_model_name_or_path": base_model_name,
        "task_type": task_type,
        "modules_to_save": heads or None,
    }
    aside = folder / f".{WEIGHTS_FILE}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: _storable(tensor) for key, tensor in tensors.items()}, aside, metadata={"format": "pt"})
        sync_file(aside)
        os.replace(aside, folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise UserError(f"cannot write adapter '{name}' to {folder}: {error}.") from error
    write_json(folder / CONFIG_FILE, config)


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> dict[str, Tensor]:
    """Add the adapter in a folder to the model, frozen and active; returns the tensors saved beside it.

    The returned keys are names in the PEFT model, such as ``score.weight``. Raises ``UserError``, with nothing changed,
    when a file is missing or damaged, uses a feature that is not supported, or was made for another base.
    """
    folder = Path(folder)
    check_adapter_name(name)
    if name in adapter_names(model):
        raise UserError(f"adapter '{name}' is already on this model; choose another name or delete it first.")
    config, tensors = _read_config(folder), _read_tensors(folder)
    lora = {key: tensor for key, tensor in tensors.items() if LORA_KEY.fullmatch(key)}
    extra = {key: tensor for key, tensor in tensors.items() if key not in lora}
    unknown = [key for key in extra if ".lora_" in key]
    if unknown or not lora:
        raise UserError(
            f"{folder / WEIGHTS_FILE} holds {unknown[0] if unknown else 'no LoRA weights'}; expected lora_A and lora_B."
        )
    settings = _settings_per_layer(model, config, lora, folder)
    install_adapter(model, name, settings)
    load_adapter_state_dict(model, name, lora)
    set_active_adapter(model, name)
    return extra


def check_task_type(folder: str | Path, expected: TaskType) -> None:
    """Refuse an adapter that was trained for another task: a policy's read as a reward model's, or the other way round.

    Its head would be lost without a word. PEFT adapters that name no task fit either.
    """
    found = _read_config(Path(folder)).get("task_type")
    if found not in (None, expected):
        wanted = {"CAUSAL_LM": "a policy", "SEQ_CLS": "a reward model", "TOKEN_CLS": "a process reward model"}[expected]
        raise UserError(
            f"the adapter in {folder} was trained for the task {found}, but {wanted} needs {expected}; "
            "name the folder of another adapter."
        )


def _peft_config(model: nn.Module, name: str) -> dict[str, Any]:
    """The fields that depend on the adapter. Layers that differ from the commonest rank or alpha go into patterns."""
    layers = lora_layers(model, name)
    settings = {path: layer.settings[name] for path, layer in layers.items()}
    r = Counter(one.r for one in settings.values()).most_common(1)[0][0]
    alpha = Counter(one.alpha for one in settings.values()).most_common(1)[0][0]
    some = next(iter(settings.values()))
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": _as_integer(alpha),
        "rank_pattern": {path: one.r for path, one in settings.items() if one.r != r},
        "alpha_pattern": {path: _as_integer(one.alpha) for path, one in settings.items() if one.alpha != alpha},
        "lora_dropout": some.dropout,
        "use_rslora": some.use_rslora,
        "target_modules": _short_targets(model, list(layers)),
        "fan_in_fan_out": any(isinstance(layer.base, Conv1D) for layer in layers.values()),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "use_dora": False,
    }


def _storable(tensor: Tensor) -> Tensor:
    """A copy of its own on the CPU, because safetensors refuses tensors that share memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _short_targets(model: nn.Module, paths: list[str]) -> list[str]:
    """Last components where they pick exactly these layers, else whole paths."""
    leaves = sorted({path.rpartition(".")[2] for path in paths})
    return leaves if set(find_target_modules(model, leaves)) == set(paths) else paths


def _as_integer(value: float) -> float:
    return int(value) if value == int(value) else value  # engines expect an integer lora_alpha


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"no adapter in {folder}: {CONFIG_FILE} is missing; give a folder written by save_adapter or PEFT."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{path} describes a {kind} adapter; only LORA can be loaded.")
    used = [key for key in _REFUSED if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if config.get("init_lora_weights", True) not in _BASE_KEEPING_INITS:
        used.append("init_lora_weights")
    if used:
        raise UserError(f"{path} uses {used[0]}={config[used[0]]!r}, which is not supported; train plain LoRA instead.")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """The file's tensors in fp32, without PEFT's prefix."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = " (adapter_model.bin is a pickle and is not read; save it as safetensors)"
        raise UserError(
            f"no adapter in {folder}: {WEIGHTS_FILE} is missing{pickled * (folder / 'adapter_model.bin').exists()}."
        )
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}.") from error
    return {key.removeprefix(PREFIX): tensor.to(torch.float32) for key, tensor in tensors.items()}


def _settings_per_layer(
    model: nn.Module, config: Mapping[str, Any], lora: Mapping[str, Tensor], folder: Path
) -> dict[str, AdapterSettings]:
    """Settings of every layer named in the file, after checking that each exists here with the same shape."""
    sites = lora_sites(model)
    other_base = f"the adapter in {folder} was made for another base"
    settings: dict[str, AdapterSettings] = {}
    for path in dict.fromkeys(key.rpartition(".lora_")[0] for key in lora):
        if path not in sites:
            raise UserError(f"{other_base}: this model has no linear layer {path}.")
        down, up = lora.get(f"{path}.lora_A.weight"), lora.get(f"{path}.lora_B.weight")
        if down is None or up is None:
            raise UserError(f"{folder / WEIGHTS_FILE} holds only one of lora_A and lora_B for {path}; it is damaged.")
        settings[path] = _settings_from(config, path)
        r, (num_in, num_out) = settings[path].r, linear_features(sites[path])
        found, expected = (tuple(down.shape), tuple(up.shape)), ((r, num_in), (num_out, r))
        if found != expected:
            raise UserError(
                f"{other_base}: A and B of {path} have shapes {found[0]} and {found[1]}, "
                f"but this model at rank {r} needs {expected[0]} and {expected[1]}."
            )
    return settings


def _settings_from(config: Mapping[str, Any], path: str) -> AdapterSettings:
    try:
        return AdapterSettings(
            r=int(_pattern_value(config.get("rank_pattern"), path, config.get("r", 8))),
            alpha=float(_pattern_value(config.get("alpha_pattern"), path, config.get("lora_alpha", 8))),
            dropout=float(config.get("lora_dropout", 0.0)),
            use_rslora=bool(config.get("use_rslora", False)),
        )
    except UserError:
        raise
    except (TypeError, ValueError, re.error) as error:
        raise UserError(f"{CONFIG_FILE} holds a rank, alpha or pattern that cannot be used: {error}.") from error


def _pattern_value(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the whole path or a dotted suffix of it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default
