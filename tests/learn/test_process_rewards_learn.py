"""A process reward model learns which steps are wrong, beats what length knows, and resumes bit for bit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_some import fast_some
from safetensors.torch import load_file
from toy_runs import ANIMALS, COLOURS, WriteRows, column, interrupt_after, log_lines, prompts, settings

from rlhf.infra.config import load_config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run
from rlhf.infra.interrupt import Stopped
from rlhf.models.process_reward_model import ProcessRewardModel
from rlhf.recipes.prm import ProcessRewardConfig, run_prm
from rlhf.recipes.resume import resume_run
from rlhf.rewards.process import ProcessReward

LABELS = Path(__file__).parents[2].parent / "shared" / "data" / "process_labels"


def solutions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Two to four steps of equal length; one that names a bad thing is wrong, wherever it stands."""
    rng, rows = random.Random(seed), []
    for prompt in prompts(count, seed):
        steps = []
        for _ in range(rng.randint(2, 4)):
            words = [rng.choice(COLOURS), rng.choice(("good", "bad")), rng.choice(ANIMALS)]
            steps.append(" ".join(rng.sample(words, 3)))
        rows.append({"prompt": prompt, "completions": steps, "labels": ["bad" not in step for step in steps]})
    return rows


def prm(tmp_path: Path, base: Path, data: Path, name: str, *more: str) -> Run:
    shared = settings(tmp_path, name, f"backbone={base}", f"data.train_files={data}", "data.separator=<end>")
    return run_prm(load_config(ProcessRewardConfig, overrides=[*shared, "model.lora.r=4", *more]))


@pytest.mark.parametrize("train", fast_some(["lora", "full"], "lora"))
def test_wrong_steps_are_told_from_right_ones(tmp_path: Path, base: Path, write_rows: WriteRows, train: str) -> None:
    run = prm(
        tmp_path,
        base,
        write_rows(solutions(96)),
        "prm",
        f"data.validation_files={write_rows(solutions(40, seed=1))}",
        "training.num_train_epochs=12",
        "optimizer.learning_rate=0.01",
        f"prm.train={train}",
        *(["model.lora=null"] if train == "full" else []),
    )
    losses = column(run.folder, "train/loss")
    assert losses[0] == pytest.approx(0.693, abs=0.3) and losses[-1] < 0.3
    assert column(run.folder, "validation/auc")[-1] > 0.95
    report = json.loads((run.folder / "process_report.json").read_text(encoding="utf-8"))
    assert report["model"]["first_error"]["estimate"] > 0.8
    assert 0.4 < report["position"]["auc"]["estimate"] < 0.6  # all steps are equally long
    assert report["lead_over_position"]["auc"]["low"] > 0.2
    model = ProcessRewardModel.load(run.folder / "process_reward_model")
    good, bad = ProcessReward(model)(["two red cat"] * 2, ["blue good dog\ngood red cat", "blue good dog\nbad red cat"])
    assert good > 0.5 > bad


@pytest.mark.slow
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    tmp_path: Path, base: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(solutions(24))
    more = (
        "training.per_device_train_batch_size=5",
        "training.num_train_epochs=2",
        "training.eval_steps=2",
        "optimizer.learning_rate=0.01",
        "data.validation_fraction=0.2",
        "model.lora.lora_dropout=0.3",
    )
    straight = prm(tmp_path, base, data, "straight", *more)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "should_stop", interrupt_after(3))
        with pytest.raises(Stopped, match="rlhf resume"):
            prm(tmp_path, base, data, "stopped", *more)
    folder = tmp_path / "stopped"
    assert not (folder / "process_reward_model").exists()
    resume_run(folder, lambda *_: None)
    assert log_lines(folder) == log_lines(straight.folder)
    for file in ("process_report.json", "process_reward_model/reward_config.json"):
        assert (folder / file).read_text() == (straight.folder / file).read_text()
    for name in ("adapter_model.safetensors", "reward_head.safetensors"):
        wanted, found = (load_file(one / "process_reward_model" / name) for one in (straight.folder, folder))
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)


def test_rows_of_another_kind_are_refused_before_anything_is_written(
    tmp_path: Path, base: Path, write_rows: WriteRows
) -> None:
    data = write_rows([{"prompt": "red", "chosen": "a", "rejected": "b"}] * 30)
    with pytest.raises(UserError, match="PreferenceRow, expected worked solutions with step labels"):
        prm(tmp_path, base, data, "prm", "data.validation_fraction=0")
    assert not (tmp_path / "prm").exists()


@pytest.mark.slow
def test_labels_of_people_train_and_are_reported_by_question(tmp_path: Path) -> None:
    """PRM800K's 310 solutions on the bundled model: everything runs, no question stands on both sides."""
    file = LABELS / "prm800k_multi_step.json.gz"
    if not file.exists():
        pytest.skip("the published labels are not here")
    overrides = settings(
        tmp_path, "prm", f"data.train_files={file}", "data.validation_fraction=0.3", "training.num_train_epochs=1",
        "training.max_tokens_per_micro_batch=1024", "optimizer.learning_rate=0.001",
    )  # fmt: skip
    run = run_prm(load_config(ProcessRewardConfig, overrides=overrides))
    report = json.loads((run.folder / "process_report.json").read_text(encoding="utf-8"))
    losses = column(run.folder, "train/loss")
    assert losses[-1] < losses[0]
    assert 15 < report["num_questions"] < 45 and report["num_steps"] > 500
    for scorer in ("model", "constant", "position"):
        assert 0 < report[scorer]["log_loss"]["low"] < report[scorer]["log_loss"]["high"] < 1.5
