"""The law of over-optimisation against literals, NumPy's and SciPy's own fits, and maxima that are looked for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.algo.overoptimisation import LAWS, best_of_n_peak, best_of_n_terms, least_squares, rl_peak, rl_terms

D = torch.tensor([0.0, 0.25, 1.0, 2.0, 4.0], dtype=torch.float64)


def value(law: str, d: float, alpha: float, beta: float) -> float:
    """The law as the paper writes it."""
    if law == "best_of_n":
        return d * (alpha - beta * d)
    return d * (alpha - beta * math.log(d)) if d > 0 else 0.0


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_terms_are_those_of_the_paper() -> None:
    assert best_of_n_terms(numbers(0, 3)).tolist() == [[0, 0], [3, -9]]
    assert rl_terms(numbers(0, 1, math.e)).tolist() == [[0, 0], [1, 0], [math.e, pytest.approx(-math.e)]]
    for law in LAWS:
        found = LAWS[law].terms(D) @ numbers(0.7, 0.2)
        assert found.tolist() == pytest.approx([value(law, d, 0.7, 0.2) for d in D.tolist()])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("alpha", "beta"), [(0.7, 0.2), (1.5, 0.01), (-0.3, 0.4), (0.2, -0.1), (0.5, 0.0)])
def test_points_on_the_law_give_its_coefficients_back(law: str, alpha: float, beta: float) -> None:
    points = numbers(*[value(law, d, alpha, beta) for d in D.tolist()])
    assert least_squares(LAWS[law].terms(D), points).tolist() == pytest.approx([alpha, beta], abs=1e-12)


@pytest.mark.parametrize("law", LAWS)
def test_noisy_points_are_fitted_as_others_fit_them(law: str) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(0)
    d = np.sort(rng.uniform(0.01, 5, 40))
    points = np.array([value(law, x, 0.6, 0.15) for x in d]) + rng.normal(0, 0.05, 40)
    found = least_squares(LAWS[law].terms(torch.from_numpy(d)), torch.from_numpy(points)).tolist()

    def curve(x: np.ndarray, alpha: float, beta: float) -> np.ndarray:
        return np.array([value(law, one, alpha, beta) for one in x])

    assert found == pytest.approx(optimize.curve_fit(curve, d, points)[0].tolist(), rel=1e-6)
    column = d if law == "best_of_n" else np.log(d)
    design = np.stack((d, -d * column), axis=1)
    assert found == pytest.approx(np.linalg.lstsq(design, points, rcond=None)[0].tolist(), rel=1e-10)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("alpha", "beta"), [(0.7, 0.2), (1.5, 0.9), (0.1, 0.3)])
def test_the_peak_is_where_no_point_beside_it_is_higher(law: str, alpha: float, beta: float) -> None:
    grid = np.linspace(1e-6, 20, 400_001)
    along = [grid * (alpha - beta * grid), grid * (alpha - beta * np.log(grid))][law == "rl"]
    found = float(LAWS[law].peak(numbers(alpha), numbers(beta)))
    assert found == pytest.approx(grid[along.argmax()], abs=1e-4)


def test_peaks_by_hand() -> None:
    assert float(best_of_n_peak(numbers(3), numbers(0.5))) == 3
    assert float(rl_peak(numbers(2), numbers(2))) == 1
    assert float(rl_peak(numbers(0.6), numbers(0.2))) == pytest.approx(math.e**2)
    # At RL's peak the gain is beta d, at that of best of n alpha^2 / (4 beta).
    assert value("rl", math.e**2, 0.6, 0.2) == pytest.approx(0.2 * math.e**2)
    assert value("best_of_n", 3, 3, 0.5) == pytest.approx(9 / 2)


@pytest.mark.parametrize("law", LAWS)
def test_a_curve_without_a_bend_has_no_peak(law: str) -> None:
    alphas, betas = numbers(1, 1, -1, -1, 0), numbers(0, -1, -1, 0, 0)
    assert LAWS[law].peak(alphas, betas).tolist() == [math.inf, math.inf, math.inf, 0, 0]


def test_best_of_n_that_only_falls_is_best_at_its_start() -> None:
    assert float(best_of_n_peak(numbers(-1), numbers(2))) == 0


def test_points_that_determine_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 2"):
        least_squares(rl_terms(numbers(2)), numbers(1))
    with pytest.raises(ValueError, match="KL above 0"):
        least_squares(best_of_n_terms(numbers(0, 0, 0)), numbers(1, 2, 3))
    with pytest.raises(ValueError, match="too few different KLs"):
        least_squares(best_of_n_terms(numbers(2, 2, 2)), numbers(1, 2, 3))
    # Of RL's two terms the second is 0 at d = 1.
    with pytest.raises(ValueError, match="KL above 0"):
        least_squares(rl_terms(numbers(1, 1)), numbers(1, 2))
