"""What a check found, and how far two computations of one number may lie apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Level = Literal["green", "yellow", "red"]
LEVELS: tuple[Level, ...] = ("green", "yellow", "red")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: `seen` on this set-up, what a fault `breaks`, and the `fix` (empty where green)."""

    id: str
    title: str
    level: Level
    seen: str
    breaks: str
    fix: str = ""


@dataclass(frozen=True)
class Check:
    """The part of a finding that is known before looking; ids are those of the table in docs/doctor.md."""

    id: str
    title: str
    breaks: str

    def green(self, seen: str) -> Finding:
        """Sound."""
        return Finding(self.id, self.title, "green", seen, self.breaks)

    def yellow(self, seen: str, fix: str) -> Finding:
        """A risk: harmless in this setting, or a loss that may be meant."""
        return Finding(self.id, self.title, "yellow", seen, self.breaks, fix)

    def red(self, seen: str, fix: str) -> Finding:
        """A fault: a run would be wrong."""
        return Finding(self.id, self.title, "red", seen, self.breaks, fix)

    def graded(self, gap: Gap, bounds: Bounds, seen: str, fix: str) -> Finding:
        """Green, yellow or red by the bounds on a gap; what was measured is put in front of `seen`."""
        measured = bounds.measured(gap)
        told = f"{'mean' if bounds.of_mean else 'largest'} difference {measured:.1e} {seen}"
        if measured <= bounds.sound:
            return self.green(told)
        wide = f"{told}, above {bounds.sound:.0e}"
        # Put this way round, a NaN is red.
        return self.yellow(wide, fix) if measured <= bounds.broken else self.red(wide, fix)


@dataclass(frozen=True)
class Gap:
    """How far two computations of the same numbers lie apart."""

    largest: float
    mean: float

    @classmethod
    def between(cls, one: Tensor, other: Tensor, mask: Tensor | None = None) -> Gap:
        """Over all places, or those where the mask is True; two empty tensors do not differ."""
        apart = (one.float() - other.float()).abs()
        apart = apart.flatten() if mask is None else apart[mask]
        return cls(float(apart.max()), float(apart.mean())) if apart.numel() else cls(0.0, 0.0)


@dataclass(frozen=True)
class Bounds:
    """Up to `sound` a gap is rounding, above `broken` it is a fault; of the mean over tokens or of the largest."""

    sound: float
    broken: float
    of_mean: bool

    def measured(self, gap: Gap) -> float:
        """The number that is bounded."""
        return gap.mean if self.of_mean else gap.largest


# Log-probabilities in nats. In half precision a single rare token may be a few tenths off by rounding alone while the
# mean stays near a hundredth, so there the mean is bounded.
LOGPROB_BOUNDS: dict[str, Bounds] = {
    "fp32": Bounds(1e-4, 1e-3, of_mean=False),
    "bf16": Bounds(1e-2, 3e-2, of_mean=True),
    "fp16": Bounds(2e-3, 2e-2, of_mean=True),
}

# The same program run twice on the same numbers: any difference is a random number at work, not rounding.
REPEAT_BOUNDS = Bounds(1e-6, 1e-6, of_mean=False)


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level among the findings; green where there is none."""
    return LEVELS[max((LEVELS.index(finding.level) for finding in findings), default=0)]


def counted(number: int, of: int, noun: str) -> str:
    """`3 of 400 rows (0.8 %)`."""
    return f"{number} of {of} {noun} ({number / max(1, of):.1%})"
