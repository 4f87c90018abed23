"""One optimizer step, for any loss: accumulate micro-batches, check finite, clip, step, schedule, count.

The trainer never learns which algorithm it serves. A recipe hands it micro-batches and a function from a micro-batch to
a `LossOutput` whose loss and metrics are already divided by the counts of the whole step: parts then simply add up, and
the gradient does not depend on how the step was cut into micro-batches.

A loss or gradient that is not finite never reaches the weights: the step is skipped, counted and reported as skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from rlhf.infra.checkpoint import optimizer_tensors, restore_optimizer
from rlhf.infra.config import Config
from rlhf.infra.device import to_floats
from rlhf.infra.errors import UserError

MicroBatch = TypeVar("MicroBatch")


class OptimizerConfig(Config):
    """AdamW and its learning-rate schedule, under the names of Hugging Face's training arguments."""

    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment")
    adam_epsilon: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay, on matrices only")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this global norm")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="shape of the schedule after warm-up, over all optimizer steps"
    )
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="share of the steps over which the rate rises from 0")
    max_nonfinite_steps: int = Field(5, ge=1, description="skipped steps in a row after which the run stops")

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        if self.lr_scheduler_type == "constant" and self.warmup_ratio > 0:
            return {"warmup_ratio": "lr_scheduler_type is constant; take constant_with_warmup"}
        return {}


@dataclass(frozen=True)
class LossOutput:
    """The loss of one micro-batch, metrics that add up over a step's micro-batches, and those whose largest counts."""

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    maxima: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did. `skipped`: a non-finite loss or gradient was met and the weights did not move.

    `culprit` names the first that was not finite as far as the trainer sees: the loss, a gradient, their norm.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool
    metrics: Mapping[str, float]
    maxima: Mapping[str, float] = field(default_factory=dict)
    culprit: str | None = None


class NonFiniteError(UserError):
    """Too many optimizer steps in a row had a loss or gradient that was not finite."""


