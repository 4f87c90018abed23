"""What a suite is made of: items to ask, the names of the functions that read and judge the answers, and a version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.data.rows import Prompt


@dataclass(frozen=True)
class Item:
    """One question.

    `turns` are what the user says, one after the other (most items have one); `prompt` is what stands before them, such
    as a dialogue so far. A ranked item has `choices` instead of an answer to write: the model is asked how likely it
    finds each of them behind the prompt, `shots` being worked examples that stand before it. `spec` holds what the
    scorer needs to know. `extractor` and `scorer` overrule those of the suite.
    """

    item_id: str
    turns: tuple[str, ...] = ()
    prompt: Prompt = ""
    group: str = "all"
    choices: tuple[str, ...] = ()
    shots: tuple[str, ...] = ()
    spec: Mapping[str, Any] = field(default_factory=dict)
    extractor: str | None = None
    scorer: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The item as JSON types, for the hash of a suite."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


@dataclass(frozen=True)
class Suite:
    """A fixed set of items under a version.

    `sha256` is of the data: results of different hashes are not comparable, whatever the suite is called. `ranked`
    suites are scored by likelihood. A `guard` is a set whose items must not get worse from one model to the next.
    """

    name: str
    version: str
    sha256: str
    items: tuple[Item, ...]
    extractor: str
    scorer: str
    ranked: bool = False
    guard: bool = False
    description: str = ""

    @property
    def label(self) -> str:
        """Name, version and the beginning of the hash: what a number must be quoted with."""
        return f"{self.name} {self.version} ({self.sha256[:8]})"


def hash_of(items: tuple[Item, ...]) -> str:
    """SHA-256 of items that come from a program instead of a file."""
    lines = (json.dumps(item.to_json(), sort_keys=True, ensure_ascii=False) for item in items)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
