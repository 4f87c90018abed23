"""The guard over skipped steps: what it names, what it keeps, when it stops the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf.algo.trainer import LossOutput, NonFiniteError, OptimizerConfig, StepReport, Trainer
from rlhf.infra.config import Config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run, RunConfig
from rlhf.recipes.nonfinite import NonFiniteGuard, first_nonfinite, tensors_of, values_of


@dataclass(frozen=True)
class Rows:
    ids: Tensor
    targets: Tensor
    temperature: float = 1.0


class Root(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.sqrt()


class Net(nn.Module):
    """Embeds, takes a root that negative numbers do not have, and sums up."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(4, 3)
        self.body = nn.Sequential(nn.Linear(3, 3), Root())
        self.dropout = nn.Dropout(0.5)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.tensor([[1.0, 2, 3], [2, 1, 1], [-9, -9, -9], [math.inf, 0, 0]]))
            self.body[0].weight.copy_(torch.eye(3))
            self.body[0].bias.zero_()

    def forward(self, ids: Tensor) -> Tensor:
        return self.dropout(self.body(self.embedding(ids)))


def loss_of(net: Net) -> Callable[[Rows], LossOutput]:
    return lambda rows: LossOutput((net(rows.ids).sum(dim=-1) - rows.targets).square().mean())


def rows(*ids: int, target: float = 0.0) -> Rows:
    return Rows(torch.tensor(ids), torch.full((len(ids),), target))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    config = RunConfig(output_dir=tmp_path, name="run", device="cpu")
    with Run.create("sft", Config(), config) as run:
        yield run


def test_the_first_non_finite_tensor_is_named() -> None:
    net = Net()
    loss = loss_of(net)
    assert first_nonfinite([rows(0, 1), rows(1)], loss) is None
    assert first_nonfinite([rows(0), rows(1, 2)], loss) == "the output of Net.body.1"
    assert first_nonfinite([rows(3), rows(2)], loss) == "the output of Net.embedding"
    assert first_nonfinite([rows(0), rows(2, target=math.nan)], loss) == "tensor 1.targets of the batch"


def test_looking_draws_no_random_numbers_and_leaves_no_hook_and_no_gradient() -> None:
    net = Net()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first_nonfinite([rows(2)], loss_of(net), seed=3)
    assert torch.equal(torch.rand(3), expected)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not nn.modules.module._global_forward_hooks and not nn.modules.module._global_forward_pre_hooks


def test_the_look_sees_the_dropout_of_the_step() -> None:
    drawn: list[Tensor] = []

    def loss(batch: Rows) -> LossOutput:
        drawn.append(torch.rand(4))
        return LossOutput(drawn[-1].sum())

    torch.manual_seed(11)
    loss(rows(0))
    torch.rand(100)
    first_nonfinite([rows(0)], loss, seed=11)
    assert torch.equal(drawn[0], drawn[1])


def test_places_inside_a_batch() -> None:
    batch = [(rows(1, 2), {"extra": torch.ones(1)}, None, "text", math.nan, True)]
    assert [name for name, _ in tensors_of(batch)] == ["0.0.ids", "0.0.targets", "0.1.extra"]
    assert dict(values_of(batch)) == {"0.0.temperature": 1.0, "0.2": None, "0.3": "text", "0.4": "nan", "0.5": True}


def stepped(run: Run, net: Net, batches: list[Rows], **settings: int) -> tuple[Trainer, NonFiniteGuard]:
    trainer = Trainer(dict(net.named_parameters()), OptimizerConfig(learning_rate=0.1, **settings), 20)
    guard = NonFiniteGuard(run, trainer)
    for batch in batches:
        report = trainer.step([batch], loss_of(net))
        if report.skipped:
            guard.examine(report, [batch], loss_of(net))
        guard.stop_if_exhausted()
    return trainer, guard


def test_a_skipped_batch_is_kept_without_pickle_and_told_about(run: Run) -> None:
    net = Net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    trainer, _ = stepped(run, net, [rows(2, 1)])
    assert trainer.skipped_count == 1
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    folder = run.folder / "nonfinite" / "step_000001"
    assert sorted(path.name for path in folder.iterdir()) == ["batch.safetensors", "report.json"]
    kept = load_file(folder / "batch.safetensors")
    assert kept["0.ids"].tolist() == [2, 1] and kept["0.targets"].tolist() == [0.0, 0.0]
    report = json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["first_nonfinite"] == "the output of Net.body.1"
    assert (report["step"], report["loss"], report["learning_rate"]) == (1, "nan", 0.1)
    assert report["tensors"]["0.ids"] == {"shape": [2], "dtype": "int64", "num_nonfinite": 0}
    assert report["values"] == {"0.temperature": 1.0}
    said = (run.folder / "logs" / "train.log").read_text()
    assert "step 1 was skipped, the weights are as before: first not finite was the output of Net.body.1" in said


def test_a_few_batches_are_kept_and_no_more(run: Run) -> None:
    stepped(run, Net(), [rows(2)] * 6, max_nonfinite_steps=9)
    kept = sorted(path.name for path in (run.folder / "nonfinite").iterdir())
    assert kept == ["step_000001", "step_000002", "step_000003"]


def test_the_run_stops_after_so_many_in_a_row_and_names_the_first(run: Run) -> None:
    net = Net()
    stepped(run, net, [rows(2), rows(2), rows(0), rows(2), rows(2)], max_nonfinite_steps=3)  # never three in a row
    with pytest.raises(NonFiniteError) as caught:
        stepped(run, net, [rows(0), rows(3), rows(2), rows(2)], max_nonfinite_steps=3)
    assert isinstance(caught.value, UserError)  # the command line tells it in one sentence, with exit code 2
    text = str(caught.value)
    assert text.startswith("3 optimizer steps in a row were not finite, first in the output of Net.embedding; ")
    assert "in the newest checkpoint" in text and f"rlhf resume {run.folder}" in text and "\n" not in text


def test_overflows_that_only_lower_the_loss_scale_are_not_examined(run: Run) -> None:
    net = Net()
    trainer = Trainer(dict(net.named_parameters()), OptimizerConfig(max_nonfinite_steps=2), 20, scale_loss=True)
    guard = NonFiniteGuard(run, trainer)
    overflow = StepReport(1, 0.5, math.inf, 0.1, True, {}, {}, "the gradient of body.0.weight")
    guard.examine(overflow, [rows(0)], loss_of(net))
    assert not (run.folder / "nonfinite").exists()
    trainer.skipped_in_a_row = 2  # now it ends the run, and is worth a look
    guard.examine(overflow, [rows(0)], loss_of(net))
    assert (run.folder / "nonfinite" / "step_000001").is_dir()
    with pytest.raises(NonFiniteError, match=r"the gradient of body\.0\.weight"):
        guard.stop_if_exhausted()