class Trainer:
    """Owns optimizer, schedule, loss scaling and counters for a fixed list of named parameters."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        num_training_steps: int,
        *,
        scale_loss: bool = False,
        clipped_apart: Sequence[Collection[str]] = (),
    ) -> None:
        """`scale_loss`: float16 autocast, whose small gradients would vanish unscaled. `clipped_apart`: names of
        parameters whose gradients are clipped by a norm of their own, set by set; none: all by the norm of all.
        """
        if not parameters:
            raise ValueError("nothing to train: no parameter requires a gradient")
        self.parameters, self.config = dict(parameters), config
        matrices = [p for p in self.parameters.values() if p.ndim >= 2]
        vectors = [p for p in self.parameters.values() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,  # one kernel instead of a loop over parameters: a quarter of the time on a small model
        )
        self._clipped_apart = [[self.parameters[name] for name in names] for names in clipped_apart]
        self._rate_factor = schedule(config, num_training_steps)
        device_type = next(iter(self.parameters.values())).device.type
        self.scaler = torch.amp.GradScaler(device_type, enabled=scale_loss)
        self.step_count = self.skipped_count = self.skipped_in_a_row = 0

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return self.config.learning_rate * self._rate_factor(self.step_count)

    @property
    def exhausted(self) -> bool:
        """Whether `max_nonfinite_steps` steps in a row were skipped: the recipe is to save and to stop."""
        return self.skipped_in_a_row >= self.config.max_nonfinite_steps

    def step(self, micro_batches: Iterable[MicroBatch], loss_fn: Callable[[MicroBatch], LossOutput]) -> StepReport:
        """Run one optimizer step over the micro-batches.

        Raises:
            NonFiniteError: the step before this one had already exhausted `max_nonfinite_steps`.
        """
        if self.exhausted:
            raise NonFiniteError(f"{self.skipped_in_a_row} optimizer steps in a row were not finite")
        self.optimizer.zero_grad(set_to_none=True)
        outputs = []
        for micro_batch in micro_batches:
            output = loss_fn(micro_batch)
            self.scaler.scale(output.loss).backward()  # type: ignore[no-untyped-call]
            outputs.append(_without_graph(output))
            del output  # its graph must not live on beside that of the next micro-batch
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        grad_norm, total, metrics, maxima = _read(norm, outputs)
        learning_rate = self.learning_rate
        culprit = self._first_nonfinite(total, grad_norm)
        # Clipping by a norm that is no number would make every gradient one, and hide which was the first.
        if culprit is None:
            self._clip(norm)
        self._apply(culprit is not None, learning_rate)
        return StepReport(
            self.step_count, total, grad_norm, learning_rate, culprit is not None, metrics, maxima, culprit
        )

    def _clip(self, norm: Tensor) -> None:
        if not self._clipped_apart:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.max_grad_norm, norm)
        for part in self._clipped_apart:
            nn.utils.clip_grad_norm_(part, self.config.max_grad_norm)

    def _apply(self, skip: bool, learning_rate: float) -> None:
        if skip:
            self.skipped_count += 1
            self.skipped_in_a_row += 1
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.skipped_in_a_row = 0
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.scaler.step(self.optimizer)
        self.scaler.update()  # after a skipped step too: an overflow is what lowers its factor
        # A skipped step still counts: the schedule stays a function of the step number alone.
        self.step_count += 1

    def _first_nonfinite(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss ({loss})"
        if math.isfinite(grad_norm):
            return None
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                return f"the gradient of {name}"
        return "the norm of all gradients, each of them finite"

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything needed to go on: optimizer moments as tensors, scaler and counters as plain values.

        The place in the schedule is the number of steps.
        """
        plain = {
            "scaler": self.scaler.state_dict(),
            "counts": [self.step_count, self.skipped_count, self.skipped_in_a_row],
        }
        return optimizer_tensors(self.optimizer), plain

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Continue exactly where `state` was taken; a trainer that was exhausted there gets all its tries again."""
        restore_optimizer(self.optimizer, dict(tensors))
        if plain["scaler"]:
            self.scaler.load_state_dict(plain["scaler"])
        self.step_count, self.skipped_count, self.skipped_in_a_row = plain["counts"]
        if self.exhausted:
            self.skipped_in_a_row = 0


def _without_graph(output: LossOutput) -> LossOutput:
    return LossOutput(
        output.loss.detach(),
        {name: value.detach() for name, value in output.metrics.items()},
        {name: value.detach() for name, value in output.maxima.items()},
    )


def _read(norm: Tensor, outputs: Sequence[LossOutput]) -> tuple[float, float, dict[str, float], dict[str, float]]:
    """Norm, loss, metrics and maxima of a step. All are asked for together: each question would wait for the device."""
    asked = [norm, *(s for o in outputs for s in (o.loss, *o.metrics.values(), *o.maxima.values()))]
    grad_norm, *found = to_floats(asked)
    values = iter(found)
    total, metrics, maxima = 0.0, dict[str, float](), dict[str, float]()
    for output in outputs:
        total += next(values)
        for name in output.metrics:
            metrics[name] = metrics.get(name, 0.0) + next(values)
        for name in output.maxima:
            value = next(values)
            maxima[name] = largest([maxima.get(name, value), value])
    return grad_norm, total, metrics, maxima


def schedule(config: OptimizerConfig, num_training_steps: int) -> Callable[[int], float]:
    """What the learning rate is multiplied with, as a function of the number of steps before."""
    # Transformers' schedules come as an object that moves an optimizer's rates; only their formula is wanted here.
    scheduler = get_scheduler(
        config.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(())]),
        num_warmup_steps=math.ceil(config.warmup_ratio * num_training_steps),
        num_training_steps=num_training_steps,
    )
    assert isinstance(scheduler, LambdaLR)
    return scheduler.lr_lambdas[0]


def mean_reports(reports: Sequence[StepReport]) -> dict[str, float]:
    """Metrics of several optimizer steps for one log line: means, each step weighing the same, and largest of maxima.

    Skipped steps are left out where others are there: one of them would make every mean of the line no number.
    """
    reports = taken(reports)
    names = sorted({name for report in reports for name in report.metrics})
    present = {name: [r.metrics[name] for r in reports if name in r.metrics] for name in names}
    means = {name: sum(values) / len(values) for name, values in present.items()}
    names = sorted({name for report in reports for name in report.maxima})
    return means | {name: largest([r.maxima[name] for r in reports if name in r.maxima]) for name in names}


def mean_loss(reports: Sequence[StepReport]) -> float:
    """Mean loss of several optimizer steps, skipped ones as in `mean_reports`."""
    return sum(report.loss for report in taken(reports)) / len(taken(reports))


def taken(reports: Sequence[StepReport]) -> Sequence[StepReport]:
    """The steps that moved the weights; all of them where none did."""
    return [report for report in reports if not report.skipped] or reports


def largest(values: Sequence[float]) -> float:
    """The largest of the values, NaN where one of them is: `max` would let it pass or not, by its place."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)
