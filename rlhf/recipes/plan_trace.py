"""Running the phases of a recipe on imagined numbers, and what memory each takes at its peak.

Every function here calls the code that training calls, on a `hollow_backbone`, with batches as long as the config
allows: as many tokens as `max_tokens_per_micro_batch` lets pass at once, in rows as long as the data may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.algo.trainer import LossOutput, MicroBatch, OptimizerConfig, StepReport, Trainer
from rlhf.data.chat import TokenExample
from rlhf.data.preference_dataset import PreferenceExample
from rlhf.data.rows import PreferenceRow
from rlhf.infra.shadow import Shadow
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.models.hollow import BASE, Shape, hollow_backbone
from rlhf.models.lora import LoRAConfig
from rlhf.recipes.stages import held_as_trained
from rlhf.recipes.supervised import Method

ADAPTERS, OPTIMIZER, GRADIENTS, BEST = "adapters", "optimizer", "gradients", "best weights"
ACTIVATIONS, CACHE, LOGITS, MERGED, FILE = "activations", "KV cache", "logits", "merged", "file"
FRAMEWORK = "framework"
PARTS = (BASE, ADAPTERS, OPTIMIZER, GRADIENTS, ACTIVATIONS, CACHE, LOGITS, MERGED, BEST, FILE, FRAMEWORK)

MANY = 10**6  # rows, where a pass takes them from a whole data set


@dataclass(frozen=True)
class Phase:
    """One phase of a recipe at the moment of its most memory: bytes by part (keys are `PARTS`)."""

    name: str
    parts: Mapping[str, int]

    @property
    def num_bytes(self) -> int:
        """All that is resident."""
        return sum(self.parts.values())

    @property
    def needed_bytes(self) -> int:
        """Without a file that is mapped, whose pages the system takes back where memory is short."""
        return self.num_bytes - self.parts.get(FILE, 0)


@dataclass(frozen=True)
class Start:
    """What a stage starts from: a base, and the adapter that an earlier stage left on it (None: the bare base).

    `quantisation` is how the base was held that the adapter was trained on (see `ModelConfig.quantisation`).
    """

    shape: Shape
    adapter: LoRAConfig | None = None
    quantisation: Mapping[str, Any] = field(default_factory=dict)

    def held(self, model: ModelConfig) -> ModelConfig:
        """How the base is held in a stage with these settings, by the rules of `load_policy`."""
        return model if self.adapter is None or model.train == "full" else held_as_trained(model, self.quantisation)


@dataclass(frozen=True)
class RewardStart:
    """A reward model that scores in a stage: an adapter with a head on the policy's base, or on one of its own.

    An ensemble has an adapter with a head for each of its members.
    """

    start: Start
    has_own_base: bool
    is_classifier: bool = False
    num_members: int = 1


@dataclass(frozen=True)
class Rows:
    """The largest micro-batch: its rows (pairs), the columns that each takes, and whether a step has more than one."""

    count: int
    width: int
    is_accumulated: bool


@dataclass
class Tracer:
    """A shadow in which a stage runs phase after phase.

    `longest_row` holds rows shorter than the config would: rows up to some length may take more memory than long ones.
    What a block is for is told by its shape: rows as wide as a vocabulary are logits; while answers are sampled, some
    shapes are those of the cache, and some those of a weight that takes an adapter in.
    """

    on_cpu: bool = True
    longest_row: int | None = None
    vocab_sizes: set[int] = field(default_factory=set)
    phases: list[Phase] = field(default_factory=list)
    cache_shapes: set[tuple[int, ...]] = field(default_factory=set)
    folded_shapes: set[tuple[int, ...]] = field(default_factory=set)
    num_trained: int = 0
    widest_row: int = 0
    load: Phase = field(default_factory=lambda: Phase("load", {}))

    def __post_init__(self) -> None:
        self.shadow = Shadow(self._label)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Run the block in the shadow and note its peak under this name."""
        with self.shadow, self.shadow.phase() as peak:
            yield
        self.phases.append(Phase(name, peak.by_label))

    def backbone(self, start: Start, model: ModelConfig, dtype: str) -> Backbone:
        """The base of a stage, frozen, under the adapter it starts from (named `sft`)."""
        self.vocab_sizes.add(int(start.shape.config.get_text_config().vocab_size))
        with self.shadow.phase() as peak:
            backbone = hollow_backbone(start.shape, start.held(model), dtype, self.shadow, on_cpu=self.on_cpu)
        if self.on_cpu and not model.random_init:
            self._note_load(start, backbone, peak.by_label)
        if start.adapter is not None and model.train == "lora":
            self.add_adapter(backbone, "sft", start.adapter)
        return backbone

    def _note_load(self, start: Start, backbone: Backbone, parts: Mapping[str, int]) -> None:
        """Weights in another format than in their file are read from it, mapped as a whole; else it is the base."""
        if backbone.is_quantised or next(backbone.parameters()).dtype != start.shape.file_dtype:
            parts = {**parts, FILE: start.shape.num_parameters * start.shape.file_dtype.itemsize}
        if sum(parts.values()) > self.load.num_bytes:
            self.load = Phase("load", dict(parts))

    def add_adapter(self, backbone: Backbone, name: str, config: LoRAConfig) -> None:
        """A fresh adapter, frozen until it is chosen to train."""
        with self.shadow:
            backbone.add_adapter(name, config)
            backbone.train_only([])
        self.count_as_adapters(backbone)

    def count_as_adapters(self, backbone: Backbone) -> None:
        """Say that the adapters of a backbone are no part of its base."""
        self.shadow.relabel((p for name, p in backbone.named_parameters() if ".lora_" in name), ADAPTERS)

    def largest_rows(self, max_tokens: int, max_width: int, num_rows: int) -> Rows:
        """See `rows_within`; rows are not wider than `longest_row`."""
        rows = rows_within(max_tokens, min(max_width, self.longest_row or max_width), num_rows)
        self.widest_row = max(self.widest_row, rows.width)
        return rows

    def _label(self, tensor: Tensor) -> str:
        if tensor.ndim >= 2 and tensor.is_floating_point() and tensor.shape[-1] in self.vocab_sizes:
            return LOGITS
        if tuple(tensor.shape) in self.cache_shapes:
            return CACHE
        return MERGED if tuple(tensor.shape) in self.folded_shapes else ACTIVATIONS


