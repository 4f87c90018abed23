"""One optimizer step: what it does to weights, rate and counters, and that it can be taken up again."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable

import pytest
import torch
from sync_counter import counted_syncs
from torch import Tensor, nn

from rlhf.algo.trainer import (
    LossOutput,
    NonFiniteError,
    OptimizerConfig,
    StepReport,
    Trainer,
    largest,
    mean_loss,
    mean_reports,
)


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def trainer_of(model: nn.Module, num_steps: int = 10, **settings: float | str) -> Trainer:
    return Trainer(dict(model.named_parameters()), OptimizerConfig(**settings), num_steps)


def rows(seed: int = 0) -> Tensor:
    return torch.randn(12, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squared(model: nn.Module, count: int = 12) -> Callable[[Tensor], LossOutput]:
    def loss(part: Tensor) -> LossOutput:
        error = (model(part) - 1).square().sum() / count
        return LossOutput(error, {"rows": torch.tensor(len(part) / count)})

    return loss


@pytest.mark.parametrize("cut", [[3, 3, 3, 3], [1, 11], [5, 4, 3]])
def test_O1_gradients_do_not_depend_on_the_micro_batches(cut: list[int]) -> None:
    whole, parts = small_model(), small_model()
    one = trainer_of(whole, max_grad_norm=1e9).step([rows()], squared(whole))
    four = trainer_of(parts, max_grad_norm=1e9).step(rows().split(cut), squared(parts))
    for first, second in zip(whole.parameters(), parts.parameters(), strict=True):
        assert first.grad is not None and second.grad is not None
        torch.testing.assert_close(first.grad, second.grad, atol=1e-14, rtol=1e-12)
        torch.testing.assert_close(first, second, atol=1e-10, rtol=0)
    assert four.loss == pytest.approx(one.loss)
    assert four.grad_norm == pytest.approx(one.grad_norm)
    assert four.metrics == pytest.approx({"rows": 1.0})


def test_a_step_is_adamw_with_decay_on_matrices_only() -> None:
    model, twin = small_model(), small_model()
    optimizer = torch.optim.AdamW(
        [
            {"params": [twin[0].weight, twin[2].weight], "weight_decay": 0.1},
            {"params": [twin[0].bias, twin[2].bias], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.8, 0.9),
        eps=1e-6,
    )
    settings = {"learning_rate": 0.01, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "weight_decay": 0.1}
    trainer = trainer_of(model, lr_scheduler_type="constant", max_grad_norm=0.5, **settings)
    for seed in range(3):
        report = trainer.step([rows(seed)], squared(model))
        optimizer.zero_grad()
        squared(twin)(rows(seed)).loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in twin.parameters() if p.grad is not None))
        assert report.grad_norm == pytest.approx(norm)
        for parameter in twin.parameters():
            assert parameter.grad is not None
            parameter.grad *= min(1.0, 0.5 / (norm + 1e-6))
        optimizer.step()
    for first, second in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(first, second, atol=1e-12, rtol=0)


def rates(num_steps: int, **settings: float | str) -> list[float]:
    model = small_model()
    trainer = trainer_of(model, num_steps, learning_rate=1.0, **settings)
    return [trainer.step([rows()], squared(model)).learning_rate for _ in range(num_steps)]


def test_O2_learning_rate_schedules_follow_their_formula() -> None:
    assert rates(5) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert rates(8, warmup_ratio=0.25) == pytest.approx([0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert rates(4, lr_scheduler_type="constant") == [1.0] * 4
    assert rates(4, lr_scheduler_type="constant_with_warmup", warmup_ratio=0.5) == [0.0, 0.5, 1.0, 1.0]
    cosine = [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert rates(6, lr_scheduler_type="cosine") == pytest.approx(cosine)


def test_a_tiny_gradient_norm_keeps_the_change_tiny() -> None:
    # Adam's step does not shrink with its gradient; it does once that is far below epsilon.
    model = small_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    report = trainer_of(model, learning_rate=0.1, max_grad_norm=1e-12).step([rows()], squared(model))
    assert report.grad_norm > 0.1
    moved = [after.detach() - start for after, start in zip(model.parameters(), before, strict=True)]
    assert 0 < math.sqrt(sum(float(change.square().sum()) for change in moved)) < 0.1 * 1e-12 / 1e-8
    norm = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    assert math.sqrt(norm) == pytest.approx(1e-12, rel=1e-3)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_step_is_skipped_and_counted(poison: float) -> None:
    model = small_model()
    trainer = trainer_of(model, num_steps=10, learning_rate=0.1, max_nonfinite_steps=3)
    before = copy.deepcopy(model.state_dict())
    bad = rows()
    bad[0, 0] = poison
    first = trainer.step([rows(), bad], squared(model))
    assert first.skipped and not (math.isfinite(first.loss) and math.isfinite(first.grad_norm))
    assert first.culprit is not None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not trainer.optimizer.state  # no moment has seen the gradient either
    good = trainer.step([rows()], squared(model))
    assert not good.skipped and good.culprit is None
    assert good.learning_rate == pytest.approx(0.09)  # the schedule went on
    assert (trainer.step_count, trainer.skipped_count, trainer.skipped_in_a_row) == (2, 1, 0)
    after = copy.deepcopy(model.state_dict())
    assert trainer.step([bad], squared(model)).skipped and not trainer.exhausted
    assert trainer.step([bad], squared(model)).skipped and not trainer.exhausted
    assert trainer.step([bad], squared(model)).skipped and trainer.exhausted
    assert trainer.skipped_count == 4
    with pytest.raises(NonFiniteError, match="3 optimizer steps in a row were not finite"):
        trainer.step([rows()], squared(model))
    assert trainer.step_count == 5
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("factor", [1.0, math.nan])
def test_a_non_finite_gradient_is_skipped_and_named_even_under_a_finite_loss(factor: float) -> None:
    model = small_model()
    with torch.no_grad():
        model[2].bias.zero_()
    trainer = trainer_of(model, max_nonfinite_steps=2)
    before = copy.deepcopy(model.state_dict())

    def loss(part: Tensor) -> LossOutput:
        # The root of zero is 0, its slope is infinite; the other parameters have good gradients.
        root = model[2].bias.sqrt()
        root.register_hook(lambda gradient: factor * gradient)
        return LossOutput(model(part).sum().clamp(-1, 1) * 0 + root.sum())

    report = trainer.step([rows()], loss)
    assert report.skipped and report.loss == 0.0
    assert report.culprit == "the gradient of 2.bias"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_that_are_finite_but_whose_norm_is_not_are_skipped() -> None:
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    trainer = trainer_of(model)
    report = trainer.step([torch.ones(1, 2)], lambda part: LossOutput(1e30 * model(part).sum()))
    assert report.skipped and math.isfinite(report.loss) and math.isinf(report.grad_norm)
    assert report.culprit == "the norm of all gradients, each of them finite"
    assert torch.equal(model.weight, before)


def test_skipped_steps_call_for_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    model = small_model()
    trainer = trainer_of(model)
    trainer.step([rows() * math.nan], squared(model))
    trainer.step([rows()], squared(model))
    assert [str(warning.message) for warning in recwarn] == []


def test_loss_scaling_changes_no_step_and_an_overflow_lowers_the_scale() -> None:
    scaled, plain = small_model().float(), small_model().float()
    inputs = rows().float()
    first = Trainer(dict(scaled.named_parameters()), OptimizerConfig(learning_rate=0.1), 10, scale_loss=True)
    second = trainer_of(plain, learning_rate=0.1)
    assert first.scaler.get_scale() == 65536.0
    # A loss that is finite itself but not 65536 times: the gradients overflow, as they do in float16.
    overflow = first.step([inputs], lambda part: LossOutput(1e35 * scaled(part).sum()))
    assert overflow.skipped and math.isfinite(overflow.loss)
    assert first.scaler.get_scale() == 32768.0 and not first.optimizer.state
    second.step([inputs * math.nan], squared(plain))
    for _ in range(3):
        one, other = first.step([inputs], squared(scaled)), second.step([inputs], squared(plain))
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-6) and not one.skipped
    for a, b in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    tensors, state = first.state()
    again = Trainer(dict(scaled.named_parameters()), OptimizerConfig(learning_rate=0.1), 10, scale_loss=True)
    again.restore(tensors, state)
    assert again.scaler.get_scale() == 32768.0


def test_an_exhausted_trainer_that_is_restored_has_all_its_tries_again() -> None:
    model = small_model()
    trainer = trainer_of(model, max_nonfinite_steps=2)
    bad = rows() * math.nan
    trainer.step([bad], squared(model))
    tensors, state = trainer.state()
    again = trainer_of(model, max_nonfinite_steps=2)
    again.restore(tensors, state)
    assert (again.skipped_count, again.skipped_in_a_row) == (1, 1)  # taken up in between, the count goes on
    trainer.step([bad], squared(model))
    assert trainer.exhausted
    again.restore(*trainer.state())
    assert (again.skipped_count, again.skipped_in_a_row, again.step_count) == (2, 0, 2)
    assert not again.step([rows()], squared(model)).skipped


@pytest.mark.parametrize(("values", "expected"), [([1.0, 5.0, 3.0], 5.0), ([-4.0, -2.0], -2.0)])
def test_a_maximum_is_that_of_all_micro_batches(values: list[float], expected: float) -> None:
    model = small_model()
    parts = [rows() * 0 + value for value in values]

    def loss(part: Tensor) -> LossOutput:
        return LossOutput(model(part).sum(), {"sum": part[0, 0]}, {"largest": part[0, 0]})

    report = trainer_of(model).step(parts, loss)
    assert report.maxima == {"largest": expected}
    assert report.metrics == {"sum": sum(values)}


def test_state_and_restore_go_on_bit_for_bit() -> None:
    through, stopped = small_model(), small_model()
    settings = {"learning_rate": 0.05, "lr_scheduler_type": "cosine", "warmup_ratio": 0.3}
    straight, first = trainer_of(through, 6, **settings), trainer_of(stopped, 6, **settings)
    wanted = [straight.step([rows(seed)], squared(through)) for seed in range(6)]
    found = [first.step([rows(seed)], squared(stopped)) for seed in range(3)]
    tensors, plain = first.state()
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    resumed_model = small_model()
    resumed_model.load_state_dict(stopped.state_dict())
    resumed = trainer_of(resumed_model, 6, **settings)
    resumed.restore(saved, plain)
    found += [resumed.step([rows(seed)], squared(resumed_model)) for seed in range(3, 6)]
    assert found == wanted
    assert all(torch.equal(a, b) for a, b in zip(through.parameters(), resumed_model.parameters(), strict=True))


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        Trainer({}, OptimizerConfig(), 10)


def test_metrics_of_steps_are_averaged_where_they_exist() -> None:
    reports = [
        StepReport(1, 2.0, 0.0, 0.0, False, {"a": 1.0}, {"m": 7.0}),
        StepReport(2, 4.0, 0.0, 0.0, False, {"a": 3.0, "b": 5.0}, {"m": -1.0}),
    ]
    assert mean_reports(reports) == {"a": 2.0, "b": 5.0, "m": 7.0}
    assert mean_loss(reports) == 3.0


def test_a_skipped_step_spoils_no_mean_unless_it_stands_alone() -> None:
    bad = StepReport(1, math.nan, math.nan, 0.0, True, {"a": math.nan}, {"m": math.nan})
    good = StepReport(2, 4.0, 1.0, 0.0, False, {"a": 3.0}, {"m": 1.0})
    assert mean_reports([bad, good, bad]) == {"a": 3.0, "m": 1.0}
    assert mean_loss([bad, good]) == 4.0
    assert all(math.isnan(value) for value in mean_reports([bad, bad]).values())
    assert math.isnan(mean_loss([bad]))
    assert math.isnan(largest([1.0, math.nan])) and math.isnan(largest([math.nan, 1.0]))


def test_parts_that_are_clipped_apart_move_as_if_each_were_trained_alone() -> None:
    torch.manual_seed(0)
    start = [nn.Linear(4, 1).double(), nn.Linear(4, 1).double()]
    targets = (1.0, 500.0)  # the second one's gradients are far larger than any bound

    def errors(models: nn.ModuleList, which: range) -> Callable[[Tensor], LossOutput]:
        return lambda x: LossOutput(sum((models[i](x) - targets[i]).square().sum() for i in which))  # type: ignore[arg-type]

    config = OptimizerConfig(max_grad_norm=0.5, adam_epsilon=1.0)  # so large that Adam does not undo the clipping
    together = nn.ModuleList(copy.deepcopy(start))
    names = [[f"{i}.{name}" for name, _ in start[i].named_parameters()] for i in range(2)]
    trainer = Trainer(dict(together.named_parameters()), config, 3, clipped_apart=names)
    alone = nn.ModuleList(copy.deepcopy(start))
    each = [Trainer(dict(alone[i].named_parameters()), config, 3) for i in range(2)]
    for _ in range(3):
        whole = trainer.step([rows()], errors(together, range(2)))
        norms = [each[i].step([rows()], errors(alone, range(i, i + 1))).grad_norm for i in range(2)]
        assert whole.grad_norm == pytest.approx(math.hypot(*norms))
    for first, second in zip(together.parameters(), alone.parameters(), strict=True):
        assert torch.equal(first, second)


def test_a_step_waits_for_the_device_once_whatever_it_is_made_of() -> None:
    def with_metrics(model: nn.Module, count: int) -> Callable[[Tensor], LossOutput]:
        def loss(part: Tensor) -> LossOutput:
            error = (model(part) - 1).square().sum() / 12
            metrics = {f"m{i}": error.detach() * i for i in range(count)}
            return LossOutput(error, metrics, {f"largest{i}": error.detach() + i for i in range(count)})

        return loss

    found = []
    for size, num_metrics in ((12, 0), (12, 9), (1, 0), (1, 9)):
        model = small_model()
        trainer = trainer_of(model)
        trainer.step([rows()], with_metrics(model, 1))  # what is set up in a first step does not count
        with counted_syncs() as syncs:
            trainer.step(rows(1).split(size), with_metrics(model, num_metrics))
        found.append(dict(syncs))
    assert found == [{"tolist": 1}] * 4


def test_the_counter_of_waits_sees_what_it_is_there_for() -> None:
    values = torch.arange(3.0)
    with counted_syncs() as syncs:
        float(values.sum()), bool(values[0] == 1), int(values[1]), values[2].item()
        values[values > 0], values.tolist(), values.cpu(), torch.equal(values, values), values.nonzero()
        values + 1, values[:2], values.where(values > 0, 0.0)
    assert syncs == {"item": 4, "index by mask": 1, "tolist": 1, "cpu": 1, "equal": 1, "nonzero": 1}


def test_numbers_of_a_step_are_those_of_floats_added_one_by_one() -> None:
    """Bit for bit: what was a float per scalar and is one reading of all of them must not move a log."""
    torch.manual_seed(1)
    parts = [torch.randn(4) for _ in range(7)]
    weight = nn.Parameter(torch.randn(4))

    def loss(part: Tensor) -> LossOutput:
        output = (weight * part).sum()
        return LossOutput(output, {"a": output.detach() / 3, "b": part.std().double()}, {"top": part.max()})

    outputs = [loss(part) for part in parts]
    total, first, second, top = 0.0, 0.0, 0.0, -math.inf
    for output in outputs:
        total += float(output.loss)
        first += float(output.metrics["a"])
        second += float(output.metrics["b"])
        top = max(top, float(output.maxima["top"]))
    report = Trainer({"weight": weight}, OptimizerConfig(), 10).step(parts, loss)
    assert (report.loss, report.metrics, report.maxima) == (total, {"a": first, "b": second}, {"top": top})


def test_what_is_kept_of_a_micro_batch_holds_no_graph() -> None:
    weight = nn.Parameter(torch.ones(3))
    kept: list[weakref.ref[Tensor]] = []

    def loss(part: Tensor) -> LossOutput:
        product = weight * part
        assert all(earlier() is None for earlier in kept)
        kept.append(weakref.ref(product))
        return LossOutput(product.sum(), {"with_graph": product.sum()}, {"top_with_graph": product.max()})

    Trainer({"weight": weight}, OptimizerConfig(), 10).step(torch.ones(4, 3).unbind(), loss)
    assert len(kept) == 4
