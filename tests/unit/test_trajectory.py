"""What was sampled: rows and columns of a trajectory, the random numbers behind it, and answers kept on disk."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_backbones import add_trained_adapter, random_prompts, tiny_backbone

from rlhf.infra.errors import UserError
from rlhf.models.decoding import GenerationConfig
from rlhf.models.policy import Policy
from rlhf.rollout.cache import CachedAnswer, ResponseCache, answers_of, weights_hash
from rlhf.rollout.sampler import Sampler, row_uniforms
from rlhf.rollout.trajectory import Experience, Trajectory, concatenate


def small(finished: tuple[bool, ...] = (True, False, True)) -> Trajectory:
    """Prompts of 2, 1 and 3 tokens, answers of 3, 4 and 1; pad is 0."""
    prompts = torch.tensor([[0, 5, 6], [0, 0, 7], [8, 9, 10]])
    answers = torch.tensor([[11, 12, 1, 0], [13, 14, 15, 16], [1, 0, 0, 0]])
    mask = answers > 0
    return Trajectory(
        prompt_ids_BP=prompts,
        prompt_mask_BP=prompts > 0,
        response_ids_BR=answers,
        response_mask_BR=mask,
        logprobs_BR=-0.1 * answers,
        entropy_BR=0.5 * mask,
        values_BR=2.0 * answers,
        finished_B=torch.tensor(finished),
        temperature=0.7,
        weights_version=3,
    )


def test_columns_of_a_trajectory() -> None:
    trajectory = small()
    assert len(trajectory) == 3
    assert trajectory.input_ids_BT[0].tolist() == [0, 5, 6, 11, 12, 1, 0]
    assert trajectory.attention_mask_BT[0].tolist() == [False, True, True, True, True, True, False]
    assert trajectory.lengths_B.tolist() == [3, 4, 1]
    assert trajectory.prompts() == [[5, 6], [7], [8, 9, 10]]
    assert trajectory.responses() == [[11, 12, 1], [13, 14, 15, 16], [1]]


def test_V1_scores_are_paid_on_the_last_token_and_only_finished_answers_are_done() -> None:
    no = [False] * 4
    last = [[False, False, True, False], [False, False, False, True], [True, False, False, False]]
    assert small().last_token_BR.tolist() == last
    assert small().dones_BR.tolist() == [last[0], no, last[2]]


def test_select_takes_rows_and_leaves_common_padding_behind() -> None:
    part = small().select(torch.tensor([2, 0]))
    assert part.prompts() == [[8, 9, 10], [5, 6]]
    assert part.responses() == [[1], [11, 12, 1]]
    assert part.response_ids_BR.shape == (2, 3)
    alone = small().select(torch.tensor([1]))
    assert alone.input_ids_BT.tolist() == [[7, 13, 14, 15, 16]]
    assert alone.finished_B.tolist() == [False]
    assert alone.values_BR is not None and alone.values_BR.tolist() == [[26.0, 28.0, 30.0, 32.0]]
    assert (alone.temperature, alone.weights_version) == (0.7, 3)


def test_select_of_an_experience_narrows_every_column_alike() -> None:
    trajectory, grid = small(), torch.arange(12.0).view(3, 4)
    experience = Experience(
        trajectory,
        reference_logprobs_BR=grid,
        rewards_BR=grid + 100,
        values_BR=grid + 200,
        advantages_BR=grid + 300,
        returns_BR=grid + 400,
        scores_B=torch.arange(3.0),
        kl_B=torch.arange(3.0) + 10,
    )
    part = experience.select(torch.tensor([2, 0]))
    assert len(part) == 2
    for offset, column in (
        (0, part.reference_logprobs_BR),
        (100, part.rewards_BR),
        (200, part.values_BR),
        (300, part.advantages_BR),
        (400, part.returns_BR),
    ):
        assert column is not None
        assert column.tolist() == [[offset + 8, offset + 9, offset + 10], [offset, offset + 1, offset + 2]]
    assert part.scores_B.tolist() == [2, 0] and part.kl_B.tolist() == [12, 10]
    without_critic = replace(experience, values_BR=None, returns_BR=None).select(torch.tensor([2, 0]))
    assert without_critic.values_BR is None and torch.equal(without_critic.advantages_BR, part.advantages_BR)
    assert part.trajectory.responses() == [[1], [11, 12, 1]]


def test_concatenate_pads_to_a_common_width() -> None:
    whole = small()
    parts = [whole.select(torch.tensor([index])) for index in (2, 1, 0)]
    again = concatenate(parts, pad_token_id=0).select(torch.tensor([2, 1, 0]))
    for name in ("prompt_ids_BP", "prompt_mask_BP", "response_ids_BR", "response_mask_BR", "logprobs_BR", "entropy_BR"):
        assert torch.equal(vars(again)[name], vars(whole)[name]), name
    assert again.values_BR is not None and torch.equal(again.values_BR, vars(whole)["values_BR"])
    assert torch.equal(again.finished_B, whole.finished_B)
    assert (again.temperature, again.weights_version) == (0.7, 3)


def test_concatenate_weighs_the_truncated_mass_by_tokens() -> None:
    long, short = (small().select(torch.tensor([index])) for index in (1, 2))
    both = concatenate([replace(long, truncated_mass=0.1), replace(short, truncated_mass=0.6)], 0)
    assert both.truncated_mass == pytest.approx((4 * 0.1 + 1 * 0.6) / 5)


# ---------------------------------------------------------------- random numbers


def test_random_numbers_belong_to_seed_prompt_and_count() -> None:
    prompts = [[5, 6], [7], [5, 6], [5, 6, 0]]
    rows = row_uniforms(prompts, seed=0, width=50)
    assert np.array_equal(rows, row_uniforms(prompts, 0, 50))
    assert np.array_equal(row_uniforms([[7], [5, 6, 0]], 0, 50), rows[[1, 3]])  # neighbours do not matter
    assert np.array_equal(row_uniforms(prompts, 0, 20), rows[:, :20])  # nor does the width
    everything = np.concatenate([rows, row_uniforms(prompts, 1, 50)])
    assert len(np.unique(everything)) == everything.size  # duplicates and other seeds draw other numbers
    assert ((everything >= 0) & (everything < 1)).all()
    assert abs(everything.mean() - 0.5) < 0.06


def test_duplicates_of_a_prompt_get_different_answers_and_every_run_the_same() -> None:
    sampler = Sampler(Policy(tiny_backbone(), None), GenerationConfig(max_new_tokens=12, temperature=2.0), [1])
    prompts = [[5, 6], [7, 8], [5, 6], [5, 6]]
    first, second, other = (sampler.sample(prompts, seed).responses() for seed in (0, 0, 1))
    assert first == second
    assert len({tuple(first[row]) for row in (0, 2, 3)}) == 3
    assert all(a != b for a, b in zip(first, other, strict=True))


# ---------------------------------------------------------------- answers on disk

CONFIG = GenerationConfig(max_new_tokens=4)
ANSWERS = [
    CachedAnswer([5, 6], [11, 12, 1], True, -2.4, 0.5),
    CachedAnswer([7], [13, 14, 15, 16], False, -5.8, 0.5),
]


def test_answers_of_a_trajectory() -> None:
    first, second, third = answers_of(small())
    assert (first.prompt_ids, first.response_ids, first.finished) == ([5, 6], [11, 12, 1], True)
    assert first.logprob == pytest.approx(-2.4) and first.entropy == pytest.approx(0.5)
    assert (second.finished, third.response_ids) == (False, [1])


def test_cache_round_trip(tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path / "cache", "weights", CONFIG, seed=0)
    assert cache.get([5, 6]) is None
    cache.put(ANSWERS)
    for one in (cache, ResponseCache(tmp_path / "cache", "weights", CONFIG, seed=0)):
        assert [one.get(answer.prompt_ids) for answer in ANSWERS] == ANSWERS
        assert one.get([5]) is None


def test_cache_is_keyed_by_weights_settings_and_seed(tmp_path: Path) -> None:
    ResponseCache(tmp_path, "weights", CONFIG, 0).put(ANSWERS)
    for weights, config, seed in (
        ("other", CONFIG, 0),
        ("weights", CONFIG.model_copy(update={"temperature": 0.5}), 0),
        ("weights", CONFIG.model_copy(update={"stop": ["x"]}), 0),
        ("weights", CONFIG, 1),
    ):
        assert ResponseCache(tmp_path, weights, config, seed).get([7]) is None
    same = CONFIG.model_copy(update={"batch_size": 3})
    assert ResponseCache(tmp_path, "weights", same, 0).get([7]) == ANSWERS[1]


@pytest.mark.parametrize("rest", ['{"prompt_ids": [7], "respo', "{", "12", '{"prompt_ids": [7]}', ""])
def test_a_half_written_last_line_costs_only_itself(tmp_path: Path, rest: str) -> None:
    cache = ResponseCache(tmp_path, "weights", CONFIG, 0)
    cache.put(ANSWERS[:1])
    with cache.path.open("a") as file:
        file.write(rest)
    again = ResponseCache(tmp_path, "weights", CONFIG, 0)
    assert again.get([5, 6]) == ANSWERS[0] and again.get([7]) is None
    again.put(ANSWERS[1:])
    third = ResponseCache(tmp_path, "weights", CONFIG, 0)
    assert [third.get(answer.prompt_ids) for answer in ANSWERS] == ANSWERS


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the response cache .* cannot be written"):
        ResponseCache(tmp_path / "file" / "cache", "weights", CONFIG, 0).put(ANSWERS)


def test_cached_answers_are_those_that_would_be_sampled_again(tmp_path: Path) -> None:
    backbone, prompts = tiny_backbone(), random_prompts(5)
    sampler = Sampler(Policy(backbone, None), CONFIG, [1])
    ResponseCache(tmp_path, weights_hash(backbone, None), CONFIG, 0).put(answers_of(sampler.sample(prompts, 0)))
    cache = ResponseCache(tmp_path, weights_hash(backbone, None), CONFIG, 0)
    fresh = answers_of(sampler.sample(prompts[2:3], 0))[0]
    kept = cache.get(prompts[2])
    assert kept is not None and kept.response_ids == fresh.response_ids
    assert math.isclose(kept.logprob, fresh.logprob, abs_tol=1e-4)


def test_weights_hash_sees_every_weight_of_base_and_adapter() -> None:
    backbone = tiny_backbone()
    bare = weights_hash(backbone, None)
    add_trained_adapter(backbone, "sft")
    sft = weights_hash(backbone, "sft")
    assert weights_hash(backbone, None) == bare != sft
    add_trained_adapter(backbone, "policy", seed=1)
    assert weights_hash(backbone, "sft") == sft != weights_hash(backbone, "policy")
    stronger = tiny_backbone()
    add_trained_adapter(stronger, "sft", lora_alpha=9.0)
    assert weights_hash(stronger, "sft") != sft  # the same matrices, another factor before them
    with torch.no_grad():
        next(iter(backbone.model.parameters()))[0, 0] += 1e-3
    assert weights_hash(backbone, None) != bare and weights_hash(backbone, "sft") != sft
    assert weights_hash(tiny_backbone(), None) == bare
