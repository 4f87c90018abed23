"""The tests of the formulas are themselves tested: each wrong formula in `tests/mutants.py` must be caught."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "mutants.py"
ALGO = Path(__file__).parents[2] / "rlhf" / "algo"


# In parts, so that several workers can share them.
NUM_PARTS = 6


@pytest.mark.slow
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_every_mutant_is_caught(part: int) -> None:
    files = sorted(path.name for path in ALGO.glob("*.py") if path.name != "__init__.py")[part::NUM_PARTS]
    done = subprocess.run([sys.executable, str(SCRIPT), *files], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    outcomes = [line.split(maxsplit=1)[0] for line in lines[:-1]]
    assert done.returncode == 0, "\n".join(line for line in lines if re.match("[A-Z]", line)) + done.stderr
    assert set(outcomes) == {"sound", "caught"} and outcomes.count("caught") >= 3 * len(files)


def test_every_text_to_alter_is_there_once_and_no_file_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from mutants import MUTANTS

    assert MUTANTS.keys() == {path.name for path in ALGO.glob("*.py")} - {"__init__.py"}
    for file, mutants in MUTANTS.items():
        source = (ALGO / file).read_text(encoding="utf-8")
        assert len(mutants) >= 3, file
        for old, new, what in mutants:
            assert source.count(old) == 1 and new != old, f"{file}: {what}"
