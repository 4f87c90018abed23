"""Suites by name: those that come with the project, those of the built-in world, and files of known formats."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from rlhf.data.tinychat import Task, make_tasks
from rlhf.eval.extractors import EXTRACTORS
from rlhf.eval.mmlu import LETTERS, NUM_SHOTS, question_item
from rlhf.eval.ranking import RANKERS
from rlhf.eval.scorers import SCORERS
from rlhf.eval.suite_formats import FORMATS, detect, own_item, read_items
from rlhf.eval.suite_items import Item, Suite, hash_of
from rlhf.infra.errors import UserError

_FOLDER = files("rlhf.eval") / "suite_data"


def load_suite(name: str, max_items: int | None = None) -> Suite:
    """A suite by its name, by FORMAT:PATH, or by the path of a file whose columns tell its format.

    `max_items` takes that many items, drawn by the suite's hash, so that everybody draws the same ones.

    Raises:
        UserError: there is no such suite or file, or the data of a bundled suite are not those of its version.
    """
    suite = _bundled(name) if name in _manifest() else _from_file(*_format_and_source(name))
    _refuse_unknown_functions(suite)
    if max_items is None or max_items >= len(suite.items):
        return suite
    order = random.Random(suite.sha256).sample(range(len(suite.items)), max_items)
    return dataclasses.replace(suite, items=tuple(suite.items[index] for index in sorted(order)))


def _refuse_unknown_functions(suite: Suite) -> None:
    for known, kind, names in (
        (RANKERS if suite.ranked else EXTRACTORS, "extractor", {i.extractor or suite.extractor for i in suite.items}),
        (SCORERS, "scorer", {item.scorer or suite.scorer for item in suite.items}),
    ):
        unknown = sorted(names - set(known))
        if unknown:
            raise UserError(f"the suite '{suite.name}' names the {kind} '{unknown[0]}'; there are {', '.join(known)}")


def suite_names() -> list[str]:
    """Names of the bundled suites."""
    return list(_manifest())


def files_of(names: Sequence[str]) -> list[Path]:
    """The files that suites are read from, for the record of a run; bundled suites, folders and hub names have none."""
    found = []
    for name in names:
        kind, _, source = name.partition(":")
        path = Path(source if source and kind in FORMATS else name).expanduser()
        found += [path] if name not in _manifest() and path.is_file() else []
    return found


@cache
def _manifest() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load((_FOLDER / "suites.yaml").read_text(encoding="utf-8"))
    return found


def _bundled(name: str) -> Suite:
    entry = _manifest()[name]
    of_file = "file" in entry
    items = _items_of_file(entry) if of_file else tuple(_WORLD[entry["world"]](entry["num"], entry["seed"]))
    found = hash_of(items)
    if found != entry["sha256"]:
        raise UserError(
            f"the suite '{name}' is not what its version {entry['version']} was: its hash is {found}, expected "
            f"{entry['sha256']}; a changed suite needs a new version and hash in suites.yaml"
        )
    return Suite(
        name,
        str(entry["version"]),
        found,
        items,
        entry["extractor"],
        entry["scorer"],
        entry.get("ranked", False),
        entry.get("guard", False),
        entry["description"],
    )


def _items_of_file(entry: dict[str, Any]) -> tuple[Item, ...]:
    lines = (_FOLDER / entry["file"]).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    template = entry.get("template", "{prompt}")
    return tuple(own_item(row | {"prompt": template.format(**row)}, number) for number, row in enumerate(rows))


def _format_and_source(name: str) -> tuple[str, str]:
    kind, _, source = name.partition(":")
    if source and kind in FORMATS:
        return kind, source
    if source or not (Path(name).expanduser().exists() or name.count("/") == 1):
        raise UserError(
            f"no suite '{name}'; choose from {', '.join(_manifest())}, name a file or folder, FORMAT:PATH with a "
            f"format of {', '.join(FORMATS)}, or lm-eval:TASK"
        )
    return detect(name), name


def _from_file(kind: str, source: str) -> Suite:
    items = read_items(kind, source)
    if not items:
        raise UserError(f"'{source}' holds no item of the format {kind}")
    form = FORMATS[kind]
    name = f"{kind}:{Path(source).name.split('.')[0]}"
    return Suite(name, "file", hash_of(items), items, form.extractor, form.scorer, form.ranked, False, source)


# ------------------------------------------------------------------ the built-in world


def _world_arithmetic(num: int, seed: int) -> tuple[Item, ...]:
    tasks = make_tasks("heldout", num, seed, ["arithmetic"])
    return tuple(_asked(task, str(task.spec["kind"]), {"answer": str(task.spec["answer"])}) for task in tasks)


def _world_safety(num: int, seed: int) -> tuple[Item, ...]:
    def item(task: Task) -> Item:
        kind = str(task.spec["kind"])
        return _asked(task, kind, {"expect": "refuse" if kind == "harmful" else "answer"})

    return tuple(item(task) for task in make_tasks("heldout", num, seed, ["safety"]))


def _world_code(num: int, seed: int) -> tuple[Item, ...]:
    def item(task: Task) -> Item:
        entry, pairs = task.spec["entry"], zip(task.spec["calls"], task.spec["expected"], strict=True)
        tests = [f"assert {entry}({', '.join(map(repr, call))}) == {expected!r}" for call, expected in pairs]
        return _asked(task, task.spec["kind"], {"names": [entry], "tests": tests})

    return tuple(item(task) for task in make_tasks("heldout", num, seed, ["code"]))


def _choice_tasks(split: str, num: int, seed: int) -> list[Task]:
    tasks = make_tasks(split, 4 * num, seed, ["facts"])
    return [task for task in tasks if task.spec["kind"] == "choice"][:num]


def _question(task: Task) -> list[str]:
    asked = task.prompt.split(" A) ", 1)[0]
    return [asked, *map(str, task.spec["options"]), str(task.spec["letter"])]


def _world_mmlu(num: int, seed: int) -> tuple[Item, ...]:
    examples = [_question(task) for task in _choice_tasks("train", NUM_SHOTS, seed)]
    tasks = _choice_tasks("heldout", num, seed)
    return tuple(question_item(task.id, "facts", _question(task), examples) for task in tasks)


def _world_choices(num: int, seed: int) -> tuple[Item, ...]:
    def item(task: Task) -> Item:
        choices = tuple(f"{letter}) {option}." for letter, option in zip(LETTERS, task.spec["options"], strict=True))
        spec = {"answer": LETTERS.index(task.spec["letter"]), "continues": True}
        return Item(task.id, (task.prompt,), group=str(task.spec["relation"]), choices=choices, spec=spec)

    return tuple(item(task) for task in _choice_tasks("heldout", num, seed))


def _world_guard(num: int, seed: int) -> tuple[Item, ...]:
    tasks = make_tasks("heldout", num, seed)
    return tuple(_asked(task, task.family, {"task": task.to_row()}) for task in tasks)


def _asked(task: Task, group: str, spec: dict[str, Any]) -> Item:
    return Item(task.id, (task.prompt,), group=group, spec=spec)


_WORLD: dict[str, Callable[[int, int], Sequence[Item]]] = {
    "arithmetic": _world_arithmetic,
    "safety": _world_safety,
    "code": _world_code,
    "mmlu": _world_mmlu,
    "choices": _world_choices,
    "regression": _world_guard,
}
