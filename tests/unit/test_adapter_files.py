"""Adapter files: PEFT reads ours, we read PEFT's, with the same outputs; what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from rlhf.infra.errors import UserError
from rlhf.models.adapter_files import load_adapter, save_adapter
from rlhf.models.lora import (
    active_adapter,
    adapter_names,
    apply_lora_to_model,
    get_lora_parameters,
    lora_layers,
    set_active_adapter,
)

VOCAB_SIZE = 60


def gpt2_config(width: int = 16) -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=32,
        n_embd=width,
        n_layer=2,
        n_head=2,
        num_labels=1,
        initializer_range=0.3,  # large enough that an adapter on the queries alone shows in the logits
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def qwen2_config() -> Qwen2Config:
    return Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        num_labels=1,
        initializer_range=0.3,
        pad_token_id=0,
    )


def causal(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(gpt2_config()) if kind == "gpt2" else Qwen2ForCausalLM(qwen2_config())
    return model.eval()


def classifier(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2ForSequenceClassification(gpt2_config()).eval()
    return Qwen2ForSequenceClassification(qwen2_config()).eval()


@pytest.fixture
def input_ids() -> Tensor:
    return torch.randint(1, VOCAB_SIZE, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def peft() -> Iterator[Any]:
    yield pytest.importorskip("peft", reason="PEFT is the oracle")


def randomise(parameters: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def randomise_peft(model: nn.Module) -> None:
    randomise([parameter for name, parameter in model.named_parameters() if ".lora_" in name])


def saved(folder: Path, kind: str = "gpt2") -> Tensor:
    """Write a trained adapter of ours and give the logits it makes on tokens 1 to 5."""
    model = causal(kind)
    apply_lora_to_model(model, r=4)
    randomise(get_lora_parameters(model))
    save_adapter(model, "default", folder, "some/base")
    return model(torch.arange(1, 6)[None]).logits


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("targets", [None, ["q_proj", "c_attn"], ["mlp.c_proj", "mlp.down_proj"]])
@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_peft_loads_ours(
    peft: Any, tmp_path: Path, input_ids: Tensor, kind: str, targets: list[str] | None, use_rslora: bool
) -> None:
    model = causal(kind)
    if targets is not None:
        targets = [name for name in targets if (kind == "gpt2") == ("c_" in name)]
    apply_lora_to_model(model, r=4, alpha=6, dropout=0.1, target_modules=targets, use_rslora=use_rslora)
    randomise(get_lora_parameters(model))
    save_adapter(model, "default", tmp_path, "some/base")
    expected = model(input_ids).logits
    theirs = peft.PeftModel.from_pretrained(causal(kind), tmp_path).eval()
    torch.testing.assert_close(theirs(input_ids).logits, expected)
    assert not torch.allclose(causal(kind)(input_ids).logits, expected, atol=1e-2)
    wrapped = {name for name, _ in theirs.named_modules() if name.endswith(".base_layer")}
    assert len(wrapped) == len(lora_layers(model))  # no layer too many, which fresh weights would hide


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_we_load_peft(peft: Any, tmp_path: Path, input_ids: Tensor, kind: str, use_rslora: bool) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.1, target_modules="all-linear", use_rslora=use_rslora, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(causal(kind), config).eval()
    randomise_peft(theirs)
    theirs.save_pretrained(tmp_path)
    model = causal(kind)
    assert load_adapter(model, tmp_path, "sft") == {}
    torch.testing.assert_close(model(input_ids).logits, theirs(input_ids).logits)
    assert get_lora_parameters(model) == []  # frozen until asked for


def test_ranks_and_alphas_by_pattern_both_ways(peft: Any, tmp_path: Path, input_ids: Tensor) -> None:
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["c_attn", "c_fc"],
        rank_pattern={"h.0.attn.c_attn": 2, r"h\.1.*c_fc": 3},
        alpha_pattern={"c_fc": 5},
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(causal("gpt2"), config).eval()
    randomise_peft(theirs)
    expected = theirs(input_ids).logits
    theirs.save_pretrained(tmp_path / "theirs")
    model = causal("gpt2")
    load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(model(input_ids).logits, expected)
    assert [layer.A.shape[0] for layer in lora_layers(model).values()] == [2, 4, 4, 3]

    save_adapter(model, "default", tmp_path / "ours", None)
    again = peft.PeftModel.from_pretrained(causal("gpt2"), tmp_path / "ours").eval()
    torch.testing.assert_close(again(input_ids).logits, expected)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_reward_adapter_with_its_head_becomes_a_peft_sequence_classifier(
    peft: Any, tmp_path: Path, input_ids: Tensor, kind: str
) -> None:
    """The adapter is trained on the causal backbone, the head beside it; PEFT puts both on the classifier class."""
    model, head = causal(kind), torch.randn(1, 16)
    apply_lora_to_model(model, r=4, adapter_name="reward")
    randomise(get_lora_parameters(model))
    save_adapter(model, "reward", tmp_path, "some/base", task_type="SEQ_CLS", extra={"score.weight": head})
    scores = model.base_model(input_ids).last_hidden_state[:, -1] @ head.T
    theirs = peft.PeftModel.from_pretrained(classifier(kind), tmp_path).eval()
    torch.testing.assert_close(theirs(input_ids).logits, scores)

    fresh = causal(kind)
    extra = load_adapter(fresh, tmp_path, "reward")
    assert list(extra) == ["score.weight"]
    assert torch.equal(extra["score.weight"], head)
    assert torch.equal(fresh.base_model(input_ids).last_hidden_state[:, -1] @ extra["score.weight"].T, scores)


def test_head_of_a_peft_sequence_classifier_comes_back(peft: Any, tmp_path: Path, input_ids: Tensor) -> None:
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    theirs = peft.get_peft_model(classifier("gpt2"), config).eval()
    randomise_peft(theirs)
    theirs.save_pretrained(tmp_path)
    model = causal("gpt2")
    extra = load_adapter(model, tmp_path)
    scores = model.base_model(input_ids).last_hidden_state[:, -1] @ extra["score.weight"].T
    torch.testing.assert_close(scores, theirs(input_ids).logits)


def test_files_and_fields(tmp_path: Path) -> None:
    model = causal("gpt2")
    apply_lora_to_model(model, r=4, alpha=8)
    save_adapter(model, "default", tmp_path / "deep" / "folder", "some/base")
    folder = tmp_path / "deep" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": True,
        "use_rslora": False,
        "modules_to_save": None,
        "target_modules": ["c_attn", "c_fc", "c_proj"],
    }
    assert {key: config[key] for key in expected} == expected
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 16
    assert tensors["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"].shape == (4, 16)
    assert tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"].shape == (48, 4)


def test_round_trip_is_exact_and_one_adapter_of_several_is_written(tmp_path: Path, input_ids: Tensor) -> None:
    model = causal("qwen2")
    for name in ("sft", "reward"):
        apply_lora_to_model(model, r=2, adapter_name=name)
        randomise(get_lora_parameters(model))
    with torch.no_grad():
        for parameter in get_lora_parameters(model, "sft"):
            parameter.mul_(-0.5)
    save_adapter(model, "sft", tmp_path, None)
    set_active_adapter(model, "sft")
    expected = model(input_ids).logits
    load_adapter(model, tmp_path, "again")
    assert adapter_names(model) == ["sft", "reward", "again"]
    assert torch.equal(model(input_ids).logits, expected)
    with active_adapter(model, "reward"):
        assert not torch.equal(model(input_ids).logits, expected)


def test_adapter_made_for_a_wider_base_changes_nothing(tmp_path: Path) -> None:
    saved(tmp_path)
    torch.manual_seed(0)
    wider = GPT2LMHeadModel(gpt2_config(width=32)).eval()
    before, structure = wider(torch.arange(1, 6)[None]).logits, str(wider)
    with pytest.raises(UserError) as error:
        load_adapter(wider, tmp_path)
    assert str(error.value) == (
        f"the adapter in {tmp_path} was made for another base: A and B of transformer.h.0.attn.c_attn "
        "have shapes (4, 16) and (48, 4), but this model at rank 4 needs (4, 32) and (96, 4)."
    )
    assert str(wider) == structure
    assert torch.equal(wider(torch.arange(1, 6)[None]).logits, before)


def test_adapter_made_for_another_architecture_names_the_layer(tmp_path: Path) -> None:
    saved(tmp_path, "gpt2")
    model = causal("qwen2")
    with pytest.raises(UserError, match=r"another base: .* no linear layer transformer\.h\.0\.attn\.c_attn"):
        load_adapter(model, tmp_path)
    assert lora_layers(model) == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1]),
    ],
)
def test_features_that_would_change_the_numbers_are_refused(tmp_path: Path, field: str, value: Any) -> None:
    saved(tmp_path)
    edit_config(tmp_path, **{field: value})
    with pytest.raises(UserError, match=f"uses {field}="):
        load_adapter(causal("gpt2"), tmp_path)


def test_other_peft_types_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    edit_config(tmp_path, peft_type="IA3")
    with pytest.raises(UserError, match="describes a IA3 adapter; only LORA"):
        load_adapter(causal("gpt2"), tmp_path)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    model = causal("gpt2")
    with pytest.raises(UserError, match=r"adapter_config\.json is missing"):
        load_adapter(model, tmp_path / "nowhere")
    saved(tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged"):
        load_adapter(model, tmp_path)
    weights.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"safetensors is missing \(adapter_model\.bin is a pickle"):
        load_adapter(model, tmp_path)
    config.write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load_adapter(model, tmp_path)
    assert lora_layers(model) == {}


def test_half_an_adapter_or_a_strange_tensor_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.transformer.h.1.mlp.c_fc.lora_B.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, path)
    with pytest.raises(UserError, match=r"only one of lora_A and lora_B for transformer\.h\.1\.mlp\.c_fc"):
        load_adapter(causal("gpt2"), tmp_path)
    save_file(tensors | {"base_model.model.transformer.wte.lora_embedding_A": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="lora_embedding_A"):
        load_adapter(causal("gpt2"), tmp_path)
    save_file({"base_model.model.score.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="no LoRA weights"):
        load_adapter(causal("gpt2"), tmp_path)


def test_rank_that_disagrees_with_the_weights_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    edit_config(tmp_path, r=8)
    with pytest.raises(UserError, match="at rank 8 needs"):
        load_adapter(causal("gpt2"), tmp_path)
    edit_config(tmp_path, r="four")
    with pytest.raises(UserError, match="cannot be used"):
        load_adapter(causal("gpt2"), tmp_path)


def test_taken_name_and_unwritable_folder(tmp_path: Path) -> None:
    saved(tmp_path)
    model = causal("gpt2")
    load_adapter(model, tmp_path, "sft")
    with pytest.raises(UserError, match="already on this model"):
        load_adapter(model, tmp_path, "sft")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write adapter 'sft'"):
        save_adapter(model, "sft", tmp_path / "file", None)


def test_a_failed_write_keeps_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = saved(tmp_path)

    def full_disk(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlhf.models.adapter_files.save_file", full_disk)
    model = causal("gpt2")
    apply_lora_to_model(model)
    with pytest.raises(UserError, match="No space left"):
        save_adapter(model, "default", tmp_path, None)
    again = causal("gpt2")
    load_adapter(again, tmp_path)
    assert torch.equal(again(torch.arange(1, 6)[None]).logits, expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
