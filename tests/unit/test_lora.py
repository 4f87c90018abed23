"""Adapters on whole models: document 001, phase 1, as written; several adapters on one base; merging."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.pytorch_utils import Conv1D

from rlhf.infra.errors import UserError
from rlhf.models.dense import use_fast_products
from rlhf.models.lora import (
    LoRAConfig,
    active_adapter,
    adapter_names,
    adapter_state_dict,
    apply_lora_to_model,
    copy_adapter,
    default_target_modules,
    delete_adapter,
    find_target_modules,
    get_lora_parameters,
    load_adapter_state_dict,
    lora_layers,
    merge_adapter,
    merge_lora_weights,
    print_trainable_parameters,
    set_active_adapter,
    set_trainable_adapter,
    unmerge_adapter,
)
from rlhf.models.lora_layer import LoRALinear


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=60, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def tiny_qwen2() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(params=[tiny_gpt2, tiny_qwen2], ids=["gpt2", "qwen2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    made: PreTrainedModel = request.param()
    use_fast_products(made)  # as a backbone does, and each layer with adapters: the same bits with them and without
    return made


@pytest.fixture
def input_ids() -> Tensor:
    return torch.randint(0, 60, (3, 7), generator=torch.Generator().manual_seed(1))


def randomise(model: nn.Module, name: str, seed: int = 0) -> None:
    """Give an adapter weights that matter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in get_lora_parameters(model, name):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


# ---------------------------------------------------------------- document 001, phase 1


def test_001_find_target_modules_lists_the_attention_projections() -> None:
    modules = find_target_modules(tiny_gpt2(), ["c_attn", "c_proj"])
    assert modules == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_proj",
        "transformer.h.0.mlp.c_proj",
        "transformer.h.1.attn.c_attn",
        "transformer.h.1.attn.c_proj",
        "transformer.h.1.mlp.c_proj",
    ]


def test_001_only_lora_parameters_train_and_there_are_two_per_layer() -> None:
    model = tiny_gpt2()
    apply_lora_to_model(model, target_modules=["c_attn"])
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 4
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)
    assert len(get_lora_parameters(model)) == 2 * 2


def test_001_share_of_gpt2_small_is_about_one_per_cent() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
        apply_lora_to_model(model, r=16)
    sentence = print_trainable_parameters(model)
    # 12 blocks x 16 x (768 + 2304 + 768 + 768 + 768 + 3072 + 3072 + 768) beside GPT-2's 124,439,808.
    assert sentence == "Trainable: 1.86% (2,359,296 of 126,799,104 parameters)"


def test_001_checkpoint_merging_keeps_the_output(input_ids: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_gpt2()
    apply_lora_to_model(model, r=16)
    sentence = print_trainable_parameters(model)
    assert capsys.readouterr().out == sentence + "\n"
    randomise(model, "default")
    output1 = model(input_ids).logits
    merge_lora_weights(model)
    output2 = model(input_ids).logits
    torch.testing.assert_close(output1, output2, atol=1e-5, rtol=0)
    assert isinstance(model.transformer.h[0].attn.c_attn, Conv1D)


# ---------------------------------------------------------------- which layers


def test_default_targets_are_attention_and_mlp() -> None:
    leaves = {path.rpartition(".")[2] for path in default_target_modules(tiny_gpt2())}
    assert leaves == {"c_attn", "c_proj", "c_fc"}
    qwen2 = default_target_modules(tiny_qwen2())
    assert qwen2[:7] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert len(qwen2) == 14  # no output head
    assert default_target_modules(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))) == ["0", "2"]


def test_heads_in_a_list_are_not_blocks() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3))])
    model.heads = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])
    assert default_target_modules(model) == ["layers.0.0", "layers.1.0"]


def test_dotted_suffixes_tell_attention_from_mlp() -> None:
    paths = find_target_modules(tiny_gpt2(), ["mlp.c_proj"])
    assert paths == ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]
    assert find_target_modules(tiny_gpt2(), ["proj"]) == []  # whole components only


