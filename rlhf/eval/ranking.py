"""Which choice a model takes, from how likely it finds each: the extractors of ranked suites.

A ranker gets the sum of log-probabilities and the number of tokens of each choice and returns the indices of the best
ones: several where they tie, so that a model that cannot tell gets its share of luck and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Ranker = Callable[[Sequence[float], Sequence[int]], list[int]]


def likelihood(sums: Sequence[float], lengths: Sequence[int]) -> list[int]:
    """The choice that is likeliest as a whole; of unequally long ones it favours the short."""
    return _best(sums)


def likelihood_per_token(sums: Sequence[float], lengths: Sequence[int]) -> list[int]:
    """The choice with the highest mean log-probability per token."""
    return _best([total / length for total, length in zip(sums, lengths, strict=True)])


def _best(values: Sequence[float]) -> list[int]:
    best = max(values)
    return [index for index, value in enumerate(values) if value == best]


RANKERS: dict[str, Ranker] = {"likelihood": likelihood, "likelihood_per_token": likelihood_per_token}
