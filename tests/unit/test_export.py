"""Exports: what plain transformers reads back, how it is held against the run, and what leaves nothing behind.

Expected weights come from PEFT's own merge, expected texts and scores from the run.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from command_line import rlhf
from safetensors.torch import load_file
from tiny_backbones import END, PAD, UNKNOWN, WORDS, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from rlhf.data.chat import TokenExample
from rlhf.data.collate import pad_right
from rlhf.infra.config import load_config
from rlhf.infra.durable import sha256_file
from rlhf.infra.errors import UserError
from rlhf.models import export as export_model
from rlhf.models.backbone import Backbone
from rlhf.models.lora_layer import LoRALinear
from rlhf.models.reward_model import ClassifierReward, RewardModel
from rlhf.recipes.export import EXPORT_INFO, ExportConfig, Exported, run_export
from rlhf.recipes.generate import Responder
from rlhf.recipes.reward import RewardConfig, run_reward
from rlhf.recipes.sft import SFTConfig, run_sft

pytestmark = pytest.mark.slow  # it trains, a little

TEMPLATE = (
    "{% for m in messages %}{{ 'a ' if m['role'] == 'assistant' else 'the ' }}{{ m['content'] }}{{ ' <end> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"
)
PROMPTS = ["red cat", "red dog", "green cat", "green dog"]
SHAPES = ["sft", "sft_full", "sft_head"]
IN_TWO_PASSES = ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"]


def write_base(folder: Path, *, pad: bool = True) -> Path:
    """A base whose generation defaults are not those that a policy is trained under."""
    special = [PAD, END, UNKNOWN]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*special, *WORDS])}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"eos_token": END, "unk_token": UNKNOWN, "pad_token": PAD if pad else END}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = TEMPLATE
    model = tiny_model("llama", len(tokenizer), spread=0.2)
    model.generation_config = GenerationConfig(do_sample=True, top_p=0.5, repetition_penalty=1.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and, from it, policies (adapter, every weight, adapter on the tied head too) and reward models."""
    folder = tmp_path_factory.mktemp("runs")
    base = write_base(folder / "base")
    rows = [{"messages": turns(prompt, f"{' '.join(reversed(prompt.split()))} good")} for prompt in PROMPTS]
    pairs = [{"prompt": turns(p)[:1], "chosen": f"{p} good", "rejected": f"bad {p}"} for p in PROMPTS]
    for name, lines in [("rows", rows), ("pairs", pairs)]:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name, more in {
        "sft": [],
        "sft_full": ["model.train=full"],
        "sft_head": ["model.lora.target_modules=[q_proj,lm_head]"],
    }.items():
        train_policy(folder, name, more)
    for name, more in {
        "reward": ["backbone=sft", "reward.suffix=' the'"],
        "reward_full": [f"backbone={base}", "reward.train=full"],
        "reward_mean": ["backbone=sft", "reward.pooling=mean"],
    }.items():
        train_reward(folder, name, more)
    return folder


@pytest.fixture(scope="module")
def coded(runs: Path) -> Path:
    """The same folder with runs on the base in 4 bits, blocks computed again, two passes a step."""
    pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    train_policy(runs, "sft_4bit", ["model.load_in_4bit=true", "model.gradient_checkpointing=true", *IN_TWO_PASSES])
    train_reward(runs, "reward_4bit", ["backbone=sft_4bit", "model.gradient_checkpointing=true", *IN_TWO_PASSES])
    return runs


def train_policy(folder: Path, name: str, more: list[str]) -> None:
    data = [f"model.name_or_path={folder}/base", f"data.train_files=[{folder}/rows.jsonl]", "training.max_steps=30"]
    run_sft(load_config(SFTConfig, overrides=[*common(folder), f"run.name={name}", *data, *more]))


def train_reward(folder: Path, name: str, more: list[str]) -> None:
    data = [f"data.train_files=[{folder}/pairs.jsonl]", "training.max_steps=4"]
    run_reward(load_config(RewardConfig, overrides=[*common(folder), f"run.name={name}", *data, *more]))


