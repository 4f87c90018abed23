"""Each row of the correctness checklist is a test that carries its id in its name, or waits here with a reason.

`grep -rn "def test_.*T1_" tests` finds the tests of row T1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CHECKLIST = TESTS.parents[1] / "shared" / "checklist.md"
ROWS = {"T": 10, "P": 10, "V": 10, "O": 13, "C": 12}  # letter of a section: number of its rows
IDS = {f"{letter}{number}" for letter, last in ROWS.items() for number in range(1, last + 1)}

WAITING = {
    "P5": "there is no outside engine whose log-probabilities could differ",
    "C4": "there is no outside engine to deliver an adapter to",
    "C7": "rollouts are synchronous: no sample is ever stale",
    "C11": "there is one worker",
}


def names_of_tests() -> Iterator[str]:
    for file in sorted(TESTS.rglob("test_*.py")):
        yield from re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), flags=re.MULTILINE)


def ids_in(name: str) -> set[str]:
    """Ids at the beginning of a test's name, in either case: `test_P1_P3_kept_...` has two."""
    match = re.match(r"test((?:_[tpvoc]\d+)*)_", name, flags=re.IGNORECASE)
    return set(match[1].upper().split("_")) - {""} if match else set()


def test_every_row_is_tested_or_waits_with_a_reason() -> None:
    found = set().union(*(ids_in(name) for name in names_of_tests()))
    assert found - IDS == set(), "a test names a row that is not there"
    assert IDS - found - WAITING.keys() == set(), "a row without a test"
    assert found & WAITING.keys() == set(), "a row that waits although it has a test"


def test_the_rows_are_those_of_the_checklist() -> None:
    if not CHECKLIST.is_file():
        pytest.skip("the checklist is not beside the repository")
    listed = re.findall(r"^\| ([TPVOC]\d+)(?: D)? \|", CHECKLIST.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(listed) == IDS and len(listed) == len(IDS)