def test_targets_stay_findable_once_wrapped(model: PreTrainedModel) -> None:
    before = default_target_modules(model)
    apply_lora_to_model(model)
    assert default_target_modules(model) == before
    assert list(lora_layers(model)) == before


def test_unknown_target_changes_nothing(model: PreTrainedModel) -> None:
    with pytest.raises(UserError, match=r"'no_such_layer'.*choose from \["):
        apply_lora_to_model(model, target_modules=["no_such_layer"])
    assert lora_layers(model) == {}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_unsupported_layers_are_refused() -> None:
    with pytest.raises(UserError, match="Embedding"):
        LoRALinear(nn.Embedding(3, 4))
    with pytest.raises(UserError, match="no linear layer inside"):
        apply_lora_to_model(nn.Linear(3, 3))
    attention = nn.MultiheadAttention(4, 2)  # reads out_proj.weight, never calls it
    with pytest.raises(UserError, match="no linear layer inside"):
        apply_lora_to_model(attention)


# ---------------------------------------------------------------- several adapters on one base


def test_identity_at_the_start(model: PreTrainedModel, input_ids: Tensor) -> None:
    before = model(input_ids).logits
    apply_lora_to_model(model, r=4, dropout=0.1)
    assert torch.equal(model(input_ids).logits, before)


def test_dropout_is_off_in_a_model_in_evaluation_mode(model: PreTrainedModel, input_ids: Tensor) -> None:
    apply_lora_to_model(model, dropout=0.5)  # on a model in evaluation mode
    randomise(model, "default")
    assert torch.equal(model(input_ids).logits, model(input_ids).logits)


def test_gradients_reach_a_and_b_and_nothing_else(model: PreTrainedModel, input_ids: Tensor) -> None:
    apply_lora_to_model(model, r=4)
    model(input_ids, labels=input_ids).loss.backward()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            assert parameter.grad.any(), name
        elif ".lora_A." in name:
            assert parameter.grad is not None and not parameter.grad.any()  # B is still zero
        else:
            assert parameter.grad is None, name


def test_training_one_adapter_never_moves_another_or_the_base(model: PreTrainedModel, input_ids: Tensor) -> None:
    bare = model(input_ids).logits
    apply_lora_to_model(model, r=2, adapter_name="reward")
    randomise(model, "reward")
    reward = model(input_ids).logits
    apply_lora_to_model(model, r=4, adapter_name="policy")
    optimizer = torch.optim.AdamW(get_lora_parameters(model), lr=0.05, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids, labels=input_ids).loss.backward()
        optimizer.step()
    policy = model(input_ids).logits
    assert not torch.equal(policy, bare)
    with active_adapter(model, "reward"):
        assert torch.equal(model(input_ids).logits, reward)
    with active_adapter(model, None):
        assert torch.equal(model(input_ids).logits, bare)
    assert torch.equal(model(input_ids).logits, policy)


def test_active_adapter_returns_to_the_former_one_after_an_error(model: PreTrainedModel) -> None:
    apply_lora_to_model(model, adapter_name="sft")
    apply_lora_to_model(model, adapter_name="policy")
    with pytest.raises(RuntimeError), active_adapter(model, "sft"), active_adapter(model, None):
        raise RuntimeError
    assert {layer.active for layer in lora_layers(model).values()} == {"policy"}
    with pytest.raises(UserError, match=r"no adapter 'value' on this model; it has \['sft', 'policy'\]"):
        set_active_adapter(model, "value")


def test_adapters_may_cover_different_layers(input_ids: Tensor) -> None:
    model = tiny_gpt2()
    apply_lora_to_model(model, target_modules=["c_attn"], adapter_name="narrow")
    randomise(model, "narrow")
    narrow = model(input_ids).logits
    apply_lora_to_model(model, adapter_name="wide")
    set_active_adapter(model, "narrow")
    assert torch.equal(model(input_ids).logits, narrow)
    assert len(lora_layers(model, "narrow")) == 2
    assert len(lora_layers(model, "wide")) == 8
    merge_lora_weights(model)
    torch.testing.assert_close(model(input_ids).logits, narrow, atol=1e-5, rtol=0)


