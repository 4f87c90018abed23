"""Documents name what is there: every function of docs/papers.md exists, and none of the mathematics is left out."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAPERS = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
# Rooms whose every public function stands for an equation; classes of settings and of plain results do not.
COMPLETE = [
    *sorted((ROOT / "rlhf" / "algo").glob("*.py")),
    ROOT / "rlhf" / "eval" / "intervals.py",
    ROOT / "rlhf" / "rewards" / "detectors.py",
]


def rows() -> list[list[str]]:
    """The cells of every table row but the headings."""
    lines = [line for line in PAPERS.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if not line.startswith("| what")]


def named() -> list[tuple[str, str]]:
    """(file, name) of everything in the column of functions: "`file`: `name`, `name`; `file`: `name`"."""
    found = []
    for row in rows():
        for part in row[2].split(";"):
            file, *names = re.findall(r"`([^`]+)`", part)
            found += [(file, name) for name in names]
    return found


def defined(file: Path) -> set[str]:
    """Names of functions and classes of a file, methods as Class.method."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_every_row_of_papers_has_all_its_cells() -> None:
    assert len(rows()) > 30
    for row in rows():
        assert len(row) == 5 and all(row), row
        assert re.match(r"`[a-z_/]+\.py`: `", row[2]), row[2]


@pytest.mark.parametrize("file", sorted({file for file, _ in named()}))
def test_every_function_that_papers_names_exists(file: str) -> None:
    assert {name for one, name in named() if one == file} <= defined(ROOT / "rlhf" / file)


@pytest.mark.parametrize("path", COMPLETE, ids=lambda path: path.name)
def test_no_public_function_of_the_mathematics_is_missing_from_papers(path: Path) -> None:
    file = path.relative_to(ROOT / "rlhf").as_posix()
    public = {name for name in defined(path) if name[0].islower() and not name.startswith("_")}
    assert public <= {name for one, name in named() if one == file}
