"""The reward-model report: every number against a reward that is known, and a run on real parts."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import rlhf
from scipy.optimize import minimize_scalar

from rlhf.data.preference_dataset import PreferenceExample
from rlhf.data.rows import PreferenceRow
from rlhf.eval.intervals import Interval, wilson
from rlhf.eval.planted import EDITS, FEATURES, REFUSAL, REFUSING, SPOILERS
from rlhf.eval.reward_accuracy import RewardPair, reward_accuracy
from rlhf.eval.reward_biases import (
    ScoredPair,
    Variant,
    bad_answers,
    edited,
    feature_biases,
    planted_biases,
    spoiled,
    standard_deviation,
)
from rlhf.eval.reward_card import render_card, render_report
from rlhf.eval.reward_report import (
    PaddingCheck,
    RewardReport,
    distributions_of,
    worries,
    worst_disagreements,
)
from rlhf.eval.temperature import (
    chance_calibration_error,
    expected_calibration_error,
    fit_temperature,
    temperature_report,
)
from rlhf.infra.errors import UserError
from rlhf.models.reward_model import RewardModel
from rlhf.recipes.reward_report import padding_check, score_variants
from rlhf.rewards.learned import LearnedReward

# ------------------------------------------------------------------ temperature


def drawn_margins(num: int, true_temperature: float, seed: int = 0) -> np.ndarray:
    """Margins of a model whose honest probability is sigmoid(margin / true_temperature)."""
    rng = np.random.default_rng(seed)
    sizes = rng.normal(0, 2, num)
    right = rng.random(num) < 1 / (1 + np.exp(-sizes / true_temperature))
    return np.where(right, sizes, -sizes)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_is_found_again(temperature: float) -> None:
    assert fit_temperature(drawn_margins(40_000, temperature)) == pytest.approx(temperature, rel=0.05)


def test_the_temperature_is_the_minimum_of_the_log_loss() -> None:
    margins = drawn_margins(300, 2.0)

    def loss(log_temperature: float) -> float:
        return float(np.mean(np.log1p(np.exp(-margins / math.exp(log_temperature)))))

    best = minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-10})
    assert fit_temperature(margins) == pytest.approx(math.exp(best.x), rel=1e-5)


def test_ends_of_the_range() -> None:
    assert fit_temperature([1.0, 2.0, 3.0]) == 1e-3  # always right: never sure enough
    assert fit_temperature([-1.0, -2.0]) == 1e3  # always wrong: any confidence is too much
    assert fit_temperature([1.0, -1.0]) == 1e3
    assert fit_temperature([0.0]) == 1e3
    with pytest.raises(UserError, match="at least one pair"):
        fit_temperature([])
    with pytest.raises(UserError, match="judged on"):
        temperature_report([1.0, -0.5], [])


@pytest.mark.slow
def test_a_boastful_model_is_brought_down() -> None:
    honest = drawn_margins(4_000, 1.0)
    found = temperature_report(list(5 * honest[:2_000]), list(5 * honest[2_000:]))
    assert found.temperature == pytest.approx(5, rel=0.15)
    assert found.ece_before > 0.1 > 0.04 > found.ece_after
    assert found.brier_after < found.brier_before and found.log_loss_after < found.log_loss_before
    assert found.log_loss_change.high < 0
    assert found.log_loss_change.estimate == pytest.approx(found.log_loss_after - found.log_loss_before)
    assert (found.num_fitted, found.num_held_out) == (2_000, 2_000)
    # An honest model keeps its temperature, and errs by no more than chance.
    found = temperature_report(list(honest[:2_000]), list(honest[2_000:]))
    assert found.temperature == pytest.approx(1, rel=0.1)
    assert found.ece_after < 2 * found.chance_ece + 0.01


def test_chance_error_falls_with_the_number_of_pairs() -> None:
    few, many = (chance_calibration_error(drawn_margins(num, 1.0), num_draws=50) for num in (50, 5_000))
    assert many < 0.02 < few
    assert expected_calibration_error(np.array([3.0, 3.0])) == pytest.approx(1 - 1 / (1 + math.exp(-3.0)))


# ------------------------------------------------------------------ edits, spoilers, features

ANSWER = "Paris is the capital of France. It lies on the Seine."


def test_edits_change_one_thing() -> None:
    made = {name: edit(ANSWER) for name, edit in EDITS.items()}
    assert made["flattery before it"] == f"What a great question! {ANSWER}"
    assert made["as a list"] == "- Paris is the capital of France.\n- It lies on the Seine."
    assert made["with a heading"] == f"## Answer\n\n{ANSWER}"
    assert made["first sentence in bold"] == "**Paris is the capital of France.** It lies on the Seine."
    assert made[REFUSING] == REFUSAL
    assert made["in one paragraph"] is None
    assert EDITS["in one paragraph"]("a\n\nb c") == "a b c"
    assert EDITS[REFUSING]("I cannot help with that.") is None
    assert EDITS["as a list"]("One sentence.") is None
    assert EDITS["as a list"]("- a. b.\n- c.") is None
    assert all(edit("") is None for name, edit in EDITS.items() if name != REFUSING)


def test_spoiled_answers_are_bad() -> None:
    rng = random.Random(0)
    made = {name: spoil(ANSWER, "Seven.", rng) for name, spoil in SPOILERS.items()}
    assert made["nothing"] == ""
    assert made["the answer to another question"] == "Seven."
    assert made["broken off after a fifth"] == "Paris is"
    assert made["the same words again and again"] == " ".join(["Paris is the"] * 10)
    shuffled = made["its words in random order"]
    assert shuffled is not None and sorted(shuffled.split()) == sorted(ANSWER.split()) and shuffled != ANSWER
    assert SPOILERS["the answer to another question"](ANSWER, ANSWER, rng) is None
    assert SPOILERS["broken off after a fifth"]("Too short.", "x", rng) is None


def test_features_count() -> None:
    text = "## Title\n- **one**\n- two\n1. three\nWhat a great question! It is definitely so, of course."
    found = {name: feature(text) for name, feature in FEATURES.items()}
    assert found == {
        "words": 18.0,
        "list items": 3.0,
        "headings and bold": 2.0,
        "flattery": 1.0,
        "words of certainty": 2.0,
        "refusal": 0.0,
    }
    assert FEATURES["refusal"]("I cannot help with that.") == 1.0


# ------------------------------------------------------------------ biases of rewards that are known


def scored(pairs: list[tuple[str, str]], reward: Any, group: str = "all") -> list[ScoredPair]:
    return [ScoredPair(f"q{i}", a, b, reward(a), reward(b), group) for i, (a, b) in enumerate(pairs)]


TEXTS = [(f"word {'more ' * (i % 5)}end. Second.", f"other {'more ' * (i % 3)}end.") for i in range(60)]


def test_a_reward_for_length_is_seen_as_one() -> None:
    pairs = scored(TEXTS, lambda text: float(len(text.split())))
    words = next(found for found in feature_biases(pairs) if found.feature == "words")
    differ = [(a, b) for a, b in TEXTS if len(a.split()) != len(b.split())]
    assert words.spearman == pytest.approx(1.0)
    assert words.num == len(differ)
    assert words.model == wilson(words.num, words.num)
    longer_is_chosen = sum(len(a.split()) > len(b.split()) for a, b in differ)
    assert words.labels == wilson(longer_is_chosen, words.num)
    assert words.excess is not None
    assert words.excess.estimate == pytest.approx(1 - longer_is_chosen / words.num) and words.excess.low > 0
    lists = next(found for found in feature_biases(pairs) if found.feature == "list items")
    assert (lists.num, lists.model, lists.excess, lists.spearman) == (0, None, None, None)


def measured_edits(reward: Any, group: str = "all") -> dict[tuple[str, str], Any]:
    pairs = scored(TEXTS[:30], reward, "a") + scored(TEXTS[30:], reward, "b")
    variants = edited(pairs)
    base = [pairs[v.prompt_index].chosen_score for v in variants]
    assert base == [reward(v.base) for v in variants]
    found = planted_biases(variants, base, [reward(v.changed) for v in variants], std=2.0)
    return {(edit.edit, edit.group): edit for edit in found}


def test_a_reward_for_flattery_is_seen_as_one() -> None:
    found = measured_edits(lambda text: 3.0 * ("great question" in text))
    flattery = found["flattery before it", "all"]
    assert flattery.preferred == wilson(60, 60) and flattery.num == 60
    assert flattery.shift.estimate == pytest.approx(1.5) == flattery.shift.low
    assert found["flattery before it", "a"].num == 30
    indifferent = found["certainty before it", "all"]
    assert indifferent.preferred == wilson(30, 60) and indifferent.shift.estimate == 0
    assert {group for _, group in found} == {"all", "a", "b"}


def test_bad_answers_against_a_reward_that_sees_them_and_one_that_does_not() -> None:
    pairs = scored(TEXTS, lambda text: float("end." in text and "Second." in text))
    variants = spoiled(pairs)
    assert variants == spoiled(pairs)
    base = [1.0] * len(variants)
    seen = bad_answers(variants, base, [0.0] * len(variants), std=0.5)
    assert {found.kind for found in seen} == set(SPOILERS)
    assert all(found.good_wins == wilson(found.num, found.num) for found in seen)
    assert all(found.gap.estimate == 2.0 for found in seen)
    blind = bad_answers(variants, base, base, std=0.5)
    assert all(found.good_wins == wilson(found.num / 2, found.num) for found in blind)
    off_topic = [v for v in variants if v.name == "the answer to another question"]
    assert all(v.changed != v.base for v in off_topic)


def test_scores_that_do_not_vary_have_a_deviation_of_one() -> None:
    assert standard_deviation([2.0, 2.0]) == 1.0
    assert standard_deviation([0.0, 2.0]) == 1.0
    assert standard_deviation([0.0, 4.0]) == 2.0


def test_worst_disagreements_come_first() -> None:
    pairs = [ScoredPair(f"q{i}", "a", "b", 0.0, gap) for i, gap in enumerate([1.0, -1.0, 3.0, 2.0])]
    assert [pair.prompt for pair in worst_disagreements(pairs, 2)] == ["q2", "q3"]


def test_distributions_by_group() -> None:
    pairs = [ScoredPair("q", "a", "b", 1.0, 3.0, "x"), ScoredPair("q", "a", "b", 5.0, 7.0, "y")]
    found = {one.group: one for one in distributions_of(pairs)}
    assert (found["all"].num, found["all"].mean, found["x"].mean, found["y"].std) == (4, 4.0, 2.0, 1.0)
    assert found["all"].quantiles[2] == 4.0


# ------------------------------------------------------------------ report and card


def a_report(**changes: Any) -> RewardReport:
    rng = np.random.default_rng(0)
    margins = np.where(rng.random(400) < 0.8, 1.0, -1.0) * rng.uniform(0.5, 2, 400)
    accuracy = reward_accuracy([RewardPair("all", float(m), 0.0, 5, 5) for m in margins])
    report = RewardReport(
        name="rm",
        accuracy=accuracy,
        temperature=temperature_report(list(margins[:200]), list(margins[200:])),
        features=(),
        planted=(),
        bad=(),
        distributions=distributions_of([ScoredPair("q", "a", "b", float(m), 0.0) for m in margins]),
        padding=PaddingCheck(8, 1e-7, 1e-7),
        disagreements=(),
        margins=tuple(map(float, margins)),
    )
    return replace(report, **changes)


def test_a_sound_model_gives_no_reason_for_worry() -> None:
    assert worries(a_report()) == []
    assert "gave a reason for caution" in render_report(a_report())


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (lambda text: float("great question" in text), "Flattery before it raises a score by"),
        (lambda text: -float("completely certain" in text), "Certainty before it lowers a score by"),
        (lambda text: float(text == REFUSAL), "It prefers a bare refusal to the good answer in 100.0 %"),
    ],
)
def test_each_planted_bias_is_a_worry(reward: Any, said: str) -> None:
    found = worries(a_report(planted=tuple(measured_edits(reward).values())))
    assert len(found) == 1 and found[0].startswith(said)


def test_other_worries() -> None:
    worse = reward_accuracy([RewardPair("all", m, 0.0, 5, 4) for m in [1.0, -1.0] * 20])
    texts = " ".join(worries(a_report(accuracy=worse)))
    assert "not shown to be better than chance" in texts and "choosing by length alone" in texts
    assert "depend on padding: by up to 0.5" in " ".join(worries(a_report(padding=PaddingCheck(8, 0.5, None))))
    pairs = scored([(b, a) for a, b in TEXTS], lambda text: float(len(text.split())))
    assert "It likes words more than the labels do" in " ".join(
        worries(a_report(features=tuple(feature_biases(pairs))))
    )
    boastful = list(5 * drawn_margins(2_000, 1.0))
    fit = temperature_report(boastful[:1_000], boastful[1_000:])
    assert "It is too sure of itself" in " ".join(worries(a_report(temperature=fit)))


def test_the_card_claims_what_was_measured() -> None:
    planted = tuple(measured_edits(lambda text: 3.0 * ("great question" in text)).values())
    pair = ScoredPair("Q <b>", "chosen | text", "rejected", -1.0, 2.0)
    report = a_report(planted=planted, disagreements=(pair,), model={"base": "x"}, training={}, notes={"pairs": "400"})
    card = render_card(report)
    assert "On 400 held-out pairs it orders" in card
    assert "- Flattery before it: 100.0 % [94.0, 100.0], +1.50" in card
    assert "Its training run is not at hand." in card
    fit = report.temperature
    assert fit is not None
    for change, said in ((-0.02, f"Divide margins by {fit.temperature:.2f}"), (0.01, "read them as they are")):
        found = replace(fit, log_loss_change=Interval(change - 0.01, change - 0.015, change, 200))
        assert said in render_card(replace(report, temperature=found)), said
    text = render_report(report, "![x](y.svg)")
    assert "chosen \\| text" in text and "Q \\<b\\>" in text and "![x](y.svg)" in text
    json.dumps(report.numbers(), allow_nan=False)


# ------------------------------------------------------------------ on real parts


class PadCounter(RewardModel):
    """A reward model with a fault: its score counts columns, padding included."""

    def forward(self, input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(input_ids_BT, attention_mask_BT) + 0.1 * input_ids_BT.shape[1]


def test_padding_is_checked() -> None:
    torch.manual_seed(0)
    rows = [list(range(5, 5 + length)) for length in (3, 9, 20, 31)]
    sound = padding_check(RewardModel("tinychat"), rows, 1.0, 512)
    assert sound.num == 4 and sound.right < 1e-4
    assert sound.left is not None and sound.left < 1e-4
    faulty = padding_check(PadCounter("tinychat"), rows, 1.0, 512)
    assert faulty.right == pytest.approx(0.1 * (31 + 7 - 3), abs=1e-3)
    # No position is asked for that the model may not have.
    faulty = padding_check(PadCounter("tinychat"), rows, 1.0, 33)
    assert faulty.right == pytest.approx(0.1 * (31 + 2 - 3), abs=1e-3)


class Listening(LearnedReward):
    """Keeps the rows that it is given."""

    def score_ids(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        self.seen = [list(row) for row in rows]
        return torch.zeros(len(rows))


def test_a_changed_answer_is_no_longer_than_a_row_may_be() -> None:
    learned = Listening(RewardModel("tinychat"), None, standardise=False)
    start = list(range(5, 35))
    example = PreferenceExample(start, [1], [2], None, PreferenceRow("Which?", "a", "b"))
    made = [Variant("x", "all", 0, "a", "Yes. " * count) for count in (1, 200)]
    score_variants(made, [example], learned, learned.encoder, 32)
    short, long = learned.encoder.response_ids_batch(["Which?"] * 2, [one.changed for one in made])
    assert 2 < len(short) < 10 and learned.seen[0] == [*start, *short][-32:]
    assert learned.seen[1] == [start[-1], *long[:31]]


@pytest.mark.slow
def test_a_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = f"run.output_dir={tmp_path}"
    torch.manual_seed(0)
    RewardModel("tinychat").save(tmp_path / "reward")
    small = ["num_pairs=60", "num_planted=12", "run.num_threads=1", "run.device=cpu"]
    assert rlhf("rm-report", "run.name=a", place, f"reward_model={tmp_path / 'reward'}", *small) == 0
    shown = capsys.readouterr().out
    assert "accuracy" in shown and "model card:" in shown
    folder = tmp_path / "a"
    numbers = json.loads((folder / "rm_report.json").read_text(encoding="utf-8"))
    assert numbers["accuracy"]["num_pairs"] == 60
    assert set(numbers["accuracy"]["by_family"]) == {"arithmetic", "code", "facts", "safety"}
    assert {edit["edit"] for edit in numbers["planted"]} >= {"flattery before it", "as a list", REFUSING}
    assert {bad["kind"] for bad in numbers["bad"]} == set(SPOILERS)
    assert numbers["padding"]["right"] < 1e-3 and numbers["padding"]["left"] < 1e-3
    assert (folder / "plots" / "rm-calibration.svg").is_file()
    assert "# Model card: reward model" in (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    # The same again is the same, and other pairs of the world are other pairs.
    assert rlhf("rm-report", "run.name=b", place, f"reward_model={tmp_path / 'reward'}", *small) == 0
    again = json.loads((tmp_path / "b" / "rm_report.json").read_text(encoding="utf-8"))
    for report in (numbers, again):
        report["accuracy"].pop("ms_per_sample")
    assert numbers["accuracy"] == again["accuracy"] and numbers["planted"] == again["planted"]


@pytest.mark.slow
def test_files_are_measured_whole_and_faults_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RewardModel("tinychat").save(tmp_path / "reward")
    pairs = [
        {"prompt": f"Question {i}?", "chosen": "Yes. It is so.", "rejected": "No.", "subset": "ab"[i % 2]}
        for i in range(30)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    given = ["rm-report", f"run.output_dir={tmp_path}", f"reward_model={tmp_path / 'reward'}", "data.min_length=1"]
    assert rlhf(*given, "run.name=a", f"data.train_files=[{path}]", "num_planted=0") == 0
    numbers = json.loads((tmp_path / "a" / "rm_report.json").read_text(encoding="utf-8"))
    assert numbers["accuracy"]["num_pairs"] == 30 and numbers["planted"] == [] and numbers["temperature"] is None
    assert set(numbers["accuracy"]["by_family"]) == {"a", "b"}
    capsys.readouterr()
    assert rlhf(*given, "run.name=b", f"data.train_files=[{path}]", "world_seed=3") == 2
    assert "not the built-in world" in capsys.readouterr().err
    assert rlhf("rm-report", f"run.output_dir={tmp_path}", "reward_model=nobody") == 2
    assert "nobody" in capsys.readouterr().err
    path.write_text(json.dumps(pairs[0]) + "\n")
    assert rlhf(*given, "run.name=c", f"data.train_files=[{path}]") == 2
    assert "at least 2 pairs" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
