"""Parameters of which a few run with the fast tests, and all of them with both suites together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import pytest


def fast_some(values: Iterable[Hashable], *fast: Hashable) -> list[Any]:
    """Every value as a parameter; those that are not named in `fast` are marked slow."""
    listed = list(values)
    assert set(fast) <= set(listed), f"{fast} are not all among {listed}"
    return [pytest.param(value, marks=() if value in fast else pytest.mark.slow) for value in listed]
