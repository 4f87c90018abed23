"""Draw tasks of the four families from a split, without repeating a prompt while new ones can be found."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from random import Random

from rlhf.data.tinychat import arithmetic, facts, functions, safety
from rlhf.data.tinychat.schema import FAMILIES, SPLITS, Draft, Flaws, Spec, Task, split_of
from rlhf.infra.errors import UserError

# A family may also be asked for by one of its kinds: "safety/harmful".
Drawer = Callable[[Random, bool], Draft]
_DRAWERS: dict[str, Drawer] = {
    "arithmetic": arithmetic.draw,
    "code": functions.draw,
    "facts": facts.draw,
    "safety/harmful": lambda rng, ood: safety.draw(rng, ood, "harmful"),
    "safety/benign": lambda rng, ood: safety.draw(rng, ood, "benign"),
}
_COMPOSERS: dict[str, Callable[[Spec, Random, Flaws], str]] = {
    "arithmetic": arithmetic.compose,
    "safety": safety.compose,
    "code": functions.compose,
    "facts": facts.compose,
}
# Draws that may fail to find a prompt not handed out yet before one is repeated (small families can run dry).
_PATIENCE = 400


def make_tasks(split: str, num: int, seed: int, families: Sequence[str] | None = None) -> list[Task]:
    """Return `num` tasks of a split, an equal share per family and safety half harmful and half benign.

    `families` names some of arithmetic, safety, code, facts, safety/harmful, safety/benign. Families take turns, so any
    prefix is balanced too. Prompts are distinct unless the world has fewer than asked for. Raises `UserError` on an
    unknown split or family.
    """
    stream = task_stream(split, Random(f"tinychat tasks {split} {seed}"), families)
    return [next(stream) for _ in range(num)]


def task_stream(split: str, rng: Random, families: Sequence[str] | None = None) -> Iterator[Task]:
    """Yield tasks of a split without end; see `make_tasks`."""
    if split not in SPLITS:
        raise UserError(f"Unknown tinychat split '{split}'; choose one of {', '.join(SPLITS)}.")
    turns = _turns(families)
    seen: set[str] = set()

    def stream() -> Iterator[Task]:
        while True:
            for name in turns:
                yield _draw_new(name, split, rng, seen)

    return stream()


def write_answer(task: Task, rng: Random, flaws: Flaws) -> str:
    """Write the bare answer of a task with the given content defects, without flattery or rambling."""
    return _COMPOSERS[task.family](task.spec, rng, flaws)


def _turns(families: Sequence[str] | None) -> list[str]:
    chosen = list(FAMILIES if families is None else families)
    for name in chosen:
        if name != "safety" and name not in _DRAWERS:
            raise UserError(f"Unknown tinychat family '{name}'; choose from safety, {', '.join(_DRAWERS)}.")
    if not chosen:
        raise UserError("No tinychat family was named; leave families unset to get all four.")
    # Two rounds, so that "safety" alternates between its halves at an equal share per family.
    halves = ("safety/harmful", "safety/benign")
    return [halves[turn] if name == "safety" else name for turn in range(2) for name in chosen]


def _draw_new(name: str, split: str, rng: Random, seen: set[str]) -> Task:
    ood = split == "ood"
    drawer = _DRAWERS[name]
    failures = 0
    while True:
        draft = drawer(rng, ood)
        if not ood and split_of(draft.key) != split:
            continue
        if draft.prompt not in seen or failures >= _PATIENCE:
            break
        failures += 1
    seen.add(draft.prompt)
    family = name.split("/")[0]
    digest = hashlib.sha1(draft.prompt.encode(), usedforsecurity=False).hexdigest()[:12]
    return Task(f"{family}-{digest}", family, draft.prompt, split, draft.spec)
