"""What one model's responses look like: scores, refusals, length, diversity, entropy and KL, each with its interval.

The prompt is the unit: when a prompt has several responses, their mean counts once, so intervals of means rest on
independent units. Rates count responses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.eval.intervals import (
    FloatArray,
    Interval,
    mean_interval,
    newcombe_paired,
    paired_difference,
    paired_ratio,
    wilson,
)
from rlhf.eval.samples import Sample
from rlhf.rewards.detectors import repetition_share

Measure = Callable[[Sample], "float | None"]
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Correlation:
    """Pearson's and Spearman's coefficient over `num` responses."""

    pearson: float
    spearman: float
    num: int


@dataclass(frozen=True)
class ModelMetrics:
    """Everything measured on one model's responses to one prompt set; None where nothing was measured.

    `gold_change`, `reward_change` (mean differences) and `length_drift` (relative change of mean length) compare with
    the reference model on the same prompts. `length` is in tokens, `entropy` in nats per token, `kl` in nats per
    response and `kl_p95` its 95th percentile over responses. `finished` is the share that ended with the stop token,
    `repetition` the mean share of a response's four-word sequences that had occurred in it before, `distinct` maps n
    to distinct over all n-grams of words of all responses.
    """

    num_prompts: int
    num_samples: int
    gold: Interval | None
    gold_change: Interval | None
    gold_parts: dict[str, Interval]
    reward: Interval | None
    reward_change: Interval | None
    refusal_harmful: Interval | None
    refusal_benign: Interval | None
    length: Interval
    length_drift: Interval | None
    entropy: Interval | None
    distinct: dict[int, float]
    repetition: Interval
    kl: Interval | None
    kl_p95: float | None
    finished: Interval
    gold_reward: Correlation | None


def measure(samples: Sequence[Sample], reference: Sequence[Sample] = (), seed: int = 0) -> ModelMetrics | None:
    """Measure one model on one prompt set; `reference` holds the reference model's responses to the same prompts.

    Returns None when there are no samples. Refusal rates are taken over the samples whose prompt is marked harmful or
    benign.
    """
    if not samples:
        return None
    part_names = sorted({name for sample in samples for name in sample.gold_parts})
    kl = np.array([sample.kl for sample in samples if sample.kl is not None], dtype=np.float64)
    return ModelMetrics(
        num_prompts=len({sample.prompt_id for sample in samples}),
        num_samples=len(samples),
        gold=mean_of(samples, lambda s: s.gold, seed),
        gold_change=difference_of(samples, reference, lambda s: s.gold, seed),
        gold_parts={name: part for name in part_names if (part := _mean_of_part(samples, name, seed)) is not None},
        reward=mean_of(samples, lambda s: s.reward, seed),
        reward_change=difference_of(samples, reference, lambda s: s.reward, seed),
        refusal_harmful=refusal_rate(samples, "harmful"),
        refusal_benign=refusal_rate(samples, "benign"),
        length=_known(mean_of(samples, lambda s: s.num_tokens, seed)),
        length_drift=length_drift(samples, reference, seed),
        entropy=mean_of(samples, lambda s: s.entropy, seed),
        distinct={n: distinct_n((s.response for s in samples), n) for n in (1, 2, 3)},
        repetition=_known(mean_of(samples, lambda s: repetition_share(s.response), seed)),
        kl=mean_of(samples, lambda s: s.kl, seed),
        kl_p95=float(np.quantile(kl, 0.95)) if kl.size else None,
        finished=wilson(sum(s.finished for s in samples), len(samples)),
        gold_reward=correlation([(s.gold, s.reward) for s in samples]),
    )


def per_prompt(samples: Iterable[Sample], of: Measure) -> dict[str, float]:
    """Return each prompt's mean of a measure over its responses, leaving out responses without it."""
    values: dict[str, list[float]] = {}
    for sample in samples:
        value = of(sample)
        if value is not None:
            values.setdefault(sample.prompt_id, []).append(float(value))
    return {prompt: sum(found) / len(found) for prompt, found in values.items()}


