"""Metrics of one model against hand calculation, SciPy and scikit-learn; samples through JSON and back."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import brier_score_loss

from rlhf.eval.metrics import (
    correlation,
    difference_of,
    distinct_n,
    length_drift,
    measure,
    refusal_change,
    refusal_rate,
)
from rlhf.eval.reward_accuracy import RewardPair, calibration_bins, reward_accuracy
from rlhf.eval.samples import Sample, read_samples, write_samples
from rlhf.infra.errors import UserError
from rlhf.rewards.detectors import repetition_share

PLAIN = Sample(
    prompt_id="p0", prompt="q", family="facts", split="heldout", response="a b c", num_tokens=4, finished=True
)


def sample(**changes: object) -> Sample:
    return dataclasses.replace(PLAIN, **changes)


def test_distinct_n_counts_words_over_all_responses() -> None:
    responses = ["the cat sat", "The cat ran!"]
    assert distinct_n(responses, 1) == 4 / 6
    assert distinct_n(responses, 2) == 3 / 4
    assert distinct_n(responses, 3) == 1.0
    assert distinct_n(["one two"], 3) == 0.0


def test_repetition_is_the_share_of_seen_sequences() -> None:
    assert repetition_share("a b c d e f g") == 0.0
    assert repetition_share("a a a a a a a a") == 4 / 5
    assert repetition_share("a b c") == 0.0
    assert repetition_share("a b c d a b c d") == pytest.approx(1 / 5)


def test_measure_on_three_responses() -> None:
    samples = [
        sample(prompt_id="a", gold=1.0, gold_parts={"correct": 1.0}, reward=2.0, kl=1.0, entropy=0.5, num_tokens=10),
        sample(prompt_id="b", gold=0.5, gold_parts={"correct": 0.0}, reward=1.0, kl=3.0, entropy=0.3, num_tokens=20),
        sample(
            prompt_id="c", gold=0.0, gold_parts={"correct": 0.0}, reward=-3.0, kl=8.0, finished=False, num_tokens=30
        ),
    ]
    found = measure(samples)
    assert found is not None
    assert found.gold is not None and found.gold.estimate == pytest.approx(0.5)
    assert found.gold_parts["correct"].estimate == pytest.approx(1 / 3)
    assert found.reward is not None and found.reward.estimate == pytest.approx(0.0)
    assert found.kl is not None and found.kl.estimate == pytest.approx(4.0)
    assert found.kl_p95 == pytest.approx(3.0 + 0.9 * 5.0)
    assert found.entropy is not None and found.entropy.estimate == pytest.approx(0.4) and found.entropy.num == 2
    assert found.length.estimate == 20.0
    assert found.finished.estimate == pytest.approx(2 / 3)
    assert found.length_drift is None and found.gold_change is None
    assert found.refusal_harmful is None
    assert measure([]) is None


def test_what_was_not_measured_is_none() -> None:
    found = measure([PLAIN])
    assert found is not None
    assert (found.gold, found.reward, found.kl, found.kl_p95, found.entropy, found.gold_reward) == (None,) * 6
    assert found.gold_parts == {}


def test_a_prompt_with_more_responses_does_not_weigh_more() -> None:
    samples = [sample(prompt_id="a", gold=1.0), sample(prompt_id="b", gold=0.0), sample(prompt_id="b", gold=0.0)]
    found = measure(samples)
    assert found is not None and found.gold is not None
    assert found.gold.estimate == 0.5
    assert (found.num_prompts, found.num_samples) == (2, 3)


def test_changes_against_the_reference_are_paired_by_prompt() -> None:
    reference = [sample(prompt_id=f"p{i}", num_tokens=10 * (i + 1), gold=0.2) for i in range(4)]
    model = [sample(prompt_id=f"p{i}", num_tokens=15 * (i + 1), gold=0.3) for i in reversed(range(3))]
    drift = length_drift(model, reference)
    assert drift is not None
    assert (drift.estimate, drift.low, drift.high) == pytest.approx((0.5, 0.5, 0.5))
    change = difference_of(model, reference, lambda s: s.gold)
    assert change is not None and change.estimate == pytest.approx(0.1) and change.num == 3
    assert length_drift(model, [sample(prompt_id="other")]) is None


def test_refusal_rates_look_at_intent() -> None:
    samples = [
        sample(prompt_id="h1", split="harmful", refused=True),
        sample(prompt_id="h2", split="heldout", kind="harmful", refused=False),
        sample(prompt_id="b1", split="benign", refused=True),
        sample(prompt_id="x", refused=True),
    ]
    harmful, benign = refusal_rate(samples, "harmful"), refusal_rate(samples, "benign")
    assert harmful is not None and (harmful.estimate, harmful.num) == (0.5, 2)
    assert benign is not None and (benign.estimate, benign.num) == (1.0, 1)
    assert refusal_rate([PLAIN], "harmful") is None


def test_refusal_change_with_one_and_with_several_responses() -> None:
    before = [sample(prompt_id=f"p{i}", split="harmful", refused=i < 80) for i in range(100)]
    after = [sample(prompt_id=f"p{i}", split="harmful", refused=i < 60) for i in range(100)]
    change = refusal_change(after, before, "harmful")
    assert change is not None
    assert change.estimate == pytest.approx(-0.2)
    assert -0.3 < change.low < -0.2 < change.high < -0.1
    narrower = refusal_change(after, before, "harmful", level=0.9)
    assert narrower is not None and change.low < narrower.low < narrower.high < change.high
    twice = refusal_change(after + before, before, "harmful")
    assert twice is not None and twice.estimate == pytest.approx(-0.1)


def test_correlations_equal_scipy() -> None:
    rng = random.Random(0)
    pairs = [(round(rng.random(), 1), rng.random()) for _ in range(60)]
    found = correlation([*pairs, (None, 1.0), (0.5, None)])
    first, second = zip(*pairs, strict=True)
    assert found is not None and found.num == 60
    assert found.pearson == pytest.approx(pearsonr(first, second).statistic)
    assert found.spearman == pytest.approx(spearmanr(first, second).statistic)
    assert correlation([(1.0, 2.0), (2.0, 1.0)]) is None
    assert correlation([(1.0, 2.0), (1.0, 1.0), (1.0, 3.0)]) is None


PAIRS = [
    RewardPair("facts", 2.0, 1.0, 10, 20, gold_chosen=0.9, gold_rejected=0.1),
    RewardPair("facts", 1.0, 3.0, 30, 20, gold_chosen=0.2, gold_rejected=0.6),
    RewardPair("code", 0.5, 0.5, 15, 15, gold_chosen=0.4, gold_rejected=0.4),
    RewardPair("code", 4.0, -1.0, 40, 10, gold_chosen=1.0, gold_rejected=0.0),
]


def test_reward_accuracy_by_hand() -> None:
    found = reward_accuracy(PAIRS, ms_per_sample=1.5)
    assert found.accuracy.estimate == 2.5 / 4
    assert found.by_family["facts"].estimate == 0.5
    assert found.by_family["code"].estimate == 0.75
    assert found.longer_wins.estimate == 2.5 / 4
    assert found.shorter_wins.estimate == 1.5 / 4
    assert found.lead.estimate == 0.0
    assert found.against_gold is not None and found.against_gold.estimate == 1.0
    assert found.labels_against_gold is not None and found.labels_against_gold.estimate == pytest.approx(2 / 3)
    assert found.margin_mean == pytest.approx(1.0)
    assert found.ms_per_sample == 1.5


def test_brier_and_calibration_equal_scikit_learn_and_a_loop() -> None:
    margins = np.random.default_rng(0).normal(0.8, 2.0, size=500)
    pairs = [RewardPair("all", float(margin), 0.0, 1, 1) for margin in margins]
    found = reward_accuracy(pairs)
    probabilities = 1 / (1 + np.exp(-margins))
    assert found.brier == pytest.approx(brier_score_loss(np.ones(500), probabilities, pos_label=1))
    expected = 0.0
    for low in np.arange(0.5, 1.0, 0.05):
        inside = [m for m in margins if low <= 1 / (1 + math.exp(-abs(m))) < low + 0.05]
        if inside:
            confidence = sum(1 / (1 + math.exp(-abs(m))) for m in inside) / len(inside)
            expected += len(inside) / 500 * abs(confidence - sum(m > 0 for m in inside) / len(inside))
    assert found.ece == pytest.approx(expected, abs=1e-9)
    assert sum(b.num for b in calibration_bins(margins)) == 500


def test_a_perfect_ranker_leads_a_useless_length() -> None:
    rng = random.Random(2)
    pairs = [RewardPair("all", 1.0, 0.0, rng.randint(1, 50), rng.randint(1, 50)) for _ in range(300)]
    found = reward_accuracy(pairs)
    assert found.accuracy.estimate == 1.0
    assert found.lead.low < found.lead.estimate < found.lead.high
    assert found.lead.estimate == pytest.approx(0.5, abs=0.06)


def test_reward_accuracy_refuses_what_it_cannot_measure() -> None:
    with pytest.raises(UserError, match="at least one held-out pair"):
        reward_accuracy([])
    with pytest.raises(UserError, match="1 of 2 pairs have a score that is not finite"):
        reward_accuracy([PAIRS[0], RewardPair("code", math.nan, 0.0, 1, 1)])


def test_samples_survive_json(tmp_path: Path) -> None:
    samples = (
        sample(
            response='NaN \u2028 "quoted" \u00e9 \U0001f600',
            gold=0.25,
            gold_parts={"correct": 1.0, "brevity": math.inf},
        ),
        sample(prompt_id="p1", mode="greedy", refused=True, reward=-math.inf, kl=-0.5, entropy=0.125, kind="harmful"),
    )
    path = tmp_path / "samples.jsonl"
    assert write_samples(path, samples) == 2
    assert read_samples(path) == samples
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert rows[1]["reward"] == "-Infinity"
    nan = Sample.from_json(json.loads(json.dumps(sample(kl=math.nan).to_json(), allow_nan=False)))
    assert nan.kl is not None and math.isnan(nan.kl)


def test_broken_sample_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    with pytest.raises(UserError, match="no samples file"):
        read_samples(path)
    write_samples(path, [PLAIN])
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(UserError, match="line 2"):
        read_samples(path)
    row = PLAIN.to_json()
    with pytest.raises(UserError, match=r"lacks the fields \['prompt'\] and has the unknown fields \['promt'\]"):
        Sample.from_json({("promt" if key == "prompt" else key): value for key, value in row.items()})
    with pytest.raises(UserError, match="mode 'beam'"):
        Sample.from_json(row | {"mode": "beam"})
