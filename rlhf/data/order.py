"""The order in which rows are visited: a pure function, so a resumed run needs no saved sampler state."""

from __future__ import annotations

import random
from functools import lru_cache


# Recipes ask at every step; shuffling half a million rows takes a quarter of a second.
@lru_cache(maxsize=8)
def epoch_order(num_rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Return the shuffled row indices of one epoch.

    The same (num_rows, seed, epoch) gives the same order in every process. A text seed is hashed by `random` with
    SHA-512, which unlike `hash()` does not depend on the interpreter's hash seed.
    """
    order = list(range(num_rows))
    random.Random(f"epoch order, seed {seed}, epoch {epoch}").shuffle(order)
    return tuple(order)
