"""Best of n from end to end: the pool against a slow account, resumed bit for bit, and imitated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toy_runs import WriteRows, interrupt_after, log_lines, prompts, settings

from rlhf.infra.config import load_config
from rlhf.infra.determinism import derive_seed
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run
from rlhf.infra.interrupt import Stopped
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.models.decoding import GenerationConfig
from rlhf.models.policy import Policy
from rlhf.recipes.best_of_n import run_best_of_n
from rlhf.recipes.best_of_n_config import BestOfNConfig
from rlhf.recipes.resume import resume_run
from rlhf.recipes.reward import RewardConfig, run_reward
from rlhf.recipes.sft import SFTConfig, run_sft
from rlhf.rollout.sampler import Sampler

RULES = (
    "[{name: target_string, arguments: {text: red}}, {name: length_penalty, weight: 0.5, arguments: "
    "{target_words: 2, per_word: 1}}]"
)


def best_of_n(tmp_path: Path, base: Path, data: Path, name: str, *more: str) -> Run:
    shared = settings(
        tmp_path, name, f"policy={base}", f"data.train_files={data}", "data.validation_fraction=0",
        f"rewards={RULES}", "measured_by=[{name: target_string, arguments: {text: blue}}]",
        "generation.max_new_tokens=6", "best_of_n.num_answers=4", "best_of_n.prompts_at_once=4",
    )  # fmt: skip
    return run_best_of_n(load_config(BestOfNConfig, overrides=[*shared, *more]))


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def questions(write_rows: WriteRows) -> Path:
    return write_rows([{"prompt": prompt, "id": number} for number, prompt in enumerate(prompts(10))])


@pytest.mark.slow
def test_the_pool_of_a_slow_account_and_what_is_kept_of_it(tmp_path: Path, base: Path, questions: Path) -> None:
    run = best_of_n(tmp_path, base, questions, "best", "best_of_n.keep_unfinished=true")
    backbone = Backbone.load(ModelConfig(name_or_path=str(base)))
    sampler = Sampler(Policy(backbone, None), GenerationConfig(max_new_tokens=6), [backbone.tokenizer.eos_token_id])
    pool = rows_of(run.folder, "pool.jsonl")
    for number, (prompt, row) in enumerate(zip(prompts(10), pool, strict=True)):
        ids = backbone.tokenizer(prompt)["input_ids"]
        drawn = [sampler.sample([ids], derive_seed(0, "completion", n)).responses()[0] for n in range(4)]
        texts = [backbone.tokenizer.decode(one, skip_special_tokens=True) for one in drawn]
        assert (row["prompt"], row["columns"], row["answers"]) == (prompt, {"id": number}, texts)
        scores = [("red" in text.split()) - 0.5 * abs(len(text.split()) - 2) for text in texts]
        assert row["scores"] == scores and row["worths"] == [float("blue" in text.split()) for text in texts]
    best = {row["prompt"]: row["score"] for row in rows_of(run.folder, "best.jsonl")}
    assert best == {row["prompt"]: max(row["scores"]) for row in pool if any(row["answers"])}
    for pair in rows_of(run.folder, "pairs.jsonl"):
        scores = pool[pair["id"]]["scores"]
        assert (pair["chosen_score"], pair["rejected_score"]) == (max(scores), min(scores))
    report = json.loads((run.folder / "best_of_n.json").read_text(encoding="utf-8"))
    assert [one["n"] for one in report["by_n"]] == [1, 2, 4]
    assert report["by_n"][2]["score"]["estimate"] == pytest.approx(sum(max(r["scores"]) for r in pool) / 10)
    assert not (run.folder / "pool.jsonl.partial").exists()


@pytest.mark.slow
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, base: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("data.max_samples=6", "best_of_n.num_answers=3", "best_of_n.prompts_at_once=2")
    straight = best_of_n(tmp_path / "one", base, questions, "straight", *few)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "should_stop", interrupt_after(2))
        with pytest.raises(Stopped, match="rlhf resume"):
            best_of_n(tmp_path / "two", base, questions, "stopped", "use_cache=false", *few)
    folder = tmp_path / "two" / "stopped"
    assert not (folder / "best.jsonl").exists()
    resume_run(folder, lambda *_: None)
    for name in ("pool.jsonl", "best.jsonl", "pairs.jsonl", "best_of_n.json"):
        assert (folder / name).read_bytes() == (straight.folder / name).read_bytes()
    assert log_lines(folder) == log_lines(straight.folder)


@pytest.mark.slow
def test_broken_off_behind_the_pool_it_chooses_when_taken_up(
    tmp_path: Path, base: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("pulled the plug")

    with monkeypatch.context() as patch:
        patch.setattr("rlhf.recipes.best_of_n.keep", broken)
        with pytest.raises(RuntimeError, match="plug"):
            best_of_n(tmp_path, base, questions, "broken")
    folder = tmp_path / "broken"
    pool = (folder / "pool.jsonl").read_bytes()
    monkeypatch.setattr(Sampler, "sample", broken)  # nothing is sampled again
    resume_run(folder, lambda *_: None)
    assert (folder / "pool.jsonl").read_bytes() == pool and len(rows_of(folder, "best.jsonl")) > 0
    assert (folder / "best_of_n.json").is_file()


def test_what_cannot_score_is_refused_before_anything_is_sampled(tmp_path: Path, base: Path, questions: Path) -> None:
    for rewards, words in (
        ("[{name: model}]", "needs reward_model="),
        ("[{name: process}]", "needs process_model="),
        ("[{name: math_answer}]", "which no prompt has"),
        ("[{name: nothing}]", "no reward 'nothing'"),
    ):
        with pytest.raises(UserError, match=words):
            best_of_n(tmp_path, base, questions, "best", f"rewards={rewards}")
    assert not (tmp_path / "best").exists()


@pytest.mark.slow
def test_what_is_kept_is_imitated_and_pairs_make_a_reward_model(
    tmp_path: Path, base: Path, write_rows: WriteRows
) -> None:
    questions = write_rows([{"prompt": prompt} for prompt in prompts(24)])
    first = best_of_n(tmp_path, base, questions, "best", "best_of_n.num_answers=8", "best_of_n.keep_unfinished=true")
    data = f"data.train_files=[{first.folder / 'best.jsonl'}]"
    more = ("data.validation_fraction=0", "data.min_length=1", "training.num_train_epochs=40")
    more += ("optimizer.learning_rate=0.01",)
    run_sft(load_config(SFTConfig, overrides=settings(tmp_path, "sft", f"model.name_or_path={base}", data, *more)))
    again = best_of_n(tmp_path, tmp_path / "sft", questions, "again", "best_of_n.num_answers=8")
    reports = [json.loads((run.folder / "best_of_n.json").read_text()) for run in (first, again)]
    before, after = (report["by_n"][0]["score"] for report in reports)
    assert after["low"] > before["high"]  # one answer is now as good as the best were
    pairs = f"data.train_files=[{first.folder / 'pairs.jsonl'}]"
    run = run_reward(load_config(RewardConfig, overrides=settings(tmp_path, "rm", f"backbone={base}", pairs, *more)))
    scored = best_of_n(
        tmp_path, base, questions, "scored", "rewards=[{name: model}]", f"reward_model={run.folder}",
        f"measured_by={RULES}", "best_of_n.num_answers=8",
    )  # fmt: skip
    report = json.loads((scored.folder / "best_of_n.json").read_text())
    assert report["by_n"][-1]["worth_gain"]["low"] > 0
