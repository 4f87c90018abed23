"""Checklist T: tokens, masks and positions."""

from __future__ import annotations

import pytest
import torch
from parts import PROMPTS, SHAPES, Shape, backbone_of, pairs, policy_on, sampled
from tiny_backbones import random_prompts, tiny_backbone, tiny_model, word_tokenizer
from tiny_tokenizers import FAMILIES, byte_level, family
from torch import Tensor, nn

from rlhf.data.chat import ChatEncoder, TokenExample
from rlhf.data.collate import pad_left, pad_right, pair_batch
from rlhf.data.data_config import DataConfig, InstructionDataConfig, PromptDataConfig
from rlhf.data.instruction_dataset import InstructionDataset
from rlhf.data.preference_dataset import PreferenceDataset
from rlhf.data.prompt_dataset import PromptDataset
from rlhf.data.rows import InstructionRow, PreferenceRow, PromptRow, TextRow
from rlhf.infra.errors import UserError
from rlhf.models.backbone import Backbone
from rlhf.models.decoding import GenerationConfig, decode
from rlhf.models.lora import LoRAConfig
from rlhf.models.policy import masked_logprobs
from rlhf.models.reward_model import RewardModel
from rlhf.recipes.offline import summed_logprobs
from rlhf.rewards.learned import LearnedReward

USER = [{"role": "user", "content": "What is 2+2?"}]


