"""Which logged metrics share a plot: a list of panels, each claiming keys of `logs/train.jsonl` by pattern."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.infra.errors import UserError

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_STEP_KEYS = ("step", "optimizer_step")
_MAX_LINES = 6


@dataclass(frozen=True)
class Panel:
    """A plot over training steps: its title, the unit of its axis and the keys it shows."""

    title: str
    unit: str
    keys: tuple[str, ...]


# The first pattern that matches a key claims it, so the narrow ones come first.
_CATALOGUE: tuple[tuple[str, str, str], ...] = (
    ("Tokens per second", "", r"^rate/|tokens_per_s"),
    ("Memory", "MB", r"^memory/|memory"),
    ("Seconds", "per step", r"^time/"),
    ("Optimizer steps", "so far, per iteration", r"optimizer_steps|updates_this|skipped"),
    ("Tokens seen", "so far", r"^train/tokens"),
    ("Padding", "share of tokens", r"padding"),
    ("Clipped, clamped, outlying", "share", r"(clipped|clamped|outlier)_share"),
    ("Truncated mass", "probability", r"truncated_mass"),
    ("Finished responses", "share", r"(finished|overlong)_share"),
    ("Groups", "per iteration", r"^grpo/(groups|sampling_rounds)"),
    ("Accuracy", "share", r"accurac"),
    ("Margin", "", r"margin"),
    ("Disagreement of an ensemble", "deviations", r"disagreement"),
    ("Reward by member", "deviations", r"^reward/detail/.*/member_"),
    ("Rule over rewards", "share of answers", r"^reward/detail/"),
    ("Reward by term", "", r"^reward/term/"),
    ("Reward", "", r"^(rewards?|scores?)/"),
    ("KL coefficient", "", r"kl.*(coef|beta)|^beta$"),
    ("KL of the update", "nats per token", r"(approx|old|update|inner).*kl|kl.*(old|update|k3)|^(policy|ppo|train)/kl"),
    ("KL to the reference", "nats per response", r"(^|/)kl($|/|_)|(^|/)kl"),
    ("Entropy", "nats per token", r"entropy"),
    ("Clip fraction", "share of tokens", r"clip_?frac|clipped_share|clip/"),
    ("Probability ratio", "distance from 1", r"(^|[_/])ratio|logprob_gap"),
    ("Explained variance", "", r"explained"),
    ("Policy loss", "", r"policy.*loss|loss.*policy|pg_loss"),
    ("Value loss", "", r"value.*loss|loss.*value"),
    ("Advantages", "", r"advantage"),
    ("Values and returns", "", r"(^|/)(value|return)s?($|/|_)"),
    ("Length change", "share of the start", r"length.*drift|drift.*length"),
    ("Length", "tokens", r"length"),
    ("Refusals", "share", r"refus"),
    ("Repetition", "share", r"repet|repeat|degenerat"),
    ("Finished responses", "share", r"finish|eos|truncat"),
    ("Gold score", "", r"gold"),
    ("Reward", "", r"reward|score"),
    ("Learning rate", "", r"(^|/)(lr|learning_rate)($|/|_)"),
    ("Gradient norm", "", r"grad"),
    ("Loss", "", r"loss|perplexity"),
)
# The order in which panels are shown: what was aimed at first, the machinery after it.
_ORDER = (
    "Reward", "Reward by term", "Gold score", "KL to the reference", "Entropy", "Loss", "Accuracy", "Margin", "Length",
    "Length change", "Refusals", "Repetition", "Finished responses", "Groups", "Policy loss", "Value loss",
    "Clip fraction", "KL of the update", "Probability ratio", "KL coefficient", "Advantages", "Values and returns",
    "Explained variance", "Clipped, clamped, outlying", "Truncated mass", "Gradient norm", "Learning rate",
    "Optimizer steps", "Tokens seen", "Padding", "Tokens per second", "Memory", "Seconds",
)  # fmt: skip
SHORT = ("Loss", "Accuracy", "Margin", "Reward")


def read_history(path: Path) -> list[dict[str, float]]:
    """Read `logs/train.jsonl`: one dict of numbers per line; "NaN" and "Infinity" become the numbers they name.

    Values that are not numbers are left out. UserError names the file and line that is not JSON.
    """
    if not path.is_file():
        raise UserError(f"no training log at {path}; give a run folder's logs/train.jsonl")
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number} is not JSON: {error.msg}") from error
            rows.append({key: value for key, raw in row.items() if (value := _number(raw)) is not None})
    return rows


def panels_of(rows: Sequence[Mapping[str, float]], only: Iterable[str] | None = None) -> list[Panel]:
    """Group the keys of a history into panels; keys no pattern knows are grouped by what stands before their slash."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key not in _STEP_KEYS))
    groups: dict[tuple[str, str], list[str]] = {}
    for key in keys:
        groups.setdefault(_place(key), []).append(key)
    wanted = None if only is None else set(only)
    named = [(title, unit, members) for (title, unit), members in groups.items() if wanted is None or title in wanted]
    named.sort(key=lambda group: _ORDER.index(group[0]) if group[0] in _ORDER else len(_ORDER))
    known = {title for title, _, _ in _CATALOGUE}
    return [
        # A lone key that no pattern knows is its own title: "custom/thing" says more than "Custom".
        Panel(
            title if title in known or len(members) > 1 else members[0],
            unit,
            tuple(members[start : start + _MAX_LINES]),
        )
        for title, unit, members in named
        for start in range(0, len(members), _MAX_LINES)
    ]


def _place(key: str) -> tuple[str, str]:
    for title, unit, pattern in _CATALOGUE:
        if re.search(pattern, key.lower()):
            return title, unit
    return (key.split("/")[0] if "/" in key else key).replace("_", " ").capitalize(), ""


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        return _NON_FINITE.get(value)
    if isinstance(value, (int, float)):
        return float(value)
    return None
