"""How far judges agree beyond chance: Cohen's kappa for two, Fleiss' kappa for any number, with bootstrap intervals.

Where it is arbitrary which of two answers stands first, as in pairs of a chosen and a rejected one, chance must not
know it: who always says "first" there would share a habit with the file, not with people. `turned` says what each
rating becomes when an item is turned around, and every item then counts both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import chain

import numpy as np

from rlhf.eval.intervals import FloatArray, Interval, bootstrap
from rlhf.infra.errors import UserError


def cohen_kappa(
    first: Sequence[Hashable],
    second: Sequence[Hashable],
    seed: int = 0,
    turned: Mapping[Hashable, Hashable] | None = None,
) -> Interval:
    """Agreement of two raters on the same items, 1 perfect, 0 as good as chance; NaN where both always say the same.

    Source: Cohen (1960). The interval resamples items.
    """
    if len(first) != len(second) or not first:
        raise UserError(f"kappa needs two raters on the same items; got {len(first)} and {len(second)} ratings")
    names = list(dict.fromkeys(chain(first, second, *([turned] if turned is not None else []))))
    places = {name: place for place, name in enumerate(names)}
    size = len(places)
    cells = np.zeros((len(first), size * size))
    for item, (a, b) in enumerate(zip(first, second, strict=True)):
        ways = [(a, b)] if turned is None else [(a, b), (turned[a], turned[b])]
        for one, other in ways:
            cells[item, places[one] * size + places[other]] += 1 / len(ways)

    def kappas(weights: FloatArray) -> FloatArray:
        tables = (weights @ cells).reshape(-1, size, size) / len(first)
        agreed = np.trace(tables, axis1=1, axis2=2)
        by_chance = (tables.sum(axis=2) * tables.sum(axis=1)).sum(axis=1)
        return _beyond_chance(agreed, by_chance)

    return _with_interval(kappas, len(first), seed)


def fleiss_kappa(
    ratings: Sequence[Sequence[Hashable]], seed: int = 0, turned: Mapping[Hashable, Hashable] | None = None
) -> Interval:
    """Agreement of several raters; `ratings` holds each item's ratings, equally many for every item, at least two.

    Source: Fleiss (1971). NaN where every rating is the same.
    """
    counts = {len(of_item) for of_item in ratings}
    if len(counts) != 1 or min(counts) < 2:
        raise UserError(
            f"Fleiss' kappa needs the same number of ratings, two or more, for every item; got {sorted(counts)}"
        )
    num_raters = counts.pop()
    names = list(dict.fromkeys(chain(chain.from_iterable(ratings), *([turned] if turned is not None else []))))
    places = {name: place for place, name in enumerate(names)}
    back = [places[name if turned is None else turned[name]] for name in names]
    table = np.zeros((len(ratings), len(places)))
    for item, of_item in enumerate(ratings):
        for rating in of_item:
            table[item, places[rating]] += 1
    agreed_in_item = ((table**2).sum(axis=1) - num_raters) / (num_raters * (num_raters - 1))

    def kappas(weights: FloatArray) -> FloatArray:
        shares = weights @ (table + table[:, back]) / (2 * len(ratings) * num_raters)
        return _beyond_chance(weights @ agreed_in_item / len(ratings), (shares**2).sum(axis=1))

    return _with_interval(kappas, len(ratings), seed)


def _beyond_chance(agreed: FloatArray, by_chance: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(by_chance < 1 - 1e-12, (agreed - by_chance) / (1 - by_chance), np.nan)


def _with_interval(kappas: Callable[[FloatArray], FloatArray], num: int, seed: int) -> Interval:
    return bootstrap(float(kappas(np.ones((1, num)))[0]), num, kappas, seed)
