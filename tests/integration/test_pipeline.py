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
from command_line import rlhf
from killed_runs import log_lines

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


ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    assert rlhf("pipeline", "run.name=small", f"run.output_dir={folder}", "run.num_threads=1", *SMALL) == 0
    return folder / "small"


def test_pipeline_leaves_every_stage_and_a_report(finished: Path) -> None:
    for stage in ("sft", "dpo", "ppo"):
        assert (finished / stage / "policy" / "adapter_model.safetensors").is_file()
    assert (finished / "reward" / "reward_model" / "reward_head.safetensors").is_file()
    for name in ("EVAL_REPORT.md", "report.html", "report.json", "samples.jsonl"):
        assert (finished / "eval" / name).stat().st_size > 0
    # PPO was watched, gold included, and the report says so.
    verdicts = json.loads((finished / "ppo" / "hacking.json").read_text())["verdicts"]
    assert {"length", "gold", "held_out_gap"} <= {verdict["sign"] for verdict in verdicts}
    report = (finished / "eval" / "EVAL_REPORT.md").read_text()
    for words in (
        "## What failed",
        "### ppo, while it trained: ",
        "### dpo, after training: ",
        "| Cost of training, seconds |",
    ):
        assert words in report
    for stage in ("sft", "reward", "dpo", "ppo"):
        info = json.loads((finished / stage / "run.json").read_text())
        assert info["status"] == "finished" and info["cost"]["optimizer_steps"] > 0
        assert (finished / stage / "logs" / "train.jsonl").read_text().count("\n") > 0


def test_ppo_logs_every_metric_each_iteration(finished: Path) -> None:
    lines = (finished / "ppo" / "logs" / "train.jsonl").read_text().splitlines()
    assert len(lines) == 2
    wanted = {
        "reward/mean", "reward/std", "kl/mean", "kl/p95", "entropy/mean", "policy/clip_fraction", "value/loss",
        "advantage/mean", "advantage/std", "length/drift", "refusal/rate", "rate/tokens_per_second", "memory/peak_mb",
    }  # fmt: skip
    for line in lines:
        assert wanted <= json.loads(line).keys()


def test_generate_answers_from_a_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["generate", str(finished / "ppo"), "Tell me the capital of France.", "--temperature", "0"]
    capsys.readouterr()
    assert rlhf(*asked) == 0
    said = capsys.readouterr().out
    assert said.startswith("> Tell me the capital of France.\n")
    assert rlhf(*asked) == 0
    assert capsys.readouterr().out == said


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
def test_bad_input_is_one_sentence_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert rlhf(*arguments, f"run.output_dir={tmp_path / 'runs'}") == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("rlhf: ") and "\n" not in said
    for word in words:
        assert word in said
    assert not list(tmp_path.rglob("run.json"))


@pytest.mark.slow
def test_ctrl_c_writes_a_checkpoint_and_resume_goes_on(tmp_path: Path) -> None:
    arguments = ["sft", "run.name=long", "run.num_threads=1", "data.max_samples=256", "data.max_validation_samples=8"]
    arguments += ["training.num_train_epochs=3", "training.per_device_train_batch_size=8"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf.cli", *arguments], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
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
    assert rlhf("resume", str(tmp_path / "runs" / "long")) == 0
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 97))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_log(finished: Path, tmp_path: Path) -> None:
    assert rlhf("pipeline", "run.name=small", f"run.output_dir={tmp_path}", "run.num_threads=1", *SMALL) == 0
    again = tmp_path / "small"
    for stage in ("sft", "reward", "dpo", "ppo"):
        lines = log_lines(again / stage)
        assert lines and lines == log_lines(finished / stage), stage
    assert (again / "eval" / "samples.jsonl").read_text() == (finished / "eval" / "samples.jsonl").read_text()
    other = tmp_path / "other"
    assert rlhf("pipeline", "run.name=small", f"run.output_dir={other}", "run.seed=1", *SMALL) == 0
    assert log_lines(other / "small" / "sft") != log_lines(finished / "sft")
