"""Files that others publish, read as suites: GSM8K, MBPP, HumanEval, XSTest, MT-bench, IFEval, MMLU, preference pairs.

Each format knows by which columns its rows are recognised, how a row becomes an item, and which extractor and scorer
belong to it. The wording that is put around a question is part of the item, hence of the suite's hash.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.data_config import DataConfig
from rlhf.data.loading import load_rows
from rlhf.data.reading import read_rows
from rlhf.data.rows import PreferenceRow
from rlhf.eval.mmlu import read_mmlu
from rlhf.eval.suite_items import Item
from rlhf.infra.errors import UserError

Fields = Mapping[str, Any]
_DEF = re.compile(r"(?m)^(?:async )?def (\w+)")


@dataclass(frozen=True)
class Format:
    """How rows of one kind are recognised (`columns`, all of them) and read, and how answers to them are judged."""

    columns: frozenset[str]
    extractor: str
    scorer: str
    to_item: Callable[[Fields, int], Item | None] | None = None
    read: Callable[[str], Sequence[Item]] | None = None
    ranked: bool = False


def read_items(name: str, source: str) -> tuple[Item, ...]:
    """Items of a file, folder or hub data set in the named format.

    Raises:
        UserError: the source cannot be read, or a row is not of the format; the sentence names the row.
    """
    kind = FORMATS[name]
    if kind.read is not None:
        return tuple(kind.read(source))
    assert kind.to_item is not None
    items: dict[str, Item] = {}
    for number, row in enumerate(read_rows(source, "test").rows):
        try:
            item = kind.to_item(row.fields, number)
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            wanted = ", ".join(sorted(kind.columns))
            raise UserError(
                f"'{row.file}' {row.unit} {row.place} is no row of {name} ({type(error).__name__}: {error}); expected "
                f"the columns {wanted}"
            ) from None
        if item is not None:
            items.setdefault(item.item_id, item)
    return tuple(items.values())


def detect(source: str) -> str:
    """Name of the format whose columns the first row has. Raises UserError where none fits."""
    if source.endswith((".tar.gz", ".tgz", ".tar")):
        return "mmlu"
    columns = set(read_rows(source, "test").rows[0].fields)
    for name, kind in FORMATS.items():
        if kind.columns and kind.columns <= columns:
            return name
    raise UserError(
        f"'{source}' with the columns {', '.join(sorted(map(str, columns)))} is in none of the formats of suites: "
        + "; ".join(f"{name} ({', '.join(sorted(kind.columns))})" for name, kind in FORMATS.items() if kind.columns)
        + "; say which with FORMAT:PATH"
    )


def own_item(row: Fields, number: int) -> Item:
    """Rows in this project's form: id, prompt or turns, group, and for the scorer whatever else the row holds."""
    known = {"id", "prompt", "turns", "group", "extractor", "scorer"}
    turns = tuple(map(str, row["turns"])) if "turns" in row else (str(row["prompt"]),)
    spec = {name: value for name, value in row.items() if name not in known}
    return Item(
        str(row.get("id", number)),
        turns,
        group=str(row.get("group", "all")),
        spec=spec,
        extractor=row.get("extractor"),
        scorer=row.get("scorer"),
    )


def _gsm8k(row: Fields, number: int) -> Item:
    solution = str(row["answer"])
    right = re.search(r"####\s*(-?[\d.,]+)", solution)
    if right is None:
        raise ValueError("the solution has no '#### number'")
    ask = f'{str(row["question"]).strip()}\n\nThink step by step, and end with a line "Answer: " and the number alone.'
    return Item(f"gsm8k-{number}", (ask,), spec={"answer": right.group(1).replace(",", "").rstrip(".")})


