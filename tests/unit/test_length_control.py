"""Length control against AlpacaEval's published value, against scikit-learn, and on data made by the model itself."""

from __future__ import annotations

import csv
import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from rlhf.eval.intervals import mean_interval
from rlhf.eval.length_control import Regulariser, length_controlled
from rlhf.infra.errors import UserError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "golden.json").read_text(encoding="utf-8"))
PUBLISHED = GOLDEN["expected"]["alpaca_eval_2_alpaca-7b"]


@pytest.fixture(scope="module")
def alpaca(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    """AlpacaEval 2 of one model: preference for it (0.5 where the annotator was undecided), lengths, difficulty."""
    folder = Path(__file__).parents[3] / "shared" / "data" / "alpaca_eval"
    if not folder.is_dir():
        pytest.skip("the folder ../shared/data is not here")
    rows = json.loads(gzip.decompress((folder / "ae2_annotations__alpaca-7b.json.gz").read_bytes()))
    raw = [float(row["preference"]) for row in rows]
    with (folder / "instruction_difficulty_recovered.csv").open() as file:
        difficulty = [float(row["instruction_difficulty"]) for row in csv.DictReader(file)]
    with gzip.open(folder / "df_gamed_expected.csv.gz", "rt") as file:
        gamed = list(csv.DictReader(file))
    return {
        "preference": np.array([0.5 if value in (0.0, 1.5) else value - 1 for value in raw]),
        "model": np.array([len(row["output_2"]) for row in rows], dtype=float),
        "baseline": np.array([len(row["output_1"]) for row in rows], dtype=float),
        "difficulty": np.array(difficulty),
        "gamed_gap": -np.array([float(row["std_delta_len"]) for row in gamed]),
        "gamed_difficulty": np.array([float(row["instruction_difficulty"]) for row in gamed]),
        "gamed_preference": np.array([float(row["expected_preference"]) for row in gamed]),
    }


def test_the_published_win_rates_are_met(alpaca: dict[str, np.ndarray]) -> None:
    raw = mean_interval(alpaca["preference"])
    assert 100 * raw.estimate == pytest.approx(PUBLISHED["win_rate"], abs=1e-6)
    regulariser = Regulariser(alpaca["gamed_gap"], alpaca["gamed_difficulty"], alpaca["gamed_preference"])
    found = length_controlled(
        alpaca["preference"], alpaca["model"], alpaca["baseline"], alpaca["difficulty"], regulariser
    )
    assert 100 * found.rate.estimate == pytest.approx(PUBLISHED["length_controlled_winrate"], abs=0.3)
    # This annotator favours length: the published coefficient, which has baseline minus model, is negative.
    assert found.length_effect > 1
    assert found.rate.low < found.rate.estimate < found.rate.high


def test_the_fit_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(20, 900, 300), rng.integers(20, 900, 300)
    hardness, preferences = rng.normal(size=300), rng.random(300)
    found = length_controlled(preferences, first, second, hardness)
    gaps = first - second
    length = np.tanh(gaps / gaps.std(ddof=1))
    rows = np.column_stack([length, hardness, np.ones(300)])
    # A soft target is one row of each kind with its share as weight.
    model = LogisticRegression(C=1e3, fit_intercept=False, tol=1e-12, max_iter=5000).fit(
        np.vstack([rows, rows]), np.repeat([1, 0], 300), sample_weight=np.concatenate([preferences, 1 - preferences])
    )
    phi, psi, theta = model.coef_[0]
    assert found.length_effect == pytest.approx(phi, abs=1e-6)
    assert found.rate.estimate == pytest.approx((1 / (1 + np.exp(-(psi * hardness + theta)))).mean(), abs=1e-8)


@pytest.mark.slow
def test_a_judge_that_likes_length_is_seen_through() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.integers(200, 900, 4000), rng.integers(100, 700, 4000)
    gaps = first - second
    chance = 1 / (1 + np.exp(-(2.0 * np.tanh(gaps / gaps.std(ddof=1)) - 0.4)))
    found = length_controlled(chance, first, second)
    truth = 1 / (1 + math.exp(0.4))
    assert chance.mean() > 0.55
    assert found.rate.estimate == pytest.approx(truth, abs=1e-5)
    assert found.length_effect == pytest.approx(2.0, abs=1e-3)
    drawn = (rng.random(4000) < chance).astype(float)
    sampled = length_controlled(drawn, first, second).rate
    assert sampled.low < truth < sampled.high
    assert sampled.high - sampled.low < 0.05


def test_swapping_the_models_mirrors_the_rate() -> None:
    rng = np.random.default_rng(2)
    preferences, first, second = rng.choice([0, 0.25, 0.5, 1], 90), rng.random(90), rng.random(90)
    one = length_controlled(preferences, first, second)
    two = length_controlled(1 - preferences, second, first)
    assert one.rate.estimate == pytest.approx(1 - two.rate.estimate, abs=1e-9)
    assert one.length_effect == pytest.approx(two.length_effect, abs=1e-9)
    assert one.rate.low == pytest.approx(1 - two.rate.high, abs=1e-6)


def test_a_model_against_itself_is_one_half() -> None:
    lengths = np.arange(1, 60)
    found = length_controlled(np.full(59, 0.5), lengths, lengths)
    assert (found.rate.estimate, found.rate.low, found.rate.high, found.length_effect) == (0.5, 0.5, 0.5, 0.0)


def test_without_a_length_difference_nothing_is_controlled() -> None:
    preferences = [1.0, 1.0, 0.0, 0.5, 1.0]
    found = length_controlled(preferences, [10] * 5, [30] * 5)
    assert found.rate.estimate == pytest.approx(0.7, abs=1e-3)


def test_winning_everything_stays_a_number() -> None:
    found = length_controlled([1.0] * 40, range(40), range(40, 0, -1))
    assert 0.99 < found.rate.estimate <= 1.0
    assert found.rate.has_bounds


def test_bad_input_is_told_in_a_sentence() -> None:
    with pytest.raises(UserError, match="2 preferences, 1 lengths of the first"):
        length_controlled([1.0, 0.0], [1.0], [1.0, 2.0])
    with pytest.raises(UserError, match="between 0 and 1; got 0 to 2"):
        length_controlled([0.0, 2.0], [1.0, 2.0], [1.0, 2.0])
    with pytest.raises(UserError, match="finite"):
        length_controlled([0.0, math.nan], [1.0, 2.0], [1.0, 2.0])
    with pytest.raises(UserError, match="2, 1 and 2"):
        length_controlled([0.0, 1.0], [1, 2], [2, 1], [0, 0], Regulariser(np.zeros(2), np.zeros(1), np.zeros(2)))
