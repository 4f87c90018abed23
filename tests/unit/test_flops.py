"""The count of matrix-product flops against PyTorch's own counter, which sees every product as it is dispatched."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from tiny_backbones import Family, tiny_backbone

from rlhf.infra.determinism import rng_state
from rlhf.infra.flop_counter import flop_counter
from rlhf.infra.matmul_rate import measure_matmul_rate
from rlhf.models.backbone import Backbone
from rlhf.models.flops import forward_flops, pass_flops, training_flops
from rlhf.models.lora import LoRAConfig

ROWS, WIDTH = 3, 7


def eager(family: Family) -> Backbone:
    """Attention as plain products: PyTorch's counter knows no fused attention of a CPU."""
    backbone = tiny_backbone(family)
    backbone.model.set_attn_implementation("eager")
    return backbone


def ids() -> torch.Tensor:
    return torch.randint(3, 20, (ROWS, WIDTH), generator=torch.Generator().manual_seed(0))


def counted(backbone: Backbone, adapter: str | None, *, backward: bool, merged: bool = False) -> int:
    """Flops that PyTorch saw."""
    mask = torch.ones(ROWS, WIDTH, dtype=torch.bool)
    through = backbone.merged(adapter) if merged else backbone.using(adapter)
    with through, torch.set_grad_enabled(backward), flop_counter() as counter:
        logits = backbone.logits(backbone.hidden(ids(), mask, adapter=adapter), adapter=adapter)
        if backward:
            logits.sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama"])
def test_a_forward_pass(family: Family) -> None:
    backbone = eager(family)
    assert forward_flops(backbone, None, ROWS, WIDTH) == counted(backbone, None, backward=False)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@pytest.mark.parametrize("targets", [None, ["q_proj", "c_attn"], ["down_proj", "c_proj"]])
def test_a_step_of_lora(family: Family, targets: list[str] | None) -> None:
    backbone = eager(family)
    if targets is not None:
        targets = [targets[family == "gpt2"]]
    backbone.add_adapter("policy", LoRAConfig(r=3, target_modules=targets))
    backbone.train_only(["policy"])
    assert training_flops(backbone, "policy", ROWS, WIDTH) == counted(backbone, "policy", backward=True)
    assert forward_flops(backbone, "policy", ROWS, WIDTH) == counted(backbone, "policy", backward=False)
    merged = forward_flops(backbone, "policy", ROWS, WIDTH, merged=True)
    assert merged == counted(backbone, "policy", backward=False, merged=True)
    assert merged == forward_flops(backbone, None, ROWS, WIDTH)


def test_a_step_of_full_training() -> None:
    backbone = eager("llama")
    backbone.model.requires_grad_(True)
    assert training_flops(backbone, None, ROWS, WIDTH) == counted(backbone, None, backward=True)


@pytest.mark.parametrize("targets", [None, ["q_proj"], ["v_proj"], ["down_proj"]])
def test_fused_attention_counts_as_its_products(targets: list[str] | None) -> None:
    counts = []
    for implementation in ("eager", "sdpa"):
        backbone = tiny_backbone("qwen2")
        backbone.model.set_attn_implementation(implementation)
        backbone.add_adapter("policy", LoRAConfig(r=3, target_modules=targets))
        backbone.train_only(["policy"])
        counts.append([pass_flops(backbone, "policy", backward=backward) for backward in (False, True)])
    assert counts[0] == counts[1]


def test_attention_that_cannot_be_seen_counts_by_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = eager("qwen2")
    backbone.model.requires_grad_(True)
    seen = [pass_flops(backbone, None, backward=backward) for backward in (False, True)]
    monkeypatch.setattr("rlhf.models.flops._AttentionSeen", lambda probe: nullcontext())
    assert [pass_flops(backbone, None, backward=backward) for backward in (False, True)] == seen


def test_a_token_after_a_cache() -> None:
    """Going on by one token costs a token's linear layers, and attention over all that stands before it."""
    backbone = eager("qwen2")
    whole, before = (forward_flops(backbone, None, ROWS, width, 0) for width in (WIDTH, WIDTH - 1))
    last = forward_flops(backbone, None, ROWS, 1, 0, num_cached=WIDTH - 1)
    hidden_pairs = ROWS * (WIDTH - 1)  # a full square has the last key also under the earlier queries
    assert before + last + hidden_pairs * pass_flops(backbone, None, backward=False).per_pair == whole


def test_the_head_runs_where_it_is_asked() -> None:
    backbone = eager("qwen2")
    none, some = (forward_flops(backbone, None, ROWS, WIDTH, count) for count in (0, 5))
    assert some - none == 5 * 2 * 32 * backbone.vocab_size


def test_counting_draws_no_random_number_and_leaves_no_gradient() -> None:
    backbone = eager("qwen2")
    backbone.add_adapter("sft", LoRAConfig(r=3, lora_dropout=0.5))
    backbone.train_only(["sft"])
    before = rng_state()
    with backbone.adapter_dropout(0.5):
        training_flops(backbone, "sft", ROWS, WIDTH)
    assert str(rng_state()) == str(before)
    assert all(parameter.grad is None for parameter in backbone.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_of_the_machine(dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    rate = measure_matmul_rate(dtype, edge=128, seconds=0.01)
    assert rate > 0.01  # GFLOP/s; the slowest machine there is
    assert torch.equal(torch.get_rng_state(), state)