def common(folder: Path) -> list[str]:
    return [
        f"run.output_dir={folder}", "run.device=cpu", "run.num_threads=1", "data.validation_fraction=0",
        "data.min_length=1", "training.num_train_epochs=100", "training.per_device_train_batch_size=4",
        "optimizer.learning_rate=0.01",
    ]  # fmt: skip


def turns(prompt: str, answer: str = "") -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def exported(runs: Path, source: str, target: Path, **more: Any) -> Exported:
    settings = {"source": source, "output_dir": runs, "target": target, "device": "cpu", "dtype": "fp32"}
    return run_export(ExportConfig.model_validate(settings | more))


def code_of_card(folder: Path, **texts: str) -> dict[str, Any]:
    """What the card's code leaves behind, with this folder and other words put into it."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert code is not None
    text = code[1].replace('folder = "..."', f"folder = {str(folder)!r}")
    for old, new in texts.items():
        assert repr(old)[1:-1] in text
        text = text.replace(old, new)
    found: dict[str, Any] = {}
    exec(text, found)  # as a reader of the card would
    return found


# ---------------------------------------------------------------- policies


@pytest.mark.parametrize("source", SHAPES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_plain_transformers_says_what_the_run_says(runs: Path, tmp_path: Path, source: str, dtype: str) -> None:
    found = exported(runs, source, tmp_path / "out", dtype=dtype)
    answers = Responder.load(source, runs, temperature=0, max_new_tokens=8).answers([turns(p)[:1] for p in PROMPTS])
    said = [code_of_card(found.folder, **{"Tell me the capital of France.": p})["answer"] for p in PROMPTS]
    assert said == answers
    assert len(set(answers)) == 4 and answers[0] == "cat red good"  # it has learnt something
    model = AutoModelForCausalLM.from_pretrained(found.folder, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16 if dtype == "bf16" else torch.float32}


def test_weights_are_those_that_peft_merges(runs: Path, tmp_path: Path) -> None:
    """C5: base and update are added in fp32 and rounded once."""
    folder = exported(runs, "sft", tmp_path / "out", dtype="bf16").folder
    base = AutoModelForCausalLM.from_pretrained(runs / "base", dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(base, runs / "sft" / "policy").merge_and_unload()
    wanted = {name: tensor.to(torch.bfloat16) for name, tensor in merged.state_dict().items()}
    found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        # A sum that is written otherwise may fall on the other side of a rounding step, rarely.
        assert (tensor != wanted[name]).float().mean() < 0.01, name
        torch.testing.assert_close(tensor.float(), wanted[name].float(), atol=1e-6, rtol=2**-7)


def test_the_folder_knows_when_to_stop_and_nothing_of_the_bases_sampling(runs: Path, tmp_path: Path) -> None:
    folder = exported(runs, "sft", tmp_path / "out").folder
    settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert settings["eos_token_id"] == [1] and settings["pad_token_id"] == 0
    assert not {"do_sample", "top_p", "repetition_penalty"} & settings.keys()
    assert "short_rows" not in (folder / "config.json").read_text(encoding="utf-8")
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE


def test_an_adapter_on_the_tied_head_unties_it(runs: Path, tmp_path: Path) -> None:
    folder = exported(runs, "sft_head", tmp_path / "out").folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not model.config.tie_word_embeddings
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_the_record_says_what_was_measured_and_made_of_what(runs: Path, tmp_path: Path) -> None:
    found = exported(runs, "sft", tmp_path / "out")
    report = json.loads((found.folder / EXPORT_INFO).read_text(encoding="utf-8"))
    assert report == found.report
    assert 0 < report["measured"]["max_abs_difference"] < report["tolerance"]["max_abs_difference"] == 1e-3
    assert 0 <= report["measured"]["mean_kl"] < report["tolerance"]["mean_kl"] == 1e-6
    assert report["measured"]["same_choice"] == 1.0 and report["measured"]["num_tokens"] == 16
    assert "4 prompts of the data that the run was trained on" in report["compared_on"]
    assert report["base_model"] == str(runs / "base") and report["measured_against_quantised"] is None
    (stage,) = report["lineage"]
    assert (stage["name"], stage["recipe"], stage["lineage"]) == ("sft", "sft", {"base": str(runs / "base")})
    assert stage["data"][str(runs / "rows.jsonl")]["sha256"] == sha256_file(runs / "rows.jsonl")
    assert stage["settings"]["optimizer.learning_rate"] == 0.01 and "run.output_dir" not in stage["settings"]
    assert stage["last_measures"]["train/loss"] < 0.2
    files = {path.name for path in found.folder.iterdir()}
    assert files == report["files"].keys() | {EXPORT_INFO, "README.md"}
    assert all(sha256_file(found.folder / name) == digest for name, digest in report["files"].items())
    card = (found.folder / "README.md").read_text(encoding="utf-8")
    for text in [
        "pipeline_tag: text-generation", "trained with the Python package `rlhf` by `sft`", "merged into `base`",
        sha256_file(runs / "rows.jsonl"), "| mean KL, nats per token |", "- `optimizer.learning_rate`: 0.01",
        f"{report['measured']['max_abs_difference']:.3g}",
    ]:  # fmt: skip
        assert text in card
    assert str(runs) not in card


def test_an_adapter_from_a_quantised_base_goes_onto_the_original_weights(coded: Path, tmp_path: Path) -> None:
    """Trained in 4 bits with gradient checkpointing and two passes a step, saved, read back, merged."""
    found = exported(coded, "sft_4bit", tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(coded / "base", dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(base, coded / "sft_4bit" / "policy").merge_and_unload().state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(found.folder).state_dict().items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=1e-6)
    apart = found.report["measured_against_quantised"]
    assert apart["max_abs_difference"] > 100 * found.report["measured"]["max_abs_difference"]
    assert apart["mean_kl"] > 0 and found.report["trained_on_quantised_base"]["load_in_4bit"]
    card = (found.folder / "README.md").read_text(encoding="utf-8")
    assert "The adapter was trained on a quantised base** (load_in_4bit=True, bnb_4bit_quant_type=nf4" in card
    assert f"| {apart['max_abs_difference']:.3g} |" in card
    said = [code_of_card(found.folder, **{"Tell me the capital of France.": p})["answer"] for p in PROMPTS]
    assert said == [f"{' '.join(reversed(prompt.split()))} good" for prompt in PROMPTS]  # what the data say


def test_in_4_bits_neither_checkpointing_nor_passes_change_what_is_learnt(coded: Path) -> None:
    train_policy(coded, "sft_4bit_plain", ["model.load_in_4bit=true", "training.max_steps=3"])
    train_policy(
        coded, "sft_4bit_lean",
        ["model.load_in_4bit=true", "training.max_steps=3", "model.gradient_checkpointing=true", *IN_TWO_PASSES],
    )  # fmt: skip
    plain, lean = (
        load_file(coded / f"sft_4bit_{n}" / "policy" / "adapter_model.safetensors") for n in ("plain", "lean")
    )
    assert plain.keys() == lean.keys()
    for name, tensor in plain.items():
        assert tensor.any()
        torch.testing.assert_close(lean[name], tensor, atol=1e-4, rtol=1e-4)


def test_a_policy_folder_and_a_bare_model_too(runs: Path, tmp_path: Path) -> None:
    one = exported(runs, str(runs / "sft" / "policy"), tmp_path / "one")
    assert [stage["name"] for stage in one.report["lineage"]] == ["sft"]
    bare = exported(runs, str(runs / "base"), tmp_path / "bare")
    assert bare.report["lineage"] == [] and "built-in world" in bare.report["compared_on"]


# ---------------------------------------------------------------- reward models


@pytest.mark.parametrize("source", ["reward", "reward_full"])
def test_a_classifier_scores_as_the_reward_model_does(runs: Path, tmp_path: Path, source: str) -> None:
    found = exported(runs, source, tmp_path / "out")
    model = RewardModel.load(runs / source / "reward_model")
    ids = model.tokenizer("the red cat <end> a red good <end>", add_special_tokens=False)["input_ids"]
    score = code_of_card(
        found.folder, **{"Tell me the capital of France.": "red cat", "Paris.": "red good"}
    )["score"]  # fmt: skip
    assert score == pytest.approx(float(model(torch.tensor([ids])).detach()), abs=1e-5)
    assert found.report["suffix"] == (" the" if source == "reward" else "")
    assert "pipeline_tag: text-classification" in (found.folder / "README.md").read_text(encoding="utf-8")


def test_this_package_heeds_suffix_and_scale_of_its_own_export(runs: Path, tmp_path: Path) -> None:
    folder = exported(runs, "reward", tmp_path / "out").folder
    model, again = RewardModel.load(runs / "reward" / "reward_model"), ClassifierReward(str(folder))
    rows = [[5, 6, 1, 7, 1], [9, 1], [4, 8, 8, 1, 3, 5, 1]]
    batch = pad_right([TokenExample(row, [False] * len(row)) for row in rows], 0)
    wanted = model(batch.input_ids_BT, batch.attention_mask_BT).detach()
    scores = again(batch.input_ids_BT, batch.attention_mask_BT)
    torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(again.standardised(scores), model.standardised(wanted), atol=1e-4, rtol=0)
    assert model.scale.std != 1.0


def test_a_reward_model_of_a_quantised_base(coded: Path, tmp_path: Path) -> None:
    found = exported(coded, "reward_4bit", tmp_path / "out")
    apart = found.report["measured_against_quantised"]["max_abs_difference"]
    assert apart > 100 * found.report["measured"]["max_abs_difference"]
    assert [stage["name"] for stage in found.report["lineage"]] == ["sft_4bit", "reward_4bit"]


def test_reward_models_that_a_classifier_cannot_be(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="read from the mean over all tokens"):
        exported(runs, "reward_mean", tmp_path / "out")
    torch.manual_seed(0)
    tied = write_base(tmp_path / "tied", pad=False)
    RewardModel(str(tied), train="full").save(tmp_path / "reward_tied")
    with pytest.raises(UserError, match="'<end>' both pads and ends an answer"):
        exported(runs, str(tmp_path / "reward_tied"), tmp_path / "out")
    tokenizer = Backbone.load(load_config(SFTConfig, overrides=[f"model.name_or_path={runs}/base"]).model).tokenizer
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = Backbone(BertModel(BertConfig(vocab_size=len(tokenizer), **shape)), tokenizer, "bert")
    RewardModel(encoder, train="full").save(tmp_path / "reward_bert")
    with pytest.raises(UserError, match="encoders read the first token through a pooler"):
        exported(runs, str(tmp_path / "reward_bert"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- what is refused, and leaves nothing behind


def nothing_left(folder: Path) -> bool:
    return list(folder.iterdir()) == []


def test_too_far_is_an_error(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"max_abs_difference is .* above the tolerance of 0; .* --max-abs-difference"):
        exported(runs, "sft", tmp_path / "out", max_abs_difference=0.0)
    with pytest.raises(UserError, match="--max-mean-kl"):
        exported(runs, "sft", tmp_path / "out", dtype="bf16", max_mean_kl=0.0)
    merged = LoRALinear.merged_weight
    monkeypatch.setattr(LoRALinear, "merged_weight", lambda layer, name: 1.01 * merged(layer, name))
    for source in ("sft", "reward"):
        with pytest.raises(UserError, match="too far from its source"):
            exported(runs, source, tmp_path / "out")
    monkeypatch.setattr(LoRALinear, "merged_weight", lambda layer, name: layer.base.weight.detach().clone())
    with pytest.raises(UserError, match="too far from its source"):  # the adapter forgotten: also in bf16
        exported(runs, "sft", tmp_path / "out", dtype="bf16")
    assert nothing_left(tmp_path)


def test_what_is_not_a_number_is_too_far(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_model, "answer_logits_of_folder", lambda *_: [torch.full((4, 27), torch.nan)] * 4)
    with pytest.raises(UserError, match="is nan, above the tolerance"):
        exported(runs, "sft", tmp_path / "out")


def test_an_interruption_leaves_what_was_there(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported(runs, "sft", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_model, "answer_logits_of_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        exported(runs, "sft_full", tmp_path / "out", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_earlier_export_is_replaced_where_that_is_asked_for(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    exported(runs, "sft", tmp_path / "empty")
    with pytest.raises(UserError, match="already exists; choose another --to"):
        exported(runs, "sft", tmp_path / "empty")
    with pytest.raises(UserError, match="is what is exported, or stands under it"):
        exported(runs, str(tmp_path / "empty"), tmp_path / "empty", overwrite=True)
    again = exported(runs, "sft_full", tmp_path / "empty", overwrite=True)
    assert again.report["lineage"][0]["name"] == "sft_full"


def test_a_base_that_is_stored_quantised_or_gone(coded: Path, tmp_path: Path) -> None:
    """Both are refused until `--base` says where the original weights are, and then give what the run gives."""
    config = load_config(SFTConfig, overrides=[f"model.name_or_path={coded}/base", "model.load_in_4bit=true"])
    backbone = Backbone.load(config.model)
    backbone.model.save_pretrained(tmp_path / "stored")
    backbone.tokenizer.save_pretrained(tmp_path / "stored")
    wanted = exported(coded, "sft_4bit", tmp_path / "wanted")
    for name in ("stored", "gone"):
        for kind, source in [("policy", "sft_4bit"), ("reward_model", "reward_4bit")]:
            place = tmp_path / f"{source}_{name}" / kind
            shutil.copytree(coded / source, place.parent)
            record = "adapter_config.json" if kind == "policy" else "reward_config.json"
            described = json.loads((place / record).read_text(encoding="utf-8"))
            described["base_model_name_or_path"] = str(tmp_path / name)
            if name == "stored" and kind == "reward_model":
                described["quantization"] = {}
            (place / record).write_text(json.dumps(described), encoding="utf-8")
            if name == "stored" and kind == "policy":
                (place / "quantization.json").unlink()
            words = "are codes of fewer bits" if name == "stored" else "cannot be loaded here; put it back"
            with pytest.raises(UserError, match=words):
                exported(coded, str(place), tmp_path / "out")
            assert not (tmp_path / "out").exists()
            found = exported(coded, str(place), tmp_path / "out", base=str(coded / "base"))
            assert found.report["trained_on_quantised_base"]["bnb_4bit_quant_type"] == "nf4"
            if kind == "policy":
                apart, apart_of_run = (r.report["measured_against_quantised"] for r in (found, wanted))
                assert apart["mean_kl"] == pytest.approx(apart_of_run["mean_kl"], rel=1e-3)
                assert found.report["files"]["model.safetensors"] == wanted.report["files"]["model.safetensors"]
            shutil.rmtree(tmp_path / "out")
    with pytest.raises(UserError, match="are codes of fewer bits"):
        exported(coded, str(tmp_path / "stored"), tmp_path / "out")


def test_a_base_that_is_not_needed(runs: Path, tmp_path: Path) -> None:
    for source, words in [("sft", "is there and not quantised"), ("sft_full", "every weight"), ("reward", "is there")]:
        with pytest.raises(UserError, match=f"{words}.*leave --base out"):
            exported(runs, source, tmp_path / "out", base=str(runs / "base"))
    assert nothing_left(tmp_path)


def test_the_verb(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert rlhf("export", "sft", "--output-dir", str(runs), "--device", "cpu") == 0
    told = capsys.readouterr().out
    assert "export: exports/sft (policy, bf16)" in told and "(tolerance 1)" in told
    assert (tmp_path / "exports" / "sft" / "model.safetensors").is_file()
    assert rlhf("export", "sft", "--output-dir", str(runs)) == 2
    assert "already exists" in capsys.readouterr().err
    assert rlhf("export", "sft", "--dtype", "fp16") == 2
    assert rlhf("export", "sft", "--max-mean-kl", "-1") == 2


def test_importing_the_package_says_nothing() -> None:
    """Where bitsandbytes is installed, transformers imports it, and it warns of a kernel that is not used here."""
    done = subprocess.run(
        [sys.executable, "-c", "import rlhf.recipes.sft, rlhf.models.quantized, peft, sys; sys.exit(0)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("", "")
