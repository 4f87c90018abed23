"""How likely a model finds each of several continuations of a prompt: the way multiple choice is asked of base models.

Legend: M rows of a batch, T tokens, K choices, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf.data.chat import TokenExample, join
from rlhf.data.collate import batches_by_tokens, pad_right
from rlhf.models.backbone import Backbone
from rlhf.models.policy import masked_logprobs

Ids = Sequence[int]


@torch.no_grad()
def choice_logprobs(
    backbone: Backbone,
    adapter: str | None,
    prompts: Sequence[Ids],
    choices: Sequence[Sequence[Ids]],
    max_batch_tokens: int = 2_048,
) -> list[list[float]]:
    """Sum over each choice's tokens of log p(token | prompt, tokens before), in nats, at temperature 1.

    `choices[i]` are the continuations of `prompts[i]` as ids. Where all of them are single tokens the prompt is read
    once for all. Raises ValueError for an empty prompt or choice.
    """
    if any(not prompt for prompt in prompts) or any(not ids for of_prompt in choices for ids in of_prompt):
        raise ValueError("a prompt and its choices need at least one token each")
    sums: list[list[float]] = [[0.0] * len(of_prompt) for of_prompt in choices]
    short = [i for i, of_prompt in enumerate(choices) if all(len(ids) == 1 for ids in of_prompt)]
    for i, found in zip(
        short, _next_tokens(backbone, adapter, [prompts[i] for i in short], max_batch_tokens), strict=True
    ):
        sums[i] = [float(found[ids[0]]) for ids in choices[i]]
    single = set(short)
    rows = [(i, k) for i, of_prompt in enumerate(choices) if i not in single for k in range(len(of_prompt))]
    examples = [join(list(prompts[i]), list(choices[i][k])) for i, k in rows]
    for (i, k), total in zip(rows, _sums(backbone, adapter, examples, max_batch_tokens), strict=True):
        sums[i][k] = total
    return sums


def _next_tokens(
    backbone: Backbone, adapter: str | None, prompts: Sequence[Ids], max_batch_tokens: int
) -> list[torch.Tensor]:
    """Log-probabilities (V,) of every token behind each prompt."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    for group in batches_by_tokens([len(prompt) for prompt in prompts], max_batch_tokens):
        examples = [TokenExample(list(prompts[i]), [False] * len(prompts[i])) for i in group]
        batch = pad_right(examples, backbone.tokenizer.pad_token_id).to(backbone.device)
        hidden_MTD = backbone.hidden(batch.input_ids_BT, batch.attention_mask_BT, adapter=adapter)
        last_M = torch.tensor([len(prompts[i]) - 1 for i in group], device=hidden_MTD.device)
        hidden_MD = hidden_MTD[torch.arange(len(group), device=hidden_MTD.device), last_M]
        logits_MV = backbone.logits(hidden_MD, adapter=adapter)
        for i, row in zip(group, logits_MV.float().log_softmax(dim=-1).cpu(), strict=True):
            found[i] = row
    return found


def _sums(
    backbone: Backbone, adapter: str | None, examples: Sequence[TokenExample], max_batch_tokens: int
) -> list[float]:
    sums = torch.zeros(len(examples))
    for group in batches_by_tokens([len(example.input_ids) for example in examples], max_batch_tokens):
        batch = pad_right([examples[i] for i in group], backbone.tokenizer.pad_token_id).to(backbone.device)
        logprobs_MT = masked_logprobs(
            backbone, adapter, batch.input_ids_BT, batch.attention_mask_BT, batch.loss_mask_BT
        )
        sums[group] = logprobs_MT.sum(dim=1).cpu()
    return [float(value) for value in sums]
