"""What every run tells of its time, padding and memory; a profiled run is the same run, taken up or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_some import fast_some
from toy_runs import WriteRows, column, demonstrations, interrupt_after, log_lines, pairs, prompts, settings

from rlhf.data.forest import PADDING, Forest
from rlhf.infra.config import load_config
from rlhf.infra.experiment import Run
from rlhf.infra.interrupt import Stopped
from rlhf.models.backbone import Backbone
from rlhf.recipes.dpo import run_dpo
from rlhf.recipes.grpo import run_grpo
from rlhf.recipes.kto import run_kto
from rlhf.recipes.ppo import run_ppo
from rlhf.recipes.pretrain import run_pretrain
from rlhf.recipes.resume import CONFIGS, resume_run
from rlhf.recipes.reward import run_reward
from rlhf.recipes.sft import run_sft
from rlhf.recipes.supervised import SupervisedLoop
from rlhf.rollout import passes as rollout_passes

RUNNERS: dict[str, Callable[..., Run]] = {
    "pretrain": run_pretrain,
    "sft": run_sft,
    "reward": run_reward,
    "dpo": run_dpo,
    "kto": run_kto,
    "ppo": run_ppo,
    "grpo": run_grpo,
}
ONLINE = ("ppo", "grpo")
SUPERVISED = [
    "data.min_length=1",
    "training.per_device_train_batch_size=6",
    "training.num_train_epochs=3",
    "training.max_steps=4",
    "training.eval_steps=2",
    "data.validation_fraction=0.25",
]
SOURCE = {"sft": "model.name_or_path", "reward": "backbone"} | dict.fromkeys(("dpo", "kto", *ONLINE), "policy")
ONLINE_RUN = [
    "rewards=[{name: target_string, arguments: {text: red}}]",
    "generation.max_new_tokens=4",
    "data.validation_fraction=0",
]
Start = Callable[..., Run]


def slow(recipe: str, *more: str) -> Any:
    return pytest.param(recipe, more, marks=pytest.mark.slow)


@pytest.fixture
def start(tmp_path: Path, base: Path, write_rows: WriteRows) -> Start:
    """Start a toy run of a recipe under a name, with more settings."""
    files = {
        "pretrain": write_rows(demonstrations(24)),
        "sft": write_rows(demonstrations(24)),
        "reward": write_rows(pairs(24)),
        "ppo": write_rows([{"prompt": prompt} for prompt in prompts(12)]),
    }
    files |= {"dpo": files["reward"], "grpo": files["ppo"]}
    files["kto"] = write_rows([row | {"label": place % 3 > 0} for place, row in enumerate(demonstrations(24))])
    own = {
        "pretrain": [
            *SUPERVISED,
            *(f"architecture.{key}" for key in ("hidden_size=24", "num_hidden_layers=1", "vocab_size=300")),
            "architecture.num_key_value_heads=2",
            "data.max_length=24",
        ],
        "ppo": [
            *ONLINE_RUN,
            *(f"ppo.{key}" for key in ("num_iterations=4", "rollout_batch_size=12", "num_ppo_epochs=1")),
        ],
        "grpo": [*ONLINE_RUN, *(f"grpo.{key}" for key in ("num_iterations=4", "num_prompts=4", "num_generations=3"))],
    }
    own["ppo"].append("ppo.num_mini_batches=2")

    def begin(recipe: str, name: str, *more: str) -> Run:
        source = [f"{SOURCE[recipe]}={base}"] if recipe in SOURCE else []
        shared = [*source, f"data.train_files={files[recipe]}", *own.get(recipe, SUPERVISED), *more]
        return RUNNERS[recipe](load_config(CONFIGS[recipe], overrides=settings(tmp_path, name, *shared)))

    return begin


def raw_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "logs" / "train.jsonl").read_text(encoding="utf-8").splitlines()]


def products_of(trace: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return [event for event in events if event.get("name") in ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RUNNERS)
def test_a_profile_of_two_steps_and_the_same_log(start: Start, recipe: str) -> None:
    plain, profiled = start(recipe, "plain"), start(recipe, "profiled", "run.profile=true", "run.profile_steps=[2, 2]")
    assert log_lines(profiled.folder) == log_lines(plain.folder)
    assert not (plain.folder / "profile").exists()
    names = sorted(path.name for path in (profiled.folder / "profile").iterdir())
    assert names == ["steps_2-2.trace.json", "steps_2-2.txt"]
    products = products_of(profiled.folder / "profile" / "steps_2-2.trace.json")
    assert products and all(product["args"]["Input Dims"] for product in products)


@pytest.mark.parametrize("recipe", fast_some(RUNNERS, "ppo"))
def test_every_run_says_where_its_time_went(start: Start, recipe: str) -> None:
    folder = start(recipe, "run").folder
    phases = {"load", "update", "save", "other"}
    phases |= {"generate", "score", "reference", "advantage"} if recipe in ONLINE else {"collate", "validate"}
    phases |= {"reference"} if recipe in ("dpo", "kto") else set()
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert info["seconds_by_phase"].keys() == phases
    assert sum(info["seconds_by_phase"].values()) == pytest.approx(info["cost"]["seconds"], rel=0.1, abs=0.2)
    last = (folder / "logs" / "train.log").read_text(encoding="utf-8").splitlines()[-1]
    assert "| where the time went, " in last and "update" in last and "peak memory" in last
    for line in raw_lines(folder):
        assert {"time/update", "time/other", "rate/tokens_per_second", "memory/peak_mb", "memory/peak_rss_mb"} <= set(
            line
        )
        assert 0 <= line["padding/train_share"] < 1 and line["rate/tokens_per_second"] > 0
        assert all(line[name] >= 0 for name in line if name.startswith("time/"))
    if recipe in ONLINE:
        assert all(0 <= share < 1 for share in column(folder, "padding/generation_share"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sft", "ppo"])
def test_a_run_taken_up_again_is_profiled_all_the_same(
    start: Start, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times of both parts are added up, and the log is that of a run nobody interrupted and nobody looked at."""
    plain = start(recipe, "plain")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Run, "should_stop", interrupt_after(2))
        start(recipe, "run", "run.profile=true", "run.profile_steps=[2, 3]", "run.save_every_steps=1")
    folder = plain.folder.parent / "run"
    assert [path.name for path in (folder / "profile").glob("*.json")] == ["steps_2-2.trace.json"]
    first = json.loads((folder / "run.json").read_text(encoding="utf-8"))["seconds_by_phase"]
    resume_run(folder, pytest.fail)
    assert sorted(path.name for path in (folder / "profile").glob("*.json")) == [
        "steps_2-2.trace.json",
        "steps_3-3.trace.json",
    ]
    assert log_lines(folder) == log_lines(plain.folder)
    whole = json.loads((folder / "run.json").read_text(encoding="utf-8"))["seconds_by_phase"]
    assert all(whole[phase] > first[phase] for phase in ("load", "update"))


