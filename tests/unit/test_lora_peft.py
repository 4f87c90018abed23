"""Whole models against PEFT: two adapters on one base, training mode, and the model that a merge leaves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_backbones import Family, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.models.lora import apply_lora_to_model, default_target_modules, lora_layers, merge_lora_weights
from rlhf.models.lora import set_active_adapter as activate

peft = pytest.importorskip("peft", reason="PEFT is the oracle")

IDS = torch.randint(0, 27, (3, 7), generator=torch.Generator().manual_seed(1))


def pair(family: Family, use_rslora: bool, dropout: float = 0.0) -> tuple[PreTrainedModel, Any]:
    """Our model and PEFT's with the same two adapters, of different ranks, on the same base."""
    ours, base = tiny_model(family, 27, spread=0.3).eval(), tiny_model(family, 27, spread=0.3).eval()
    paths = default_target_modules(base)
    for name, (r, alpha) in {"sft": (4, 6.0), "policy": (2, 5.0)}.items():
        apply_lora_to_model(ours, r=r, alpha=alpha, dropout=dropout, adapter_name=name, use_rslora=use_rslora)
    # `fan_in_fan_out` says that GPT-2's Conv1D stores its weight the other way round.
    theirs: Any = None
    for name, (r, alpha) in {"sft": (4, 6.0), "policy": (2, 5.0)}.items():
        config = peft.LoraConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=paths,
            use_rslora=use_rslora,
            fan_in_fan_out=family == "gpt2",
        )
        if theirs is None:
            theirs = peft.get_peft_model(base, config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
    generator = torch.Generator().manual_seed(2)
    found = {name.removeprefix("base_model.model."): module for name, module in theirs.named_modules()}
    for path, layer in lora_layers(ours).items():
        for name in ("sft", "policy"):
            for own, other in ((layer.lora_A, found[path].lora_A), (layer.lora_B, found[path].lora_B)):
                values = 0.2 * torch.randn(own[name].shape, generator=generator)
                own[name].data.copy_(values)
                other[name].weight.data.copy_(values)
    return ours, theirs


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_each_adapter_the_bare_base_and_the_merged_model_equal_pefts(family: Family, use_rslora: bool) -> None:
    ours, theirs = pair(family, use_rslora)
    logits: dict[str | None, Tensor] = {}
    for name in ("sft", "policy"):
        activate(ours, name)
        theirs.set_adapter(name)
        logits[name] = ours(IDS).logits
        torch.testing.assert_close(logits[name], theirs(IDS).logits)
    activate(ours, None)
    with theirs.disable_adapter():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)
    assert not torch.allclose(logits["sft"], logits["policy"], atol=0.1)
    merged = merge_lora_weights(copy.deepcopy(ours), "policy")
    torch.testing.assert_close(merged(IDS).logits, logits["policy"], atol=1e-4, rtol=1e-4)
    folded = theirs.merge_and_unload(adapter_names=["policy"])
    weights = dict(folded.named_parameters())
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, weights[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_training_mode_with_dropout_draws_the_same_masks(family: Family) -> None:
    ours, theirs = pair(family, use_rslora=False, dropout=0.4)
    outputs, gradients = [], []
    for model, select in ((ours, lambda: activate(ours, "sft")), (theirs, lambda: theirs.set_adapter("sft"))):
        select()
        dropouts = [m for name, m in model.named_modules() if ".lora_" in name or name in lora_layers(ours)]
        for module in dropouts:
            module.train()
        weights = [
            p.requires_grad_(True) for name, p in model.named_parameters() if ".lora_" in name and ".sft" in name
        ]
        torch.manual_seed(5)
        outputs.append(model(IDS).logits)
        gradients.append(torch.autograd.grad(outputs[-1].square().mean(), weights))
    torch.testing.assert_close(outputs[0], outputs[1])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)
    assert all(bool(gradient.any()) for gradient in gradients[0])


def test_both_start_from_the_same_distribution() -> None:
    base = nn.Sequential(nn.Linear(400, 10))
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=50, target_modules=["0"])).base_model.model[0]
    ours = nn.Sequential(nn.Linear(400, 10))
    apply_lora_to_model(ours, r=50, target_modules=["0"])
    layer = lora_layers(ours)["0"]
    down, other = layer.A.detach(), theirs.lora_A["default"].weight.detach()
    for values in (down, other):
        assert 0.049 < float(values.abs().max()) <= 0.05  # 1 / sqrt(400)
        assert float(values.std()) == pytest.approx(0.05 / 3**0.5, rel=0.02)
    assert not layer.B.any() and not theirs.lora_B["default"].weight.any()
