"""Likelihood of choices: against a loop over plain softmax, for single tokens and longer ones, padded or not."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_gpt2, make_qwen2
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlhf.data.chat import ChatEncoder
from rlhf.eval.suite_items import Item
from rlhf.models.backbone import Backbone
from rlhf.models.choices import choice_logprobs
from rlhf.recipes.ranked import ranked_ids
from rlhf.recipes.stages import LoadedPolicy

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
CHOICES = [[[1], [2], [3]], [[4, 5], [6]], [[7, 8, 9], [10], [11, 12]]]


def by_hand(model: PreTrainedModel, prompt: list[int], choice: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + choice])).logits[0].double()
    total = 0.0
    for place, token in enumerate(choice):
        row = logits[len(prompt) + place - 1]
        total += float(row[token] - torch.log(torch.exp(row - row.max()).sum()) - row.max())
    return total


@pytest.mark.parametrize("make", [make_gpt2, make_qwen2])
@pytest.mark.parametrize("max_tokens", [4, 2048])
def test_equals_a_loop(make: object, max_tokens: int, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make(len(tiny_tokenizer))  # type: ignore[operator]
    backbone = Backbone(model, tiny_tokenizer, "tiny")
    found = choice_logprobs(backbone, None, PROMPTS, CHOICES, max_tokens)
    for prompt, choices, sums in zip(PROMPTS, CHOICES, found, strict=True):
        assert sums == pytest.approx([by_hand(model, prompt, choice) for choice in choices], abs=1e-4)


def test_nothing_to_ask_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    backbone = Backbone(make_qwen2(len(tiny_tokenizer)), tiny_tokenizer, "tiny")
    with pytest.raises(ValueError, match="at least one token"):
        choice_logprobs(backbone, None, [[]], [[[1]]])
    with pytest.raises(ValueError, match="at least one token"):
        choice_logprobs(backbone, None, [[1]], [[[1], []]])


def test_examples_that_do_not_fit_are_left_out(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """The context of the small model is 128 tokens: the first examples go, the question stays."""
    backbone = Backbone(make_qwen2(len(tiny_tokenizer)), tiny_tokenizer, "tiny")
    encoder = ChatEncoder(tiny_tokenizer)
    item = Item(
        "x", prompt="Question?", choices=(" A", " B"), shots=tuple(f"shot {n} {'z' * 40}\n" for n in range(5)),
        spec={"answer": 0, "header": "Header.\n"},
    )  # fmt: skip
    (prompt,), (choices,), (kept,) = ranked_ids([item], LoadedPolicy(backbone, None), encoder)
    assert 0 < kept < 5 and len(prompt) + max(map(len, choices)) <= 128
    text = tiny_tokenizer.decode(prompt)
    assert text.startswith("Header.") and text.endswith("Question?")
    assert "shot 4" in text and "shot 0" not in text
    assert [tiny_tokenizer.decode(ids) for ids in choices] == [" A", " B"]


def test_choices_that_continue_a_conversation_end_it(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    backbone = Backbone(make_qwen2(len(tiny_tokenizer)), tiny_tokenizer, "tiny")
    encoder = ChatEncoder(tiny_tokenizer)
    item = Item("x", ("Pick.",), choices=("one", "two"), spec={"answer": 0, "continues": True})
    (prompt,), (choices,), _ = ranked_ids([item], LoadedPolicy(backbone, None), encoder)
    assert prompt == encoder.prompt_ids([{"role": "user", "content": "Pick."}])
    assert all(ids[-1] == tiny_tokenizer.eos_token_id for ids in choices)
