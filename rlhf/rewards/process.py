"""A process reward model as a reward: every step of an answer is scored, and the steps make one score or many rewards.

Legend: S steps of an answer; B sequences, R response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from rlhf.algo.process_loss import AGGREGATIONS, STEP_REWARDS
from rlhf.data.chat import ChatEncoder
from rlhf.data.collate import batches_by_tokens, step_batch
from rlhf.data.rows import Prompt
from rlhf.data.step_dataset import encode_solutions
from rlhf.data.step_splitter import LINES, Decode, StepSplitter, tokens_until, tokens_within
from rlhf.infra.config import Config
from rlhf.infra.errors import UserError
from rlhf.models.process_reward_model import ProcessRewardModel
from rlhf.rewards.learned import SCORING_TOKENS
from rlhf.rewards.protocol import RewardFunction, StepValue, StepwiseReward
from rlhf.rollout.trajectory import Trajectory


class ProcessTermConfig(Config):
    """`arguments` of the reward `process`."""

    aggregation: Literal["min", "product", "last"] = Field(
        "min", description="the score of an answer: its most doubted step, the product over steps, or the last step"
    )
    split: str = Field(LINES, description="regular expression of what stands between two steps of an answer")
    per_step: Literal["probability", "log_probability", "change"] | None = Field(
        None, description="pay every step where it ends, this much, instead of one score per answer (PPO and GRPO)"
    )

    @model_validator(mode="after")
    def _one_way_to_pay(self) -> ProcessTermConfig:
        if self.per_step and "aggregation" in self.model_fields_set:
            raise ValueError("aggregation has no effect here because per_step pays every step")
        return self


@dataclass(frozen=True)
class StepRewards:
    """What is paid on the way (B, R), and where steps end: a step may be worth 0."""

    rewards_BR: Tensor
    ends_BR: Tensor


class ProcessReward:
    """Scores answers with a frozen process reward model, through text: its own tokenizer, template and separator.

    As a reward function it gives the aggregated probability of each answer, in [0, 1]; an answer without a step has 0.
    """

    def __init__(
        self,
        model: ProcessRewardModel,
        aggregation: str = "min",
        split: str = LINES,
        system_prompt: str | None = None,
        max_batch_tokens: int = SCORING_TOKENS,
    ) -> None:
        if aggregation not in AGGREGATIONS:
            raise UserError(f"no aggregation '{aggregation}' of steps; choose from {', '.join(AGGREGATIONS)}")
        self.model, self.aggregate, self.max_batch_tokens = model, AGGREGATIONS[aggregation], max_batch_tokens
        self.splitter = StepSplitter(split)
        self.encoder = ChatEncoder(model.tokenizer, system_prompt)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        return [aggregated_score(logits_S, self.aggregate) for logits_S in self.step_logits(prompts, completions)]

    def step_logits(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Tensor]:
        """Logits (S,) of every answer's steps, empty where it has none."""
        solutions = [self.splitter.steps(text) for text in completions]
        encoded = encode_solutions(self.encoder, prompts, solutions, self.model.separator)
        rows, ends = [], []
        for prompt_ids, steps in encoded:
            ids, places = list(prompt_ids), []
            for step in steps:
                ids += step
                places.append(len(ids) - 1)
            rows.append(ids)
            ends.append(places)
        return score_steps(self.model, rows, ends, self.max_batch_tokens)


class ProcessStepRewards(StepwiseReward):
    """Every step of an answer with what it is worth by a process reward model."""

    def __init__(self, process: ProcessReward, worth: str) -> None:
        """`worth` names one of `rlhf.algo.process_loss.STEP_REWARDS`."""
        self.process, self.worth = process, STEP_REWARDS[worth]

    def by_step(
        self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[list[StepValue]]:
        """See `StepwiseReward`."""
        spans = [self.process.splitter.spans(text) for text in completions]
        logits = self.process.step_logits(prompts, completions)
        return [
            [(end, value) for (_, end), value in zip(some, self.worth(logits_S).tolist(), strict=True)]
            for some, logits_S in zip(spans, logits, strict=True)
        ]


def process_term_config(arguments: dict[str, Any]) -> ProcessTermConfig:
    """The arguments of a reward `process`, checked; raises UserError."""
    try:
        return ProcessTermConfig(**arguments)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{name}: " for name in first["loc"])
        raise UserError(
            f"reward 'process' does not take {arguments}: {place}{first['msg']}; it takes "
            f"{', '.join(ProcessTermConfig.model_fields)}"
        ) from error


def process_reward(
    model: ProcessRewardModel, arguments: dict[str, Any], system_prompt: str | None = None
) -> RewardFunction | StepwiseReward:
    """The reward `process` with these arguments (`ProcessTermConfig`)."""
    config = process_term_config(arguments)
    process = ProcessReward(model, config.aggregation, config.split, system_prompt)
    return process if config.per_step is None else ProcessStepRewards(process, config.per_step)


def step_rewards(by_step: Sequence[Sequence[StepValue]], trajectory: Trajectory, decode: Decode) -> StepRewards:
    """Put what steps are worth on the last token of each; `decode` is that by which the answers were read as text.

    Tokens that write nothing belong to the step before them: that which ends an answer is paid for its last step.
    """
    rewards_BR = torch.zeros_like(trajectory.logprobs_BR)
    ends_BR = torch.zeros_like(trajectory.response_mask_BR)
    for row, (ids, steps) in enumerate(zip(trajectory.responses(), by_step, strict=True)):
        for end, value in steps:
            place = max(tokens_until(decode, ids, end), tokens_within(decode, ids, end)) - 1
            rewards_BR[row, place] += value
            ends_BR[row, place] = True
    return StepRewards(rewards_BR, ends_BR)


@torch.no_grad()
def score_steps(
    model: ProcessRewardModel, input_ids: Sequence[Sequence[int]], ends: Sequence[Sequence[int]], max_tokens: int
) -> list[Tensor]:
    """Logits (S,) at the places `ends` of every row, in passes of at most `max_tokens`, in the order given."""
    logits = [torch.zeros(0)] * len(input_ids)
    rows = [row for row, places in enumerate(ends) if places]
    costs = [model.cost(len(input_ids[row]), len(ends[row])) for row in rows]
    for group in batches_by_tokens(costs, max_tokens):
        chosen = [rows[i] for i in group]
        places = [ends[row] for row in chosen]
        labels = [[None] * len(some) for some in places]
        batch = step_batch([input_ids[row] for row in chosen], places, labels, model.tokenizer.pad_token_id)
        batch = batch.to(model.backbone.device)
        scored_BT = model(batch.input_ids_BT, batch.attention_mask_BT, batch.step_mask_BT).cpu()
        for row, scored_T, some in zip(chosen, scored_BT, places, strict=True):
            logits[row] = scored_T[list(some)]
    return logits


def aggregated_score(logits_S: Tensor, aggregate: Any) -> float:
    """One number of the logits of an answer's steps; 0 where it has none."""
    if not len(logits_S):
        return 0.0
    return float(aggregate(logits_S.unsqueeze(0), torch.ones(1, len(logits_S), dtype=torch.bool)))