def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(tokens, of which padding) of every pass of a training step from here on, by mask where there is a plain one.

    Rows that are packed, and pairs, are told by their ids: of the words in files none has that of padding. Answers that
    were sampled may have it, and are told by their branches.
    """
    found: list[tuple[int, int]] = []
    hidden, hidden_of, step = Backbone.hidden, Backbone.hidden_of, SupervisedLoop._one_step
    inside, in_forest = [], []

    def note(padding: torch.Tensor) -> None:
        if inside or torch.is_grad_enabled():
            found.append((padding.numel(), int(padding.sum())))

    def watched(self: Backbone, ids: torch.Tensor, mask: torch.Tensor | None = None, *rest: Any, **named: Any) -> Any:
        if not in_forest:
            note(ids == 0 if mask is None or mask.dim() != 2 else ~mask)
        return hidden(self, ids, mask, *rest, **named)

    def watched_of(self: Backbone, forest: Forest, **named: Any) -> Any:
        note(forest.branch_BT == PADDING)
        in_forest.append(forest)
        read = hidden_of(self, forest, **named)
        in_forest.clear()
        return read

    def one_step(loop: Any) -> Any:
        inside.append(loop)
        report = step(loop)
        inside.clear()
        return report

    monkeypatch.setattr(Backbone, "hidden", watched)
    monkeypatch.setattr(Backbone, "hidden_of", watched_of)
    monkeypatch.setattr(SupervisedLoop, "_one_step", one_step)
    return found


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("sft", ()),
        ("ppo", ("ppo.value_adapter=true",)),
        slow("sft", "packing=true", "data.max_length=24", "training.max_tokens_per_micro_batch=48"),
        slow("reward"),
        slow("reward", "reward.suffix=one two"),
        slow("reward", "reward.ensemble.members=2"),
        slow("reward", "reward.pooling=mean", "reward.suffix=one two"),
        slow("dpo"),
        slow("kto"),
        slow("ppo"),
        slow("grpo"),
    ],
)
def test_the_share_of_padding_is_that_of_the_passes(
    start: Start, monkeypatch: pytest.MonkeyPatch, recipe: str, more: tuple[str, ...]
) -> None:
    """In one step of several micro-batches, counted at the door of the model."""
    section = recipe if recipe in ONLINE else "training"
    once = [f"{section}.num_iterations=1", f"{section}.num_mini_batches=1"]
    once = once if recipe in ONLINE else ["training.max_steps=1", "training.eval_steps=null"]
    if recipe in ONLINE:  # short rows would be cut by their length, without any padding
        monkeypatch.setattr(
            rollout_passes, "batches_by_tokens", lambda lengths, _: [[*range(i, len(lengths), 2)] for i in (0, 1)]
        )
    else:
        once.append("training.max_tokens_per_micro_batch=40")
    found = passes(monkeypatch)
    folder = start(recipe, "run", *once, *more).folder
    tokens, padding = (sum(column) for column in zip(*found, strict=True))
    assert len(found) > 1 and padding > 0
    assert column(folder, "padding/train_share") == [pytest.approx(padding / tokens)]
