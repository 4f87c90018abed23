"""The prediction for one stage, and the machine it is held against."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from rlhf.infra.device import DeviceName
from rlhf.infra.memory_limit import GB, MemoryLimit, framework_bytes, memory_limit
from rlhf.recipes.plan_sources import Stage
from rlhf.recipes.plan_trace import FRAMEWORK, Phase

# Share of the limit above which a plan is called tight: predictions were found at most so far off (docs/plan.md).
TIGHT = 0.85
# Taken by CUDA and the kernels that PyTorch loads, and by what its allocator cannot give out again: rules of thumb.
CUDA_CONTEXT, CUDA_FRAGMENTATION = 700_000_000, 0.05
Verdict = Literal["fits", "tight", "does not fit", "no limit known"]


@dataclass(frozen=True)
class Machine:
    """What a plan is held against: the kind of device, its memory, and what is taken before any tensor is there."""

    device: DeviceName
    limit: MemoryLimit | None
    framework: int

    @classmethod
    def of(cls, device: DeviceName, memory_gb: float | None = None) -> Machine:
        """This machine's device, or another of that kind with so much memory (GB of 10^9 bytes).

        To be called before tensors are made: on a CPU, what the process holds by then is the framework's share.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        limit = memory_limit(device) if memory_gb is None else MemoryLimit(int(memory_gb * GB), "--memory-gb")
        return cls(device, limit, CUDA_CONTEXT if device == "cuda" else framework_bytes())

    def with_framework(self, phase: Phase) -> Phase:
        """The phase with what is no tensor; on a GPU, also what its allocator loses between blocks."""
        taken = self.framework + (int(CUDA_FRAGMENTATION * phase.num_bytes) if self.device == "cuda" else 0)
        return replace(phase, parts={**phase.parts, FRAMEWORK: taken})


@dataclass(frozen=True)
class StagePlan:
    """One stage: its base, how many parameters that has and how many train, and its phases in order."""

    name: str
    base: str
    shape_origin: str
    num_parameters: int
    num_trained: int
    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Phase:
        """The phase that needs the most."""
        return max(self.phases, key=lambda phase: phase.needed_bytes)

    def verdict(self, limit: MemoryLimit | None) -> Verdict:
        """Whether the peak fits; `tight` where it would not if the prediction were 15 % too low."""
        if limit is None:
            return "no limit known"
        share = self.peak.needed_bytes / limit.num_bytes
        return "fits" if share <= TIGHT else "tight" if share <= 1 else "does not fit"


def plan_stage(stage: Stage, machine: Machine) -> StagePlan:
    """The peak of each phase of a stage."""
    phases, num_trained = stage.phases(on_cpu=machine.device == "cpu")
    return StagePlan(
        stage.name,
        stage.start.shape.name,
        stage.start.shape.origin,
        stage.start.shape.num_parameters,
        num_trained,
        tuple(machine.with_framework(phase) for phase in phases),
    )
