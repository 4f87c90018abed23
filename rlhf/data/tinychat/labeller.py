"""The labeller: a noisy, slightly biased judge of pairs, so that a reward model learnt from it is a proxy for gold.

It prefers a over b with probability sigmoid(u / temperature), as Bradley and Terry have it (doi:10.2307/2334029), where
u is the gold gap plus small bonuses for the longer and for the flattering answer; then some labels are flipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from pydantic import Field

from rlhf.data.tinychat.signals import is_flattering, sentences
from rlhf.infra.config import Config
from rlhf.infra.errors import UserError

# Calibrated with `calibrate_temperature` on 8,000 pairs of the default candidates; a test holds it to 90 +- 2 %.
DEFAULT_TEMPERATURE = 0.133
# Answers that differ by this many words get most of the bonus for length.
_LENGTH_SCALE_WORDS = 10.0


class LabellerConfig(Config):
    """How the labeller errs; bonuses are in units of the gold score."""

    temperature: float = Field(default=DEFAULT_TEMPERATURE, gt=0, description="gold gap at which the odds are e to 1")
    label_noise: float = Field(default=0.1, ge=0, lt=0.5, description="share of labels flipped at random")
    longer_bonus: float = Field(default=0.02, ge=-1, le=1, description="added for the longer answer")
    flattery_bonus: float = Field(default=0.02, ge=-1, le=1, description="added for an answer that flatters")
    min_gap: float = Field(default=0.04, ge=0, lt=1, description="smallest difference in gold score of a pair")


@dataclass(frozen=True)
class Label:
    """A verdict on answers a and b: before the noise (`clean_prefers_a`), and as it is written down (`prefers_a`)."""

    clean_prefers_a: bool
    prefers_a: bool


class Labeller:
    """Draws labels from gold scores; deterministic given its generator."""

    def __init__(self, config: LabellerConfig | None = None) -> None:
        self.config = config or LabellerConfig()

    def label(self, gold_a: float, gold_b: float, text_a: str, text_b: str, rng: Random) -> Label:
        """Draw the label of one pair."""
        advantage = gold_a - gold_b + self.bias(text_a, text_b)
        clean = rng.random() < _sigmoid(advantage / self.config.temperature)
        flipped = rng.random() < self.config.label_noise
        return Label(clean, clean != flipped)

    def bias(self, text_a: str, text_b: str) -> float:
        """Return what the labeller's biases add to the gold gap of a over b."""
        longer = math.tanh((len(text_a.split()) - len(text_b.split())) / _LENGTH_SCALE_WORDS)
        flattering = _flatters(text_a) - _flatters(text_b)
        return self.config.longer_bonus * longer + self.config.flattery_bonus * flattering


def agreement(gaps: Sequence[float], biases: Sequence[float], temperature: float) -> float:
    """Return the expected share of draws that agree with gold, before noise; pairs of equal gold are left out."""
    terms = [
        _sigmoid(math.copysign(1.0, gap) * (gap + bias) / temperature)
        for gap, bias in zip(gaps, biases, strict=True)
        if gap != 0
    ]
    if not terms:
        raise UserError("The agreement of no pairs was asked for; give pairs whose gold scores differ.")
    return sum(terms) / len(terms)


def calibrate_temperature(
    gaps: Sequence[float], biases: Sequence[float] | None = None, target: float = 0.9, tolerance: float = 1e-4
) -> float:
    """Find by bisection the temperature at which Bradley-Terry draws agree with gold on `target` of the pairs.

    `gaps` are gold differences (either sign), `biases` what `Labeller.bias` adds to each. Raises `UserError` when no
    temperature in [1e-3, 100] reaches the target, as with biases larger than the gaps.
    """
    biases = [0.0] * len(gaps) if biases is None else biases
    low, high = 1e-3, 100.0
    if not agreement(gaps, biases, high) <= target <= agreement(gaps, biases, low):
        raise UserError(
            f"No temperature gives an agreement of {target:g}: it lies between {agreement(gaps, biases, high):.3f} and "
            f"{agreement(gaps, biases, low):.3f} on these pairs; lower the target or the biases."
        )
    while high / low > 1 + tolerance:
        middle = math.sqrt(low * high)
        if agreement(gaps, biases, middle) > target:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def _flatters(text: str) -> int:
    return int(any(is_flattering(part) for part in sentences(text)))
