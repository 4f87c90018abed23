"""The whole pipeline on a sliver of the built-in world, and what a user meets: errors, interrupts, resuming."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SMALL = [
    "world.num_pairs=48",
    "world.num_validation_pairs=12",
    "world.num_prompts=24",
    "ppo.ppo.num_iterations=2",
    "ppo.ppo.rollout_batch_size=8",
    "ppo.generation.max_new_tokens=16",
    "evaluate.generation.max_new_tokens=16",
    "evaluate.suite.num_heldout=8",
    "evaluate.suite.num_ood=4",
    "evaluate.suite.num_probes=4",
    "evaluate.num_reward_pairs=16",
]


def rlhf(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "rlhf.cli", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    done = rlhf("pipeline", "run.name=small", "run.num_threads=1", *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_pipeline_leaves_every_stage_and_a_report(finished: Path) -> None:
    root = finished / "runs" / "small"
    for stage in ("sft", "dpo", "ppo"):
        assert (root / stage / "policy" / "adapter_model.safetensors").is_file()
    assert (root / "reward" / "reward_model" / "reward_head.safetensors").is_file()
    for name in ("EVAL_REPORT.md", "report.html", "report.json", "samples.jsonl"):
        assert (root / "eval" / name).stat().st_size > 0
    for stage in ("sft", "reward", "dpo", "ppo"):
        info = json.loads((root / stage / "run.json").read_text())
        assert info["status"] == "finished" and info["cost"]["optimizer_steps"] > 0
        assert (root / stage / "logs" / "train.jsonl").read_text().count("\n") > 0


def test_ppo_logs_every_metric_each_iteration(finished: Path) -> None:
    lines = (finished / "runs" / "small" / "ppo" / "logs" / "train.jsonl").read_text().splitlines()
    assert len(lines) == 2
    wanted = {
        "reward/mean", "reward/std", "kl/mean", "kl/p95", "entropy/mean", "policy/clip_fraction", "value/loss",
        "advantage/mean", "advantage/std", "length/drift", "refusal/rate", "rate/tokens_per_second", "memory/peak_mb",
    }  # fmt: skip
    for line in lines:
        assert wanted <= json.loads(line).keys()


def test_generate_answers_from_a_run(finished: Path) -> None:
    said = rlhf("generate", "small/ppo", "Tell me the capital of France.", "--temperature", "0", cwd=finished)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("> Tell me the capital of France.\n")
    again = rlhf("generate", "small/ppo", "Tell me the capital of France.", "--temperature", "0", cwd=finished)
    assert again.stdout == said.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ppo", "ppo.clip_rnage=0.1"], ["clip_rnage", "clip_range"]),
        (["sft", "data.train_files=[nowhere.jsonl]"], ["nowhere.jsonl"]),
        (["sft", "model.name_or_path=./nowhere"], ["nowhere"]),
        (["ppo", "policy=never_run"], ["never_run"]),
        (["sft", "run.device=cuda"], ["cuda"]),
        (["ppo", "rewards=[{name: nosuch}]"], ["nosuch", "target_string"]),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    refused = rlhf(*arguments, cwd=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert "Traceback" not in refused.stderr
    for word in words:
        assert word in refused.stderr
    assert not list(tmp_path.rglob("run.json"))


def test_ctrl_c_writes_a_checkpoint_and_resume_goes_on(tmp_path: Path) -> None:
    arguments = ["sft", "run.name=long", "run.num_threads=1", "data.max_samples=256", "data.max_validation_samples=8"]
    arguments += ["training.num_train_epochs=3", "training.per_device_train_batch_size=8"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf.cli", *arguments], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "runs" / "long" / "logs" / "train.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "rlhf resume runs/long" in stderr
    resumed = rlhf("resume", "runs/long", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 97))
