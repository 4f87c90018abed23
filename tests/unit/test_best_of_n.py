"""Best of n against counting every way of drawing n answers."""

from __future__ import annotations

import math
from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from rlhf.algo.best_of_n import best_of_n_kl, expected_best, kl_by_ties


def counted(scores: list[float], worths: list[float], n: int) -> float:
    """Mean over all subsets of n; where several in a subset share the highest score, each of them is as likely."""
    values = []
    for subset in combinations(range(len(scores)), n):
        top = max(scores[i] for i in subset)
        best = [worths[i] for i in subset if scores[i] == top]
        values.append(sum(best) / len(best))
    return sum(values) / len(values)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_it_is_the_mean_over_all_draws(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, worths = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)
    ties = torch.randint(0, 3, (4, 6), generator=generator).float()
    for given in (scores, ties, torch.zeros(4, 6)):
        expected = [counted(s, w, n) for s, w in zip(given.tolist(), worths.tolist(), strict=True)]
        torch.testing.assert_close(expected_best(given, worths, n), torch.tensor(expected, dtype=torch.float64))


def test_the_ends_are_the_mean_and_the_best() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5]])
    worths = torch.tensor([[3.0, 6.0, 0.0]])
    assert float(expected_best(scores, worths, 1)) == pytest.approx(3)
    assert float(expected_best(scores, worths, 3)) == pytest.approx(6)
    assert float(expected_best(scores, worths, 2)) == pytest.approx((6 + 0 + 6) / 3)
    # A score that says nothing picks at random, whatever n is.
    assert float(expected_best(torch.zeros(1, 3), worths, 2)) == pytest.approx(3)


def test_many_answers_stay_exact() -> None:
    num = 400
    found = expected_best(torch.arange(num).float().unsqueeze(0), torch.ones(1, num), 64)
    assert float(found) == pytest.approx(1, abs=1e-9)


def test_kl_is_that_of_the_distribution_of_the_best() -> None:
    def exact(n: int, num: int = 20_000) -> float:
        edges: Tensor = torch.arange(num + 1, dtype=torch.float64) / num
        best = edges[1:] ** n - edges[:-1] ** n  # the best of n uniform numbers
        return float((best * (best * num).log()).nansum())

    for n in (1, 2, 8):
        assert best_of_n_kl(n) == pytest.approx(exact(n), abs=2e-3)
    assert best_of_n_kl(1) == 0 and math.isclose(best_of_n_kl(2), math.log(2) - 0.5)


def test_ties_take_off_what_drawing_with_them_says() -> None:
    def drawn(scores: list[float], n: int) -> float:
        """KL from one answer in N of the best of n draws, a coin among the best, over all N^n of them."""
        shares = [0.0] * len(scores)
        for places in product(range(len(scores)), repeat=n):
            best = [i for i in places if scores[i] == max(scores[j] for j in places)]
            for i in best:
                shares[i] += 1 / len(best) / len(scores) ** n
        return sum(share * math.log(share * len(scores)) for share in shares)

    rows = [[0.1, 0.9, 0.5, 0.7], [0.1, 0.1, 0.5, 0.7], [0.3, 0.3, 0.3, 0.9], [2.0, 2.0, 2.0, 2.0]]
    for n in (1, 2, 3):
        expected = [drawn(rows[0], n) - drawn(row, n) for row in rows]
        assert kl_by_ties(torch.tensor(rows), n).tolist() == pytest.approx(expected, abs=1e-12)
    assert float(kl_by_ties(torch.zeros(1, 4000), 4)) == pytest.approx(best_of_n_kl(4), abs=1e-3)


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ValueError, match="n = 0"):
        best_of_n_kl(0)
    for n in (0, 4):
        with pytest.raises(ValueError, match="expected 1 to 3"):
            expected_best(torch.zeros(1, 3), torch.zeros(1, 3), n)
