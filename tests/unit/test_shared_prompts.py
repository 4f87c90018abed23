"""Answers to one prompt in a rollout: it is read once, and nothing else changes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_backbones import Family, add_trained_adapter, tiny_backbone
from torch import Tensor

from rlhf.data.collate import pad_left
from rlhf.models.decoding import GenerationConfig
from rlhf.models.lora import get_lora_parameters
from rlhf.models.policy import Policy, ResponseStatistics
from rlhf.models.reference import Reference
from rlhf.models.response_rows import ResponseRows
from rlhf.models.value_head import ValueHead
from rlhf.rollout.passes import passes
from rlhf.rollout.sampler import Sampler
from rlhf.rollout.trajectory import Trajectory

FAMILIES: list[Family] = ["gpt2", "llama", "qwen2"]
LONG, SHORT = [*range(3, 23)], [7, 8, 9, 10, 11, 12]
PROMPTS = [LONG, LONG, LONG, SHORT, SHORT, [13, 14]]
ANSWERS = [[5], [6, 7, 8, 9], [10, 11], [12, 13, 14], [5, 6], [21, 22, 23]]
TREES = [[0, 1, 2], [3, 4], [5]]


def rollout(prompts: Sequence[Sequence[int]] = PROMPTS, answers: Sequence[Sequence[int]] = ANSWERS) -> Trajectory:
    batch, longest = pad_left([list(prompt) for prompt in prompts], 0), max(map(len, answers))
    ids_BR = torch.tensor([[*answer, *[0] * (longest - len(answer))] for answer in answers])
    mask_BR = torch.arange(longest) < torch.tensor([[len(answer)] for answer in answers])
    nothing_BR, ended_B = torch.zeros(ids_BR.shape), torch.ones(len(answers), dtype=torch.bool)
    return Trajectory(
        batch.input_ids_BP, batch.attention_mask_BP, ids_BR, mask_BR, nothing_BR, nothing_BR, None, ended_B, 0.7
    )


def make_policy(family: Family) -> Policy:
    backbone = tiny_backbone(family)
    add_trained_adapter(backbone, "policy", seed=3)
    backbone.train_only(["policy"])
    torch.manual_seed(0)
    head = ValueHead(backbone.width)
    torch.nn.init.normal_(head.last.weight)
    return Policy(backbone, "policy", head)


def asked(trajectory: Trajectory) -> tuple[Any, ...]:
    masks = trajectory.attention_mask_BT, trajectory.response_mask_BR
    return trajectory.input_ids_BT, *masks, trajectory.temperature, trajectory.trees


def statistics(policy: Policy, trajectory: Trajectory) -> ResponseStatistics:
    return policy.response_statistics(*asked(trajectory))


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_and_gradients_are_those_of_rows_alone(family: Family) -> None:
    policy, whole = make_policy(family), rollout().of_pass(TREES)
    assert policy.backbone.takes_forests
    together = statistics(policy, whole)
    parameters = list(policy.trainable_parameters().values())
    weights_BR = torch.randn(whole.response_mask_BR.shape, generator=torch.Generator().manual_seed(1))

    def objective(found: ResponseStatistics, weights: Tensor) -> Tensor:
        assert found.values_BR is not None
        return ((found.logprobs_BR + 2 * found.values_BR + 3 * found.entropy_BR) * weights).sum()

    total = torch.zeros(())
    for row in range(len(whole)):
        one = whole.select(torch.tensor([row]))
        alone, width = statistics(policy, one), one.response_ids_BR.shape[1]
        for name in ("logprobs_BR", "entropy_BR", "values_BR"):
            found = getattr(together, name)[row]
            torch.testing.assert_close(found[:width], getattr(alone, name)[0], atol=1e-4, rtol=1e-4)
            assert not found[width:].any()
        total = total + objective(alone, weights_BR[row, :width])
    mine = torch.autograd.grad(objective(together, weights_BR), parameters)
    for one, other in zip(mine, torch.autograd.grad(total, parameters), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_the_reference_and_a_critic_of_its_own_read_them_so_too() -> None:
    policy, whole = make_policy("gpt2"), rollout()
    add_trained_adapter(policy.backbone, "value", seed=5)
    own = Policy(policy.backbone, "policy", policy.value_head, "value")
    reference, shared = Reference(policy.backbone, "value"), whole.of_pass(TREES)
    with torch.no_grad():
        expected = statistics(own, whole)  # every row alone
        read = policy.backbone.num_tokens_read
        found = statistics(own, shared)
        assert policy.backbone.num_tokens_read - read == 2 * (29 + 12 + 5)  # two passes
    assert found.values_BR is not None and expected.values_BR is not None
    torch.testing.assert_close(found.values_BR, expected.values_BR, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.logprobs_BR, expected.logprobs_BR, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        reference.logprobs(*asked(shared)), reference.logprobs(*asked(whole)), atol=1e-5, rtol=1e-4
    )


def test_recomputed_blocks_give_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        policy = make_policy("qwen2")
        if recompute:
            policy.backbone.recompute_in_backward()
        found = statistics(policy, rollout().of_pass(TREES))
        gradients.append(
            torch.autograd.grad(found.logprobs_BR.sum(), get_lora_parameters(policy.backbone.model, "policy"))
        )
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_an_answer_may_be_empty() -> None:
    policy, answers = make_policy("gpt2"), [[], *ANSWERS[1:]]
    alone, together = rollout(answers=answers), rollout(answers=answers).of_pass(TREES)
    with torch.no_grad():
        wanted, found = statistics(policy, alone), statistics(policy, together)
    torch.testing.assert_close(found.logprobs_BR, wanted.logprobs_BR, atol=1e-5, rtol=1e-4)
    assert not found.logprobs_BR[0].any()


def test_what_goes_through_the_model_is_counted() -> None:
    policy = make_policy("gpt2")
    through, read = policy.backbone.num_tokens_through, policy.backbone.num_tokens_read
    statistics(policy, rollout().of_pass(TREES))
    # A branch begins with the prompt's last token once more: 19 + (2 + 5 + 3), 5 + (4 + 3), 1 + 4 tokens.
    assert policy.backbone.num_tokens_read - read == 29 + 12 + 5
    assert policy.backbone.num_tokens_through - through == 3 * 29
    read = policy.backbone.num_tokens_read
    statistics(policy, rollout())
    assert policy.backbone.num_tokens_read - read == sum(map(len, PROMPTS + ANSWERS))


def test_choosing_rows_forgets_what_they_shared() -> None:
    shared = rollout().of_pass([[3, 4], [0]])
    assert shared.trees == (2, 1) and shared.prompts() == [SHORT, SHORT, LONG]
    assert shared.select(torch.tensor([0, 2])).trees == ()


def test_passes_keep_equal_prompts_together() -> None:
    backbone = make_policy("gpt2").backbone
    order = [3, 0, 5, 1, 4, 2]
    whole = rollout([PROMPTS[i] for i in order], [ANSWERS[i] for i in order])
    (together,) = passes(whole, backbone, 1000)
    assert sorted(map(sorted, together)) == [[0, 4], [1, 3, 5], [2]]
    assert all(len(tree) == 1 for together in passes(whole, backbone, 1000, share_prompts=False) for tree in together)


@pytest.mark.parametrize("seed", range(5))
def test_passes_hold_every_row_once_within_the_limit(seed: int) -> None:
    backbone, numbers = make_policy("gpt2").backbone, random.Random(seed)
    known = [[3 + number] * numbers.randint(1, 20) for number in range(4)]
    prompts = [numbers.choice(known) for _ in range(20)]
    whole = rollout(prompts, [[30] * numbers.choice([1, 2, 3, 15]) for _ in prompts])
    longest = int(whole.attention_mask_BT.sum(dim=1).max())
    for limit in (5, longest, longest + 3, 50, 100):
        found = passes(whole, backbone, limit)
        assert sorted(row for together in found for tree in together for row in tree) == list(range(20))
        for together in found:
            assert all(prompts[row] == prompts[tree[0]] for tree in together for row in tree)
            shared = whole.of_pass(together)
            rows = ResponseRows.of(backbone, *asked(shared)[:3], shared.trees)
            is_alone = sum(map(len, together)) == 1
            assert rows.input_ids_BT.numel() <= limit or is_alone


def test_rows_stay_alone_where_prompts_differ_or_the_model_takes_no_forests() -> None:
    backbone = make_policy("gpt2").backbone
    different = rollout([LONG, SHORT, [13, 14]], [[5], [6, 7, 8, 9], [10, 11]])
    assert sorted(passes(different, backbone, 1000)[0]) == [[0], [1], [2]]
    assert "takes_forests" not in vars(backbone)  # not even asked for, which costs a forward
    # Equal but for padding that an attention mask alone tells from a token: not the same prompt.
    padded = rollout([[0, 5, 6], [5, 6]], [[7], [8]])
    assert torch.equal(padded.prompt_ids_BP[0], padded.prompt_ids_BP[1])
    assert sorted(passes(padded, backbone, 1000)[0]) == [[0], [1]]
    backbone.__dict__["takes_forests"] = False
    assert all(len(tree) == 1 for tree in passes(rollout(), backbone, 1000)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_reads_a_prompt_once_for_all_its_answers(family: Family) -> None:
    policy = make_policy(family)
    config = GenerationConfig(max_new_tokens=6)
    whole = Sampler(policy, config, stop_token_ids=[]).sample(PROMPTS, seed=4)
    # Three prompts in 20 columns, then five steps of six rows: the last token of an answer is never fed back.
    assert whole.num_through == 3 * 20 + 5 * 6
    assert whole.num_padding == (20 - len(SHORT)) + (20 - 2)
    # One row at a time, where there is nothing to share; the same random numbers.
    alone = Sampler(policy, config.model_copy(update={"batch_size": 1}), stop_token_ids=[]).sample(PROMPTS, seed=4)
    assert whole.responses() == alone.responses()
    torch.testing.assert_close(whole.logprobs_BR, alone.logprobs_BR, atol=1e-5, rtol=0)
    assert whole.values_BR is not None
    torch.testing.assert_close(whole.values_BR, alone.values_BR, atol=1e-5, rtol=1e-5)
