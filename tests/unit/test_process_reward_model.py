"""Process reward models: what a step's logit depends on, what is saved, and scoring of answers by steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_backbones import add_trained_adapter, random_prompts, tiny_backbone, tiny_model, word_tokenizer
from torch import nn
from transformers import BertConfig, BertLMHeadModel, BertModel

from rlhf.algo.process_loss import product
from rlhf.data.collate import StepBatch, step_batch
from rlhf.infra.errors import UserError
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.models.lora import LoRAConfig
from rlhf.models.process_reward_model import ProcessRewardModel, looks_ahead
from rlhf.models.reward_model import RewardModel, load_reward_model
from rlhf.rewards.process import ProcessReward, score_steps

SMALL = ModelConfig(lora=LoRAConfig(r=4))
ROWS = [row for row in random_prompts(12, longest=9, seed=2) if len(row) >= 4]
ENDS = [[len(row) - 3, len(row) - 1] for row in ROWS]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved base model with its tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), word_tokenizer()
    tiny_model("llama", len(tokenizer), spread=0.3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_base(base: Path, train: str = "lora") -> Backbone:
    return Backbone.load(ModelConfig(name_or_path=str(base), train="full" if train == "full" else "lora"))


def encoder_backbone(*, with_head: bool = False) -> Backbone:
    """BERT, which transformers loads under the name of a causal model when its config is asked for one."""
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape)
    model = BertLMHeadModel(config) if with_head else BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return Backbone(model, tokenizer, "tiny-bert")


def moved(model: nn.Module) -> None:
    """Change everything that trains, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def batch_of(rows: list[list[int]], ends: list[list[int]], pad: int = 0) -> StepBatch:
    return step_batch(rows, ends, [[None] * len(places) for places in ends], pad)


def logits_of(model: ProcessRewardModel, batch: StepBatch) -> torch.Tensor:
    with torch.no_grad():
        return model(batch.input_ids_BT, batch.attention_mask_BT, batch.step_mask_BT)


# ---------------------------------------------------------------- what a logit depends on


def test_a_batch_of_steps_by_hand() -> None:
    batch = step_batch([[5, 6, 7], [8, 9]], [[1, 2], [1]], [[1.0, None], [0.25]], 0)
    assert batch.input_ids_BT.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.attention_mask_BT.tolist() == [[True, True, True], [True, True, False]]
    assert batch.step_mask_BT.tolist() == [[False, True, True], [False, True, False]]
    assert batch.judged_mask_BT.tolist() == [[False, True, False], [False, True, False]]
    assert batch.labels_BT.tolist() == [[0, 1, 0], [0, 0.25, 0]]


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "encoder", "encoder with a head"])
def test_a_logit_depends_on_what_stands_before_it_and_on_nothing_else(kind: str) -> None:
    is_encoder = kind.startswith("encoder")
    backbone = encoder_backbone(with_head="head" in kind) if is_encoder else tiny_backbone(kind)  # type: ignore[arg-type]
    assert looks_ahead(backbone) == is_encoder
    add_trained_adapter(backbone, "process")
    model = ProcessRewardModel(backbone, "process")
    together = logits_of(model, batch_of(ROWS, ENDS))
    assert together.dtype == torch.float32
    found = [together[row, places].tolist() for row, places in enumerate(ENDS)]
    for ids, places, logits in zip(ROWS, ENDS, found, strict=True):
        for place, logit in zip(places, logits, strict=True):
            # Alone, unpadded and without what follows: also for an encoder, which would look ahead.
            alone = logits_of(model, batch_of([ids[: place + 1]], [[place]]))
            assert logit == pytest.approx(float(alone[0, place]), abs=1e-5)
    assert len({round(logit, 5) for logits in found for logit in logits}) == sum(map(len, ENDS))
    batch = batch_of(ROWS, ENDS)
    assert not together[~batch.step_mask_BT].any()
    left = 0 if is_encoder else 3  # an encoder counts positions from the first column
    wide = StepBatch(
        *(
            torch.nn.functional.pad(tensor, (left, 5), value=7 if tensor.dtype == torch.long else 0)
            for tensor in (batch.input_ids_BT, batch.attention_mask_BT, batch.step_mask_BT)
        ),
        batch.judged_mask_BT,
        batch.labels_BT,
    )
    torch.testing.assert_close(logits_of(model, wide)[:, left:-5], together, atol=1e-5, rtol=0)


def test_a_logit_is_the_head_on_the_models_own_hidden_state() -> None:
    backbone, row = tiny_backbone("gpt2"), torch.tensor([ROWS[0]])
    model = ProcessRewardModel(backbone, None, train="frozen")
    moved(model)
    hidden = backbone.model.transformer(row).last_hidden_state[0, 2]
    expected = float(hidden @ model.head.weight[0] + model.head.bias)
    assert float(logits_of(model, batch_of([ROWS[0]], [[2]]))[0, 2]) == pytest.approx(expected, abs=1e-5)
    assert float(model.head.bias) != 0


def test_an_encoder_costs_a_pass_for_every_step() -> None:
    assert ProcessRewardModel(tiny_backbone(), None, train="frozen").cost(20, 3) == 20
    assert ProcessRewardModel(encoder_backbone(), None, train="frozen").cost(20, 3) == 60


# ---------------------------------------------------------------- what is trained and what is saved


