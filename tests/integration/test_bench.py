"""The benchmark's own side: its workload can be made and every kind of work runs, in small."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
WORDS = ("please", "tell", "me", "how", "the", "red", "dog", "and", "a", "blue", "cat", "came", "home", "late", "cold")


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    numbers = random.Random(0)

    def text(count: int) -> str:
        return " ".join(numbers.choices(WORDS, k=count))

    rows = [
        {"prompt": f"\n\nHuman: {text(90)}\n\nAssistant:", "chosen": text(9), "rejected": text(7)} for _ in range(80)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run("workload.py", str(folder / "work"), str(folder / "rows.jsonl"))
    return folder / "work"


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCH / script), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(BENCH.parent)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "rm", "dpo", "ppo", "generate"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_our_side_runs_and_says_what_it_did(workload: Path, kind: str, dtype: str) -> None:
    measured = json.loads(run("ours.py", kind, str(workload), "1", "--dtype", dtype))
    assert measured["optimizer_steps"] == {"generate": 0, "ppo": 4}.get(kind, 1)
    assert measured["tokens"] > 100 and measured["s_per_step"] > 0 and measured["peak_mb"] > 100


@pytest.mark.slow
def test_what_each_saving_is_worth_is_printed(workload: Path) -> None:
    assert run("parts.py", str(workload), "--repeats", "1").startswith("prompt of a pair read once: ")
