"""Online DPO raises a reward by rounds, each of ordinary runs; pairs and rounds resume bit for bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import WriteRows, column, interrupt_after, log_lines, prompts, settings

from rlhf.data.rows import Prompt
from rlhf.infra.config import load_config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run
from rlhf.infra.interrupt import Stopped
from rlhf.recipes.online_dpo import run_online_dpo
from rlhf.recipes.online_dpo_config import OnlineDPOConfig
from rlhf.recipes.pairs import ANSWERS, PAIRS, REPORT, Block, blocks_of, run_pairs
from rlhf.recipes.pairs_config import PairsConfig
from rlhf.recipes.resume import resume_run

RED = "rewards=[{name: target_string, arguments: {text: red}}]"
HERE = Path(__file__)


def of_length(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """Answers differ in what they are worth wherever they differ in length."""
    return [float(len(text)) for text in completions]


def nothing(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    return [0.0] * len(completions)


def sampling(tmp_path: Path, data: Path, name: str, base: Path, *more: str) -> list[str]:
    shared = [f"policy={base}", f"data.train_files={data}", "data.validation_fraction=0", "generation.max_new_tokens=6"]
    return settings(tmp_path, name, *shared, *more)


def online_config(tmp_path: Path, data: Path, name: str, base: Path, *more: str) -> OnlineDPOConfig:
    small = [
        "rounds.num_prompts=16",
        "rounds.num_generations=8",
        "rounds.num_rounds=2",
        "rounds.cut_off=as_it_is",  # the toy hardly ever ends an answer
        "training.per_device_train_batch_size=8",
        "training.num_train_epochs=2",
        "optimizer.learning_rate=0.01",
        "model.lora.r=8",
    ]
    return load_config(OnlineDPOConfig, overrides=sampling(tmp_path, data, name, base, *small, *more))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return found


def assert_same_policy(one: Path, other: Path) -> None:
    ours, theirs = (load_file(next((folder / "policy").glob("*.safetensors"))) for folder in (one, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def prompt_file(write_rows: WriteRows) -> Path:
    return write_rows([{"prompt": prompt, "family": prompt.split()[0], "gold_chosen": 1} for prompt in prompts(40)])


def test_a_rule_reward_is_learnt_by_rounds(tmp_path: Path, base: Path, prompt_file: Path) -> None:
    run = run_online_dpo(online_config(tmp_path, prompt_file, "online", base, RED, "rounds.num_rounds=4"))
    rewards = column(run.folder, "reward/mean")
    assert len(rewards) == 4 and rewards[0] < 0.5 and rewards[-1] > 0.85
    assert column(run.folder, "kl/mean")[0] == 0 < column(run.folder, "kl/mean")[-1] < 30
    for number in (2, 3, 4):
        sampled, trained = (run.folder / f"round_{number}" / stage for stage in ("pairs", "dpo"))
        earlier = str(run.folder / f"round_{number - 1}" / "dpo")
        assert record(sampled)["lineage"] == record(trained)["lineage"] == {"policy": earlier, "reference": str(base)}
        assert record(trained)["fingerprints"].keys() == {"policy", "reference"}
        assert list(record(trained)["data"]) == [str(sampled / PAIRS)]
        # The loss begins where the round before has left the policy, not at log 2.
        assert abs(log_lines(run.folder)[number - 1]["train/first_loss"] - 0.693147) > 1e-3
    assert log_lines(run.folder)[0]["train/first_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert_same_policy(run.folder, run.folder / "round_4" / "dpo")
    cost = record(run.folder)["cost"]
    steps = [record(run.folder / f"round_{n}" / "dpo")["cost"]["optimizer_steps"] for n in (1, 2, 3, 4)]
    assert cost["optimizer_steps"] == sum(steps) > 8
    asked = [
        json.dumps(group["prompt"]) for n in (1, 2) for group in rows_of(run.folder / f"round_{n}/pairs" / ANSWERS)
    ]
    assert len(set(asked)) == 32  # of forty prompts the first two rounds see none twice


@pytest.mark.slow
def test_the_previous_policy_can_be_the_reference(tmp_path: Path, base: Path, prompt_file: Path) -> None:
    more = (RED, "rounds.reference=previous", "loss=ipo", "beta=0.2")
    run = run_online_dpo(online_config(tmp_path, prompt_file, "previous", base, *more))
    lines = log_lines(run.folder)
    assert lines[0]["train/first_loss"] == lines[1]["train/first_loss"] == pytest.approx(1 / (2 * 0.2) ** 2, rel=1e-4)
    assert record(run.folder / "round_2" / "dpo")["lineage"] == {"policy": str(run.folder / "round_1" / "dpo")}


@pytest.mark.slow
def test_interrupted_anywhere_it_goes_on_bit_for_bit(
    tmp_path: Path, base: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = (RED, "generation.batch_size=32", "run.save_every_steps=1")
    straight = run_online_dpo(online_config(tmp_path, prompt_file, "straight", base, *more))
    # Asked: before a round, after each of its four blocks but the last, after each step of DPO; then the next.
    for checks in (3, 6, 10):
        name = f"stopped_{checks}"
        with monkeypatch.context() as patch:
            patch.setattr(Run, "should_stop", interrupt_after(checks))
            with pytest.raises(Stopped, match=rf"rlhf resume .*{name}$"):
                run_online_dpo(online_config(tmp_path, prompt_file, name, base, *more))
        folder = tmp_path / name
        assert record(folder)["status"] == "interrupted" and not (folder / "policy").exists()
        resume_run(folder, lambda *_: None)
        assert record(folder)["status"] == "finished"
        for stage in ("round_1/pairs", "round_2/pairs"):
            for file in (ANSWERS, PAIRS):
                assert (folder / stage / file).read_bytes() == (straight.folder / stage / file).read_bytes()
        assert log_lines(folder) == log_lines(straight.folder)
        assert_same_policy(folder, straight.folder)


def test_rounds_end_where_no_answer_is_better_than_another(tmp_path: Path, base: Path, prompt_file: Path) -> None:
    same = f"rewards=[{{name: '{HERE}:nothing'}}]"
    run = run_online_dpo(online_config(tmp_path, prompt_file, "same", base, same, "run.max_minutes=5"))
    assert "no two answers differ" in (run.folder / "logs" / "train.log").read_text()
    assert record(run.folder)["status"] == "finished" and not (run.folder / "policy").exists()
    sampled = json.loads((run.folder / "round_1" / "pairs" / REPORT).read_text())
    assert sampled["pairs/kept"] == 0 and sampled["pairs/prompts_without_pair"] == 16
    assert 0 < sampled["pairs/alike"] + sampled["pairs/identical"] <= 16
    assert not (run.folder / "round_2").exists()


# ---------------------------------------------------------------- pairs alone


def pairs_config(tmp_path: Path, data: Path, name: str, base: Path, *more: str) -> PairsConfig:
    return load_config(
        PairsConfig,
        overrides=sampling(tmp_path, data, name, base, "pairs.num_prompts=12", "pairs.cut_off=as_it_is", *more),
    )


def test_pairs_hold_what_their_answers_are_worth_and_the_columns_of_the_prompt(
    tmp_path: Path, base: Path, prompt_file: Path
) -> None:
    by_length = (
        f"rewards=[{{name: '{HERE}:of_length'}}, {{name: target_string, arguments: {{text: red}}, weight: 0.5}}]"
    )
    run = run_pairs(pairs_config(tmp_path, prompt_file, "pairs", base, by_length, "pairs.choose=all_pairs"))
    groups, pairs = rows_of(run.folder / ANSWERS), rows_of(run.folder / PAIRS)
    assert len(groups) == 12 and all(len(group["answers"]) == 4 for group in groups)
    worth = {
        (str(group["prompt"]), answer["text"]): len(answer["text"]) + 0.5 * ("red" in answer["text"].split())
        for group in groups
        for answer in group["answers"]
    }
    expected = 0
    for group in groups:
        for i, one in enumerate(group["answers"]):
            assert one["score"] == pytest.approx(worth[group["prompt"], one["text"]])
            for j in range(i):
                other = group["answers"][j]
                have_text = one["text"].strip() and other["text"].strip()
                expected += bool(have_text) and one["score"] != other["score"]
    assert len(pairs) == expected > 20
    for pair in pairs:
        assert pair["family"] == pair["prompt"].split()[0] and "gold_chosen" not in pair
        assert pair["score_chosen"] == pytest.approx(worth[pair["prompt"], pair["chosen"]])
        assert pair["score_rejected"] == pytest.approx(worth[pair["prompt"], pair["rejected"]])


@pytest.mark.slow
def test_later_prompts_are_other_prompts_and_batches_change_nothing(
    tmp_path: Path, base: Path, prompt_file: Path
) -> None:
    def asked(name: str, *more: str) -> list[tuple[str, list[str]]]:
        folder = run_pairs(pairs_config(tmp_path, prompt_file, name, base, RED, *more)).folder
        return [(g["prompt"], [a["text"] for a in g["answers"]]) for g in rows_of(folder / ANSWERS)]

    whole = asked("whole", "pairs.num_prompts=50")  # of forty prompts: the last ten are of the next epoch
    assert asked("small", "pairs.num_prompts=50", "generation.batch_size=9") == whole
    assert asked("later", "pairs.first_prompt=38", "pairs.num_prompts=12") == whole[38:]
    first, again = dict(whole[:40]), dict(whole[40:])
    assert len(first) == 40
    assert all(first[prompt] != again[prompt] for prompt in again)  # asked a second time, a prompt gets other answers


def test_blocks_lie_in_one_epoch_each() -> None:
    assert blocks_of(7, 6, 5, 3) == [Block(7, 3, 1), Block(10, 3, 2)]
    assert blocks_of(3, 9, 5, 4) == [Block(3, 2, 0), Block(5, 4, 1), Block(9, 1, 1), Block(10, 2, 2)]


def test_sampling_that_was_interrupted_goes_on_with_the_next_block(
    tmp_path: Path, base: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = (RED, "generation.batch_size=16")
    straight = run_pairs(pairs_config(tmp_path, prompt_file, "straight", base, *more))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "should_stop", interrupt_after(2))
        with pytest.raises(Stopped):
            run_pairs(pairs_config(tmp_path, prompt_file, "stopped", base, *more))
    folder = tmp_path / "stopped"
    assert len(log_lines(folder)) == 2 and not (folder / PAIRS).exists()
    resume_run(folder, lambda *_: None)
    for name in (ANSWERS, PAIRS, REPORT):
        assert (folder / name).read_bytes() == (straight.folder / name).read_bytes()
    assert log_lines(folder) == log_lines(straight.folder) and len(log_lines(folder)) == 3


# ---------------------------------------------------------------- judges


def more_red(prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str], **columns: Any) -> list[float]:
    """A judge who likes red, and an answer in front a little."""
    counts = [
        (one.split().count("red"), other.split().count("red")) for one, other in zip(firsts, seconds, strict=True)
    ]
    return [1.0 if one > other else 0.0 if one < other else 0.8 for one, other in counts]


JUDGE = f"judges=[{{kind: pair_function, function: '{HERE}:more_red'}}]"


def test_a_judge_is_asked_in_both_orders_about_what_nothing_else_decides(
    tmp_path: Path, base: Path, prompt_file: Path
) -> None:
    run = run_pairs(pairs_config(tmp_path, prompt_file, "judged", base, JUDGE, "pairs.choose=all_pairs"))
    report, expected = json.loads((run.folder / REPORT).read_text()), {"kept": 0, "alike": 0, "identical": 0}
    for group in rows_of(run.folder / ANSWERS):
        texts = [answer["text"] for answer in group["answers"] if answer["text"].strip()]
        assert all(answer["score"] is None and answer["terms"] == {} for answer in group["answers"])
        for i, one in enumerate(texts):
            for other in texts[i + 1 :]:
                same_red = one.split().count("red") == other.split().count("red")
                # In front it is liked a little better, whichever it is: over both orders that is no preference.
                expected["identical" if one == other else "alike" if same_red else "kept"] += 1
    assert {name: report[f"pairs/{name}"] for name in expected} == expected
    pairs = rows_of(run.folder / PAIRS)
    assert len(pairs) == expected["kept"] > 10 and expected["alike"] > 10
    assert all(p["chosen"].split().count("red") > p["rejected"].split().count("red") for p in pairs)
    assert "score_chosen" not in pairs[0]
    assert record(run.folder)["lineage"] == {"policy": str(base)}


@pytest.mark.slow
def test_judges_teach_a_reward_model_round_by_round(
    tmp_path: Path, base: Path, prompt_file: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = write_rows([{"prompt": p, "chosen": "red cat", "rejected": "blue cat"} for p in prompts(6, seed=3)])
    refresh = {"num_prompts": 12, "train_files": [str(earlier)], "validation_fraction": 0.2}
    more = (
        *(JUDGE, f"refresh={json.dumps(refresh)}", "refresh.training.num_train_epochs=3", "rounds.num_rounds=3"),
        *("refresh.optimizer.learning_rate=0.01", "refresh.training.per_device_train_batch_size=8"),
    )
    run = run_online_dpo(online_config(tmp_path, prompt_file, "taught", base, *more))
    found = [str(run.folder / f"round_{number}" / "judged" / PAIRS) for number in (1, 2, 3)]
    for number in (1, 2, 3):
        taught, sampled = (record(run.folder / f"round_{number}" / stage) for stage in ("reward", "pairs"))
        assert list(taught["data"]) == [str(earlier), *found[:number]]
        assert sampled["lineage"]["reward_model"] == str(run.folder / f"round_{number}" / "reward")
    first = [run.folder / f"round_1/{stage}" / ANSWERS for stage in ("judged", "pairs")]
    asked = [str(group["prompt"]) for path in first for group in rows_of(path)]
    assert len(asked) == len(set(asked)) == 28
    reds = [share_of_red(run.folder / f"round_{number}" / "judged") for number in (1, 2, 3)]
    assert reds[2] > reds[0] + 0.15
    lines = log_lines(run.folder)
    assert all(line["judged/kept"] > 0 and line["refresh/accuracy"] > 0.5 for line in lines)
    assert (run.folder / "reward_model" / "reward_config.json").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "should_stop", interrupt_after(9))
        with pytest.raises(Stopped):
            run_online_dpo(online_config(tmp_path, prompt_file, "again", base, *more))
    resume_run(tmp_path / "again", lambda *_: None)
    assert log_lines(tmp_path / "again") == lines
    assert_same_policy(tmp_path / "again", run.folder)


def share_of_red(folder: Path) -> float:
    texts = [answer["text"] for group in rows_of(folder / ANSWERS) for answer in group["answers"]]
    return sum("red" in text.split() for text in texts) / len(texts)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("rounds.num_generations=1",), "num_generations is 1, but a pair has two answers"),
        (("rounds.num_generations=2", "rounds.choose=neighbours"), "'rounds.choose' has no effect here because"),
        (("loss=simpo", "rounds.reference=previous"), "'rounds.reference' has no effect here because loss is simpo"),
        (("policy=nobody",), "there is no run 'nobody'"),
        (("rewards=null", JUDGE), "rounds.choose is best_and_worst, which takes scores"),
        ((JUDGE, "rounds.num_generations=2"), "'rewards' has no effect here because `judges` say"),
        (("rewards=null", "refresh.num_prompts=8"), "refresh trains a reward model on what judges say, but `judges`"),
        ((JUDGE, "refresh.num_prompts=8"), "no term of `rewards` is called model"),
        (("rewards=[{name: model}]",), "the reward `model` needs reward_model"),
    ],
)
def test_what_cannot_serve_is_refused(
    tmp_path: Path, base: Path, prompt_file: Path, more: tuple[str, ...], sentence: str
) -> None:
    rewards = () if any(text.startswith("rewards") for text in more) else (RED,)
    with pytest.raises(UserError, match=sentence):
        run_online_dpo(online_config(tmp_path, prompt_file, "refused", base, *rewards, *more))
    assert not (tmp_path / "refused").exists()


def test_a_changed_start_is_refused_on_resuming(
    tmp_path: Path, base: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Run, "should_stop", interrupt_after(2))
        with pytest.raises(Stopped):
            run_online_dpo(online_config(tmp_path, prompt_file, "changed", base, RED))
    prompt_file.write_text(prompt_file.read_text() + '{"prompt": "one more"}\n')
    with pytest.raises(UserError, match=r"data file .* has changed"):
        resume_run(tmp_path / "changed", lambda *_: None)


@pytest.mark.slow
def test_keys_of_the_whole_are_not_held_against_a_stage(tmp_path: Path, base: Path, prompt_file: Path) -> None:
    """What the user set for the rounds (full training, checkpoints) is no mistake where a stage only samples."""
    more = (RED, "model.train=full", "run.save_every_steps=1", "rounds.num_prompts=4", "rounds.num_rounds=2")
    config = load_config(OnlineDPOConfig, overrides=sampling(tmp_path, prompt_file, "full", base, *more))
    run = run_online_dpo(config)
    assert (run.folder / "policy" / "model.safetensors").is_file()
    assert not list((run.folder / "round_2").rglob("adapter_model.safetensors"))
