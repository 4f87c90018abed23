"""Answers that share a row with their prompt: the same numbers as in rows of their own."""

from __future__ import annotations

import pytest
import torch
from tiny_backbones import Family, add_trained_adapter, tiny_backbone
from torch import Tensor
from transformers import BertConfig, BertModel, MistralConfig, MistralForCausalLM

from rlhf.data.forest import PADDING, SCORE_PRICE, plant, split_evenly, trees_per_prompt
from rlhf.infra.shadow import Ledger
from rlhf.models import attention
from rlhf.models.attention import prefer_short_rows
from rlhf.models.backbone import Backbone
from rlhf.models.lora import get_lora_parameters
from rlhf.models.policy import forest_logprobs, masked_logprobs
from rlhf.models.reward_model import RewardModel

FAMILIES: list[Family] = ["gpt2", "llama", "qwen2"]
PROMPTS = [[5], [6, 7, 8, 9], [10, 11]]
ANSWERS = [[[12, 13], [14]], [[15], [16, 17, 18]], [[19, 20], [21, 22]]]


def test_a_row_spelt_out() -> None:
    forest = plant([[5, 6]], [[[7, 8], [9]]], pad_token_id=0, suffix_ids=[3])
    assert forest.input_ids_BT.tolist() == [[5, 6, 7, 8, 3, 6, 9, 3]]
    assert forest.position_ids_BT.tolist() == [[0, 1, 2, 3, 4, 1, 2, 3]]
    assert forest.branch_BT.tolist() == [[0, 1, 1, 1, 1, 2, 2, 2]]
    assert forest.loss_mask_BT.int().tolist() == [[0, 0, 1, 1, 0, 0, 1, 0]]
    assert forest.branch_ends().int().tolist() == [[0, 0, 0, 0, 1, 0, 0, 1]]
    seen = (forest.attention_mask(torch.float32) == 0).int()[0, 0].tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],
        [1, 0, 0, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 0, 1, 1, 1],
    ]


def test_padding_belongs_to_no_branch_and_sees_itself() -> None:
    forest = plant(PROMPTS, ANSWERS, pad_token_id=0)
    padded = forest.branch_BT == PADDING
    assert bool(padded.any()) and not bool((forest.loss_mask_BT & padded).any())
    assert bool((forest.attention_mask(torch.float32) == 0).any(dim=-1).all())
    assert int(forest.branch_ends().sum()) == 6


def test_rows_may_have_other_numbers_of_answers() -> None:
    forest = plant([[5], [6, 4]], [[[7], [8, 9], [3]], [[2, 1]]], pad_token_id=0)
    assert forest.input_ids_BT.tolist() == [[5, 7, 5, 8, 9, 5, 3], [6, 4, 2, 1, 0, 0, 0]]
    assert forest.branch_BT.tolist() == [[1, 1, 2, 2, 2, 3, 3], [0, 1, 1, 1, PADDING, PADDING, PADDING]]
    assert forest.num_branches == 3
    assert forest.branch_sums(torch.ones(2, 7)).tolist() == [2, 3, 3, 0, 2, 0]  # 0 where a row has no such branch


def test_parts_of_rows_differ_by_one_at_most() -> None:
    assert split_evenly([3, 1, 4, 1, 5, 9, 2], 3) == [[3, 1, 4], [1, 5], [9, 2]]
    assert split_evenly([3, 1], 2) == [[3], [1]]
    assert split_evenly([3, 1], 1) == [[3, 1]]


@pytest.mark.parametrize(
    ("num_prompt", "num_answer", "num_answers", "wanted"),
    [
        (500, 10, 8, 1),  # nearly all is prompt
        (2, 500, 8, 8),  # nothing to share, and long answers that would be scored against each other
        (64, 48, 1, 1),
    ],
)
def test_how_many_rows_answers_are_read_in(num_prompt: int, num_answer: int, num_answers: int, wanted: int) -> None:
    assert trees_per_prompt(num_prompt, num_answer, num_answers, 384) == wanted


