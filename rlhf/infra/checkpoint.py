"""Checkpoints that survive a kill at any moment: written aside, synced, renamed, and verified before use.

    checkpoints/step_000010/
        adapters.safetensors   one file per named group of tensors
        optimizer.safetensors
        state.json             everything that is not a tensor
        manifest.json          size and SHA-256 of each file above
    checkpoints/step_000010.003/    the same, taken inside step 11 after its third part

safetensors and JSON only: nothing in a checkpoint can run code when it is read.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.infra.durable import replace_folder, sha256_file, sync_file, sync_folder
from rlhf.infra.errors import UserError

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1

# A hidden `.step_000010.replaced` is the old version of a step that was being saved again when the process died.
_FINISHED = re.compile(r"^(?P<hidden>\.)?step_(?P<step>\d+)(\.(?P<part>\d+))?(?(hidden)\.replaced)$")


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint on disk; `part` counts what was done of the step after `step`, 0 between steps."""

    step: int
    folder: Path
    state: dict[str, Any]
    part: int = 0

    @property
    def place(self) -> str:
        """Where it was taken, in words."""
        return f"step {self.step}" + (f" and {self.part} part(s) of the next" if self.part else "")

    @property
    def names(self) -> list[str]:
        """Names of the groups of tensors in it."""
        return sorted(path.stem for path in self.folder.glob("*.safetensors"))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """One group of tensors, on the CPU. Raises `UserError` when the checkpoint has none of that name."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            raise UserError(f"checkpoint '{self.folder}' holds no '{name}'; it holds {', '.join(self.names) or 'none'}")
        return load_file(path)


class CheckpointStore:
    """The checkpoints of one run; the newest `keep` of them stay on disk. One process at a time may save."""

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise UserError(f"keep_checkpoints must be at least 1, got {keep}")
        self.folder = Path(folder)
        self.keep = keep

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], part: int = 0
    ) -> Path:
        """Write the checkpoint of a step, or of a part of the step after it, and return its folder.

        `tensors` maps a group's name to its tensors, `state` holds JSON values. Checkpoints of later steps, left by a
        past that was abandoned, are removed once this one is safe. Raises `UserError` when the disk is full or the
        folder cannot be written; then everything that was there still is.
        """
        final = self.folder / (f"step_{step:06d}" + (f".{part:03d}" if part else ""))
        aside = self.folder / f".{final.name}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_partials()
            aside.mkdir()
            _write_files(aside, tensors, state)
            _write_manifest(aside, step)
            replace_folder(aside, final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise UserError(
                f"the checkpoint of step {step} could not be written to '{self.folder}': {reason}; "
                "earlier checkpoints are untouched, so mend that and resume"
            ) from error
        self._prune((step, part))
        return final

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose files all match its manifest; each damaged one on the way is warned about."""
        for (step, part), folder in sorted(self._finished(), reverse=True):
            damage = find_damage(folder)
            if damage is None:
                state = json.loads((folder / STATE).read_text(encoding="utf-8"))
                return Checkpoint(step, folder, state, part)
            warnings.warn(f"checkpoint '{folder}' is damaged and is not used: {damage}", stacklevel=2)
        return None

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first, damaged ones included."""
        return sorted({step for (step, _), _ in self._finished()})

    def _finished(self) -> list[tuple[tuple[int, int], Path]]:
        """((step, part), folder) of everything that was wholly written once."""
        if not self.folder.is_dir():
            return []
        found: dict[tuple[int, int], Path] = {}
        for path in sorted(self.folder.iterdir()):  # ".step_..." sorts before "step_...", which then wins
            if (match := _FINISHED.match(path.name)) and path.is_dir():
                found[int(match["step"]), int(match["part"] or 0)] = path
        return list(found.items())

    def _remove_partials(self) -> None:
        for path in self.folder.glob(".step_*.partial"):
            shutil.rmtree(path)

    def _prune(self, newest: tuple[int, int]) -> None:
        """Keep the newest ones up to that. What cannot be deleted stays: that must not fail a finished save."""
        finished = sorted(self._finished(), reverse=True)
        past = [folder for place, folder in finished if place <= newest]
        future = [folder for place, folder in finished if place > newest]
        for folder in past[self.keep :] + future:
            shutil.rmtree(folder, ignore_errors=True)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, naming the file, or None when every file matches the manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is unreadable ({error})"
    for name, (num_bytes, sha256) in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != num_bytes:
            return f"{name} has {path.stat().st_size} bytes instead of {num_bytes}"
        if sha256_file(path) != sha256:
            return f"the content of {name} does not match its checksum"
    return None if STATE in entries else f"{STATE} is missing"


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer as tensors named `<parameter index>.<key>`, learning rates and the like as well.

    A plain number becomes a 0-d float64 or int64 tensor, and the name then ends in `:float` or `:int`. Parameters that
    have not been stepped yet have no entries.
    """
    found: dict[str, Tensor] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            _add_value(found, f"{index}.{key}", value)
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if isinstance(value, float):  # lr, initial_lr, weight_decay, eps: what schedulers move
                _add_value(found, f"group.{index}.{key}", value)
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put an optimizer over the same parameters, in the same order, back to what `optimizer_tensors` returned.

    Values keep the number format they were saved in (`Optimizer.load_state_dict` would round fp32 moments of bf16
    weights). Raises `UserError` when the parameters do not fit.
    """
    groups = optimizer.param_groups
    owners = [(parameter, group) for group in groups for parameter in group["params"]]
    state: dict[Tensor, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        where, _, key = name.partition(".")
        if where == "group":
            index, _, key = key.partition(".")
            _check_index(int(index), len(groups), "parameter groups")
            groups[int(index)][key.removesuffix(":float")] = tensor.item()
            continue
        _check_index(int(where), len(owners), "parameters")
        parameter, group = owners[int(where)]
        state.setdefault(parameter, {})[key.partition(":")[0]] = _state_value(name, tensor, parameter, group)
    optimizer.state.clear()
    optimizer.state.update(state)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _state_value(name: str, tensor: Tensor, parameter: Tensor, group: Mapping[str, Any]) -> Tensor | float | int:
    key = name.partition(".")[2]
    if key.endswith((":float", ":int")):
        return tensor.item()
    if key.startswith("exp_avg") and tensor.shape != parameter.shape:
        raise UserError(
            f"optimizer state '{name}' has shape {tuple(tensor.shape)}, its parameter {tuple(parameter.shape)}: "
            "the checkpoint belongs to another model or another set of trained weights"
        )
    # PyTorch keeps the step count on the CPU unless the update itself runs as one kernel on the device.
    if key == "step" and not group.get("capturable") and not group.get("fused"):
        return tensor.clone()
    return tensor.to(parameter.device, copy=True)


def _add_value(found: dict[str, Tensor], name: str, value: object) -> None:
    if isinstance(value, Tensor):
        found[name] = value.detach()
    elif isinstance(value, float):
        found[f"{name}:float"] = torch.tensor(value, dtype=torch.float64)
    elif isinstance(value, int):
        found[f"{name}:int"] = torch.tensor(value, dtype=torch.int64)
    elif value is not None:
        raise TypeError(f"optimizer state '{name}' is a {type(value).__name__}, which a checkpoint cannot hold")


def _check_index(index: int, num_here: int, what: str) -> None:
    if index >= num_here:
        raise UserError(
            f"the checkpoint has optimizer state for at least {index + 1} {what}, this optimizer has {num_here}: "
            "it belongs to another model or another set of trained weights"
        )


def _write_files(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    for name, group in tensors.items():
        save_file(separate_tensors(group), folder / f"{name}.safetensors")
    (folder / STATE).write_text(json.dumps(state), encoding="utf-8")


def separate_tensors(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory, as safetensors demands."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in group.items():
        on_cpu = tensor.detach().cpu().contiguous()
        storage = on_cpu.untyped_storage().data_ptr()
        separate[name] = on_cpu.clone() if storage in seen else on_cpu
        seen.add(storage)
    return separate


def _write_manifest(folder: Path, step: int) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        sync_file(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=2), encoding="utf-8")
    sync_file(manifest)
    sync_folder(folder)