def test_trainable_adapter_is_one_at_a_time(model: PreTrainedModel) -> None:
    apply_lora_to_model(model, adapter_name="sft")
    apply_lora_to_model(model, adapter_name="policy")
    assert all(".policy" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    set_trainable_adapter(model, "sft")
    assert [id(p) for p in get_lora_parameters(model)] == [id(p) for p in get_lora_parameters(model, "sft")]
    set_trainable_adapter(model, None)
    assert get_lora_parameters(model) == []


def test_policy_starts_from_sft_and_goes_its_own_way(model: PreTrainedModel, input_ids: Tensor) -> None:
    apply_lora_to_model(model, r=4, adapter_name="sft", use_rslora=True)
    randomise(model, "sft")
    sft = model(input_ids).logits
    copy_adapter(model, "sft", "policy")
    assert {layer.active for layer in lora_layers(model).values()} == {"sft"}
    with active_adapter(model, "policy"):
        assert torch.equal(model(input_ids).logits, sft)
    randomise(model, "policy", seed=1)
    assert torch.equal(model(input_ids).logits, sft)
    parameters = get_lora_parameters(model, "policy")
    copy_adapter(model, "sft", "policy")  # back again, into the same parameters, which an optimizer may hold
    assert [id(p) for p in parameters] == [id(p) for p in get_lora_parameters(model, "policy")]
    with active_adapter(model, "policy"):
        assert torch.equal(model(input_ids).logits, sft)
    apply_lora_to_model(model, r=2, adapter_name="other")
    with pytest.raises(UserError, match="other settings"):
        copy_adapter(model, "sft", "other")


def test_deleting_the_last_adapter_gives_the_plain_model_back(model: PreTrainedModel, input_ids: Tensor) -> None:
    structure, before = str(model), model(input_ids).logits
    for name in ("first", "second"):
        apply_lora_to_model(model, adapter_name=name)
        randomise(model, name)
    delete_adapter(model, "second")
    assert adapter_names(model) == ["first"]
    assert torch.equal(model(input_ids).logits, before)  # the active one went, so the base answers
    delete_adapter(model, "first")
    assert str(model) == structure


def test_names_are_checked(model: PreTrainedModel) -> None:
    apply_lora_to_model(model, adapter_name="ppo-2")
    with pytest.raises(UserError, match="already"):
        apply_lora_to_model(model, adapter_name="ppo-2")
    for bad in ("", "a.b", "keys", "train"):
        with pytest.raises(UserError, match="cannot be used"):
            apply_lora_to_model(model, adapter_name=bad)
    assert adapter_names(model) == ["ppo-2"]


def test_a_copied_model_switches_on_its_own(model: PreTrainedModel) -> None:
    apply_lora_to_model(model)
    twin = copy.deepcopy(model)
    set_active_adapter(twin, None)
    assert {layer.active for layer in lora_layers(model).values()} == {"default"}
    assert {layer.active for layer in lora_layers(twin).values()} == {None}


def test_a_layer_put_in_by_hand_is_seen() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    apply_lora_to_model(model, target_modules=["0"])
    set_active_adapter(model, None)
    model[1] = LoRALinear(model[1])
    set_active_adapter(model, "default")
    assert [layer.active for layer in model] == ["default", "default"]


def test_state_dict_round_trip_and_what_does_not_fit(model: PreTrainedModel, input_ids: Tensor) -> None:
    apply_lora_to_model(model, r=4)
    randomise(model, "default")
    saved = {key: tensor.clone() for key, tensor in adapter_state_dict(model, "default").items()}
    first = next(iter(saved))
    assert first.endswith(".lora_A.weight")
    expected = model(input_ids).logits
    randomise(model, "default", seed=1)
    other = model(input_ids).logits
    with pytest.raises(UserError, match="is missing from"):
        load_adapter_state_dict(model, "default", {key: saved[key] for key in saved if key != first})
    with pytest.raises(UserError, match="is not expected in"):
        load_adapter_state_dict(model, "default", saved | {"zzz": saved[first]})
    with pytest.raises(UserError, match="has shape"):
        load_adapter_state_dict(model, "default", saved | {first: saved[first][:1]})
    assert torch.equal(model(input_ids).logits, other)
    load_adapter_state_dict(model, "default", saved)
    assert torch.equal(model(input_ids).logits, expected)


# ---------------------------------------------------------------- merging


def test_merge_equals_unmerged_and_unmerge_restores_the_bits(model: PreTrainedModel, input_ids: Tensor) -> None:
    apply_lora_to_model(model, r=4)
    randomise(model, "default")
    expected = model(input_ids).logits
    with active_adapter(model, None):
        assert not torch.allclose(model(input_ids).logits, expected, atol=1e-2)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    merge_adapter(model)
    torch.testing.assert_close(model(input_ids).logits, expected, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="is merged into the base"), active_adapter(model, None):
        pass
    with pytest.raises(UserError, match="already merged"):
        merge_adapter(model)
    with pytest.raises(UserError, match="is merged into the base"):
        delete_adapter(model, "default")
    unmerge_adapter(model)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(model(input_ids).logits, expected)


@pytest.mark.parametrize("merge", [merge_adapter, merge_lora_weights])
def test_a_broken_adapter_is_not_merged(merge, model: PreTrainedModel) -> None:
    apply_lora_to_model(model, r=4)
    randomise(model, "default")
    path, layer = list(lora_layers(model).items())[-1]
    layer.B.data[0, 0] = float("nan")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=f"^{path}: .*not finite"):
        merge(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key].nan_to_num(), before[key].nan_to_num()) for key in before)


