"""A base in 4 bits under adapters: what is coded and what is not, training, files, merging, and what is refused.

Expected values come from the codes raised to dense weights once, and from PEFT on the same base.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_backbones import add_trained_adapter, random_prompts, word_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig

from rlhf.data.collate import pad_left
from rlhf.infra.config import load_config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run
from rlhf.infra.interrupt import Stopped
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.models.decoding import GenerationConfig
from rlhf.models.lora import LoRAConfig, lora_layers, merge_lora_weights
from rlhf.models.policy import Policy
from rlhf.models.quantized import (
    QUANTISATION_FILE,
    bytes_of_codes,
    count_parameters,
    quantised_layers,
    read_quantisation,
    scales_of,
)
from rlhf.models.reward_model import RewardModel
from rlhf.recipes.dpo import DPOConfig, run_dpo
from rlhf.recipes.resume import resume_run
from rlhf.recipes.reward import RewardConfig
from rlhf.recipes.sft import SFTConfig, run_sft
from rlhf.recipes.stages import PolicyShelf, load_policy, save_policy
from rlhf.rollout.cache import weights_hash
from rlhf.rollout.sampler import Sampler

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")

ROWS = random_prompts(6, longest=9, seed=4)
CPU = torch.device("cpu")


def save_base(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Llama-shaped bases with tied and untied heads, and a GPT-2, whose linear layers are Conv1D; on disk."""
    folder, size = tmp_path_factory.mktemp("bases"), len(word_tokenizer())
    shape = {
        "vocab_size": size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
    }
    found = {}
    for name, tied in [("tied", True), ("untied", False)]:
        torch.manual_seed(1)
        config = LlamaConfig(**shape, tie_word_embeddings=tied)
        found[name] = save_base(folder / name, AutoModelForCausalLM.from_config(config))
    torch.manual_seed(1)
    gpt2 = GPT2Config(vocab_size=size, n_positions=64, n_embd=64, n_layer=2, n_head=4, initializer_range=0.15)
    found["gpt2"] = save_base(folder / "gpt2", GPT2LMHeadModel(gpt2))
    return found


def load(base: Path, **more: Any) -> Backbone:
    return Backbone.load(ModelConfig(name_or_path=str(base), **{"load_in_4bit": True, **more}))


def logits_of(backbone: Backbone, adapter: str | None) -> Tensor:
    batch = pad_left(ROWS, backbone.tokenizer.pad_token_id)
    hidden = backbone.hidden(batch.input_ids_BP, batch.attention_mask_BP, adapter=adapter)
    return backbone.logits(hidden, adapter=adapter)[batch.attention_mask_BP]


def codes(backbone: Backbone) -> dict[str, bytes]:
    """Every byte of the frozen base: codes, scales, embeddings, norms."""
    found = {}
    for name, parameter in backbone.model.named_parameters():
        if ".lora_" not in name:
            tensors = {name: parameter} | {f"{name}.{key}": t for key, t in scales_of(parameter).items()}
            found |= {key: t.detach().contiguous().view(torch.uint8).numpy().tobytes() for key, t in tensors.items()}
    return found


def raised(base: Path) -> Backbone:
    """The same base with dense weights that are exactly what the codes stand for."""
    quantised, dense = load(base), load(base, load_in_4bit=False)
    for path, module in quantised.model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            target = dense.model.get_submodule(path)
            target.weight.data.copy_(weight if isinstance(target, nn.Linear) else weight.t())
    return dense


# ---------------------------------------------------------------- what is coded


