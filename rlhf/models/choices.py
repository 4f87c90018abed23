"""How likely a model finds each of several continuations of a prompt: the way multiple choice is asked of base models.

Legend: M rows of a batch, T tokens, N of them under the mask, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf.algo.logprobs import MAX_LOGITS
from rlhf.data.chat import TokenExample, join
from rlhf.data.collate import Batch, batches_by_tokens, pad_right
from rlhf.models.backbone import Backbone

Ids = Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is behind its prompt.

    `logprob` is the sum over its tokens of log p(token | prompt, tokens before), in nats, at temperature 1; `greedy`
    says whether the likeliest token at each place is the continuation's.
    """

    logprob: float
    greedy: bool


def choice_logprobs(
    backbone: Backbone,
    adapter: str | None,
    prompts: Sequence[Ids],
    choices: Sequence[Sequence[Ids]],
    max_batch_tokens: int = 2_048,
) -> list[list[float]]:
    """The `logprob` of each choice; see `choice_likelihoods`."""
    found = choice_likelihoods(backbone, adapter, prompts, choices, max_batch_tokens)
    return [[one.logprob for one in of_prompt] for of_prompt in found]


@torch.no_grad()
def choice_likelihoods(
    backbone: Backbone,
    adapter: str | None,
    prompts: Sequence[Ids],
    choices: Sequence[Sequence[Ids]],
    max_batch_tokens: int = 2_048,
) -> list[list[Likelihood]]:
    """How likely the model finds each continuation.

    `choices[i]` are the continuations of `prompts[i]` as ids. Where all of them are single tokens the prompt is read
    once for all. Raises ValueError for an empty prompt or choice.
    """
    if any(not prompt for prompt in prompts) or any(not ids for of_prompt in choices for ids in of_prompt):
        raise ValueError("a prompt and its choices need at least one token each")
    found: list[list[Likelihood]] = [[] for _ in choices]
    short = [i for i, of_prompt in enumerate(choices) if all(len(ids) == 1 for ids in of_prompt)]
    rows = _next_tokens(backbone, adapter, [prompts[i] for i in short], max_batch_tokens)
    for i, row in zip(short, rows, strict=True):
        best = int(row.argmax())
        found[i] = [Likelihood(float(row[ids[0]]), ids[0] == best) for ids in choices[i]]
    single = set(short)
    places = [i for i, of_prompt in enumerate(choices) if i not in single for _ in of_prompt]
    examples = [join(prompts[i], ids) for i, of_prompt in enumerate(choices) if i not in single for ids in of_prompt]
    for i, one in zip(places, _likelihoods(backbone, adapter, examples, max_batch_tokens), strict=True):
        found[i].append(one)
    return found


def _next_tokens(
    backbone: Backbone, adapter: str | None, prompts: Sequence[Ids], max_batch_tokens: int
) -> list[torch.Tensor]:
    """Log-probabilities (V,) of every token behind each prompt."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    for group in batches_by_tokens([len(prompt) for prompt in prompts], max_batch_tokens):
        examples = [TokenExample(list(prompts[i]), [False] * len(prompts[i])) for i in group]
        batch = pad_right(examples, backbone.tokenizer.pad_token_id).to(backbone.device)
        last_MT = torch.zeros_like(batch.loss_mask_BT)
        last_MT[range(len(group)), [len(prompts[i]) - 1 for i in group]] = True
        hidden_MTD = backbone.hidden(batch.input_ids_BT, batch.attention_mask_BT, adapter=adapter, wanted_BT=last_MT)
        logits_MV = backbone.logits(hidden_MTD[last_MT], adapter=adapter)
        for i, row in zip(group, logits_MV.float().log_softmax(dim=-1).cpu(), strict=True):
            found[i] = row
    return found


def _likelihoods(
    backbone: Backbone, adapter: str | None, examples: Sequence[TokenExample], max_batch_tokens: int
) -> list[Likelihood]:
    """Likelihood of the part of each example under its mask."""
    found: list[Likelihood] = [Likelihood(0.0, False)] * len(examples)
    for group in batches_by_tokens([len(example.input_ids) for example in examples], max_batch_tokens):
        batch = pad_right([examples[i] for i in group], backbone.tokenizer.pad_token_id).to(backbone.device)
        logprobs_MT, greedy_MT = _of_tokens(backbone, adapter, batch)
        greedy_M = (greedy_MT | ~batch.loss_mask_BT).all(dim=1).tolist()
        for i, total, is_greedy in zip(group, logprobs_MT.sum(dim=1).tolist(), greedy_M, strict=True):
            found[i] = Likelihood(total, is_greedy)
    return found


def _of_tokens(backbone: Backbone, adapter: str | None, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability (M, T) of each token under the mask, and whether it is the likeliest; 0 and False elsewhere."""
    mask_MT = batch.loss_mask_BT
    read_MT = mask_MT.roll(-1, dims=1)  # a token is predicted from the place before it
    hidden_MTD = backbone.hidden(batch.input_ids_BT, batch.attention_mask_BT, adapter=adapter, wanted_BT=read_MT)
    hidden_ND, tokens_N = hidden_MTD[read_MT], batch.input_ids_BT[mask_MT]
    logprobs, greedy = [], []
    for hidden, tokens in zip(
        hidden_ND.split(max(1, MAX_LOGITS // backbone.vocab_size)),
        tokens_N.split(max(1, MAX_LOGITS // backbone.vocab_size)),
        strict=True,
    ):
        logprobs_NV = backbone.logits(hidden, adapter=adapter).float().log_softmax(dim=-1)
        logprobs.append(logprobs_NV.gather(1, tokens[:, None])[:, 0])
        greedy.append(logprobs_NV.argmax(dim=-1) == tokens)
    whole, likeliest = torch.cat(logprobs), torch.cat(greedy)
    return (
        whole.new_zeros(mask_MT.shape).masked_scatter(mask_MT, whole),
        torch.zeros_like(mask_MT).masked_scatter(mask_MT, likeliest),
    )
