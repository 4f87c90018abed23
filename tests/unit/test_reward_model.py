"""Reward models and the critic's head: what a score depends on, what survives a save, and document 001's snippets."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_backbones import Family, add_trained_adapter, random_prompts, tiny_backbone, tiny_model, word_tokenizer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from rlhf.algo.reward_loss import compute_preference_loss
from rlhf.data.chat import TokenExample
from rlhf.data.collate import pad_left, pad_right
from rlhf.infra.errors import UserError
from rlhf.models.adapter_files import save_adapter
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.models.lora import LoRAConfig
from rlhf.models.reward_model import (
    ClassifierReward,
    Pooling,
    RewardModel,
    ScoreScale,
    load_reward_model,
    pool,
)
from rlhf.models.scoring import same_base
from rlhf.models.value_head import ValueHead
from rlhf.recipes.dpo import compute_log_probs

ROWS = random_prompts(7, longest=9, seed=2)
SMALL = ModelConfig(lora=LoRAConfig(r=4))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved base model with its tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), word_tokenizer()
    tiny_model("llama", len(tokenizer), spread=0.3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_base(base: Path, train: str = "lora") -> Backbone:
    return Backbone.load(ModelConfig(name_or_path=str(base), train="full" if train == "full" else "lora"))


def moved(model: nn.Module) -> None:
    """Change everything that trains, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def right_padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    batch = pad_right([TokenExample(row, [False] * len(row)) for row in rows], pad)
    assert batch.attention_mask_BT is not None
    return batch.input_ids_BT, batch.attention_mask_BT


# ---------------------------------------------------------------- what a score depends on


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_V8_a_score_depends_on_its_row_alone(family: Family, pooling: Pooling) -> None:
    # GPT-2's tokenizer has no pad token: end-of-sequence pads, and rows that really end with it must not lose it.
    backbone = tiny_backbone(family, separate_pad=family == "qwen2")
    end, pad = backbone.tokenizer.eos_token_id, backbone.tokenizer.pad_token_id
    assert (pad == end) == (family == "gpt2")
    rows = [*ROWS, [5, 6, end], [5, 6, end, end], [end]]
    add_trained_adapter(backbone, "reward")
    model = RewardModel(backbone, "reward", pooling)
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([row])) for row in rows])
        ids, mask = right_padded(rows, pad)
        left = pad_left(rows, pad)
        wide = torch.nn.functional.pad(ids, (3, 5), value=7), torch.nn.functional.pad(mask, (3, 5), value=False)
        for inputs in ((ids, mask), (left.input_ids_BP, left.attention_mask_BP), wide):
            torch.testing.assert_close(model(*inputs), alone, atol=1e-5, rtol=0)
    assert alone.dtype == torch.float32
    assert len({round(float(score), 5) for score in alone}) == len(rows)  # an end more is another text


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_a_suffix_is_read_behind_the_last_token_of_every_row(family: Family, tmp_path: Path) -> None:
    backbone = tiny_backbone(family, separate_pad=family == "qwen2")
    model = RewardModel(backbone, "reward", suffix="red cat")
    suffix_ids = backbone.tokenizer("red cat", add_special_tokens=False)["input_ids"]
    assert len(suffix_ids) >= 2
    plain = RewardModel(backbone, "reward")
    plain.head = model.head
    with torch.no_grad():
        wanted = torch.cat([plain(torch.tensor([[*row, *suffix_ids]])) for row in ROWS])
        assert not torch.allclose(wanted, torch.cat([plain(torch.tensor([row])) for row in ROWS]), atol=1e-3)
        ids, mask = right_padded(ROWS, backbone.tokenizer.pad_token_id)
        left = pad_left(ROWS, backbone.tokenizer.pad_token_id)
        wide = torch.nn.functional.pad(ids, (3, 5), value=7), torch.nn.functional.pad(mask, (3, 5), value=False)
        for inputs in ((ids, mask), (left.input_ids_BP, left.attention_mask_BP), wide, (ids, mask.long())):
            torch.testing.assert_close(model(*inputs), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(model(torch.tensor([ROWS[0]])), wanted[:1], atol=1e-5, rtol=0)
    model.save(tmp_path)
    assert json.loads((tmp_path / "reward_config.json").read_text())["suffix"] == "red cat"
    assert RewardModel.load(tmp_path, tiny_backbone(family, separate_pad=family == "qwen2")).suffix == "red cat"


def test_pooling_against_a_loop() -> None:
    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 1, 0]]).bool()
    last, mean = pool(hidden, mask, "last"), pool(hidden, mask, "mean")
    for row, places in enumerate([[0, 1, 2], [2, 3, 4], [1, 3]]):
        assert torch.equal(last[row], hidden[row, places[-1]])
        torch.testing.assert_close(mean[row], sum(hidden[row, t] for t in places) / len(places))


