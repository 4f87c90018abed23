"""The loop that SFT, the reward model, DPO and KTO have in common: epochs over rows, validation, the best weights kept.

Everything is a function of the step number: the order of an epoch comes from (seed, epoch), so a run that was
interrupted goes on with the very rows it would have seen. What differs between the methods, the loss of a micro-batch
and the measure of validation, is handed in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from rlhf.algo.trainer import LossOutput, StepReport, Trainer, mean_loss, mean_reports
from rlhf.data.order import epoch_order
from rlhf.infra.config import Config
from rlhf.infra.determinism import derive_seed, restore_rng_state, rng_state, seed_everything
from rlhf.infra.experiment import Run
from rlhf.infra.profiling import memory_metrics, padding_share, per_second
from rlhf.models.backbone import Backbone
from rlhf.recipes.nonfinite import NonFiniteGuard

MicroBatch = TypeVar("MicroBatch")


class TrainingConfig(Config):
    """Length of training and size of batches, under the names of Hugging Face's training arguments."""

    num_train_epochs: float = Field(1.0, gt=0, description="passes over the training rows")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps at most; null: as the epochs say")
    per_device_train_batch_size: int = Field(
        16, ge=1, description="rows (pairs) of one optimizer step and accumulation step"
    )
    gradient_accumulation_steps: int = Field(1, ge=1, description="an optimizer step has this many times as many rows")
    max_tokens_per_micro_batch: int = Field(
        16_384, ge=1, description="rows are cut into passes of at most this many tokens"
    )
    eval_steps: int | None = Field(None, ge=1, description="optimizer steps between validations; null: once an epoch")
    early_stopping_patience: int | None = Field(
        None, ge=1, description="validations without a new best after which training ends; null: never"
    )
    logging_steps: int = Field(1, ge=1, description="optimizer steps per line of the log")

    def idle_keys_with(self, has_validation: bool, packed_length: int | None = None) -> dict[str, str]:
        """Idle keys of a recipe with such data, as the recipe names them; `packed_length` is that of packed rows."""
        idle = {}
        if not has_validation:
            names = ["training.eval_steps", "training.early_stopping_patience"]
            idle |= dict.fromkeys(names, "data has no rows to validate on")
        if packed_length is not None and self.max_tokens_per_micro_batch < packed_length:
            idle["training.max_tokens_per_micro_batch"] = (
                f"one packed row of data.max_length, {packed_length} tokens, is more than that"
            )
        return idle

    @property
    def rows_per_step(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def num_steps(self, num_rows: int) -> int:
        """Optimizer steps of the whole training; a last, smaller batch of an epoch counts as one."""
        per_epoch = math.ceil(num_rows / self.rows_per_step)
        steps = max(1, round(self.num_train_epochs * per_epoch))
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def rows_of_step(self, num_rows: int, seed: int, step: int) -> list[int]:
        """The rows that an optimizer step (from 0) takes: a function of these numbers alone."""
        epoch, place = divmod(step, math.ceil(num_rows / self.rows_per_step))
        order = epoch_order(num_rows, seed, epoch)
        return list(order[place * self.rows_per_step : (place + 1) * self.rows_per_step])


@dataclass(frozen=True)
class Validation:
    """Measures of one validation; `key` is the one that the best weights are chosen by, `lower_is_better` its sense."""

    metrics: Mapping[str, float]
    key: str
    lower_is_better: bool

    @property
    def badness(self) -> float:
        return self.metrics[self.key] if self.lower_is_better else -self.metrics[self.key]


@dataclass(frozen=True)
class Method(Generic[MicroBatch]):
    """What makes the loop SFT, reward modelling, DPO or KTO.

    `micro_batches(rows)` collates the rows of one optimizer step; `loss(micro_batch, rows)` divides by the counts of
    the whole step; `num_tokens(rows)` is what a step processes; `validate()` measures the current weights, or is None.
    `backbone` is what the tokens of a step go through, `num_read(rows)` how many of them are no padding, where that is
    another number than `num_tokens`.
    """

    num_rows: int
    micro_batches: Callable[[Sequence[int]], Sequence[MicroBatch]]
    loss: Callable[[Sequence[int]], Callable[[MicroBatch], LossOutput]]
    num_tokens: Callable[[Sequence[int]], int]
    validate: Callable[[], Validation] | None = None
    backbone: Backbone | None = None
    num_read: Callable[[Sequence[int]], int] | None = None


@dataclass
class Progress:
    """Where training stands; all of it goes into a checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_badness: float = math.inf
    best_step: int = 0
    stale_validations: int = 0
    done: bool = False
    best_metrics: dict[str, float] = field(default_factory=dict)


class SupervisedLoop(Generic[MicroBatch]):
    """Trains named parameters by a `Method` inside a `Run`, and leaves them at the best validated weights."""

    def __init__(
        self, run: Run, trainer: Trainer, config: TrainingConfig, method: Method[MicroBatch], name: str
    ) -> None:
        self.run, self.trainer, self.config, self.method, self.name = run, trainer, config, method, name
        self.num_steps = config.num_steps(method.num_rows)
        self.progress = Progress()
        self.reports: list[StepReport] = []  # of the steps since the last line of the log
        self.best: dict[str, Tensor] = {}
        self._tokens_since_log = 0
        self.guard = NonFiniteGuard(run, trainer)
        self.timer = run.timer
        if run.resumed_from is not None:
            self._restore(run)

    def train(self) -> Progress:
        """Run to the end, to a stop request, or until patience is spent. Returns where training stands.

        Raises:
            NonFiniteError: too many steps in a row were not finite; the last good weights are in a checkpoint.
        """
        started = time.perf_counter()
        with self.run.logger.progress(self.name, self.num_steps) as advance:
            advance(self.progress.step)
            while self.progress.step < self.num_steps and not self.progress.done:
                with self.run.profiler(self.progress.step + 1):
                    report = self._one_step()
                    self.reports.append(report)
                    metrics = self._validated() if self._validation_due() else {}
                    if self.progress.step % self.config.logging_steps == 0 or metrics or self._last_step():
                        self._log(self.reports, metrics)
                        self.reports = []
                advance(1, loss=report.loss)
                stopping = self.run.should_stop()
                due = self.run.checkpoint_due(self.progress.step) or self.trainer.exhausted
                if due or stopping or self._last_step():
                    self.progress.seconds += time.perf_counter() - started
                    started = time.perf_counter()
                    with self.timer("save"):
                        self.save()
                self.guard.stop_if_exhausted()
                if stopping:
                    break
        if self.best:
            _copy_into(self.trainer.parameters, self.best)
        return self.progress

    def _one_step(self) -> StepReport:
        seed = derive_seed(self.run.config.seed, self.name, self.progress.step)
        seed_everything(seed)
        rows = self.config.rows_of_step(self.method.num_rows, self.run.config.seed, self.progress.step)
        with self.timer("collate"):
            micro_batches, num_tokens = self.method.micro_batches(rows), self.method.num_tokens(rows)
        through = self._num_through()
        with self.timer("update"):
            loss = self.method.loss(rows)
            report = self.trainer.step(micro_batches, loss)
        if self.method.backbone is not None:
            num_read = num_tokens if self.method.num_read is None else self.method.num_read(rows)
            padding = {"padding/train_share": padding_share(num_read, self._num_through() - through)}
            report = replace(report, metrics={**report.metrics, **padding})
        self.progress.step += 1
        self.progress.tokens += num_tokens
        self._tokens_since_log += num_tokens
        if report.skipped:
            self.guard.examine(report, micro_batches, loss, seed)
        return report

    def _num_through(self) -> int:
        return 0 if self.method.backbone is None else self.method.backbone.num_tokens_through

    def _last_step(self) -> bool:
        return self.progress.done or self.progress.step >= self.num_steps

    def _validation_due(self) -> bool:
        per_epoch = math.ceil(self.method.num_rows / self.config.rows_per_step)
        every = self.config.eval_steps or per_epoch
        return self.method.validate is not None and (self.progress.step % every == 0 or self._last_step())

    def _validated(self) -> dict[str, float]:
        assert self.method.validate is not None
        with self.timer("validate"):
            validation = self.method.validate()
        metrics = {f"validation/{name}": value for name, value in validation.metrics.items()}
        if validation.badness < self.progress.best_badness:
            self.progress.best_badness, self.progress.best_step = validation.badness, self.progress.step
            self.progress.best_metrics, self.progress.stale_validations = dict(validation.metrics), 0
            self.best = {name: p.detach().clone() for name, p in self.trainer.parameters.items()}
        else:
            self.progress.stale_validations += 1
            patience = self.config.early_stopping_patience
            if patience is not None and self.progress.stale_validations >= patience:
                self.progress.done = True
                self.run.logger.info(
                    f"{self.name}: no better validation in {patience} tries, going back to step "
                    f"{self.progress.best_step}"
                )
        return metrics

    def _log(self, reports: Sequence[StepReport], validation: Mapping[str, float]) -> None:
        last = reports[-1]
        seconds = self.timer.lap()
        training = seconds.get("collate", 0.0) + seconds.get("update", 0.0)
        line = mean_reports(reports)
        line |= {
            "train/loss": mean_loss(reports),
            "train/grad_norm": last.grad_norm,
            "train/learning_rate": last.learning_rate,
            "train/skipped_steps": self.trainer.skipped_count,
            "train/epoch": self.progress.step
            * min(self.config.rows_per_step, self.method.num_rows)
            / self.method.num_rows,
            "train/tokens": self.progress.tokens,
            "rate/steps_per_second": per_second(len(reports), training),
            "rate/tokens_per_second": per_second(self._tokens_since_log, training),
        }
        self._tokens_since_log = 0
        line |= memory_metrics(self.run.device) | {f"time/{phase}": value for phase, value in seconds.items()}
        self.run.logger.log(self.progress.step, line | dict(validation))

    def save(self) -> None:
        """Write everything needed to go on."""
        optimizer, plain = self.trainer.state()
        state: dict[str, Any] = {
            "progress": vars(self.progress),
            "reports": [asdict(report) for report in self.reports],
            "trainer": plain,
            "rng": rng_state(),
        }
        if math.isinf(self.progress.best_badness):
            state["progress"] = vars(self.progress) | {"best_badness": None}
        weights = {name: p.detach() for name, p in self.trainer.parameters.items()}
        self.run.save(self.progress.step, {"weights": weights, "optimizer": optimizer, "best": self.best}, state)

    def _restore(self, run: Run) -> None:
        checkpoint = run.resumed_from
        assert checkpoint is not None
        progress = dict(checkpoint.state["progress"])
        if progress["best_badness"] is None:
            progress["best_badness"] = math.inf
        self.progress = Progress(**progress)
        self.reports = [StepReport(**report) for report in checkpoint.state.get("reports", [])]
        _copy_into(self.trainer.parameters, checkpoint.tensors("weights"))
        self.best = {name: tensor.to(run.device) for name, tensor in checkpoint.tensors("best").items()}
        self.trainer.restore(checkpoint.tensors("optimizer"), checkpoint.state["trainer"])
        restore_rng_state(checkpoint.state["rng"])


@torch.no_grad()
def _copy_into(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