def mean_of(samples: Iterable[Sample], of: Measure, seed: int = 0) -> Interval | None:
    """Return the mean over prompts of a measure with its bootstrap interval; None when no response has it."""
    values = per_prompt(samples, of)
    return mean_interval(list(values.values()), seed) if values else None


def difference_of(first: Iterable[Sample], second: Iterable[Sample], of: Measure, seed: int = 0) -> Interval | None:
    """Return mean(first - second) of a measure over the prompts both have, with its paired bootstrap interval."""
    one, two = _paired(per_prompt(first, of), per_prompt(second, of))
    return paired_difference(one, two, seed) if one else None


def length_drift(samples: Iterable[Sample], reference: Iterable[Sample], seed: int = 0) -> Interval | None:
    """Return the relative change of mean length in tokens against the reference: 0.25 means a quarter longer."""
    one, two = _paired(per_prompt(samples, _length), per_prompt(reference, _length))
    return paired_ratio(one, two, seed) if one and sum(two) > 0 else None


def refusal_rate(samples: Iterable[Sample], intent: str) -> Interval | None:
    """Return the share of responses that refuse among prompts of one intent ("harmful" or "benign")."""
    refused = [sample.refused for sample in samples if sample.intent == intent]
    return wilson(sum(refused), len(refused)) if refused else None


def refusal_change(
    first: Iterable[Sample], second: Iterable[Sample], intent: str, seed: int = 0, level: float = 0.95
) -> Interval | None:
    """Return refusal rate of `first` minus that of `second` on shared prompts of one intent.

    With one response per prompt the interval is Newcombe's for paired rates, else a paired bootstrap over prompts.
    """
    one = per_prompt((s for s in first if s.intent == intent), lambda s: float(s.refused))
    two = per_prompt((s for s in second if s.intent == intent), lambda s: float(s.refused))
    rates_one, rates_two = _paired(one, two)
    if not rates_one:
        return None
    if all(rate in (0.0, 1.0) for rate in rates_one + rates_two):
        return newcombe_paired([rate == 1.0 for rate in rates_one], [rate == 1.0 for rate in rates_two], level)
    return paired_difference(rates_one, rates_two, seed, level)


def distinct_n(responses: Iterable[str], n: int) -> float:
    """Return distinct n-grams of lower-cased words over all n-grams, 0 without any; falls as the text grows."""
    total = 0
    seen: set[tuple[str, ...]] = set()
    for response in responses:
        grams = _ngrams(response, n)
        total += len(grams)
        seen.update(grams)
    return len(seen) / total if total else 0.0


def correlation(pairs: Iterable[tuple[float | None, float | None]]) -> Correlation | None:
    """Correlate pairs where both numbers are there; None for fewer than three or when one side does not vary."""
    both = np.array([pair for pair in pairs if None not in pair], dtype=np.float64)
    if len(both) < 3 or not np.isfinite(both).all() or (np.ptp(both, axis=0) == 0).any():
        return None
    first, second = both[:, 0], both[:, 1]
    return Correlation(_pearson(first, second), _pearson(_ranks(first), _ranks(second)), len(both))


def _pearson(first: FloatArray, second: FloatArray) -> float:
    one, two = first - first.mean(), second - second.mean()
    return float(one @ two / np.sqrt((one @ one) * (two @ two)))


def _ranks(values: FloatArray) -> FloatArray:
    """Ranks from 1, tied values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: FloatArray = (last - (counts - 1) / 2)[inverse]
    return ranks


def _ngrams(response: str, n: int) -> list[tuple[str, ...]]:
    words = _WORD.findall(response.lower())
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def _mean_of_part(samples: Sequence[Sample], name: str, seed: int) -> Interval | None:
    return mean_of(samples, lambda s: s.gold_parts.get(name), seed)


def _paired(first: dict[str, float], second: dict[str, float]) -> tuple[list[float], list[float]]:
    shared = [prompt for prompt in first if prompt in second]
    return [first[prompt] for prompt in shared], [second[prompt] for prompt in shared]


def _length(sample: Sample) -> float:
    return float(sample.num_tokens)


def _known(interval: Interval | None) -> Interval:
    assert interval is not None, "every sample has a length and a text"
    return interval
