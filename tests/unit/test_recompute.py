"""Gradient checkpointing: the same gradients to the last bit, no dropout, less memory, generation as before (O5)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from live_bytes import LiveBytes
from tiny_backbones import Family, add_trained_adapter, random_prompts, tiny_backbone, tiny_model, word_tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from rlhf.data.chat import join
from rlhf.data.collate import collate_packed, pad_left, pad_right
from rlhf.infra.errors import UserError
from rlhf.models import recompute
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.models.decoding import GenerationConfig
from rlhf.models.lora import LoRAConfig
from rlhf.models.policy import Policy, masked_logprobs
from rlhf.models.reward_model import RewardModel
from rlhf.models.value_head import ValueHead
from rlhf.rollout.sampler import Sampler

PROMPTS = random_prompts(5, longest=7, seed=1)
ANSWERS = random_prompts(5, longest=6, seed=2)
EXAMPLES = [join(prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
Loss = Callable[[Backbone], Tensor]


def ready(
    family: Family, *, again: bool, dropout: float = 0.0, full: bool = False, lora_dropout: float = 0.0
) -> Backbone:
    """A backbone whose adapter (or every weight) trains, with or without recomputation."""
    backbone = tiny_backbone(family, dropout=dropout)
    if full:
        backbone.model.requires_grad_(True)
    else:
        backbone.add_adapter("policy", LoRAConfig(r=4, lora_dropout=lora_dropout))
        backbone.train_only(["policy"])
        generator = torch.Generator().manual_seed(5)
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    if again:
        backbone.recompute_in_backward()
    return backbone


def padded_loss(backbone: Backbone) -> Tensor:
    batch = pad_right(EXAMPLES, 0)
    adapter = "policy" if "policy" in backbone.adapter_names else None
    return -masked_logprobs(backbone, adapter, batch.input_ids_BT, batch.attention_mask_BT, batch.loss_mask_BT).sum()


def packed_loss(backbone: Backbone) -> Tensor:
    batch = collate_packed([EXAMPLES[:2], EXAMPLES[2:]], 0)
    places = batch.position_ids_BT
    return -masked_logprobs(backbone, "policy", batch.input_ids_BT, None, batch.loss_mask_BT, places).sum()


def gradients(backbone: Backbone, loss: Loss) -> dict[str, Tensor]:
    torch.manual_seed(3)
    loss(backbone).backward()
    return {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and wanted
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name
    assert all(gradient.any() for gradient in wanted.values())


def count_forwards(backbone: Backbone) -> list[nn.Module]:
    """A list that grows by a block's attention each time it computes."""
    computed: list[nn.Module] = []
    for name, module in backbone.model.named_modules():
        if name.endswith(("self_attn", ".attn")):
            module.register_forward_pre_hook(lambda module, _: computed.append(module))
    return computed


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama"])
@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
def test_O5_gradients_are_the_same_bits(family: Family, full: bool) -> None:
    wanted = gradients(ready(family, again=False, full=full), padded_loss)
    assert_same(gradients(ready(family, again=True, full=full), padded_loss), wanted)


def test_packed_rows_too() -> None:
    assert_same(gradients(ready("qwen2", again=True), packed_loss), gradients(ready("qwen2", again=False), packed_loss))


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_the_dropout_of_the_model_stays_off(family: Family) -> None:
    """A block is in training mode while it decides; its dropout must not see that, in either pass."""
    wanted = gradients(ready(family, again=False), padded_loss)
    assert_same(gradients(ready(family, again=True, dropout=0.5), padded_loss), wanted)


def test_the_dropout_of_adapters_is_drawn_once() -> None:
    found = []
    for again in (False, True):
        backbone = ready("qwen2", again=again, lora_dropout=0.5)
        with backbone.adapter_dropout(0.5):
            found.append(gradients(backbone, padded_loss))
    assert_same(found[1], found[0])
    without = gradients(ready("qwen2", again=True), padded_loss)
    assert any(not torch.equal(found[1][name], without[name]) for name in without)


def test_each_block_computes_twice_with_gradients_and_once_without() -> None:
    backbone = ready("qwen2", again=True)
    computed = count_forwards(backbone)
    gradients(backbone, padded_loss)
    assert len(computed) == 2 * 2
    computed.clear()
    with torch.no_grad():
        padded_loss(backbone)
    assert len(computed) == 2
    blocks = [m for m in backbone.model.modules() if isinstance(m, recompute.GradientCheckpointingLayer)]
    assert len(blocks) == 2 and not any(block.training for block in blocks)


