"""`rlhf bench` in processes of its own, on runs of a second: equal work, what differs, what is refused, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from tiny_backbones import tiny_model, word_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, and config files for SFT and PPO."""
    folder, tokenizer = tmp_path_factory.mktemp("bench"), word_tokenizer()
    tiny_model("llama", len(tokenizer), spread=0.1).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = [{"prompt": f"{a} {b}", "completion": f"{b} {a}"} for a in ("red", "blue", "cat") for b in ("one", "two")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = {"output_dir": str(folder / "runs"), "device": "cpu", "num_threads": 1}
    data = {"train_files": [str(folder / "rows.jsonl")], "validation_fraction": 0}
    sft = {
        "run": run,
        "model": {"name_or_path": str(folder / "base")},
        "data": data | {"min_length": 1},
        "training": {"max_steps": 3, "num_train_epochs": 3, "per_device_train_batch_size": 3, "logging_steps": 3},
    }
    ppo = {
        "run": run,
        "policy": str(folder / "base"),
        "rewards": [{"name": "target_string", "arguments": {"text": "red"}}],
        "data": data,
        "ppo": {"num_iterations": 2, "rollout_batch_size": 4},
        "generation": {"max_new_tokens": 3},
    }
    for name, tree in (("sft", sft), ("ppo", ppo)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return folder


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "rlhf.cli", "bench", *arguments]


def bench(workplace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*arguments), cwd=workplace, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(("config", "steps"), [("sft.yaml", 3), ("ppo.yaml", 8)])
def test_a_configuration_against_itself(workplace: Path, config: str, steps: int) -> None:
    ended = bench(workplace, config, config, "--pairs", "2", "--json", "found.json")
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert [line for line in lines if line.startswith("pair ")][1].startswith("pair 2 of 2: A ")
    assert "A and B have the same settings" in lines
    assert "the first step is left out as warm-up" in ended.stdout
    assert "over 2 pairs; the losses are equal, bit for bit" in lines[-1] and lines[-1].startswith("B / A in seconds")
    found = json.loads((workplace / "found.json").read_text(encoding="utf-8"))
    assert found["recipe"] == config.removesuffix(".yaml") and found["num_steps"] == steps
    assert found["largest_loss_difference"] == 0 and found["differing_work"] == [] == list(found["differing_keys"])
    assert found["matmul_gflops_per_second"].keys() == {"fp32", "bf16"}
    a, b = found["sides"]["A"], found["sides"]["B"]
    assert a["gflops_per_step"] == b["gflops_per_step"] > 0 and 0 < a["share"] < 1
    assert len(a["runs"]) == len(b["runs"]) == 2 and a["runs"][0]["losses"] == b["runs"][1]["losses"]
    pairs = [two["per_step"] / one["per_step"] for one, two in zip(a["runs"], b["runs"], strict=True)]
    assert found["ratio"]["low"] == pytest.approx(min(pairs)) and found["ratio"]["high"] == pytest.approx(max(pairs))
    assert not (workplace / "runs").exists() or list((workplace / "runs").iterdir()) == []


@pytest.mark.slow
def test_settings_of_one_side_and_work_that_differs(workplace: Path) -> None:
    shorter = ["sft.yaml", "sft.yaml", "run.seed=1", "--b", "training.max_steps=2", "--b", "model.lora.r=2"]
    ended = bench(workplace, *shorter, "--pairs", "1")
    assert ended.returncode == 2 and "pair 1" not in ended.stdout
    assert "A and B do not do the same work: optimizer steps: A 3, B 2; tokens: A " in ended.stderr
    ended = bench(workplace, *shorter, "--pairs", "1", "--unequal-work")
    assert ended.returncode == 0, ended.stderr
    assert "  training.max_steps: A 3, B 2" in ended.stdout and "  model.lora.r: A 16, B 2" in ended.stdout
    assert "the work is not the same: optimizer steps: A 3, B 2" in ended.stdout
    assert ended.stdout.splitlines()[-1].startswith("B / A in seconds per token: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sft.yaml", "sft.yaml", "--warmup", "3"], "a run of 3 steps cannot be measured when the first 3"),
        (
            ["sft.yaml", "sft.yaml", "--b", "model.name_or_path=nowhere"],
            "the run of B (sft.yaml) failed: there is no run 'nowhere'",
        ),
    ],
)
def test_a_run_that_cannot_be_measured(workplace: Path, arguments: Sequence[str], words: str) -> None:
    ended = bench(workplace, *arguments)
    assert ended.returncode == 2 and words in ended.stderr, ended.stderr
    assert list((workplace / "runs").iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_ends_the_worker_and_leaves_nothing(workplace: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = command("sft.yaml", "sft.yaml", "training.max_steps=100000", "training.num_train_epochs=1000000")
    process = subprocess.Popen(
        arguments,
        cwd=workplace,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A suite that a shell started in the background ignores Ctrl-C, and hands that on to what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    runs = workplace / "runs"
    try:
        while not list(runs.glob("bench-*/logs/train.jsonl")) and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=240)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # the worker as well, which would train for hours
        raise
    assert process.returncode == 130, told
    assert list(runs.iterdir()) == []