@pytest.mark.parametrize("name", ["tied", "untied", "gpt2"])
def test_blocks_are_coded_embeddings_and_head_are_not(bases: dict[str, Path], name: str) -> None:
    backbone = load(bases[name])
    coded = {path for path, m in backbone.model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    per_block = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    per_block = {"c_attn", "c_proj", "c_fc"} if name == "gpt2" else per_block
    assert {path.rpartition(".")[2] for path in coded} == per_block
    assert len(coded) == len(quantised_layers(backbone)) == 2 * (4 if name == "gpt2" else 7)
    dense = load(bases[name], load_in_4bit=False)
    assert torch.equal(backbone.model.get_input_embeddings().weight, dense.model.get_input_embeddings().weight)
    assert torch.equal(backbone.model.get_output_embeddings().weight, dense.model.get_output_embeddings().weight)
    assert backbone.is_quantised and not dense.is_quantised
    assert count_parameters(backbone) == count_parameters(dense)  # codes are counted as the weights they stand for
    assert backbone.notes[-1].startswith(f"the base is quantised: {len(coded)} linear layers take 0.1 MB instead of ")


def test_memory_of_codes(bases: dict[str, Path]) -> None:
    """Half a byte per weight, a scale per 64 weights in 1 byte (or 4), and a few hundred bytes of tables per layer."""
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    for double, scale, tables in [(True, 1, 1500), (False, 4, 200)]:
        held, dense = bytes_of_codes(load(bases["tied"], bnb_4bit_use_double_quant=double).model)
        assert dense == 2 * weights
        assert 0 < held - (weights // 2 + weights // 64 * scale) < 14 * tables


@pytest.mark.parametrize(("quant_type", "double"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_the_settings_reach_the_library(bases: dict[str, Path], quant_type: str, double: bool) -> None:
    backbone = load(bases["tied"], bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double)
    for layer in quantised_layers(backbone):
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == (quant_type, double, torch.float32)
    half = Backbone.load(ModelConfig(name_or_path=str(bases["tied"]), load_in_4bit=True), "bf16")
    assert {layer.compute_dtype for layer in quantised_layers(half)} == {torch.bfloat16}
    assert half.model.get_input_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["untied", "gpt2"])
def test_outputs_and_gradients_are_those_of_the_raised_weights(bases: dict[str, Path], name: str) -> None:
    found = []
    for backbone in (load(bases[name]), raised(bases[name])):
        add_trained_adapter(backbone, "policy")
        backbone.train_only(["policy"])
        logits = logits_of(backbone, "policy")
        logits.logsumexp(dim=-1).sum().backward()
        gradients = {n: p.grad for n, p in backbone.model.named_parameters() if p.grad is not None}
        found.append((logits.detach(), logits_of(backbone, None).detach(), gradients))
    (logits, bare, gradients), (wanted, wanted_bare, wanted_gradients) = found
    torch.testing.assert_close(bare, wanted_bare, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == wanted_gradients.keys() and len(gradients) == 2 * (8 if name == "gpt2" else 14)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[key], atol=1e-4, rtol=1e-4)


def test_sampling_leaves_codes_and_gradients_alone(bases: dict[str, Path]) -> None:
    """bitsandbytes would repack the weights on the first forward without gradients, for good."""
    backbone = Backbone.load(ModelConfig(name_or_path=str(bases["tied"]), load_in_4bit=True), "bf16")
    add_trained_adapter(backbone, "policy")
    before = codes(backbone)
    config = GenerationConfig(max_new_tokens=3, temperature=0)
    Sampler(Policy(backbone, "policy"), config, [1]).sample(ROWS, seed=0)
    assert codes(backbone) == before
    assert not any(layer.support_avx512bf16_for_cpu for layer in quantised_layers(backbone))
    backbone.train_only(["policy"])
    logits_of(backbone, "policy").float().logsumexp(dim=-1).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in backbone.model.parameters() if p.requires_grad)


def test_merging_for_generation_is_no_merging_here(bases: dict[str, Path]) -> None:
    backbone = load(bases["tied"])
    add_trained_adapter(backbone, "policy")
    outside, before = logits_of(backbone, "policy"), codes(backbone)
    with backbone.merged("policy"):
        assert torch.equal(logits_of(backbone, "policy"), outside)
        assert all(layer.merged is None for layer in lora_layers(backbone.model).values())
    assert codes(backbone) == before


def test_weights_with_other_scales_have_another_hash(bases: dict[str, Path]) -> None:
    """The codes of a weight and of twice that weight are the same; cached answers must not be."""
    one, two = load(bases["tied"]), load(bases["tied"])
    assert weights_hash(one, None) == weights_hash(two, None)
    quantised_layers(two)[0].weight.quant_state.offset *= 2
    assert weights_hash(one, None) != weights_hash(two, None)


# ---------------------------------------------------------------- training and files


@pytest.fixture(scope="module")
def trained(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    """An SFT run on the untied base in 4 bits: output folder and log."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"prompt": f"{a} {b}", "completion": f"{b} {a} good"} for a in ("red", "green") for b in ("cat", "dog")]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run_sft(sft_config(folder, "sft", bases["untied"], data))
    log = (folder / "sft" / "logs" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return folder, [json.loads(line) for line in log]


def sft_config(folder: Path, name: str, base: Path, data: Path, *more: str) -> SFTConfig:
    texts = [
        f"run.name={name}", f"run.output_dir={folder}", "run.device=cpu", "run.num_threads=1",
        f"data.train_files=[{data}]", "data.validation_fraction=0", "data.min_length=1",
        f"model.name_or_path={base}", "model.load_in_4bit=true", "model.lora.r=4", "training.max_steps=8",
        "training.num_train_epochs=100", "training.per_device_train_batch_size=4", "optimizer.learning_rate=0.02",
    ]  # fmt: skip
    return load_config(SFTConfig, overrides=[*texts, *more])


def test_loss_falls_and_the_base_stays(bases: dict[str, Path], trained: tuple[Path, list[dict[str, float]]]) -> None:
    folder, log = trained
    losses = [line["train/loss"] for line in log]
    assert len(losses) == 8 and losses[-1] < 0.5 * losses[0]
    loaded = load_policy("sft", ModelConfig(), folder, CPU)
    assert codes(loaded.backbone) == {
        name.replace(".weight", ".base.weight") if ".layers." in name and "norm" not in name else name: value
        for name, value in codes(load(bases["untied"])).items()
    }


def test_the_policy_comes_back_as_it_was_trained(
    bases: dict[str, Path], trained: tuple[Path, list[dict[str, float]]]
) -> None:
    folder, _ = trained
    recorded = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    assert read_quantisation(folder / "sft" / "policy") == recorded
    by_record = load_policy("sft", ModelConfig(), folder, CPU)
    assert by_record.backbone.is_quantised and by_record.backbone.quantisation == recorded
    told = load_policy("sft", ModelConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"), folder, CPU)
    assert told.backbone.quantisation["bnb_4bit_quant_type"] == "fp4"
    assert "was trained on its base load_in_4bit=True" in told.backbone.notes[-1]
    dense = load_policy("sft", ModelConfig(load_in_4bit=False), folder, CPU)
    assert not dense.backbone.is_quantised and dense.backbone.notes[-1].endswith("as it is here")
    here = logits_of(by_record.backbone, by_record.adapter)
    again = load_policy("sft", ModelConfig(), folder, CPU)
    assert torch.equal(logits_of(again.backbone, again.adapter), here)
    assert not torch.equal(logits_of(told.backbone, told.adapter), here)
    assert not torch.equal(logits_of(dense.backbone, dense.adapter), here)


def test_peft_reads_the_adapter_with_equal_outputs(
    bases: dict[str, Path], trained: tuple[Path, list[dict[str, float]]]
) -> None:
    folder, _ = trained
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(bases["untied"], quantization_config=settings, device_map={"": CPU})
    theirs = peft.PeftModel.from_pretrained(plain, folder / "sft" / "policy").eval()
    for layer in quantised_layers(theirs):
        layer.support_avx512bf16_for_cpu = False
    ours = load_policy("sft", ModelConfig(), folder, CPU)
    batch = pad_left(ROWS[:1], 0)
    with torch.no_grad():
        wanted = theirs(input_ids=batch.input_ids_BP).logits
        found = ours.backbone.logits(
            ours.backbone.hidden(batch.input_ids_BP, adapter=ours.adapter), adapter=ours.adapter
        )
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_merging_for_good_gives_dense_layers_with_the_same_outputs(
    trained: tuple[Path, list[dict[str, float]]],
) -> None:
    folder, _ = trained
    loaded = load_policy("sft", ModelConfig(), folder, CPU)
    assert loaded.adapter is not None
    wanted = logits_of(loaded.backbone, loaded.adapter)
    merge_lora_weights(loaded.backbone.model, loaded.adapter)
    assert not quantised_layers(loaded.backbone) and not lora_layers(loaded.backbone.model)
    torch.testing.assert_close(logits_of(loaded.backbone, None), wanted, atol=1e-4, rtol=1e-4)


def test_C5_full_fine_tuning_goes_on_from_the_original_weights(
    bases: dict[str, Path], trained: tuple[Path, list[dict[str, float]]]
) -> None:
    """The adapter is merged into the base that was quantised, not into what its codes stand for."""
    folder, _ = trained
    merged = load_policy("sft", ModelConfig(train="full"), folder, CPU)
    assert merged.adapter is None and not merged.backbone.is_quantised
    dense = load(bases["untied"], load_in_4bit=False)
    dense.load_adapter(folder / "sft" / "policy", "sft")
    torch.testing.assert_close(logits_of(merged.backbone, None), logits_of(dense, "sft"), atol=1e-4, rtol=1e-4)


def test_policies_of_one_coding_share_a_base(bases: dict[str, Path], tmp_path: Path) -> None:
    for name, more in [("a", {}), ("b", {}), ("c", {"bnb_4bit_quant_type": "fp4"}), ("d", {"load_in_4bit": False})]:
        backbone = load(bases["tied"], **more)
        add_trained_adapter(backbone, "sft", seed=ord(name))
        save_policy(backbone, "sft", tmp_path / name)
    shelf = PolicyShelf(ModelConfig(), tmp_path, CPU, "fp32")
    a, b, c, d = (shelf.load(name) for name in "abcd")
    assert a.backbone is b.backbone and len({id(x.backbone) for x in (a, c, d)}) == 3
    assert (tmp_path / "a" / QUANTISATION_FILE).is_file() and not (tmp_path / "d" / QUANTISATION_FILE).exists()
    told = PolicyShelf(ModelConfig(load_in_4bit=False), tmp_path, CPU, "fp32")
    assert len({id(told.load(name).backbone) for name in "abcd"}) == 1


def test_a_later_stage_holds_the_base_as_the_earlier_did(
    trained: tuple[Path, list[dict[str, float]]],
) -> None:
    folder, _ = trained
    pairs = folder / "pairs.jsonl"
    rows = [{"prompt": f"{a} cat", "chosen": f"{a} good", "rejected": f"{a} bad"} for a in ("red", "green", "blue")]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = [
        "run.name=dpo", f"run.output_dir={folder}", "run.device=cpu", "run.num_threads=1", "policy=sft",
        f"data.train_files=[{pairs}]", "data.validation_fraction=0", "data.min_length=1", "training.max_steps=2",
    ]  # fmt: skip
    run_dpo(load_config(DPOConfig, overrides=texts))
    assert read_quantisation(folder / "dpo" / "policy") == read_quantisation(folder / "sft" / "policy") != {}


def test_a_run_that_was_interrupted_ends_at_the_same_adapter(
    bases: dict[str, Path], trained: tuple[Path, list[dict[str, float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = trained
    config = sft_config(folder, "stopped", bases["untied"], folder / "rows.jsonl")
    calls = iter(range(100))

    def should_stop(run: Run) -> bool:
        if next(calls) == 3:
            run.stop_reason = "interrupted"
        return run.stop_reason is not None

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Run, "should_stop", should_stop)
        run_sft(config)
    assert not (folder / "stopped" / "policy").exists()
    resume_run(folder / "stopped", lambda *_: None)
    weights = [(folder / name / "policy" / "adapter_model.safetensors").read_bytes() for name in ("sft", "stopped")]
    assert weights[0] == weights[1]


# ---------------------------------------------------------------- reward models


def test_a_reward_model_comes_back_with_its_coding_and_shares_only_that(bases: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = RewardModel(str(bases["tied"]), model_config=ModelConfig(load_in_4bit=True, lora=LoRAConfig(r=4)))
    assert model.backbone.is_quantised
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape)
    model.save(tmp_path)
    batch = pad_left(ROWS, 0)
    wanted = model(batch.input_ids_BP, batch.attention_mask_BP)
    alone = RewardModel.load(tmp_path)
    policy, dense = load(bases["tied"]), load(bases["tied"], load_in_4bit=False)
    shared, apart = RewardModel.load(tmp_path, policy), RewardModel.load(tmp_path, dense)
    assert shared.backbone is policy
    assert apart.backbone is not dense and apart.backbone.is_quantised
    assert "gets a base of its own" in dense.notes[-1]
    for other in (alone, shared, apart):
        assert torch.equal(other(batch.input_ids_BP, batch.attention_mask_BP), wanted)


# ---------------------------------------------------------------- refusals


def test_what_cannot_be_is_refused(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for cls, texts, words in [
        (SFTConfig, ["model.load_in_4bit=true", "model.train=full"], "weights that are 4-bit codes"),
        (SFTConfig, ["model.load_in_4bit=true", "model.random_init=true"], "random weights that are never saved"),
        (RewardConfig, ["model.load_in_4bit=true", "reward.train=full"], "reward.train=lora or frozen"),
        (SFTConfig, ["model.bnb_4bit_quant_type=fp4"], "load_in_4bit is false"),
        (SFTConfig, ["model.load_in_4bit=true", "model.bnb_4bit_quant_type=int4"], "nf4"),
    ]:
        with pytest.raises(UserError, match=words):
            load_config(cls, overrides=texts)
    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    with pytest.raises(UserError, match="does not run on cpu, only on cuda"):
        load(bases["tied"])
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'rlhf\[quant\]'"):
        load(bases["tied"])


def test_a_base_that_is_stored_quantised(bases: dict[str, Path], tmp_path: Path) -> None:
    """As hubs offer them: it needs no setting, takes adapters, and cannot be trained in full."""
    backbone = load(bases["tied"])
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    again = load(tmp_path, load_in_4bit=False)
    assert again.is_quantised and again.quantisation == {}
    add_trained_adapter(again, "policy")
    add_trained_adapter(backbone, "policy")
    assert torch.equal(logits_of(again, "policy"), logits_of(backbone, "policy"))
    with pytest.raises(UserError, match="stored as codes"):
        load(tmp_path, load_in_4bit=False, train="full")


def test_a_record_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert read_quantisation(tmp_path) == {}
    (tmp_path / QUANTISATION_FILE).write_text("[", encoding="utf-8")
    with pytest.raises(UserError, match=QUANTISATION_FILE):
        read_quantisation(tmp_path)