def test_only_what_is_said_trains() -> None:
    lora = ProcessRewardModel(tiny_backbone(), model_config=SMALL)
    assert all(".lora_" in name or name.startswith("head.") for name in lora.trainable_parameters())
    frozen = ProcessRewardModel(tiny_backbone(), None, train="frozen")
    assert list(frozen.trainable_parameters()) == ["head.weight", "head.bias"]
    full = ProcessRewardModel(tiny_backbone(), train="full")
    assert len(full.trainable_parameters()) == 2 + len(list(tiny_backbone().model.parameters()))


@pytest.mark.parametrize("train", ["lora", "full", "frozen"])
def test_V9_logits_survive_saving(base: Path, tmp_path: Path, train: str) -> None:
    adapter = None if train == "frozen" else "process"
    model = ProcessRewardModel(load_base(base, train), adapter, "<end>", train, SMALL)  # type: ignore[arg-type]
    moved(model)
    model.save(tmp_path)
    expected = logits_of(model, batch_of(ROWS, ENDS))
    alone = ProcessRewardModel.load(tmp_path)
    assert alone.separator == "<end>"
    assert torch.equal(logits_of(alone, batch_of(ROWS, ENDS)), expected)
    assert not any(parameter.requires_grad for parameter in alone.parameters())


def test_it_lies_beside_policy_and_reward_on_one_base(base: Path, tmp_path: Path) -> None:
    trained = ProcessRewardModel(load_base(base), model_config=SMALL)
    moved(trained)
    trained.save(tmp_path / "process")
    RewardModel(load_base(base), model_config=SMALL).save(tmp_path / "reward")
    shared = load_base(base)
    add_trained_adapter(shared, "policy", seed=5)
    before = shared.hidden(torch.tensor([ROWS[0]]), adapter="policy")
    model = ProcessRewardModel.load(tmp_path / "process", shared, "process")
    load_reward_model(str(tmp_path / "reward"), shared)
    assert model.backbone is shared and sorted(shared.adapter_names) == ["policy", "process", "reward"]
    assert torch.equal(logits_of(model, batch_of(ROWS, ENDS)), logits_of(trained, batch_of(ROWS, ENDS)))
    assert torch.equal(shared.hidden(torch.tensor([ROWS[0]]), adapter="policy"), before)


def test_C6_one_kind_of_reward_model_is_not_taken_for_the_other(base: Path, tmp_path: Path) -> None:
    ProcessRewardModel(load_base(base), model_config=SMALL).save(tmp_path / "process")
    RewardModel(load_base(base), model_config=SMALL).save(tmp_path / "reward")
    config = json.loads((tmp_path / "process" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("TOKEN_CLS", ["score"])
    with pytest.raises(UserError, match="holds a process reward model, but a reward model is needed"):
        load_reward_model(str(tmp_path / "process"))
    with pytest.raises(UserError, match=r"holds a reward model, but a process reward model.*rlhf prm"):
        ProcessRewardModel.load(tmp_path / "reward")
    with pytest.raises(UserError, match="holds no process reward model"):
        ProcessRewardModel.load(base)
    (tmp_path / "process" / "reward_head.safetensors").unlink()
    with pytest.raises(UserError, match="those of a random head"):
        ProcessRewardModel.load(tmp_path / "process")


# ---------------------------------------------------------------- answers by steps


@pytest.fixture(scope="module")
def scored() -> ProcessRewardModel:
    backbone = tiny_backbone()
    add_trained_adapter(backbone, "process")
    model = ProcessRewardModel(backbone, "process", separator="is")
    moved(model.head)
    return model


def test_an_answer_is_scored_step_by_step_and_joined(scored: ProcessRewardModel) -> None:
    prompts, answers = ["red", "blue cat", "dog"], ["one\nbig two", "four", "  "]
    ids = [scored.tokenizer(text)["input_ids"] for text in ("red one is big two is", "blue cat four is")]
    by_hand = [
        logits_of(scored, batch_of([ids[0]], [[2, 5]]))[0, [2, 5]],
        logits_of(scored, batch_of([ids[1]], [[3]]))[0, [3]],
    ]
    reward = ProcessReward(scored, "product")
    logits = reward.step_logits(prompts, answers)
    torch.testing.assert_close(logits[0], by_hand[0])
    torch.testing.assert_close(logits[1], by_hand[1])
    assert logits[2].tolist() == []
    expected = [float(one.sigmoid().prod()) for one in by_hand]
    assert reward(prompts, answers, finished=[True, False, True]) == pytest.approx([*expected, 0.0])
    assert ProcessReward(scored, "last")(prompts, answers)[0] == pytest.approx(float(by_hand[0][1].sigmoid()))
    with pytest.raises(UserError, match="no aggregation 'mean'"):
        ProcessReward(scored, "mean")


def test_scores_do_not_depend_on_the_size_of_passes(scored: ProcessRewardModel) -> None:
    whole = score_steps(scored, ROWS, ENDS, 1000)
    for max_tokens in (1, 12):
        for one, other in zip(whole, score_steps(scored, ROWS, ENDS, max_tokens), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert product(whole[0].unsqueeze(0), torch.ones(1, 2, dtype=torch.bool)).shape == (1,)


def test_a_separator_without_tokens_is_refused() -> None:
    model = ProcessRewardModel(tiny_backbone(), None, separator="\n", train="frozen")
    with pytest.raises(UserError, match=r"makes no token of the separator .* set data.separator"):
        ProcessReward(model)(["red"], ["one"])
