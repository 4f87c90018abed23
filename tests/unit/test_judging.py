"""A reward model as judge: what it reads of a question, and what it cannot read."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_backbones import add_trained_adapter, tiny_backbone

from rlhf.infra.errors import UserError
from rlhf.models.reward_model import RewardModel
from rlhf.recipes.judging import RewardWithinContext
from rlhf.rewards.learned import LearnedReward

ASKED: list[Any] = [[{"role": "user", "content": "the cat"}], "the cat"]
SAID = ["red", "not very big"]


@pytest.fixture(scope="module")
def model() -> RewardModel:
    backbone = tiny_backbone()
    add_trained_adapter(backbone, "reward")
    return RewardModel(backbone, "reward").requires_grad_(False)


def test_a_model_without_chat_template_is_told_what_a_question_looks_like(model: RewardModel) -> None:
    found = RewardWithinContext("rm", model, "a {prompt} is")(ASKED, SAID)
    assert found == pytest.approx(LearnedReward(model)(["a the cat is"] * 2, SAID), abs=1e-6)
    assert found != pytest.approx(LearnedReward(model)(["the cat"] * 2, SAID), abs=1e-3)
    with pytest.raises(UserError, match=r"judge 'rm' has no chat template; .* prompt_template: '\\n\\nHuman: {prompt}"):
        RewardWithinContext("rm", model, None)(ASKED, SAID)
    with pytest.raises(UserError, match="a prompt here is a conversation of 3 turns"):
        RewardWithinContext("rm", model, "{prompt}")([ASKED[0] * 3], ["red"])


def test_what_is_longer_than_the_context_has_no_score(model: RewardModel) -> None:
    limit = model.backbone.model.config.max_position_embeddings
    long = " ".join(["red"] * limit)
    (one, two) = RewardWithinContext("rm", model, None)(["the cat", "the cat"], ["red", long])
    assert one is not None and two is None
