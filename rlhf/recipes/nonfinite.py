"""When an optimizer step is not finite: its batch is kept for inspection, its first bad tensor named, the run stopped.

    <run>/nonfinite/step_000012/
        batch.safetensors    every tensor of the step, by micro-batch and field
        report.json          loss, gradient norm, the first tensor that was not finite, shapes, plain fields

The trainer has already kept the step from the weights (see `rlhf.algo.trainer`); what is here looks at why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from rlhf.algo.trainer import LossOutput, NonFiniteError, StepReport, Trainer
from rlhf.infra.checkpoint import separate_tensors
from rlhf.infra.determinism import restore_rng_state, rng_state, seed_everything
from rlhf.infra.durable import write_json, written_aside
from rlhf.infra.experiment import Run

MicroBatch = TypeVar("MicroBatch")

FOLDER = "nonfinite"
MAX_SAVED = 3  # the first ones tell the most, and a run that goes wrong must not fill the disk


class NonFiniteGuard:
    """Looks after the skipped steps of one run: `examine` each of them, `stop_if_exhausted` once all is saved."""

    def __init__(self, run: Run, trainer: Trainer) -> None:
        self.run, self.trainer = run, trainer
        self._first_in_a_row: str | None = None

    def examine(
        self,
        report: StepReport,
        micro_batches: Sequence[MicroBatch],
        loss_fn: Callable[[MicroBatch], LossOutput],
        seed: int | None = None,
    ) -> None:
        """Save the batch of a step that was skipped and say in the log which of its tensors went bad first.

        The forward pass is run once more, from the weights it had, for a look at the output of every module; `seed` is
        what the step was seeded with, where it drew random numbers. Under loss scaling an overflow in the gradients
        alone is how the scale finds its size, and is looked at only when it ends the run.
        """
        if self.trainer.scaler.is_enabled() and math.isfinite(report.loss) and not self.trainer.exhausted:
            return
        culprit = first_nonfinite(micro_batches, loss_fn, seed) or report.culprit or "an unknown place"
        if self.trainer.skipped_in_a_row == 1 or self._first_in_a_row is None:
            self._first_in_a_row = culprit
        folder = self.run.folder / FOLDER / f"step_{report.step:06d}"
        others = [path for path in folder.parent.glob("step_*") if path != folder]
        kept = len(others) < MAX_SAVED
        if kept:
            save_batch(folder, report, culprit, micro_batches)
        self.run.logger.info(
            f"optimizer step {report.step} was skipped, the weights are as before: first not finite was {culprit}"
            + (f"; its batch is in '{folder}'" if kept else "")
        )

    def stop_if_exhausted(self) -> None:
        """Raise `NonFiniteError` when too many steps in a row were skipped; to be called after a checkpoint."""
        if self.trainer.exhausted:
            raise NonFiniteError(
                f"{self.trainer.skipped_in_a_row} optimizer steps in a row were not finite, first in "
                f"{self._first_in_a_row}; the last good weights are in the newest checkpoint and the batches in "
                f"'{self.run.folder / FOLDER}': lower optimizer.learning_rate or use run.dtype=fp32 in a new run, or, "
                f"where the data were to blame, go on behind them with: {self.run.resume_command}"
            )


def first_nonfinite(
    micro_batches: Sequence[MicroBatch], loss_fn: Callable[[MicroBatch], LossOutput], seed: int | None = None
) -> str | None:
    """The first tensor of a forward pass that is not finite: in the batch, else the output of a module; None: none is.

    Modules are named below the one that was called, such as `LlamaModel.layers.0.mlp.up_proj`.
    """
    for name, tensor in tensors_of(micro_batches):
        if not _is_finite(tensor):
            return f"tensor {name} of the batch"
    found: list[str] = []
    names: dict[nn.Module, str] = {}

    def name_modules(module: nn.Module, inputs: Any) -> None:
        if module not in names:
            names.update({part: name for name, part in module.named_modules(prefix=type(module).__name__)})

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if not found and not all(_is_finite(tensor) for _, tensor in tensors_of(output)):
            found.append(f"the output of {names[module]}")

    handles = [register_module_forward_pre_hook(name_modules), register_module_forward_hook(look)]
    drawn_so_far = rng_state()
    try:
        if seed is not None:
            seed_everything(seed)
        with torch.no_grad():
            for micro_batch in micro_batches:
                loss_fn(micro_batch)
                if found:
                    return found[0]
    finally:
        restore_rng_state(drawn_so_far)
        for handle in handles:
            handle.remove()
    return None


def save_batch(folder: Path, report: StepReport, culprit: str, micro_batches: Sequence[Any]) -> None:
    """Write the tensors and the plain values of a step's micro-batches."""
    tensors = dict(tensors_of(micro_batches))
    described = {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "num_nonfinite": int((~tensor.isfinite()).sum()),
        }
        for name, tensor in tensors.items()
    }
    found = {
        "step": report.step,
        "first_nonfinite": culprit,
        "loss": str(report.loss),
        "grad_norm": str(report.grad_norm),
        "learning_rate": report.learning_rate,
        "tensors": described,
        "values": dict(values_of(micro_batches)),
    }
    with written_aside(folder) as aside:
        save_file(separate_tensors(tensors), aside / "batch.safetensors")
        write_json(aside / "report.json", found)


def tensors_of(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor inside dataclasses, mappings and sequences, with its place: `0.trajectory.logprobs_BR`."""
    return ((place, leaf) for place, leaf in _leaves(value, name) if isinstance(leaf, Tensor))


def values_of(value: Any, name: str = "") -> Iterator[tuple[str, str | int | float | bool | None]]:
    """Every plain value in the same places; what is not finite becomes text, as JSON has no number for it."""
    for place, leaf in _leaves(value, name):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            yield place, str(leaf)
        elif leaf is None or isinstance(leaf, (str, int, float)):
            yield place, leaf


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, Mapping):
        parts: Iterator[tuple[Any, Any]] = iter(value.items())
    elif isinstance(value, (list, tuple)):
        parts = iter(enumerate(value))
    else:
        yield name, value
        return
    for key, part in parts:
        yield from _leaves(part, f"{name}.{key}" if name else str(key))


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
