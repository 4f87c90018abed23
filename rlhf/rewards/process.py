"""A process reward model as a reward: every step of an answer is scored, and the steps make one score or many rewards.

Legend: S steps of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.algo.process_loss import AGGREGATIONS
from rlhf.data.chat import ChatEncoder
from rlhf.data.collate import batches_by_tokens, step_batch
from rlhf.data.rows import Prompt
from rlhf.data.step_dataset import encode_solutions
from rlhf.data.step_splitter import LINES, StepSplitter
from rlhf.infra.errors import UserError
from rlhf.models.process_reward_model import ProcessRewardModel
from rlhf.rewards.learned import SCORING_TOKENS


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
