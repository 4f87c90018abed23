"""The benchmark's own side: its workload can be made and every kind of work runs, in small; the GPU's script too."""

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
@pytest.mark.parametrize("kind", ["sft", "rm", "dpo", "kto", "ppo", "grpo", "generate"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_our_side_runs_and_says_what_it_did(workload: Path, kind: str, dtype: str) -> None:
    measured = json.loads(run("ours.py", kind, str(workload), "1", "--dtype", dtype, "--new-tokens", "8"))
    assert measured["optimizer_steps"] == {"generate": 0, "ppo": 4}.get(kind, 1)
    assert measured["tokens"] > 100 and measured["s_per_step"] > 0 and measured["peak_mb"] > 100


@pytest.mark.slow
def test_grpo_learns_from_the_answers_that_both_sides_are_given(workload: Path) -> None:
    """Of 41 to 48 tokens each; advantages add up to nothing, so a loss is there from the second update on."""
    measured = json.loads(run("ours.py", "grpo", str(workload), "3", "--same-batch"))
    losses = measured["losses"]
    assert measured["optimizer_steps"] == len(losses) == 3
    assert measured["tokens"] == 4 * sum(range(41, 49))
    assert abs(losses[0]) < 1e-6 and losses[2] < losses[1] < -1e-4


def test_ktos_rows_come_in_the_order_that_the_peer_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step as in the file, and behind each prompt the answer of the row before, in a round of the step."""
    monkeypatch.syspath_prepend(str(BENCH))
    import ours

    lines = [json.dumps({"number": number}) + "\n" for number in range(40)]
    (tmp_path / "labelled.jsonl").write_text("".join(lines), encoding="utf-8")
    bench = ours.Bench(ours.arguments(["kto", str(tmp_path), "3"]))
    (path,) = bench.labelled().train_files
    written = [json.loads(line)["number"] for line in Path(path).read_text(encoding="utf-8").splitlines()]
    for step in range(3):
        rows = [written[row] for row in bench.training().rows_of_step(len(written), bench.run().seed, step)]
        assert sorted(rows) == list(range(8 * step, 8 * step + 8))
        behind = dict(zip(rows, rows[1:] + rows[:1], strict=True))
        assert behind == {8 * step + row: 8 * step + (row - 1) % 8 for row in range(8)}


@pytest.mark.slow
def test_the_script_for_a_gpu_checks_measures_and_writes_in_its_small_form(workload: Path) -> None:
    """On the CPU: the same code with tiny shapes, every step of decoding compiled (traced, that is)."""
    folder = workload.parent / "gpu"
    found_in = workload.parent / "gpu.json"
    words = ["--small", "--without-peer", "--pairs", "1", "--data", str(workload.parent / "rows.jsonl")]
    last = run("gpu.py", *words, "--folder", str(folder), "--json", str(found_in))
    found = json.loads(found_in.read_text(encoding="utf-8"))
    apart = {check["name"]: check["apart"] for check in found["checks"]}
    # Against itself the CPU differs by nothing, the compiled decoding by rounding.
    on_both = ("sft same-batch", "dpo load-in-4bit same-batch", "ppo", "answers: log-probs")
    assert {apart[name] for name in on_both} == {0}
    assert 0 < apart["answers, aot_eager: log-probs"] < 1e-4
    for name in ("answers, aot_eager", "answers, 4 bits, aot_eager"):
        assert apart[f"{name}: tokens that are others"] == 0
    assert len(found["comparison"]) == 14 and not found["machine"]["is_gpu"]
    rows = {row["name"]: row for row in found["large"]}
    plain, compiled = rows["generate, base in 4 bits"], rows["generate, base in 4 bits, aot_eager"]
    assert plain["tokens"] == compiled["tokens"] == 64 * 6 and compiled["compile_seconds"] > 0
    assert rows["QLoRA ppo"]["optimizer_steps"] == 4 and rows["QLoRA dpo"]["optimizer_steps"] == 1
    assert all(row["s_per_step"] > 0 and row["peak_mb"] > 100 for row in [*found["comparison"], *rows.values()])
    assert last.startswith("└")  # the table stands at the end


@pytest.mark.slow
def test_what_each_saving_is_worth_is_printed(workload: Path) -> None:
    assert run("parts.py", str(workload), "--repeats", "1", "--rows", "8").startswith("prompt of a group read once: ")