def test_the_adapter_of_the_forward_is_that_of_the_backward() -> None:
    """Two adapters in one loss, as of a policy and its critic; the backward pass runs when neither is in use."""

    def loss(backbone: Backbone) -> Tensor:
        batch = pad_left(PROMPTS, 0)
        one, two = (
            backbone.hidden(batch.input_ids_BP, batch.attention_mask_BP, adapter=name) for name in ("policy", "value")
        )
        with backbone.using("value"):
            return (one * two.detach().roll(1, 0)).sum() + two.square().sum()

    found = []
    for again in (False, True):
        backbone = tiny_backbone("qwen2")
        for seed, name in enumerate(("policy", "value")):
            add_trained_adapter(backbone, name, seed)
        backbone.train_only(["policy", "value"])
        if again:
            backbone.recompute_in_backward()
        found.append(gradients(backbone, loss))
    assert_same(found[1], found[0])


def test_sampling_is_as_before_and_uses_its_cache() -> None:
    config, lengths = GenerationConfig(max_new_tokens=6), list[int]()

    def heard(module: nn.Module, args: object, kwargs: dict[str, Tensor]) -> None:
        lengths.append(kwargs["input_ids"].shape[1])

    answers = []
    for again in (False, True):
        backbone = ready("qwen2", again=again)
        backbone.model.base_model.register_forward_pre_hook(heard, with_kwargs=True)
        answers.append(Sampler(Policy(backbone, "policy"), config, [1]).sample(PROMPTS, seed=0).responses())
    assert answers[0] == answers[1]
    assert len(lengths) > 8 and lengths.count(1) == len(lengths) - 2  # all but the prompts' forwards see one token


def test_policy_and_critic_of_a_rollout_have_the_same_gradients() -> None:
    def loss(backbone: Backbone) -> Tensor:
        torch.manual_seed(7)
        head = ValueHead(backbone.width, "mlp")
        nn.init.normal_(head.last.weight)
        batch = pad_left([example.input_ids for example in EXAMPLES], 0)
        response_BR = batch.attention_mask_BP[:, -1:].clone()
        found = Policy(backbone, "policy", head).response_statistics(
            batch.input_ids_BP, batch.attention_mask_BP, response_BR, 0.7
        )
        assert found.values_BR is not None
        return found.logprobs_BR.sum() + found.values_BR.square().sum() + 0.1 * found.entropy_BR.sum()

    assert_same(gradients(ready("qwen2", again=True), loss), gradients(ready("qwen2", again=False), loss))


# ---------------------------------------------------------------- memory and settings


def deep_backbone(*, again: bool) -> Backbone:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=32, num_hidden_layers=8, max_position_embeddings=64, **shape)
    backbone = Backbone(LlamaForCausalLM(config), word_tokenizer(), "deep")
    backbone.add_adapter("policy", LoRAConfig(r=4))
    backbone.train_only(["policy"])
    if again:
        backbone.recompute_in_backward()
    return backbone


def test_O5_the_most_memory_at_once_falls() -> None:
    """Eight blocks: without, each keeps some 17 times its input; with, its input, and one block's worth at a time."""
    ids = torch.randint(3, 26, (8, 64), generator=torch.Generator().manual_seed(0))
    peaks = {}
    for again in (False, True):
        backbone = deep_backbone(again=again)
        with LiveBytes() as memory:
            backbone.hidden(ids, adapter="policy").square().sum().backward()
        peaks[again] = memory.peak
    input_of_a_block = 8 * 64 * 64 * 4
    assert peaks[False] > 8 * 12 * input_of_a_block
    assert peaks[True] < 8 * input_of_a_block + 1.8 * peaks[False] / 8


def test_the_setting_is_heard(tmp_path: Path) -> None:
    tiny_model("llama", len(word_tokenizer())).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    plain, again = (
        Backbone.load(ModelConfig(name_or_path=str(tmp_path), gradient_checkpointing=on)) for on in (False, True)
    )
    blocks = [m for m in again.model.modules() if isinstance(m, recompute.GradientCheckpointingLayer)]
    assert len(blocks) == 2 and all(block.gradient_checkpointing for block in blocks)
    assert not any(m.gradient_checkpointing for m in plain.model.modules() if hasattr(m, "gradient_checkpointing"))
    assert "gradient checkpointing: 2 blocks" in again.notes[-1]
    model = RewardModel(str(tmp_path), model_config=ModelConfig(gradient_checkpointing=True))
    assert "gradient checkpointing: 2 blocks" in model.backbone.notes[-1]


def test_an_encoder_that_scores_too() -> None:
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        encoder = BertModel(BertConfig(vocab_size=30, max_position_embeddings=64, **shape))
        backbone = Backbone(encoder, word_tokenizer(), "bert")
        torch.manual_seed(1)
        model = RewardModel(backbone, train="full")
        if again:
            backbone.recompute_in_backward()
        batch = pad_right(EXAMPLES, 0)
        model(batch.input_ids_BT, batch.attention_mask_BT).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()})
    assert_same(found[1], found[0])


def test_a_model_without_such_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "GradientCheckpointingLayer", nn.Bilinear)
    with pytest.raises(UserError, match="a Qwen2ForCausalLM has no blocks that transformers can compute again"):
        ready("qwen2", again=True)
