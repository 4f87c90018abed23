"""Every preference loss, and KTO on single answers, teaches a small model which of two words is the better one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_some import fast_some
from toy_runs import WriteRows, column, log_lines, pairs, settings

from rlhf.algo.preference_loss import PREFERENCE_LOSSES
from rlhf.infra.config import load_config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run
from rlhf.models.backbone import ModelConfig
from rlhf.recipes.dpo import DPOConfig, compute_log_probs, run_dpo
from rlhf.recipes.kto import KTOConfig, run_kto
from rlhf.recipes.stages import load_policy


def thumbs(rows: Sequence[Mapping[str, str]], every_bad: int = 1) -> list[dict[str, Any]]:
    """Both sides of pairs as answers with a label; of the bad ones only each n-th."""
    good = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in rows]
    bad = [{"prompt": row["prompt"], "completion": row["rejected"], "label": False} for row in rows]
    return good + bad[::every_bad]


def right_share(source: str, folder: Path, rows: Sequence[Mapping[str, str]]) -> float:
    """Share of pairs whose better answer is the likelier one, each answer read by itself."""
    loaded = load_policy(source, ModelConfig(), folder, torch.device("cpu"))
    tokenizer, right = loaded.backbone.tokenizer, 0

    def told(row: Mapping[str, str], side: str) -> float:
        prompt, answer = (tokenizer(row[part])["input_ids"] for part in ("prompt", side))
        ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
        return float(compute_log_probs(loaded.backbone.model, ids, torch.ones_like(ids), torch.tensor([len(prompt)])))

    with torch.no_grad(), loaded.backbone.using(loaded.adapter):
        right = sum(told(row, "chosen") > told(row, "rejected") for row in rows)
    return right / len(rows)


def toy_run(recipe: str, tmp_path: Path, base: Path, data: Path, *more: str) -> Run:
    shared = settings(tmp_path, "run", f"policy={base}", f"data.train_files={data}", "data.min_length=1")
    shared += ["model.lora.r=4", "training.num_train_epochs=5", "optimizer.learning_rate=0.005", *more]
    if recipe == "kto":
        return run_kto(load_config(KTOConfig, overrides=shared))
    return run_dpo(load_config(DPOConfig, overrides=[*shared, f"loss={recipe}"]))


@pytest.mark.parametrize("loss", fast_some([*PREFERENCE_LOSSES, "kto"], "sigmoid", "kto"))
def test_every_loss_learns_which_word_is_better(tmp_path: Path, base: Path, write_rows: WriteRows, loss: str) -> None:
    train, held = pairs(64), pairs(30, seed=1)
    before = right_share(str(base), tmp_path, held)
    run = toy_run(loss, tmp_path, base, write_rows(train), f"data.validation_files={write_rows(held)}")
    assert 0.2 < before < 0.8
    assert right_share("run", tmp_path, held) > 0.9
    losses = column(run.folder, "validation/loss")
    assert losses[-1] < losses[0]
    if loss == "kto":
        assert column(run.folder, "train/loss")[0] == pytest.approx(0.5, abs=1e-6)
        assert column(run.folder, "train/kl")[0] == pytest.approx(0, abs=1e-5)
        assert column(run.folder, "validation/accuracy")[-1] > 0.8


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_losses_without_a_reference_never_ask_one(
    tmp_path: Path, base: Path, write_rows: WriteRows, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a reference was asked for")

    monkeypatch.setattr("rlhf.recipes.dpo.start_policy", refuse)
    monkeypatch.setattr("rlhf.recipes.dpo.kept_logprobs", refuse)
    full = ("model.train=full", "model.lora=null", "training.max_steps=1")  # where a reference would be a second model
    run = toy_run(loss, tmp_path, base, write_rows(pairs(24)), *full)
    assert not (run.folder / "cache").exists()
    assert (run.folder / "policy" / "model.safetensors").is_file()


# ---------------------------------------------------------------- KTO


def test_kto_tells_how_the_labels_are_balanced(tmp_path: Path, base: Path, write_rows: WriteRows) -> None:
    data = write_rows(thumbs(pairs(32), every_bad=4))  # 32 good and 8 bad
    told = (toy_run("kto", tmp_path, base, data, "data.validation_fraction=0", "training.max_steps=1").folder
            / "logs" / "train.log").read_text(encoding="utf-8")  # fmt: skip
    assert "labels: 32 desirable, 8 undesirable; weighted ratio 4.00, outside the 1 to 1.5" in told
    assert "set undesirable_weight between 2.67 and 4" in told
    more = ("run.overwrite=true", "undesirable_weight=3.2", "data.validation_fraction=0", "training.max_steps=1")
    toy_run("kto", tmp_path, base, data, *more)
    told = (tmp_path / "run" / "logs" / "train.log").read_text(encoding="utf-8")
    assert "weighted ratio 1.25, inside the 1 to 1.5 that arXiv:2402.01306 advises" in told


def test_kto_counts_steps_of_one_label_and_leaves_their_missing_reward_out(
    tmp_path: Path, base: Path, write_rows: WriteRows
) -> None:
    data = write_rows(thumbs(pairs(33), every_bad=11))  # 33 good and 3 bad: 36 rows, 12 steps of 3
    batches = ("training.per_device_train_batch_size=3", "training.num_train_epochs=1", "data.validation_fraction=0")
    lines = log_lines(toy_run("kto", tmp_path, base, data, *batches).folder)
    assert len(lines) == 12
    for line in lines:
        share = line["train/desirable_share"]
        assert line["train/one_label"] == pytest.approx(float(share in (0.0, 1.0)))
        assert ("train/undesirable_reward" in line) == (share < 1)
        assert ("train/margin" in line) == (0 < share < 1)
    assert sum(3 * line["train/desirable_share"] for line in lines) == pytest.approx(33)
    assert 9 <= sum(line["train/one_label"] for line in lines) < 12


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row for row in thumbs(pairs(12)) if row["label"]], "all 12 answers are labelled desirable"),
        ([row for row in thumbs(pairs(12)) if not row["label"]], "all 12 answers are labelled undesirable"),
        (thumbs(pairs(1)), "no answer of the 2 can stand behind the prompt of another"),
        ([{"prompt": "red", "completion": "cat"}], "expected answers with a label"),
    ],
)
def test_kto_refuses_data_it_cannot_learn_from(
    tmp_path: Path, base: Path, write_rows: WriteRows, rows: list[dict[str, Any]], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        toy_run("kto", tmp_path, base, write_rows(rows), "data.validation_fraction=0")
    assert not (tmp_path / "run").exists()
