"""A comparison of methods from end to end, on toy data: recipes as they stand alone, equal starts, nothing twice."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import ANIMALS, interrupt_after, pairs, prompts, settings

from rlhf.infra.config import load_config
from rlhf.infra.experiment import Run
from rlhf.infra.interrupt import Stopped
from rlhf.recipes.ablation import run_ablation
from rlhf.recipes.ablation_config import AblationConfig
from rlhf.recipes.dpo import DPOConfig, run_dpo
from rlhf.recipes.resume import resume_run
from rlhf.recipes.reward import RewardConfig, run_reward

pytestmark = pytest.mark.slow

METHODS = ("ppo", "rloo", "dpo", "kto", "online_dpo", "best_of_n")
TRAINED = ("ppo", "rloo", "dpo", "kto", "online_dpo", "best_of_n_sft")
SMALL = [
    "ppo: {ppo: {rollout_batch_size: 8}}",
    "rloo: {grpo: {num_prompts: 2, num_generations: 4}}",
    "dpo: {data: {max_samples: 20}}",
    "online_dpo: {rounds: {num_prompts: 4}, training: {num_train_epochs: 1}}",
    "best_of_n: {best_of_n: {num_answers: 3, keep_unfinished: true}, sft: {data: {min_length: 1}}}",
]
LENGTHS = "lengths={ppo: 1, rloo: 2, dpo: 3, kto: 2, online_dpo: 1, best_of_n: 6}"


@pytest.fixture(scope="module")
def place(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows of both kinds and a reward model."""
    folder = tmp_path_factory.mktemp("ablations")
    for name, rows in {"pairs": pairs(24), "prompts": [{"prompt": prompt} for prompt in prompts(24)]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    small = [f"backbone={base}", f"data.train_files={folder / 'pairs.jsonl'}", "data.min_length=1"]
    run_reward(load_config(RewardConfig, overrides=settings(folder, "reward", *small, "training.max_steps=2")))
    return folder


def ablation(place: Path, base: Path, name: str, *more: str) -> AblationConfig:
    shared = [
        f"policy={base}",
        f"pairs.train_files={place / 'pairs.jsonl'}",
        f"prompts.train_files={place / 'prompts.jsonl'}",
        f"evaluate.data.train_files={place / 'prompts.jsonl'}",
        *("pairs.min_length=1", "generation.max_new_tokens=5", "evaluate.suite.num_heldout=8"),
        *("evaluate.greedy=false", "evaluate.data.validation_fraction=0", "seeds=[0, 3]"),
    ]
    return load_config(AblationConfig, overrides=settings(place, name, *shared, *more))


def all_methods(place: Path, base: Path, name: str) -> AblationConfig:
    return ablation(place, base, name, f"methods=[{', '.join(METHODS)}]", f"settings={{{', '.join(SMALL)}}}", LENGTHS)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "policy" / "adapter_model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs), one


@pytest.fixture(scope="module")
def straight(place: Path, base: Path) -> Path:
    run, found = run_ablation(all_methods(place, base, "straight"))
    assert found is not None
    assert {(one.method, one.seed) for one in found.outcomes} == {(name, seed) for name in METHODS for seed in (0, 3)}
    assert all(one.spent.training > 0 for one in found.outcomes)
    sampling = {one.method for one in found.outcomes if one.spent.sampling > 0}
    assert sampling == {"ppo", "rloo", "online_dpo", "best_of_n"}
    return run.folder


def test_every_method_trains_and_is_measured_on_the_same_prompts(straight: Path) -> None:
    for seed in (0, 3):
        place = straight / f"seed_{seed}"
        assert {path.name for path in place.iterdir() if (path / "policy").is_dir()} == set(TRAINED)
        rows = [json.loads(line) for line in (place / "eval" / "samples.jsonl").read_text().splitlines()]
        asked = {name: [row["prompt_id"] for row in rows if row["model"] == name] for name in ("sft", *METHODS)}
        assert all(prompts == asked["sft"] and len(prompts) == 8 for prompts in asked.values())
        assert all(abs(row["kl"]) < 1e-4 for row in rows if row["model"] == "sft")
    assert {path.name for path in straight.iterdir()} >= {
        "ablation.md",
        "ablation.json",
        "ablation.png",
        "lengths.json",
    }
    assert json.loads((straight / "lengths.json").read_text()) == {
        "ppo": 1,
        "rloo": 2,
        "dpo": 3,
        "kto": 2,
        "online_dpo": 1,
        "best_of_n": 6,
    }


def test_a_method_is_the_recipe_that_stands_alone(straight: Path, place: Path, base: Path) -> None:
    more = [f"data.train_files={place / 'pairs.jsonl'}", "data.min_length=1", "data.max_samples=20", "run.seed=3"]
    alone = ["training.max_steps=3", "training.num_train_epochs=3", f"policy={base}", *more]
    run = run_dpo(load_config(DPOConfig, "configs/dpo_tinychat.yaml", [*settings(place, "alone", *alone)]))
    # The file asks for eager attention, the ablation for nothing.
    assert_same_weights(straight / "seed_3" / "dpo", run.folder)


def test_interrupted_anywhere_it_goes_on_and_makes_nothing_twice(
    straight: Path, place: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ends = place / "stopped", 0
    while ends < 12:
        with monkeypatch.context() as patch:
            patch.setattr(Run, "should_stop", interrupt_after(4 + 6 * ends))
            done = {path: path.stat().st_mtime_ns for path in folder.rglob("policy/adapter_model.safetensors")}
            try:
                if ends:
                    resume_run(folder, lambda config, where: run_ablation(config, where))  # type: ignore[arg-type]
                else:
                    run_ablation(all_methods(place, base, "stopped"))
            except Stopped as stopped:
                assert str(folder) in str(stopped)
                ends += 1
            else:
                break
            assert all(path.stat().st_mtime_ns == moment for path, moment in done.items())
    assert 2 < ends < 12
    for seed in (0, 3):
        for name in TRAINED:
            assert_same_weights(folder / f"seed_{seed}" / name, straight / f"seed_{seed}" / name)
    tables = [json.loads((path / "ablation.json").read_text())["outcomes"] for path in (folder, straight)]
    for one, other in zip(*tables, strict=True):
        assert {**one, "spent": 0} == {**other, "spent": 0}


def test_methods_are_timed_where_no_length_is_given(place: Path, base: Path) -> None:
    run, found = run_ablation(ablation(place, base, "timed", "methods=[dpo]", "seeds=[0]", "seconds=0.3"))
    lengths = json.loads((run.folder / "lengths.json").read_text())
    timed = sorted(int(path.name.removeprefix("dpo_")) for path in (run.folder / "timing").iterdir())
    assert timed[0] == 20 and timed[1] >= 40 and lengths["dpo"] >= 1
    assert found is not None and found.outcomes[0].steps == f"{lengths['dpo']} steps"


def test_seconds_of_a_processor_are_counted_by_its_own_clock(
    place: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(time, "process_time", lambda: 1000.0 * next(ticks))
    more = ["methods=[dpo]", "seeds=[0]", "lengths={dpo: 4}", "clock=cpu"]
    _, found = run_ablation(ablation(place, base, "by_cpu", *more))
    assert found is not None and found.outcomes[0].spent.training > 1000
    assert "those of one processor" in (place / "by_cpu" / "ablation.md").read_text()


def test_a_method_that_diverges_is_told_and_the_others_go_on(place: Path, base: Path) -> None:
    wild = "settings={wild: {like: dpo, optimizer: {learning_rate: 1.0e+30, max_grad_norm: 1.0e+30}}}"
    more = ["methods=[wild, dpo]", "seeds=[0]", "lengths={wild: 40, dpo: 1}", wild]
    _, found = run_ablation(ablation(place, base, "wild", *more))
    assert found is not None and [one.method for one in found.outcomes] == ["dpo"]
    assert "wild diverged with 1 of 1 seeds." in json.loads((place / "wild" / "ablation.json").read_text())["said"]


def test_what_it_started_from_must_not_change(straight: Path, place: Path, base: Path) -> None:
    rows = place / "prompts.jsonl"
    text = rows.read_text()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Run, "should_stop", interrupt_after(2))
        run_ablation(ablation(place, base, "changed", "methods=[dpo]", "lengths={dpo: 2}"))
    rows.write_text(text + json.dumps({"prompt": ANIMALS[0]}) + "\n")
    try:
        with pytest.raises(Exception, match="has changed since it started"):
            resume_run(place / "changed", lambda config, where: run_ablation(config, where))  # type: ignore[arg-type]
    finally:
        rows.write_text(text)