@pytest.mark.parametrize("shape", SHAPES)
def test_T1_logprobs_do_not_depend_on_the_side_or_width_of_padding(shape: Shape) -> None:
    backbone = backbone_of(shape)
    rows = [row for row in PROMPTS if len(row) > 1]
    left = pad_left(rows, backbone.tokenizer.pad_token_id)
    right = pad_right([TokenExample(row, [True] * len(row)) for row in rows], backbone.tokenizer.pad_token_id)
    wide_ids = torch.nn.functional.pad(left.input_ids_BP, (5, 0), value=9)
    wide_mask = torch.nn.functional.pad(left.attention_mask_BP, (5, 0), value=False)

    def total(ids: Tensor, mask: Tensor) -> Tensor:
        actions = mask & (mask.cumsum(dim=1) > 1)
        return masked_logprobs(backbone, "policy", ids, mask, actions).sum(dim=1)

    with torch.no_grad(), backbone.using("policy"):
        alone = [backbone.model(torch.tensor([row])).logits[0, :-1].log_softmax(-1) for row in rows]
        expected = torch.stack([p[range(len(row) - 1), row[1:]].sum() for p, row in zip(alone, rows, strict=True)])
        for ids, mask in (
            (left.input_ids_BP, left.attention_mask_BP),
            (right.input_ids_BT, right.attention_mask_BT),
            (wide_ids, wide_mask),
        ):
            assert mask is not None
            torch.testing.assert_close(total(ids, mask), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_T2_padding_with_eos_changes_no_result(shape: Shape) -> None:
    own, shared = tiny_backbone(shape), tiny_backbone(shape)
    shared.tokenizer.pad_token = shared.tokenizer.eos_token
    assert (own.tokenizer.pad_token_id, shared.tokenizer.pad_token_id) == (0, 1)
    examples, found = pairs(6), []
    for backbone in (own, shared):
        pad = backbone.tokenizer.pad_token_id
        batch = pair_batch(examples, pad).batch
        trained_ends = (batch.input_ids_BT == backbone.tokenizer.eos_token_id) & batch.loss_mask_BT
        assert trained_ends.sum(dim=1).tolist() == [1] * 12
        torch.manual_seed(0)
        scorer = RewardModel(backbone, None, train="frozen")
        backbone.add_adapter("policy", LoRAConfig(r=4))
        trajectory = sampled(policy_on(backbone))
        with torch.no_grad():
            found.append(
                (
                    batch.loss_mask_BT,
                    summed_logprobs(backbone, None, batch),
                    scorer(batch.input_ids_BT, batch.attention_mask_BT),
                    trajectory.response_mask_BR,
                    trajectory.finished_B,
                    trajectory.logprobs_BR,
                    trajectory.responses(),
                )
            )
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.mark.parametrize("name", FAMILIES)
def test_T3_generation_stops_at_the_last_trained_token(name: str) -> None:
    tokenizer = family(name)
    backbone = Backbone(tiny_model("gpt2", len(tokenizer)), tokenizer, name)
    encoder = ChatEncoder(tokenizer)
    prompt, answer = encoder.prompt_ids(USER), encoder.response_ids(USER, "4.")
    trained = encoder.conversation([*USER, {"role": "assistant", "content": "4."}])
    assert trained.loss_mask[-1] and trained.input_ids[-1] == answer[-1]

    class Parrot(Backbone):
        """Says the trained answer token by token, and then would go on for ever."""

        said = 0

        def logits(self, hidden: Tensor, *, adapter: str | None = None) -> Tensor:
            token = answer[self.said] if self.said < len(answer) else 7
            self.said += 1
            return 50.0 * nn.functional.one_hot(torch.tensor([token]), self.vocab_size).float()

    batch = pad_left([prompt], 0)
    config = GenerationConfig(max_new_tokens=len(answer) + 3)
    found = decode(
        Parrot(backbone.model, tokenizer, name),
        None,
        batch.input_ids_BP,
        batch.attention_mask_BP,
        torch.full((1, len(answer) + 3), 0.5),
        config,
        encoder.stop_token_ids,
    )
    assert found.response_ids_NR[found.response_mask_NR].tolist() == answer
    assert found.finished_N.tolist() == [True]


def test_T5_an_answer_that_was_cut_off_is_scored_without_an_end() -> None:
    backbone = backbone_of("qwen2")
    model = RewardModel(backbone, "sft", train="frozen").requires_grad_(False)
    end, tokenizer = backbone.tokenizer.eos_token_id, backbone.tokenizer
    trajectory = sampled(policy_on(backbone), random_prompts(24, seed=4), max_new_tokens=3, temperature=1.5)
    finished = trajectory.finished_B.tolist()
    assert {True, False} == set(finished)
    assert [answer[-1] == end for answer in trajectory.responses()] == finished
    prompts, answers = trajectory.prompts(), trajectory.responses()
    expected = [float(model(torch.tensor([p + a]))) for p, a in zip(prompts, answers, strict=True)]
    columns = {"prompt_ids": prompts, "completion_ids": answers, "finished": finished}
    texts = tokenizer.batch_decode(prompts), tokenizer.batch_decode(answers, skip_special_tokens=True)
    spoken = [i for i, answer in enumerate(answers) if not {0, 2} & set(answer)]  # padding and unknown are no words
    assert len(spoken) > 12 and {True, False} == {finished[i] for i in spoken}
    for policy_tokenizer in (tokenizer, word_tokenizer(separate_pad=False)):
        reward = LearnedReward(model, policy_tokenizer, standardise=False)
        found = reward(*texts, **columns)
        assert [found[i] for i in spoken] == pytest.approx([expected[i] for i in spoken], abs=1e-5)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_T6_one_beginning_in_every_kind_of_data(adds_bos: bool) -> None:
    template, names, *_ = FAMILIES["llama3"]
    tokenizer = byte_level(names, "<|end|>", "<|begin|>", template, adds_bos=adds_bos)
    bos, encoder = tokenizer.bos_token_id, ChatEncoder(tokenizer)
    keep = DataConfig(min_length=1)
    for prompt, wanted in ((USER, 1), ("What is 2+2?", int(adds_bos)), ("<|begin|>What is 2+2?", 1)):
        (pair,) = PreferenceDataset.from_rows([PreferenceRow(prompt, "4.", "5.")], encoder, keep).examples
        sft_config = InstructionDataConfig(min_length=1)
        (taught,) = InstructionDataset.from_rows([InstructionRow(prompt, "4.")], encoder, sft_config).examples
        (asked,) = PromptDataset.from_rows([PromptRow(prompt)], encoder, PromptDataConfig()).examples
        assert pair.prompt_ids == asked.prompt_ids == taught.input_ids[: len(asked.prompt_ids)]
        for ids in ([*pair.prompt_ids, *pair.chosen_ids], [*pair.prompt_ids, *pair.rejected_ids], taught.input_ids):
            assert ids.count(bos) == wanted and bos not in ids[1:]


def test_T7_sampled_ids_are_never_tokenised_again() -> None:
    """One letter per token, where the tokenizer itself would join them: text does not lead back to what was sampled."""
    tokenizer = byte_level(["<|end|>"], "<|end|>")
    backbone = Backbone(tiny_model("gpt2", len(tokenizer), spread=0.3), tokenizer, "bytes")
    model = RewardModel(backbone, None, train="frozen").requires_grad_(False)
    prompt, answer = tokenizer("The quick")["input_ids"], [tokenizer(c)["input_ids"][0] for c in "answer is"]
    text = tokenizer.decode(answer)
    assert tokenizer(text)["input_ids"] != answer
    reward = LearnedReward(model, tokenizer, standardise=False)
    found = reward(["The quick"], [text], prompt_ids=[prompt], completion_ids=[answer], finished=[False])
    assert found == pytest.approx([float(model(torch.tensor([prompt + answer])))], abs=1e-5)
    again = reward(["The quick"], [text], finished=[False])
    assert abs(again[0] - found[0]) > 1e-3  # the other way round it would have been noticed


def test_T8_a_template_that_hides_the_answer_is_refused() -> None:
    for template in ("{{ messages[0]['content'] }}", "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"):
        with pytest.raises(UserError, match="does not write an assistant's answer as it is"):
            ChatEncoder(byte_level(["<|end|>"], "<|end|>", template=template))


@pytest.mark.parametrize("train_on", ["all", "last", "every_token"])
def test_T8_every_example_trains_something(train_on: str) -> None:
    talk = [*USER, {"role": "assistant", "content": "4."}, {"role": "user", "content": "Sure?"}]
    rows = [
        InstructionRow(talk, "Yes."),
        InstructionRow(USER, "4."),
        InstructionRow("2+2?", "4."),
        TextRow("2+2 is 4."),
    ]
    length = 20 if train_on == "every_token" else 200
    config = InstructionDataConfig.model_validate({"train_on": train_on, "min_length": 1, "max_length": length})
    dataset = InstructionDataset.from_rows(rows, ChatEncoder(family("chatml")), config)
    assert len(dataset) >= 4
    for example in dataset.examples:
        assert pad_right([example], 0).num_loss_tokens >= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_T9_logprobs_equal_a_naive_loop(shape: Shape) -> None:
    backbone = backbone_of(shape)
    row, answer_from = [5, 9, 4, 22, 7, 13, 1], 3
    actions = torch.arange(len(row)) >= answer_from
    with torch.no_grad(), backbone.using("policy"):
        found = masked_logprobs(backbone, "policy", torch.tensor([row]), None, actions.unsqueeze(0))[0]
        logits = backbone.model(torch.tensor([row])).logits[0].tolist()
    for t in range(len(row)):
        expected = 0.0
        if t >= answer_from:
            total = sum(torch.tensor(logits[t - 1], dtype=torch.float64).exp().tolist())
            expected = logits[t - 1][row[t]] - torch.tensor(total, dtype=torch.float64).log().item()
        assert float(found[t]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_T9_a_token_changes_no_logprob_before_it(shape: Shape) -> None:
    backbone, row = backbone_of(shape), [5, 9, 4, 22, 7, 13, 1]
    actions = (torch.arange(len(row)) >= 1).unsqueeze(0)
    before = masked_logprobs(backbone, "policy", torch.tensor([row]), None, actions)[0]
    for t in range(1, len(row)):
        changed = [*row[:t], row[t] + 1, *row[t + 1 :]]
        after = masked_logprobs(backbone, "policy", torch.tensor([changed]), None, actions)[0]
        assert torch.allclose(after[:t], before[:t], atol=1e-6)
        assert (after[t:] - before[t:]).abs().min() > 1e-6


def test_T10_rows_that_are_too_long_are_counted_and_none_is_empty() -> None:
    encoder = ChatEncoder(word_tokenizer())
    long = " ".join(["red"] * 30)
    pair_rows = [PreferenceRow("one", "cat", "dog"), PreferenceRow("two", long, "dog"), PreferenceRow(long, "cat", "a")]
    drop = DataConfig(min_length=1, max_length=12)
    dropped = PreferenceDataset.from_rows(pair_rows, encoder, drop)
    assert (len(dropped), dropped.report.dropped) == (1, {"too_long": 2})
    cut = PreferenceDataset.from_rows(pair_rows, encoder, drop.model_copy(update={"overlong": "truncate_prompt"}))
    assert (len(cut), cut.report.dropped, cut.report.notes) == (2, {"too_long": 1}, {"prompt_shortened": 1})
    taught = InstructionDataset.from_rows(
        [InstructionRow("one", "cat"), InstructionRow("one", long), InstructionRow(long, "cat")],
        encoder,
        InstructionDataConfig(min_length=1, max_length=12, overlong="truncate_prompt"),
    )
    assert (len(taught), taught.report.dropped, taught.report.notes) == (2, {"too_long": 1}, {"prompt_shortened": 1})
    asked = PromptDataset.from_rows(
        [PromptRow("one"), PromptRow(long)], encoder, PromptDataConfig(max_prompt_length=12)
    )
    assert (len(asked), asked.report.dropped) == (1, {"prompt_too_long": 1})
    for report, rows in ((dropped.report, 3), (cut.report, 3), (taught.report, 3), (asked.report, 2)):
        assert report.num_rows == rows == report.num_kept + sum(report.dropped.values())
    end = encoder.stop_token_ids[0]
    for example in [*dropped.examples, *cut.examples]:
        assert example.chosen_ids[-1] == example.rejected_ids[-1] == end
        assert len(example.prompt_ids) + max(len(example.chosen_ids), len(example.rejected_ids)) <= 12
    for example in taught.examples:
        assert example.input_ids[-1] == end and example.loss_mask[-1] and len(example.input_ids) <= 12
