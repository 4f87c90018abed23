"""What of an export needs no run: weights written and read back, how they are compared, and what is refused at once.

Expected numbers are worked out by hand, expected weights by the formula of the update.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from command_line import rlhf
from tiny_backbones import add_trained_adapter, random_prompts, tiny_backbone
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.infra.errors import UserError
from rlhf.models.export import (
    CheckRow,
    agreement,
    answer_logits,
    answer_logits_of_folder,
    reward_scores,
    score_agreement,
    scores_of_folder,
    write_classifier,
    write_policy,
)
from rlhf.models.reward_model import RewardModel
from rlhf.recipes.export_request import EXPORT_INFO, ExportConfig, Source, find_source, refuse_taken

CPU = torch.device("cpu")
ROWS = [CheckRow(ids[:2], ids[2:]) for ids in random_prompts(5, longest=9, seed=3) if len(ids) > 2]


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_base_and_update_are_added_in_fp32_and_rounded_once(tmp_path: Path, dtype: str) -> None:
    backbone = tiny_backbone("llama")
    add_trained_adapter(backbone, "policy")
    wanted: dict[str, Tensor] = {}
    for path in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        layer = backbone.model.get_submodule(path)
        update = layer.lora_B["policy"].double() @ layer.lora_A["policy"].double()
        wanted[path] = (layer.base.weight.double() + 2 * update).detach()  # alpha is 2 r, so the scaling is 2
    outside = answer_logits(backbone, "policy", ROWS)
    write_policy(backbone, "policy", tmp_path, "bf16" if dtype == "bf16" else "fp32", [1, 2])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    for path, exact in wanted.items():
        found = model.get_submodule(path).weight
        assert found.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
        once = exact.float().to(found.dtype)
        assert (found != once).float().mean() < (0.01 if dtype == "bf16" else 1)  # sums may fall beside a rounding step
        torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=2**-8 if dtype == "bf16" else 1e-6)
    assert model.generation_config.eos_token_id == [1, 2]
    apart = agreement(outside, answer_logits_of_folder(tmp_path, ROWS, CPU))
    assert apart.num_tokens == sum(len(row.answer_ids) for row in ROWS) == 9
    assert 0 < apart.max_abs_difference < (0.2 if dtype == "bf16" else 1e-4)


def test_a_reward_model_becomes_a_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = tiny_backbone("llama")
    add_trained_adapter(backbone, "reward")
    reward = RewardModel(backbone, train="frozen", suffix="the")
    rows = random_prompts(6, seed=1)
    wanted = reward_scores(reward, rows)
    write_classifier(reward, tmp_path, "fp32")
    found = scores_of_folder(tmp_path, rows, "the", CPU)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert wanted.std() > 0.1
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["rlhf_scoring"]["suffix"] == "the"


# ---------------------------------------------------------------- comparison


def test_how_far_two_policies_are_apart() -> None:
    """Over the tokens (1/2, 1/2) against (3/4, 1/4), and (1/4, 3/4) against itself: KL ln(4/3) / 2 and 0."""
    first = [torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]])]
    second = [torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, math.log(3)]])]
    found = agreement(first, second)
    assert found.max_abs_difference == pytest.approx(math.log(3) / 2)
    assert found.mean_kl == pytest.approx(math.log(4 / 3) / 4)
    assert agreement(second, first).mean_kl == pytest.approx((0.75 * math.log(3 / 2) - 0.25 * math.log(2)) / 2)
    assert (found.same_choice, found.num_tokens) == (1.0, 2)
    shifted = agreement(first, [logits + 7 for logits in second])
    assert shifted.max_abs_difference == pytest.approx(math.log(3) / 2, rel=1e-5)
    assert shifted.mean_kl == pytest.approx(math.log(4 / 3) / 4, rel=1e-5)
    turned = agreement([torch.tensor([[1.0, 0.0], [0.0, 1.0]])], [torch.tensor([[1.0, 0.0], [1.0, 0.0]])])
    assert turned.same_choice == 0.5


def test_how_far_two_reward_models_are_apart() -> None:
    found = score_agreement(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([1.0, 4.0, 3.0]))  # deviation 2
    assert (found.max_abs_difference, found.mean_abs_difference, found.num_answers) == (1.0, 0.5, 3)


# ---------------------------------------------------------------- what is refused at once


def test_a_target_that_is_taken(tmp_path: Path) -> None:
    source = Source(str(tmp_path / "sft" / "policy"), "policy", None, str(tmp_path / "out" / "base"), True)
    elsewhere = Source(str(tmp_path / "sft" / "policy"), "policy", None, "owner/name", True)
    out = tmp_path / "out"
    refuse_taken(out, False, source)
    out.mkdir()
    refuse_taken(out, False, source)
    (out / "letter.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(UserError, match="already exists; choose another --to"):
        refuse_taken(out, False, elsewhere)
    with pytest.raises(UserError, match="is no earlier export"):
        refuse_taken(out, True, elsewhere)
    with pytest.raises(UserError, match="is no earlier export"):
        refuse_taken(out / "letter.txt", True, elsewhere)
    for text in ("{", "[]", "{}"):
        (out / EXPORT_INFO).write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="does not say what the earlier export wrote"):
            refuse_taken(out, True, elsewhere)
    (out / EXPORT_INFO).write_text('{"files": {"model.safetensors": "0"}}', encoding="utf-8")
    (out / "model.safetensors").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"also holds letter\.txt, which the earlier export did not write"):
        refuse_taken(out, True, elsewhere)
    (out / "letter.txt").unlink()
    refuse_taken(out, True, elsewhere)
    with pytest.raises(UserError, match="is what is exported, or stands under it"):
        refuse_taken(out, True, source)


def test_sources_that_are_no_finished_model(tmp_path: Path) -> None:
    def refused(source: str, words: str) -> None:
        with pytest.raises(UserError, match=words):
            find_source(ExportConfig(source=source, output_dir=tmp_path))

    def run(path: str, recipe: str, *folders: str) -> None:
        for name in ("", *folders):
            (tmp_path / path / name).mkdir(parents=True, exist_ok=True)
        status = "interrupted" if "checkpoints" in folders else "finished"
        (tmp_path / path / "run.json").write_text(json.dumps({"recipe": recipe, "status": status}), encoding="utf-8")

    refused("nobody", "there is no run 'nobody'")
    run("stopped", "reward", "checkpoints")
    refused(
        "stopped", r"run '.*stopped' \(reward\) holds no model that was trained to its end; let it finish \(rlhf res"
    )
    run("report", "eval")
    refused("report", r"run '.*report' \(eval\) trained no model; name one that did")
    run("prm", "prm", "process_reward_model")
    refused("prm", "holds a process reward model")
    for stage in ("sft", "ppo"):
        run(f"all/{stage}", stage, "policy")
    run("all", "pipeline")
    refused("all", r"is a pipeline; name one of its stages: .*all/ppo, .*all/sft")
    (tmp_path / "classifier").mkdir()
    shape = tmp_path / "classifier" / "config.json"
    shape.write_text('{"architectures": ["LlamaForSequenceClassification"]}', encoding="utf-8")
    refused(str(shape.parent), r"is a plain Hugging Face classifier \(LlamaForSequenceClassification\) already")
    shape.write_text("{", encoding="utf-8")
    refused(str(shape.parent), "cannot be read as JSON")


def test_the_verb_leaves_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rlhf("export", "nobody", "--output-dir", str(tmp_path)) == 2
    assert capsys.readouterr().err.startswith("rlhf: there is no run 'nobody'")
    assert rlhf("export", "nobody", "--dtype", "fp16") == 2
    assert rlhf("export", "nobody", "--max-mean-kl", "-1") == 2


# ---------------------------------------------------------------- a warning that is not the user's concern


def test_a_kernel_that_is_not_used_is_not_missed(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
    assert caplog.records == []
    logger.warning("anything else")
    assert [record.getMessage() for record in caplog.records] == ["anything else"]
