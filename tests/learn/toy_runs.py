"""Toy data, and how runs on it are started and read."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.infra.experiment import Run

WriteRows = Callable[[Sequence[Mapping[str, Any]]], Path]
ANIMALS, COLOURS, NUMBERS = ("cat", "dog", "bird", "fish"), ("red", "green", "blue", "black"), ("one", "two", "three")


def prompts(count: int, seed: int = 0) -> list[str]:
    """Distinct prompts of three to five words."""
    rng, found = random.Random(seed), dict[str, None]()
    while len(found) < count:
        words = [rng.choice(NUMBERS), *rng.choices(COLOURS, k=rng.randint(1, 3)), rng.choice(ANIMALS)]
        found[" ".join(words)] = None
    return list(found)


def demonstrations(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompts with arbitrary answers: they can only be learnt by heart."""
    rng = random.Random(seed)
    return [
        {"prompt": prompt, "completion": " ".join(rng.choices((*COLOURS, *ANIMALS), k=rng.randint(2, 5)))}
        for prompt in prompts(count, seed)
    ]


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs of equal length that differ in one word at an arbitrary place: good is preferred to bad."""
    rng, rows = random.Random(seed), []
    for prompt in prompts(count, seed):
        words, place = rng.choices(ANIMALS, k=rng.randint(1, 3)), rng.randint(0, 1)
        answers = [" ".join([*words[:place], word, *words[place:]]) for word in ("good", "bad")]
        rows.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
    return rows


def settings(folder: Path, name: str, *more: str) -> list[str]:
    """Overrides every toy run shares."""
    return [f"run.output_dir={folder}", f"run.name={name}", "run.device=cpu", "run.num_threads=1", *more]


def log_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log without what depends on the clock and the machine."""
    lines = [json.loads(line) for line in (folder / "logs" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "rate/", "memory/"))} for line in lines]


def column(folder: Path, name: str) -> list[float]:
    """One metric over the steps that have it."""
    return [line[name] for line in log_lines(folder) if name in line]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def interrupt_after(checks: int) -> Any:
    """A `Run.should_stop` that sees Ctrl-C at its n-th call."""
    calls = 0

    def should_stop(run: Run) -> bool:
        nonlocal calls
        calls += 1
        if calls == checks:
            run.stop_reason = "interrupted"
        return calls == checks

    return should_stop
