"""Checklist V: rewards, advantages, values."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from parts import SHAPES, Shape, backbone_of, experience_of, pairs, ppo_on
from torch import nn
from torch.nn.functional import pad

from rlhf.algo.ppo_loss import policy_loss, value_loss
from rlhf.models.reward_model import RewardModel
from rlhf.recipes.ppo import PPO
from rlhf.recipes.reward import RewardConfig, pair_method
from rlhf.rewards.protocol import Scores
from rlhf.rewards.shaping import ShapedScores, token_rewards
from rlhf.rollout.trajectory import Trajectory


def small_ppo(folder: Path, shape: Shape = "qwen2", name: str = "run", **ppo: object) -> PPO:
    """PPO whose critic has an opinion and whose policy has left its reference."""
    found = ppo_on(
        folder,
        backbone_of(shape),
        name,
        ppo={"rollout_batch_size": 12, **ppo},
        kl={"coefficient": 0.3},
        generation={"max_new_tokens": 8, "temperature": 1.8},  # hot enough for answers of many lengths
    )
    assert found.policy.value_head is not None
    nn.init.normal_(found.policy.value_head.last.weight, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for parameter in found.policy.trainable_parameters().values():
            parameter += 0.05
    found.run.finish()
    return found


def widened(trajectory: Trajectory, columns: int) -> Trajectory:
    """The same answers with columns of rubbish behind them."""
    assert trajectory.values_BR is not None
    rubbish = {name: pad(vars(trajectory)[name], (0, columns), value=7.0) for name in ("logprobs_BR", "entropy_BR")}
    return replace(
        trajectory,
        response_ids_BR=pad(trajectory.response_ids_BR, (0, columns), value=9),
        response_mask_BR=pad(trajectory.response_mask_BR, (0, columns), value=False),
        values_BR=pad(trajectory.values_BR, (0, columns), value=7.0),
        **rubbish,
    )


def told(values: list[float]) -> tuple[Scores, ShapedScores]:
    return Scores(values, {}), ShapedScores(torch.tensor(values))


@pytest.mark.parametrize("shape", SHAPES)
def test_V1_the_score_is_paid_on_the_last_token_at_any_width(tmp_path: Path, shape: Shape) -> None:
    ppo = small_ppo(tmp_path, shape)
    trajectory = ppo.sample(ppo.next_prompts())
    assert len(set(trajectory.lengths_B.tolist())) > 1
    scores = torch.arange(1.0, 13.0)
    for part in (trajectory, widened(trajectory, 4)):
        same = token_rewards(part, scores, part.logprobs_BR, 0.3, "k1")  # no KL: nothing but the score is paid
        assert torch.equal(same.sum(dim=1), scores)
        for row, length in enumerate(trajectory.lengths_B.tolist()):
            assert float(same[row, length - 1]) == float(scores[row])


@pytest.mark.parametrize("shape", SHAPES)
def test_V2_padding_enters_neither_advantages_nor_whitening(tmp_path: Path, shape: Shape) -> None:
    ppo = small_ppo(tmp_path, shape, whiten_rewards=True)
    trajectory = ppo.sample(ppo.next_prompts())
    scores, width = [0.1 * row for row in range(12)], trajectory.response_mask_BR.shape[1]
    narrow = ppo.estimate_advantages(trajectory, *told(scores))
    wide = ppo.estimate_advantages(widened(trajectory, 3), *told(scores))
    for name in ("advantages_BR", "returns_BR", "rewards_BR"):
        assert torch.equal(vars(wide)[name][:, :width], vars(narrow)[name]), name
        assert not vars(wide)[name][:, width:].any(), name


@pytest.mark.parametrize("bootstrap", [False, True])
def test_V3_truncated_answers_against_brute_force(tmp_path: Path, bootstrap: bool) -> None:
    """Terminal with a penalty by default; with `bootstrap_truncated` the critic's value of what would come counts."""
    settings = {"gamma": 0.9, "lam": 0.8, "whiten_advantages": False, "bootstrap_truncated": bootstrap}
    ppo = small_ppo(tmp_path, **settings)
    shaping = ppo.config.shaping.model_copy(update={"normalise": False, "clip": None, "missing_eos_penalty": 2.0})
    ppo.rollouts.shaping = shaping
    batch = ppo.next_prompts()
    trajectory = ppo.sample(batch)
    scores = ppo.rollouts.score(batch, trajectory)
    shaped = ppo.rollouts.shape(trajectory, scores, ppo.progress.moments)
    found = ppo.estimate_advantages(trajectory, scores, shaped)
    head, backbone = ppo.policy.value_head, ppo.policy.backbone
    assert head is not None and set(trajectory.finished_B.tolist()) == {True, False}
    for row, (prompt, answer) in enumerate(zip(trajectory.prompts(), trajectory.responses(), strict=True)):
        finished = bool(trajectory.finished_B[row])
        with torch.no_grad():
            hidden = backbone.hidden(torch.tensor([prompt + answer]), adapter="policy")[0]
            values = head(hidden[len(prompt) - 1 :]).tolist()  # the last one is of the state behind the answer
        kl = (trajectory.logprobs_BR - found.reference_logprobs_BR)[row].tolist()
        rewards = [-0.3 * kl[t] for t in range(len(answer))]
        rewards[-1] += scores.total[row] - (0 if finished else 2.0)
        advantage, after = 0.0, values[-1] if bootstrap and not finished else 0.0
        for t in reversed(range(len(answer))):
            advantage = rewards[t] + 0.9 * after - values[t] + 0.72 * advantage
            after = values[t]
            assert float(found.advantages_BR[row, t]) == pytest.approx(advantage, abs=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_V4_advantages_do_not_depend_on_the_micro_batches(tmp_path: Path, shape: Shape) -> None:
    whole = experience_of(small_ppo(tmp_path, shape, "whole", whiten_rewards=True))
    parts = experience_of(small_ppo(tmp_path, shape, "parts", whiten_rewards=True, max_tokens_per_micro_batch=10))
    assert whole.trajectory.responses() == parts.trajectory.responses()
    torch.testing.assert_close(parts.advantages_BR, whole.advantages_BR, atol=1e-4, rtol=0)
    counted = whole.advantages_BR[whole.trajectory.response_mask_BR].double().numpy()
    assert counted.mean() == pytest.approx(0, abs=1e-6)
    assert counted.std(ddof=1) == pytest.approx(1, abs=1e-5)


def test_V6_advantages_are_scaled_by_numpys_deviation(tmp_path: Path) -> None:
    raw, scaled = (small_ppo(tmp_path, name=f"run_{on}", whiten_advantages=on) for on in (False, True))
    trajectory = raw.sample(raw.next_prompts())
    outcome = told([50.0 + 0.1 * row for row in range(12)])
    plain, found = (
        ppo.estimate_advantages(trajectory, *outcome).advantages_BR[trajectory.response_mask_BR].double().numpy()
        for ppo in (raw, scaled)
    )
    np.testing.assert_allclose(found, (plain - plain.mean()) / plain.std(ddof=1), atol=1e-5)
    assert plain.mean() > plain.std()  # a deviation about zero would be another number


@pytest.mark.parametrize("shape", SHAPES)
def test_V10_the_pair_loss_is_its_closed_form_however_it_is_cut(shape: Shape) -> None:
    backbone, examples = backbone_of(shape), pairs(9)
    model = RewardModel(backbone, "sft", train="frozen")
    expected = 0.0
    for example in examples:
        chosen, rejected = (
            float(model(torch.tensor([[*example.prompt_ids, *ids]])).detach())
            for ids in (example.chosen_ids, example.rejected_ids)
        )
        expected += math.log1p(math.exp(-(chosen - rejected - (example.margin or 0.0)))) / 9
    for tokens in (16_384, 60, 1):
        training = {"max_tokens_per_micro_batch": tokens}
        method = pair_method(model, examples, [], RewardConfig.model_validate({"training": training}))
        batches, loss = method.micro_batches(range(9)), method.loss(range(9))
        assert len(batches) == {16_384: 1, 60: len(batches), 1: 9}[tokens]
        outputs = [loss(batch) for batch in batches]
        assert sum(float(output.loss.detach()) for output in outputs) == pytest.approx(expected, abs=1e-5)


def test_V10_the_terms_of_ppo_are_divided_once(tmp_path: Path) -> None:
    ppo = small_ppo(tmp_path, max_tokens_per_micro_batch=12, vf_coef=0.7)
    experience = experience_of(ppo)
    trajectory, mask = experience.trajectory, experience.trajectory.response_mask_BR
    count = int(mask.sum())
    batches, loss = ppo.updates.micro_batches(experience), ppo.loss(experience)
    assert len(batches) > 3
    found = sum(float(loss(batch).loss.detach()) for batch in batches)
    # The policy has not moved: every ratio is 1, so the policy term is minus the mean advantage.
    error = ((experience.values_BR - experience.returns_BR)[mask].double() ** 2).sum() / count
    expected = -float(experience.advantages_BR[mask].double().sum()) / count + 0.7 * 0.5 * float(error)
    assert found == pytest.approx(expected, abs=1e-3)
    zeros = torch.zeros_like(trajectory.logprobs_BR)
    whole = policy_loss(zeros, experience.advantages_BR, mask, count).loss
    critic = value_loss(experience.values_BR, experience.values_BR, experience.returns_BR, mask, count).loss
    assert float(whole + 0.7 * critic) == pytest.approx(expected, abs=1e-4)