def test_merge_needs_to_know_which() -> None:
    model = tiny_gpt2()
    with pytest.raises(UserError, match="which adapter"):
        merge_lora_weights(model)
    apply_lora_to_model(model)
    set_active_adapter(model, None)
    with pytest.raises(UserError, match=r"\['default'\]"):
        merge_lora_weights(model)


# ---------------------------------------------------------------- quantised bases


class Linear4bit(nn.Linear):
    """Stands in for bitsandbytes' class of this name, which is recognised by its name."""


def test_a_quantised_base_runs_but_is_not_merged_in_place() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Linear4bit(4, 4))
    apply_lora_to_model(model)
    assert len(lora_layers(model)) == 2
    x, before = torch.randn(2, 4), model[0].weight.clone()
    assert torch.equal(model(x), model[1].base(model[0].base(x)))
    with pytest.raises(UserError, match="quantised"):
        merge_adapter(model)
    assert torch.equal(model[0].weight, before)


def test_bitsandbytes_4bit_layer() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the 4-bit extra is not installed")
    torch.manual_seed(0)
    dense = nn.Linear(64, 32)
    base = bitsandbytes.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    base.load_state_dict(dense.state_dict())
    model = nn.Sequential(base.to("cuda" if torch.cuda.is_available() else "cpu"))
    x = torch.randn(5, 64, device=base.weight.device)
    quantised = model(x)
    apply_lora_to_model(model, r=4)
    assert torch.equal(model(x), quantised)
    assert print_trainable_parameters(model) == "Trainable: 15.58% (384 of 2,464 parameters)"
    randomise(model, "default")
    expected = model(x)
    expected.sum().backward()
    assert all(parameter.grad.any() for parameter in get_lora_parameters(model))
    merge_lora_weights(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)


def test_config_defaults() -> None:
    config = LoRAConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (16, None, 0.0, None)
    assert LoRALinear(nn.Linear(2, 2), r=16).settings["default"].alpha == 32
