"""The optimizer step under loss scaling, and what of it a resumed run must bring along."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rlhf.algo.trainer import LossOutput, OptimizerConfig, Trainer

SETTINGS = OptimizerConfig(learning_rate=0.05, max_grad_norm=0.1, warmup_ratio=0.5, weight_decay=0.1)


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def rows(seed: int) -> Tensor:
    return torch.randn(12, 4, generator=torch.Generator().manual_seed(seed))


def squared(model: nn.Module) -> Callable[[Tensor], LossOutput]:
    return lambda part: LossOutput((model(part) - 1).square().sum() / 12)


def trainer_of(model: nn.Module, *, scale_loss: bool) -> Trainer:
    return Trainer(dict(model.named_parameters()), SETTINGS, 8, scale_loss=scale_loss)


def test_a_scaled_loss_gives_the_same_step_as_the_loss_itself() -> None:
    plain, scaled = small_model(), small_model()
    one, other = trainer_of(plain, scale_loss=False), trainer_of(scaled, scale_loss=True)
    assert other.scaler.get_scale() > 1000
    for seed in range(3):
        expected, found = (
            one.step(rows(seed).split(5), squared(plain)),
            other.step(rows(seed).split(5), squared(scaled)),
        )
        assert found.loss == pytest.approx(expected.loss) and found.grad_norm == pytest.approx(expected.grad_norm)
        assert not found.skipped and expected.grad_norm > SETTINGS.max_grad_norm
    for first, second in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=0)


def test_an_overflow_is_skipped_and_halves_the_scale() -> None:
    model = small_model()
    trainer = trainer_of(model, scale_loss=True)
    before, scale = [p.detach().clone() for p in model.parameters()], trainer.scaler.get_scale()
    # The loss and its gradient fit into fp32, the gradient times the scale does not.
    report = trainer.step([rows(0)], lambda part: LossOutput(1e35 * squared(model)(part).loss))
    assert report.skipped and trainer.skipped_count == 1 and math.isfinite(report.loss)
    assert trainer.scaler.get_scale() == scale / 2
    assert all(torch.equal(p, start) for p, start in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("scale_loss", [False, True])
def test_a_restored_trainer_holds_all_that_the_first_one_held(scale_loss: bool) -> None:
    model = small_model()
    first = trainer_of(model, scale_loss=scale_loss)
    bad = rows(0)
    bad[0, 0] = math.nan
    for batch in (rows(0), bad, rows(1), bad):
        first.step([batch], squared(model))
    twin = small_model()
    twin.load_state_dict(model.state_dict())
    second = trainer_of(twin, scale_loss=scale_loss)
    tensors, plain = first.state()
    second.restore({name: tensor.clone() for name, tensor in tensors.items()}, plain)
    assert second.scaler.state_dict() == first.scaler.state_dict()
    assert (second.step_count, second.skipped_count, second.skipped_in_a_row) == (4, 2, 1)
    for seed in range(2, 5):
        assert second.step([rows(seed)], squared(twin)) == first.step([rows(seed)], squared(model))
        assert second.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["lr"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_gradients_of_the_step_before_are_gone() -> None:
    model = small_model()
    trainer = trainer_of(model, scale_loss=False)
    trainer.step([rows(0)], squared(model))
    twin = small_model()
    twin.load_state_dict(model.state_dict())
    squared(twin)(rows(1)).loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in twin.parameters() if p.grad is not None))
    assert trainer.step([rows(1)], squared(model)).grad_norm == pytest.approx(norm, rel=1e-5)


def test_the_scheduled_rate_is_the_one_that_moves_the_weights() -> None:
    """Three steps of Adam by hand, at rates that rise from zero."""
    weight = nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    config = OptimizerConfig(learning_rate=0.1, warmup_ratio=1.0, adam_epsilon=1e-12, max_grad_norm=1e9)
    trainer = Trainer({"weight": weight}, config, 4)
    expected, mean, square = weight.detach().clone(), torch.zeros(2), torch.zeros(2)
    for step in range(3):
        gradient = 2 * expected
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        corrected = (mean / (1 - 0.9 ** (step + 1))) / (square / (1 - 0.999 ** (step + 1))).sqrt()
        expected = expected - 0.1 * step / 4 * corrected
        report = trainer.step([None], lambda _: LossOutput(weight.square().sum()))
        assert report.learning_rate == pytest.approx(0.1 * step / 4)
        torch.testing.assert_close(weight.detach(), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("constant", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_skipped_although_its_gradient_is_one(constant: float) -> None:
    model = small_model()
    trainer = trainer_of(model, scale_loss=False)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):  # the rate of the first step would be zero
        report = trainer.step([rows(0)], lambda part: LossOutput(squared(model)(part).loss + constant))
        assert report.skipped and math.isfinite(report.grad_norm)
    assert all(torch.equal(p, start) for p, start in zip(model.parameters(), before, strict=True))
