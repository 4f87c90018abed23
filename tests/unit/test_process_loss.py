"""Losses, labels and scores of steps: by hand, against loops and scikit-learn, and at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import log_loss
from torch import Tensor

from rlhf.algo.process_loss import (
    AGGREGATIONS,
    ESTIMATES,
    STEP_REWARDS,
    hard_estimate,
    last,
    minimum,
    product,
    soft_estimate,
    step_change,
    step_log_probability,
    step_loss,
    step_probability,
)

LOGITS = torch.tensor([[0.0, math.log(3), -math.log(4)], [math.log(9), math.log(4), 7.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])


def p(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_step_loss_by_hand() -> None:
    # Probabilities are 1/2, 3/4, 1/5 and 9/10, 4/5; the sixth step does not count.
    labels = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.25, 1.0]], dtype=torch.float64)
    by_hand = math.log(2) + math.log(4) - math.log(0.8) - math.log(0.9) - 0.25 * math.log(0.8) - 0.75 * math.log(0.2)
    assert float(step_loss(LOGITS, labels, MASK, 5)) == pytest.approx(by_hand / 5)
    assert float(step_loss(LOGITS, labels, MASK, 20)) == pytest.approx(by_hand / 20)


def test_step_loss_is_scikit_learns_log_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, generator=generator, dtype=torch.float64)
    labels = (torch.rand(40, generator=generator) < 0.5).double()
    mask = torch.rand(40, generator=generator) < 0.7
    expected = log_loss(labels[mask], logits.sigmoid()[mask])
    assert float(step_loss(logits, labels, mask, int(mask.sum()))) == pytest.approx(expected)


def test_step_loss_reads_nothing_under_the_mask() -> None:
    logits, labels = LOGITS.clone().requires_grad_(), torch.full_like(LOGITS, 0.5)
    spoilt = torch.where(MASK, labels, torch.nan)
    step_loss(logits, spoilt, MASK, 5).backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all()) and float(logits.grad[1, 2]) == 0
    # The gradient of each step is (p - y) / n, also where the logit is huge.
    torch.testing.assert_close(logits.grad[0], (p(0.5, 0.75, 0.2) - 0.5) / 5)
    assert float(step_loss(p(800.0, -800.0), p(0.0, 0.0), torch.tensor([True, True]), 1)) == 800


def test_labels_by_sampling() -> None:
    assert [soft_estimate(k, 8) for k in (0, 3, 8)] == [0, 0.375, 1]
    assert [hard_estimate(k, 8) for k in (0, 1, 8)] == [0, 1, 1]
    assert (ESTIMATES["soft"](1, 4), ESTIMATES["hard"](1, 4)) == (0.25, 1.0)
    for counts in ((1, 0), (-1, 3), (4, 3), (0, 0)):
        with pytest.raises(ValueError, match=f"got {counts[0]} right of {counts[1]}"):
            soft_estimate(*counts)


def test_aggregations_by_hand() -> None:
    torch.testing.assert_close(minimum(LOGITS, MASK), p(0.2, 0.8))
    torch.testing.assert_close(product(LOGITS, MASK), p(0.5 * 0.75 * 0.2, 0.9 * 0.8))
    torch.testing.assert_close(last(LOGITS, MASK), p(0.2, 0.8))
    turned = MASK[:, [2, 0, 1]]  # steps may stand anywhere under their mask
    torch.testing.assert_close(last(LOGITS[:, [2, 0, 1]], turned), p(0.75, 0.8))
    assert {"min": minimum, "product": product, "last": last} == AGGREGATIONS


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_aggregations_against_a_loop_and_whatever_is_padded(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3], [2], [4], [5]])
    loops = {"min": min, "product": math.prod, "last": lambda values: values[-1]}
    expected = [
        loops[name]([1 / (1 + math.exp(-float(v))) for v in row[keep]]) for row, keep in zip(logits, mask, strict=True)
    ]
    spoilt = torch.where(mask, logits, torch.nan)
    for given in (logits, spoilt):
        torch.testing.assert_close(AGGREGATIONS[name](given, mask), p(*expected))
    one = torch.ones(6, 1, dtype=torch.bool)
    torch.testing.assert_close(AGGREGATIONS[name](logits[:, :1], one), logits[:, 0].sigmoid())


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_a_solution_without_steps_has_no_score(name: str) -> None:
    for mask in (torch.tensor([[True], [False]]), torch.zeros(2, 0, dtype=torch.bool)):
        with pytest.raises(ValueError, match="without a step"):
            AGGREGATIONS[name](torch.zeros(mask.shape), mask)


def test_a_long_product_stays_a_probability() -> None:
    everywhere = torch.ones(1, 2000, dtype=torch.bool)
    sure = float(product(torch.full((1, 2000), 12.0), everywhere))
    assert sure == pytest.approx(math.exp(-2000 * math.log1p(math.exp(-12))), rel=1e-3)
    assert float(product(torch.full((1, 2000), -12.0), everywhere)) == 0


def test_what_steps_are_worth_one_by_one() -> None:
    logits = LOGITS[0]  # probabilities 1/2, 3/4, 1/5
    torch.testing.assert_close(step_probability(logits), p(0.5, 0.75, 0.2))
    torch.testing.assert_close(step_log_probability(logits), p(math.log(0.5), math.log(0.75), math.log(0.2)))
    torch.testing.assert_close(step_change(logits), p(0.5, 0.25, -0.55))
    names = {"probability": step_probability, "log_probability": step_log_probability, "change": step_change}
    assert names == STEP_REWARDS
    everywhere = torch.ones(1, 3, dtype=torch.bool)
    torch.testing.assert_close(step_change(logits).sum(), last(logits.unsqueeze(0), everywhere)[0])
    torch.testing.assert_close(step_log_probability(logits).sum().exp(), product(logits.unsqueeze(0), everywhere)[0])
    for worth in STEP_REWARDS.values():
        assert worth(logits[:0]).shape == (0,)
        assert bool(worth(p(-900.0, 900.0)).isfinite().all())