def test_the_number_of_rows_is_the_cheapest_by_count() -> None:
    """Multiply-adds of a block counted one after another: 12 D^2 per token, and D per query, key and product of two."""
    width, num_prompt, num_answer, num_answers = 64, 40, 30, 6

    def counted(num_rows: int) -> int:
        total = 0
        for _ in range(num_rows):
            length = num_prompt - 1 + num_answers // num_rows * (1 + num_answer)
            dense = sum(12 * width * width for _ in range(length))
            scores = sum(2 * width for _ in range(length) for _ in range(length))
            total += dense + SCORE_PRICE * scores
        return total

    divisors = (1, 2, 3, 6)
    cheapest = min(divisors, key=counted)
    assert trees_per_prompt(num_prompt, num_answer, num_answers, width) == cheapest == 3


def alone(backbone: Backbone, adapter: str) -> Tensor:
    """Summed log-probs (K * B,) of every answer in a row of its own."""
    sums = []
    for k in range(2):
        for prompt, answers in zip(PROMPTS, ANSWERS, strict=True):
            ids = torch.tensor([[*prompt, *answers[k]]])
            actions = torch.arange(ids.shape[1])[None] >= len(prompt)
            sums.append(masked_logprobs(backbone, adapter, ids, torch.ones_like(actions), actions).sum())
    return torch.stack(sums)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_gradients_are_those_of_rows_of_their_own(family: Family) -> None:
    backbone = tiny_backbone(family)
    add_trained_adapter(backbone, "policy", seed=3)
    backbone.train_only(["policy"])
    assert backbone.takes_forests
    forest = plant(PROMPTS, ANSWERS, pad_token_id=0)
    together = forest.branch_sums(forest_logprobs(backbone, "policy", forest))
    expected = alone(backbone, "policy")
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-4)
    weights = torch.arange(1.0, 7.0)
    parameters = get_lora_parameters(backbone.model, "policy")
    for one, other in zip(
        torch.autograd.grad((together * weights).sum(), parameters),
        torch.autograd.grad((expected * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("suffix", ["", "good dog"])
def test_reward_scores_are_those_of_rows_of_their_own(family: Family, suffix: str) -> None:
    model = RewardModel(tiny_backbone(family), "reward", suffix=suffix)
    assert model.takes_forests
    together = model.answer_scores(plant(PROMPTS, ANSWERS, 0, model.suffix_ids))
    rows = [torch.tensor([[*p, *a[k]]]) for k in range(2) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    expected = torch.cat([model(row) for row in rows])
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-4)


def test_models_that_look_both_ways_through_a_window_or_at_the_mean_keep_rows_of_their_own() -> None:
    tokenizer = tiny_backbone("gpt2").tokenizer
    shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = BertModel(BertConfig(**shape, intermediate_size=16))
    assert not Backbone(encoder, tokenizer, "encoder").takes_forests
    for window, takes in ((2, False), (64, False), (None, True)):  # a trial of a few tokens sees no wide window
        config = MistralConfig(**shape, intermediate_size=16, num_key_value_heads=2, sliding_window=window)
        assert Backbone(MistralForCausalLM(config), tokenizer, "window").takes_forests == takes
    assert not RewardModel(tiny_backbone("gpt2"), "reward", "mean").takes_forests


def test_long_rows_are_attended_by_the_fused_kernel_with_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("llama")
    prefer_short_rows(backbone.model)
    forest = plant([[5] * 30], [[[6] * 40, [7] * 50]], pad_token_id=0)
    wanted = forest.loss_mask_BT
    made: list[tuple[int, ...]] = []
    ledger = Ledger(lambda tensor: made.append(tuple(tensor.shape)) or "any")

    def hidden() -> Tensor:
        made.clear()
        with torch.no_grad(), ledger:
            return backbone.hidden_of(forest, adapter=None, wanted_BT=wanted)[wanted]

    width = forest.input_ids_BT.shape[1]
    scores = (1, 2, width, width)  # of two heads
    written_out = hidden()
    assert scores in made
    monkeypatch.setattr(attention, "MAX_SHORT", width - 1)
    fused = hidden()
    assert scores not in made
    torch.testing.assert_close(fused, written_out)