class PlannedTrainer(Trainer):
    """A trainer in the middle of training: its optimizer has moments, and the step before left its gradients."""

    def __init__(
        self,
        tracer: Tracer,
        parameters: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        *,
        scale_loss: bool,
        is_accumulated: bool,
    ) -> None:
        super().__init__(parameters, config, num_training_steps=10, scale_loss=scale_loss)
        self._tracer, self._is_accumulated = tracer, is_accumulated
        tracer.num_trained = sum(p.numel() for p in parameters.values())
        with tracer.shadow:
            self._give_gradients()
            self.optimizer.step()
        self._count_gradients()
        moments = (value for state in self.optimizer.state.values() for value in state.values())
        tracer.shadow.relabel((value for value in moments if isinstance(value, Tensor)), OPTIMIZER)

    def step(self, micro_batches: Iterable[MicroBatch], loss_fn: Callable[[MicroBatch], LossOutput]) -> StepReport:
        def after_others() -> Iterator[MicroBatch]:
            # Here the step has let go of the gradients of the step before it.
            if self._is_accumulated:
                self._give_gradients()
            yield from micro_batches

        report = super().step(after_others(), loss_fn)
        self._count_gradients()
        return report

    def _count_gradients(self) -> None:
        self._tracer.shadow.relabel((p.grad for p in self.parameters.values() if p.grad is not None), GRADIENTS)

    def _give_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)


def trace_supervised(tracer: Tracer, method: Method[Any], trainer: PlannedTrainer) -> None:
    """Validation, the copy of the best weights that it leaves, and an optimizer step over the method's rows."""
    best: list[Tensor] = []
    if method.validate is not None:
        with tracer.phase("validate"):
            method.validate()
            best = [p.detach().clone() for p in trainer.parameters.values()]
            tracer.shadow.relabel(best, BEST)
    rows = list(range(method.num_rows))
    with tracer.phase("update"):
        trainer.step(method.micro_batches(rows), method.loss(rows))


def rows_within(max_tokens: int, max_width: int, num_rows: int) -> Rows:
    """Rows that fill a pass of `max_tokens` best: as wide as may be, and as many as there are."""
    count = min(num_rows, max(1, math.ceil(max_tokens / max_width)))
    return Rows(count, max(4, min(max_width, max_tokens // count)) if count > 1 else max_width, count < num_rows)


def text_examples(rows: Rows) -> list[TokenExample]:
    """Rows of which every token is trained; one is a token shorter, so that there is padding."""
    lengths = [rows.width] * (rows.count - 1) + [rows.width - (rows.count > 1)]
    return [TokenExample([0] * length, [False] + [True] * (length - 1)) for length in lengths]


def pair_examples(rows: Rows) -> list[PreferenceExample]:
    """Pairs that are nearly all answer, both sides together as wide as a row; rejected sides are a token shorter."""
    row = PreferenceRow(prompt="", chosen="", rejected="")
    answer = rows.width // 2 - 1
    return [PreferenceExample([0], [0] * answer, [0] * max(1, answer - 1), None, row)] * rows.count


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Named parameters that take gradients."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