def test_a_score_is_the_head_on_the_models_own_hidden_state() -> None:
    backbone, row = tiny_backbone("gpt2"), torch.tensor([ROWS[0]])
    model = RewardModel(backbone, None, train="frozen")
    with torch.no_grad():
        hidden = backbone.model.transformer(row).last_hidden_state[0, -1]
        assert float(model(row)) == pytest.approx(float(hidden @ model.head.weight[0]), abs=1e-5)


# ---------------------------------------------------------------- what is trained and what is saved


def test_only_what_is_said_trains() -> None:
    lora = RewardModel(tiny_backbone(), model_config=SMALL)
    assert all(".lora_" in name or name == "head.weight" for name in lora.trainable_parameters())
    assert len(lora.trainable_parameters()) == 1 + 2 * 14
    backbone = tiny_backbone()
    add_trained_adapter(backbone, "sft")
    assert list(RewardModel(backbone, "sft", train="frozen").trainable_parameters()) == ["head.weight"]
    full = RewardModel(tiny_backbone(), train="full")
    assert len(full.trainable_parameters()) == 1 + len(list(tiny_backbone().model.parameters()))


@pytest.mark.parametrize("train", ["lora", "full", "frozen"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_V9_scores_survive_saving(base: Path, tmp_path: Path, train: str, pooling: Pooling) -> None:
    model = RewardModel(load_base(base, train), None if train == "frozen" else "reward", pooling, train, SMALL)
    moved(model)
    model.scale = ScoreScale(0.5, 2.0)
    model.save(tmp_path)
    ids, mask = right_padded(ROWS, 0)
    with torch.no_grad():
        expected = model(ids, mask)
    alone = load_reward_model(str(tmp_path))
    assert isinstance(alone, RewardModel)
    assert torch.equal(alone(ids, mask), expected)
    torch.testing.assert_close(alone.standardised(expected), (expected - 0.5) / 2)
    assert not any(parameter.requires_grad for parameter in alone.parameters())


def test_V9_scores_survive_on_a_shared_backbone_and_leave_it_as_it_was(base: Path, tmp_path: Path) -> None:
    trained = RewardModel(load_base(base), model_config=SMALL)
    moved(trained)
    trained.save(tmp_path)
    shared, (ids, mask) = load_base(base), right_padded(ROWS, 0)
    add_trained_adapter(shared, "policy", seed=5)
    bare, policy = shared.hidden(ids, mask), shared.hidden(ids, mask, adapter="policy")
    model = load_reward_model(str(tmp_path), shared)
    assert isinstance(model, RewardModel) and model.backbone is shared
    with torch.no_grad():
        assert torch.equal(shared.hidden(ids, mask), bare)
        assert torch.equal(model(ids, mask), trained(ids, mask))
        assert torch.equal(shared.hidden(ids, mask, adapter="policy"), policy)


def test_a_reward_model_of_another_base_brings_its_own(base: Path, tmp_path: Path) -> None:
    trained = RewardModel(load_base(base), model_config=SMALL)
    trained.save(tmp_path)
    other = tiny_backbone("gpt2")
    model = load_reward_model(str(tmp_path), other)
    assert isinstance(model, RewardModel)
    assert model.tokenizer.get_vocab() == trained.tokenizer.get_vocab()
    assert model.backbone is not other and other.adapter_names == []
    ids, mask = right_padded(ROWS, 0)
    with torch.no_grad():
        assert torch.equal(model(ids, mask), trained(ids, mask))


def test_loading_onto_a_policy_keeps_what_trains_there(base: Path, tmp_path: Path) -> None:
    RewardModel(load_base(base), model_config=SMALL).save(tmp_path)
    shared = load_base(base)
    shared.add_adapter("policy", SMALL.lora)
    shared.train_only(["policy"])
    before = {name for name, p in shared.named_parameters() if p.requires_grad}
    load_reward_model(str(tmp_path), shared)
    assert {name for name, p in shared.named_parameters() if p.requires_grad} == before


def test_a_base_that_trains_is_not_shared(base: Path, tmp_path: Path) -> None:
    trained = RewardModel(load_base(base), model_config=SMALL)
    trained.save(tmp_path)
    policy = load_base(base, "full")
    policy.model.requires_grad_(True)
    model = load_reward_model(str(tmp_path), policy)
    assert isinstance(model, RewardModel) and model.backbone is not policy
    assert policy.adapter_names == [] and all(p.requires_grad for p in policy.model.parameters())
    moved(policy)
    ids, mask = right_padded(ROWS, 0)
    with torch.no_grad():
        assert torch.equal(model(ids, mask), trained(ids, mask))


def test_C6_the_adapter_is_pefts_sequence_classification(base: Path, tmp_path: Path) -> None:
    RewardModel(load_base(base), model_config=SMALL).save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])


