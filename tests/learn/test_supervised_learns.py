"""SFT, the reward model and DPO learn toy tasks; early stopping and resuming give the weights they promise."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from fast_some import fast_some
from safetensors.torch import load_file
from toy_runs import WriteRows, column, demonstrations, interrupt_after, log_lines, pairs, settings

from rlhf.infra.config import load_config
from rlhf.infra.experiment import Run
from rlhf.infra.interrupt import Stopped
from rlhf.models.backbone import ModelConfig
from rlhf.models.decoding import GenerationConfig
from rlhf.models.policy import Policy
from rlhf.models.reward_model import RewardModel
from rlhf.recipes.dpo import DPOConfig, run_dpo
from rlhf.recipes.kto import KTOConfig, run_kto
from rlhf.recipes.resume import resume_run
from rlhf.recipes.reward import RewardConfig, run_reward
from rlhf.recipes.sft import SFTConfig, run_sft
from rlhf.recipes.stages import load_policy
from rlhf.rollout.sampler import Sampler


def sft(tmp_path: Path, base: Path, data: Path, name: str, *more: str) -> Run:
    shared = settings(tmp_path, name, f"model.name_or_path={base}", f"data.train_files={data}", "data.min_length=1")
    return run_sft(load_config(SFTConfig, overrides=[*shared, *more]))


@pytest.mark.parametrize(
    "more",
    fast_some([(), ("packing=true", "data.max_length=24")], ("packing=true", "data.max_length=24")),
    ids=["padded", "packed"],
)
def test_sft_learns_sixteen_answers_by_heart(
    tmp_path: Path, base: Path, write_rows: WriteRows, more: tuple[str, ...]
) -> None:
    rows = demonstrations(16)
    run = sft(
        tmp_path,
        base,
        write_rows(rows),
        "sft",
        "data.validation_fraction=0",
        "model.train=full",
        "training.num_train_epochs=60",
        "optimizer.learning_rate=0.01",
        *more,
    )
    losses = column(run.folder, "train/loss")
    assert losses[0] == pytest.approx(math.log(27), abs=0.3)  # the untrained model knows nothing
    assert losses[-1] < 0.05
    loaded = load_policy("sft", ModelConfig(), tmp_path, torch.device("cpu"))
    tokenizer = loaded.backbone.tokenizer
    sampler = Sampler(
        Policy(loaded.backbone, loaded.adapter),
        GenerationConfig(max_new_tokens=8, temperature=0),
        [tokenizer.eos_token_id],
    )
    answered = sampler.sample([tokenizer(row["prompt"])["input_ids"] for row in rows], 0)
    texts = tokenizer.batch_decode(answered.responses(), skip_special_tokens=True)
    assert texts == [row["completion"] for row in rows]
    assert bool(answered.finished_B.all())


def test_early_stopping_goes_back_to_the_best_weights(tmp_path: Path, base: Path, write_rows: WriteRows) -> None:
    held_out = demonstrations(12, seed=5)
    run = sft(
        tmp_path,
        base,
        write_rows(demonstrations(16)),
        "sft",
        f"data.validation_files={write_rows(held_out)}",
        "training.num_train_epochs=60",
        "training.eval_steps=2",
        "training.early_stopping_patience=3",
        "optimizer.learning_rate=0.01",
        "optimizer.lr_scheduler_type=constant",
    )
    losses = column(run.folder, "validation/loss")
    assert len(column(run.folder, "train/loss")) < 60  # it did stop
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 3
    assert losses[-1] > losses[best] + 0.01
    # What was saved gives the best loss, counted here token by token.
    loaded = load_policy("sft", ModelConfig(), tmp_path, torch.device("cpu"))
    tokenizer, total, count = loaded.backbone.tokenizer, 0.0, 0
    with torch.no_grad(), loaded.backbone.using(loaded.adapter):
        for row in held_out:
            prompt, answer = (tokenizer(row[part])["input_ids"] for part in ("prompt", "completion"))
            ids = [*prompt, *answer, tokenizer.eos_token_id]
            log_p = loaded.backbone.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            total -= sum(float(log_p[t - 1, ids[t]]) for t in range(len(prompt), len(ids)))
            count += len(ids) - len(prompt)
    assert total / count == pytest.approx(losses[best], abs=1e-4)


def reward(tmp_path: Path, base: Path, data: Path, name: str, *more: str) -> Run:
    shared = settings(tmp_path, name, f"backbone={base}", f"data.train_files={data}", "data.min_length=1")
    return run_reward(load_config(RewardConfig, overrides=[*shared, "model.lora.r=4", *more]))


@pytest.mark.parametrize("train", fast_some(["lora", "full"], "lora"))
def test_reward_model_separates_what_is_separable(
    tmp_path: Path, base: Path, write_rows: WriteRows, train: str
) -> None:
    run = reward(
        tmp_path,
        base,
        write_rows(pairs(64)),
        "reward",
        f"data.validation_files={write_rows(pairs(60, seed=1))}",
        "training.num_train_epochs=10",
        "optimizer.learning_rate=0.01",
        f"reward.train={train}",
        *(["model.lora=null"] if train == "full" else []),
    )
    assert column(run.folder, "train/loss")[0] == pytest.approx(math.log(2), abs=0.3)
    assert column(run.folder, "validation/accuracy")[-1] > 0.9
    report = json.loads((run.folder / "reward_report.json").read_text(encoding="utf-8"))
    assert report["accuracy"]["estimate"] > 0.9
    assert report["longer_wins"]["estimate"] == 0.5  # the answers of a pair are equally long
    model = RewardModel.load(run.folder / "reward_model")
    ids = model.tokenizer
    good, bad = (model(torch.tensor([ids(f"two red cat {word} dog <end>")["input_ids"]])) for word in ("good", "bad"))
    assert float(good) > float(bad)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_every_weight_can_train_on_top_of_an_adapter(
    tmp_path: Path, base: Path, write_rows: WriteRows, stage: str
) -> None:
    data = write_rows(demonstrations(8) if stage == "sft" else pairs(16))
    rate = "optimizer.learning_rate=0.02"
    first = sft(tmp_path, base, write_rows(demonstrations(8)), "first", "training.max_steps=3", rate)
    started = load_policy("first", ModelConfig(), tmp_path, torch.device("cpu"))
    ids = torch.tensor([[5, 6, 7]])
    one_step = ("training.max_steps=1", "optimizer.learning_rate=1e-12")
    if stage == "sft":
        sft(tmp_path, Path("first"), data, "second", "model.train=full", *one_step)
        second = load_policy("second", ModelConfig(), tmp_path, torch.device("cpu"))
        assert second.adapter is None
        found = second.backbone.hidden(ids)
    else:
        run = reward(tmp_path, Path("first"), data, "second", "reward.train=full", "model.lora=null", *one_step)
        found = RewardModel.load(run.folder / "reward_model").backbone.hidden(ids)
    expected = started.backbone.hidden(ids, adapter=started.adapter)
    assert not torch.allclose(expected, started.backbone.hidden(ids), atol=1e-3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert first.folder.is_dir()


def dpo(tmp_path: Path, base: Path, data: Path, name: str, *more: str) -> Run:
    shared = settings(tmp_path, name, f"policy={base}", f"data.train_files={data}", "data.min_length=1")
    return run_dpo(load_config(DPOConfig, overrides=[*shared, "model.lora.r=4", *more]))


@pytest.mark.parametrize("train", fast_some(["lora", "full"], "full"))
def test_dpo_starts_at_ln_2_and_falls(tmp_path: Path, base: Path, write_rows: WriteRows, train: str) -> None:
    run = dpo(
        tmp_path,
        base,
        write_rows(pairs(64)),
        "dpo",
        f"data.validation_files={write_rows(pairs(30, seed=1))}",
        "training.num_train_epochs=6",
        "optimizer.learning_rate=0.005",
        f"model.train={train}",
        *(["model.lora=null"] if train == "full" else []),
    )
    losses = column(run.folder, "train/loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert column(run.folder, "train/margin")[0] == pytest.approx(0, abs=1e-5)
    assert losses[-1] < 0.55
    assert column(run.folder, "train/accuracy")[-1] > 0.9
    assert column(run.folder, "validation/accuracy")[-1] > 0.9


# ---------------------------------------------------------------- interrupted and resumed


def no_pipeline(*_: object) -> None:
    raise AssertionError("no pipeline is resumed here")


def kto(tmp_path: Path, base: Path, data: Path, name: str, *more: str) -> Run:
    shared = settings(tmp_path, name, f"policy={base}", f"data.train_files={data}", "data.min_length=1")
    return run_kto(load_config(KTOConfig, overrides=[*shared, "model.lora.r=4", *more]))


@pytest.mark.parametrize("stage", fast_some(["sft", "reward", "dpo", "kto"], "dpo"))
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    tmp_path: Path, base: Path, write_rows: WriteRows, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(demonstrations(24) if stage == "sft" else pairs(24))
    start = {"sft": sft, "reward": reward, "dpo": dpo, "kto": kto}[stage]
    # LoRA's dropout makes the global generator matter (DPO has none); the validations keep a best that must survive.
    dropout = () if stage in ("dpo", "kto") else ("model.lora.lora_dropout=0.3",)
    more = (
        "training.per_device_train_batch_size=5",
        "training.num_train_epochs=2",
        "training.eval_steps=2",
        "optimizer.learning_rate=0.01",
        "optimizer.warmup_ratio=0.2",
        "data.validation_fraction=0.2",
        *dropout,
    )
    straight = start(tmp_path, base, data, "straight", *more)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "should_stop", interrupt_after(3))
        with pytest.raises(Stopped, match="rlhf resume"):
            start(tmp_path, base, data, "stopped", *more)
    folder = tmp_path / "stopped"
    product = "reward_model" if stage == "reward" else "policy"
    assert len(column(folder, "train/loss")) == 3
    assert not (folder / product).exists()
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "interrupted"
    resume_run(folder, no_pipeline)
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
    assert log_lines(folder) == log_lines(straight.folder)
    for file in sorted((straight.folder / product).glob("*.safetensors")):
        wanted, found = load_file(file), load_file(folder / product / file.name)
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[name], found[name]) for name in wanted), file.name
