"""A reward model as a reward function: by token ids where it shares the policy's tokenizer, else through text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.chat import ChatEncoder, TokenExample
from rlhf.data.collate import batches_by_tokens, pad_right
from rlhf.data.rows import Prompt
from rlhf.models.reward_model import ClassifierReward, RewardModel

# Tokens per forward pass: small enough for the activations to stay in a processor's caches.
SCORING_TOKENS = 2_048


class LearnedReward:
    """Scores answers with a frozen reward model, in batches filled by tokens.

    Two tokenizers count as one only when their vocabularies and templates are equal; then the sampled ids themselves
    are scored. Otherwise the answer's text goes through the reward model's own tokenizer and template. Either way an
    answer that was cut off (column `finished`) is scored without the token that ends one.
    """

    def __init__(
        self,
        model: RewardModel | ClassifierReward,
        policy_tokenizer: PreTrainedTokenizerBase | None = None,
        system_prompt: str | None = None,
        standardise: bool = True,
        max_batch_tokens: int = SCORING_TOKENS,
    ) -> None:
        self.model, self.standardise, self.max_batch_tokens = model, standardise, max_batch_tokens
        self.encoder = ChatEncoder(model.tokenizer, system_prompt)
        self.by_ids = policy_tokenizer is not None and same_tokenizer(model.tokenizer, policy_tokenizer)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        if self.by_ids and "completion_ids" in columns:
            rows = [[*p, *c] for p, c in zip(columns["prompt_ids"], columns["completion_ids"], strict=True)]
        else:
            starts = self.encoder.prompt_ids_batch(prompts)
            answers = self.encoder.response_ids_batch(prompts, completions)
            finished = columns.get("finished", [True] * len(answers))
            # The encoder ends every answer; one that was cut off has not said that it is over.
            answers = [ids if done else ids[:-1] for ids, done in zip(answers, finished, strict=True)]
            rows = [[*start, *answer] for start, answer in zip(starts, answers, strict=True)]
        scores: list[float] = self.score_ids(rows).tolist()
        return scores

    @torch.no_grad()
    def score_ids(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Scores (N,) of whole dialogues given as token ids."""
        device = next(self.model.parameters()).device
        scores = torch.zeros(len(rows), device=device)
        for indices in batches_by_tokens([len(row) for row in rows], self.max_batch_tokens):
            examples = [TokenExample(list(rows[i]), [False] * len(rows[i])) for i in indices]
            batch = pad_right(examples, self.model.tokenizer.pad_token_id).to(device)
            scores[indices] = self.model(batch.input_ids_BT, batch.attention_mask_BT)
        return self.model.standardised(scores) if self.standardise else scores


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether ids and templates of two tokenizers mean the same."""
    return one is other or (one.get_vocab() == other.get_vocab() and one.chat_template == other.chat_template)