def _mbpp(row: Fields, number: int) -> Item:
    tests = [str(test) for test in row["test_list"]]
    # The reference says which of the names in the tests are functions to be written.
    names = [name for name in _DEF.findall(str(row["code"])) if any(re.search(rf"\b{name}\s*\(", t) for t in tests)]
    setup = [*map(str, row.get("test_imports") or []), str(row.get("test_setup_code") or "")]
    ask = f"{str(row.get('text') or row['prompt']).strip()}\nYour code should pass these tests:\n\n" + "\n".join(tests)
    spec = {"names": names, "tests": tests, "setup": "\n".join(setup).replace("\r\n", "\n")}
    return Item(f"mbpp-{row.get('task_id', number)}", (ask,), spec=spec)


def _humaneval(row: Fields, number: int) -> Item:
    start, entry = str(row["prompt"]), str(row["entry_point"])
    names = list(dict.fromkeys([*_DEF.findall(start), entry]))
    ask = f"Complete this Python function. Answer with the whole function and nothing else.\n\n```python\n{start}```"
    spec = {"start": start, "entry": entry, "names": names, "tests": [f"{row['test']}\n\ncheck({entry})\n"]}
    return Item(f"{row.get('task_id', number)}", (ask,), spec=spec)


def _xstest(row: Fields, number: int) -> Item:
    # In XSTest the prompts that ought to be refused are the "contrast" ones.
    harmful = str(row["type"]).startswith("contrast")
    spec = {"expect": "refuse" if harmful else "answer", "type": str(row["type"])}
    group = "harmful" if harmful else "benign"
    return Item(str(row.get("id", number)), (str(row["prompt"]),), group=group, spec=spec)


def _mt_bench(row: Fields, number: int) -> Item:
    turns = tuple(str(turn) for turn in row["turns"])
    spec = {"reference": list(row["reference"])} if row.get("reference") else {}
    return Item(f"question-{row['question_id']}", turns, group=str(row["category"]), spec=spec)


def _ifeval(row: Fields, number: int) -> Item:
    names, arguments = list(row["instruction_id_list"]), [dict(kwargs) for kwargs in row["kwargs"]]
    if len(names) != len(arguments):
        raise ValueError(f"{len(names)} instructions with {len(arguments)} sets of arguments")
    return Item(
        str(row.get("key", number)), (str(row["prompt"]),), spec={"instructions": names, "arguments": arguments}
    )


def _preferences(source: str) -> list[Item]:
    rows = load_rows(DataConfig(train_files=(source,)), (source,), "test").rows
    items = []
    for number, row in enumerate(rows):
        if not isinstance(row, PreferenceRow):
            raise UserError(f"'{source}' holds no preference pairs (prompt, chosen, rejected)")
        group = str(row.columns.get("subset", row.columns.get("family", "all")))
        name = str(row.columns.get("id", f"pair-{number}"))
        spec = {"answer": 0, "continues": True}
        items.append(Item(name, prompt=row.prompt, group=group, choices=(row.chosen, row.rejected), spec=spec))
    return items


FORMATS: dict[str, Format] = {
    "gsm8k": Format(frozenset({"question", "answer"}), "last_number", "number", _gsm8k),
    "mbpp": Format(frozenset({"code", "test_list"}), "python", "python_tests", _mbpp),
    "humaneval": Format(frozenset({"prompt", "test", "entry_point"}), "python_completion", "python_tests", _humaneval),
    "xstest": Format(frozenset({"type", "prompt"}), "whole", "refusal", _xstest),
    "mt_bench": Format(frozenset({"question_id", "category", "turns"}), "whole", "unjudged", _mt_bench),
    "ifeval": Format(frozenset({"prompt", "instruction_id_list", "kwargs"}), "whole", "instructions", _ifeval),
    "mmlu": Format(frozenset(), "likelihood", "chosen", read=read_mmlu, ranked=True),
    "preferences": Format(frozenset({"chosen", "rejected"}), "likelihood", "chosen", read=_preferences, ranked=True),
    "suite": Format(frozenset({"prompt", "scorer"}), "whole", "exact", own_item),
}