def test_C6_a_reward_adapter_is_no_policy_and_a_policy_no_reward_model(base: Path, tmp_path: Path) -> None:
    RewardModel(load_base(base), model_config=SMALL).save(tmp_path / "reward")
    shared = load_base(base)
    with pytest.raises(UserError, match="was trained for the task SEQ_CLS, but a policy needs CAUSAL_LM"):
        shared.load_adapter(tmp_path / "reward", "policy")
    add_trained_adapter(shared, "sft")
    save_adapter(shared.model, "sft", tmp_path / "sft", str(base))
    with pytest.raises(UserError, match="was trained for the task CAUSAL_LM, but a reward model needs SEQ_CLS"):
        load_base(base).load_adapter(tmp_path / "sft", "reward", "SEQ_CLS")
    assert shared.adapter_names == ["sft"]


def test_V9_C6_a_missing_head_or_description_is_refused(base: Path, tmp_path: Path) -> None:
    RewardModel(load_base(base), model_config=SMALL).save(tmp_path)
    (tmp_path / "reward_head.safetensors").unlink()
    shared = load_base(base)
    with pytest.raises(UserError, match=r"has no reward_head\.safetensors: its scores would be those of a random head"):
        load_reward_model(str(tmp_path), shared)
    assert shared.adapter_names == []
    with pytest.raises(UserError, match=r"holds no reward model: reward_config\.json is missing"):
        RewardModel.load(base)


def test_bases_are_compared_by_name_or_folder(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    assert same_base(str(base), base.name) and same_base("org/model", "org/model")
    assert not same_base("org/model", "org/other") and not same_base(str(base), str(base.parent))


# ---------------------------------------------------------------- classifiers


def save_classifier(folder: Path, num_labels: int, *, separate_pad: bool = True) -> GPT2ForSequenceClassification:
    tokenizer = word_tokenizer(separate_pad=separate_pad)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        num_labels=num_labels,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("separate_pad", [True, False])
def test_V8_a_hub_classifier_serves_as_a_reward_model(tmp_path: Path, separate_pad: bool) -> None:
    original = save_classifier(tmp_path, 1, separate_pad=separate_pad)
    model = load_reward_model(str(tmp_path))
    assert isinstance(model, ClassifierReward)
    ids, mask = right_padded(ROWS, model.tokenizer.pad_token_id)
    with torch.no_grad():
        alone = torch.cat([original(input_ids=torch.tensor([row])).logits[0] for row in ROWS])
        torch.testing.assert_close(model(ids, mask), alone, atol=1e-5, rtol=0)
    assert model(ids, mask).shape == (len(ROWS),)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_classifier_with_two_labels_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    save_classifier(tmp_path, 2)
    with pytest.raises(UserError, match="has 2 labels; a reward model has exactly 1"):
        ClassifierReward(str(tmp_path))
    with pytest.raises(UserError, match="no sequence classifier that transformers can load"):
        load_reward_model(str(tmp_path / "absent"))


# ---------------------------------------------------------------- document 001


def test_001_reward_model_gives_one_scalar(base: Path) -> None:
    tokenizer = word_tokenizer()
    rm = RewardModel(str(base))
    input_ids = tokenizer("good cat", return_tensors="pt")["input_ids"]
    assert rm(input_ids).shape == (1,)


def test_001_preference_loss() -> None:
    chosen = torch.tensor([2.0, 1.5])
    rejected = torch.tensor([0.5, 0.3])
    loss, metrics = compute_preference_loss(chosen, rejected)
    assert metrics["accuracy"] == 1.0
    assert float(loss) == pytest.approx((math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(-1.2))) / 2)
    assert metrics["margin"] == pytest.approx(1.35)
    assert compute_preference_loss(chosen, chosen)[1]["accuracy"] == 0.5


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_001_log_probs_of_answers(family: Family) -> None:
    backbone = tiny_backbone(family, separate_pad=family == "qwen2")
    rows = [row for row in ROWS if len(row) > 2]
    input_ids, attention_mask = right_padded(rows, backbone.tokenizer.pad_token_id)
    prompt_lengths = torch.tensor([1 + row % 2 for row in range(len(rows))])
    with torch.no_grad():
        logps = compute_log_probs(backbone.model, input_ids, attention_mask, prompt_lengths)
        assert (logps < 0).all()
        for row, ids in enumerate(rows):
            log_p = backbone.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(float(log_p[t - 1, ids[t]]) for t in range(int(prompt_lengths[row]), len(ids)))
            assert float(logps[row]) == pytest.approx(expected, abs=1e-4)
    shorter = compute_log_probs(backbone.model, input_ids, attention_mask, prompt_lengths + 1)
    assert (shorter >= logps).all()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_001_value_head(kind: str) -> None:
    torch.manual_seed(0)
    head = ValueHead(6, "mlp" if kind == "mlp" else "linear")
    hidden = torch.randn(2, 3, 6)
    assert head(hidden).shape == (2, 3)
    assert not head(hidden).any()  # no critic at the start
    nn.init.normal_(head.last.weight)
    features = hidden if head.first is None else torch.tanh(hidden @ head.first.weight.T + head.first.bias)
    assert (head.first is None) == (kind == "linear")
    torch.testing.assert_close(head(hidden), (features @ head.last.weight.T + head.last.bias)[..., 0])
    assert head(hidden.bfloat16()).dtype == torch.float32
