"""A wheel built here and installed elsewhere has everything inside it that the demo needs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_installed_wheel_runs_the_demo(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert "rlhf/configs/demo.yaml" in names
    assert "rlhf/data/tinychat/model/model.safetensors" in names
    assert "rlhf/eval/report_template.html" in names
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    sliver = ["world.num_pairs=48", "world.num_validation_pairs=12", "world.num_prompts=24", "ppo.ppo.num_iterations=1"]
    sliver += ["ppo.ppo.rollout_batch_size=8", "evaluate.suite.num_heldout=8", "evaluate.suite.num_ood=4"]
    sliver += ["evaluate.suite.num_probes=4", "evaluate.num_reward_pairs=16", "run.num_threads=1"]
    code = "import sys, rlhf; from rlhf.cli import main; print(rlhf.__file__, file=sys.stderr); main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "pipeline", "--config", "demo.yaml", *sliver],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stderr
    assert (tmp_path / "runs" / "demo" / "eval" / "report.html").is_file()
