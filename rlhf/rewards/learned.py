"""A reward model as a reward function: by token ids where it shares the policy's tokenizer, else through text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.algo.reward_combination import disagreement
from rlhf.data.chat import ChatEncoder, TokenExample
from rlhf.data.collate import batches_by_tokens, pad_right
from rlhf.data.rows import Prompt
from rlhf.models.reward_model import AnyReward, RewardEnsemble

# Tokens per forward pass: small enough for the activations to stay in a processor's caches.
SCORING_TOKENS = 2_048


class LearnedReward:
    """Scores answers with a frozen reward model, in batches filled by tokens.

    Two tokenizers count as one only when their vocabularies and templates are equal; then the sampled ids themselves
    are scored. Otherwise the answer's text goes through the reward model's own tokenizer and template. Either way an
    answer that was cut off (column `finished`) is scored without the token that ends one. Legend: K members, N answers.
    """

    def __init__(
        self,
        model: AnyReward,
        policy_tokenizer: PreTrainedTokenizerBase | None = None,
        system_prompt: str | None = None,
        standardise: bool = True,
        max_batch_tokens: int = SCORING_TOKENS,
    ) -> None:
        self.model, self.standardise, self.max_batch_tokens = model, standardise, max_batch_tokens
        self.encoder = ChatEncoder(model.tokenizer, system_prompt)
        self.by_ids = policy_tokenizer is not None and same_tokenizer(model.tokenizer, policy_tokenizer)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        scores: list[float] = self.score_ids(self.dialogues(prompts, completions, columns)).tolist()
        return scores

    def detailed(
        self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """The scores; of an ensemble also what each member says, standardised, and how far they are apart."""
        rows = self.dialogues(prompts, completions, columns)
        if not isinstance(self.model, RewardEnsemble):
            return self.score_ids(rows).tolist(), {}
        members_KN = self.member_scores(rows)
        details = {"disagreement": disagreement(members_KN).tolist()}
        details |= {f"member_{k}": scores_N.tolist() for k, scores_N in enumerate(members_KN)}
        return self._scaled(self.model.combined(members_KN)).tolist(), details

    def dialogues(
        self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[list[int]]:
        """Prompts and answers as the model's own token ids."""
        if self.by_ids and "completion_ids" in columns:
            return [[*p, *c] for p, c in zip(columns["prompt_ids"], columns["completion_ids"], strict=True)]
        starts = self.encoder.prompt_ids_batch(prompts)
        answers = self.encoder.response_ids_batch(prompts, completions)
        finished = columns.get("finished", [True] * len(answers))
        # The encoder ends every answer; one that was cut off has not said that it is over.
        answers = [ids if done else ids[:-1] for ids, done in zip(answers, finished, strict=True)]
        return [[*start, *answer] for start, answer in zip(starts, answers, strict=True)]

    def score_ids(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Scores (N,) of whole dialogues given as token ids."""
        if isinstance(self.model, RewardEnsemble):
            return self._scaled(self.model.combined(self.member_scores(rows)))
        return self._scaled(self._in_batches(rows, self.model, 1)[0])

    def member_scores(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Standardised scores (K, N) of the members of an ensemble."""
        assert isinstance(self.model, RewardEnsemble)
        return self._in_batches(rows, self.model.member_scores, len(self.model.members))

    @torch.no_grad()
    def _in_batches(
        self, rows: Sequence[Sequence[int]], score: Callable[[Tensor, Tensor | None], Tensor], num_scorers: int
    ) -> Tensor:
        device = next(self.model.parameters()).device
        scores_KN = torch.zeros(num_scorers, len(rows), device=device)
        for indices in batches_by_tokens([len(row) for row in rows], self.max_batch_tokens):
            examples = [TokenExample(list(rows[i]), [False] * len(rows[i])) for i in indices]
            batch = pad_right(examples, self.model.tokenizer.pad_token_id).to(device)
            scores_KN[:, indices] = score(batch.input_ids_BT, batch.attention_mask_BT)
        return scores_KN

    def _scaled(self, scores_N: Tensor) -> Tensor:
        return self.model.standardised(scores_N) if self.standardise else scores_N


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether ids and templates of two tokenizers mean the same."""
    return one is other or (one.get_vocab() == other.get_vocab() and one.chat_template == other.chat_template)
