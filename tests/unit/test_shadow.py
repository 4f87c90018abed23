"""The ledger of memory, and code that runs on imagined numbers: against literals, and against the code for real."""

from __future__ import annotations

import pytest
import torch
from tiny_backbones import tiny_model, word_tokenizer
from torch import Tensor, nn

from rlhf.algo import logprobs
from rlhf.algo.trainer import LossOutput, OptimizerConfig, Trainer
from rlhf.infra.shadow import Ledger, Shadow
from rlhf.models.backbone import Backbone
from rlhf.models.lora import LoRAConfig
from rlhf.models.policy import masked_logprobs

KB = 1024


def test_a_ledger_knows_what_lives_and_what_did_at_the_peak() -> None:
    ledger = Ledger()
    with ledger, ledger.phase() as peak:
        kept = torch.zeros(KB)  # 4 KB
        gone = torch.zeros(2 * KB)
        del gone
        view = kept.view(32, 32)[3:]  # no memory of its own
        twice = view.flatten() + view.flatten()
        del twice
        last = torch.zeros(KB, dtype=torch.float64)
    assert peak.by_label == {"activations": 12 * KB}
    assert ledger.num_bytes == 12 * KB
    del kept, view, last
    assert ledger.num_bytes == 0


def test_what_was_there_before_a_phase_counts_in_it_and_a_label_holds_from_the_first_byte() -> None:
    ledger = Ledger(lambda tensor: "wide" if tensor.shape[-1:] == (100,) else "other")
    weight = torch.zeros(10, 100, requires_grad=True)
    ledger.relabel([weight], "weights")
    with ledger, ledger.phase() as peak:
        (torch.ones(5, 10) @ weight).sum().backward()
        assert weight.grad is not None
        ledger.relabel([weight.grad], "gradients")
    # At the end the ones, the gradient of the sum (a view of one number) and that of the weight are alive.
    assert peak.by_label["weights"] == peak.by_label["gradients"] == 4 * 1000
    with ledger, ledger.phase() as quiet:
        pass
    assert quiet.by_label == {"weights": 4000, "gradients": 4000}


def test_phases_do_not_nest() -> None:
    ledger = Ledger()
    with ledger.phase(), pytest.raises(ValueError, match="do not nest"), ledger.phase():
        pass


def test_a_kernel_with_scratch_memory_is_known() -> None:
    ledger = Ledger()
    values = torch.zeros(4, KB)
    with ledger, ledger.phase() as peak:
        values.logsumexp(dim=-1)
    assert peak.num_bytes == 4 * 4 + 4 * 4 * KB


def test_imagined_numbers_take_no_memory_and_counts_are_real() -> None:
    shadow = Shadow()
    with shadow, shadow.phase() as peak:
        rows = torch.arange(6)
        huge = torch.zeros(6, 2**40)  # 24 TB
        picked = huge[rows % 2 == 0]
        assert picked.shape == (3, 2**40)
        assert int((rows > 2).sum()) == 3
        assert float(picked.sum()) == 1.0 and bool(picked.sum() > 0) is True
        drawn = torch.zeros(6, 5).argmax(dim=-1)
        assert drawn.tolist() == [0] * 6
        scores = torch.zeros(6)
        scores[rows[:2]] = torch.ones(2)
        assert (rows.float() * scores).shape == (6,)
    assert peak.num_bytes >= 9 * 4 * 2**40


def test_integers_in_place_of_imagined_ones_stay_themselves() -> None:
    with Shadow():
        ids = torch.zeros(3, dtype=torch.long)
        logits = torch.zeros(3, 7)
        same = ids.copy_(logits.argmax(dim=-1))
        assert same is ids and ids.tolist() == [0, 0, 0]
        ids[torch.tensor([True, False, True])] = 5
        assert ids.tolist() == [5, 0, 5]


def test_tied_weights_stay_tied_and_count_once() -> None:
    with torch.device("meta"):
        first, second = nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=False)
    second.weight = first.weight
    both = nn.ModuleList([first, second])
    shadow = Shadow()
    shadow.imagine_module(both, "weights")
    assert first.weight is second.weight and first.weight.device.type == "cpu"
    assert shadow.num_bytes == 4 * 8 * 16


def peaks_of_training(
    ledger: Ledger, family: str, dtype: str, *, full: bool, recomputed: bool
) -> tuple[dict[str, int], ...]:
    """Two optimizer steps of two micro-batches, one with padding; a model with random weights, or imagined ones."""
    tokenizer = word_tokenizer()
    if isinstance(ledger, Shadow):
        with torch.device("meta"):
            model = tiny_model(family, len(tokenizer))
        ledger.imagine_module(model, "base")
    else:
        model = tiny_model(family, len(tokenizer))
        ledger.relabel([*model.parameters(), *model.buffers()], "base")
    found = []
    with ledger:
        backbone = Backbone(model, tokenizer, "tiny", dtype)
        if recomputed:
            backbone.recompute_in_backward()
        backbone.add_adapter("a", LoRAConfig(r=4))
        backbone.train_only(["a"])
        if full:
            backbone.model.requires_grad_(True)
        trained = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
        trainer = Trainer(trained, OptimizerConfig(), 2)
        mask = torch.ones(4, 30, dtype=torch.bool)
        mask[0, 25:] = False
        answer = mask.clone()
        answer[:, :9] = False

        def loss(ids: Tensor) -> LossOutput:
            return LossOutput(-masked_logprobs(backbone, None if full else "a", ids, mask, answer).sum() / 100)

        for _ in range(2):
            with ledger.phase() as peak:
                trainer.step([torch.full((4, 30), token) for token in (3, 4)], loss)
                ledger.relabel((p.grad for p in trained.values() if p.grad is not None), "gradients")
            found.append(peak.by_label)
    return tuple(found)


@pytest.mark.parametrize(
    ("family", "dtype", "full", "recomputed"),
    [
        ("gpt2", "fp32", False, True),
        pytest.param("llama", "bf16", False, False, marks=pytest.mark.slow),
        pytest.param("llama", "fp32", True, False, marks=pytest.mark.slow),
        pytest.param("gpt2", "bf16", True, True, marks=pytest.mark.slow),
    ],
)
def test_a_training_step_in_a_shadow_takes_the_bytes_that_the_real_one_takes(
    family: str, dtype: str, full: bool, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "MAX_LOGITS", 27 * 16)  # several chunks
    real = peaks_of_training(Ledger(), family, dtype, full=full, recomputed=recomputed)
    imagined = peaks_of_training(Shadow(), family, dtype, full=full, recomputed=recomputed)
    assert real == imagined
    assert real[1]["gradients"] > 0 and real[1]["base"] > 0
