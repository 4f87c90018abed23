"""From lists of token ids to padded or packed tensors, and which rows share a batch.

Suffixes: B sequences, P prompt positions, T all positions (prompt and answer).
Masks are made from lengths alone. A mask made from `ids != pad` loses the real end of an answer when EOS pads.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.data.chat import TokenExample, join
from rlhf.data.forest import Forest, plant
from rlhf.data.preference_dataset import PreferenceExample
from rlhf.infra.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Right-padded or packed sequences, ready for a causal model.

    `attention_mask_BT` is True on real tokens and None when examples are packed. Transformers then makes the
    block-diagonal mask from the position ids, which restart at 0 with every example; a mask, or the cache a forward
    keeps by default (`use_cache=True`), would switch that off and let examples see each other. `loss_mask_BT[b, t]`
    is True when predicting token t is trained; the first token of an example never is, nothing stands before it.
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor | None
    loss_mask_BT: Tensor
    position_ids_BT: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`."""
        mask = self.attention_mask_BT
        return Batch(
            self.input_ids_BT.to(device),
            None if mask is None else mask.to(device),
            self.loss_mask_BT.to(device),
            self.position_ids_BT.to(device),
        )

    @property
    def num_loss_tokens(self) -> int:
        """Number of trained tokens: what a loss summed over the batch is divided by."""
        return int(self.loss_mask_BT.sum())


@dataclass(frozen=True)
class PromptBatch:
    """Left-padded prompts: every row ends at its last prompt token, where generation goes on."""

    input_ids_BP: Tensor
    attention_mask_BP: Tensor

    def to(self, device: torch.device | str) -> PromptBatch:
        """Return the batch on `device`."""
        return PromptBatch(self.input_ids_BP.to(device), self.attention_mask_BP.to(device))

    @property
    def position_ids(self) -> Tensor:
        """Positions that count real tokens only, so padding on the left shifts nothing."""
        return (self.attention_mask_BP.long().cumsum(dim=1) - 1).clamp(min=0)


@dataclass(frozen=True)
class PairBatch:
    """B preference pairs as 2B rows of one batch: the first B rows are chosen, the last B rejected, in the same order.

    Or as B rows of a `Forest`, the chosen answer the first branch of each and the rejected one the second; either way
    results per answer come as (2 B,), chosen first. `margins_B` is how much better chosen was said to be, 0 where the
    data says nothing.
    """

    batch: Batch | Forest
    margins_B: Tensor

    def to(self, device: torch.device | str) -> PairBatch:
        """Return the batch on `device`."""
        return PairBatch(self.batch.to(device), self.margins_B.to(device))

    @property
    def num_answer_tokens(self) -> Tensor:
        """Trained tokens of every answer: (2 B,), chosen first."""
        mask_BT = self.batch.loss_mask_BT
        return self.batch.branch_sums(mask_BT) if isinstance(self.batch, Forest) else mask_BT.sum(dim=1)

    @property
    def num_pairs(self) -> int:
        """Number of pairs (half the number of rows)."""
        return int(self.margins_B.shape[0])


@dataclass(frozen=True)
class StepBatch:
    """B worked solutions, right-padded. `step_mask_BT` is True on the last token of every step, `judged_mask_BT` on
    those that have a label; `labels_BT` is in [0, 1] there and 0 elsewhere.
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    step_mask_BT: Tensor
    judged_mask_BT: Tensor
    labels_BT: Tensor

    def to(self, device: torch.device | str) -> StepBatch:
        """Return the batch on `device`."""
        return StepBatch(
            self.input_ids_BT.to(device),
            self.attention_mask_BT.to(device),
            self.step_mask_BT.to(device),
            self.judged_mask_BT.to(device),
            self.labels_BT.to(device),
        )


def step_batch(
    input_ids: Sequence[Sequence[int]],
    ends: Sequence[Sequence[int]],
    labels: Sequence[Sequence[float | None]],
    pad_token_id: int,
) -> StepBatch:
    """Return solutions with the places of their steps' last tokens and the steps' labels (None: not judged)."""
    input_ids_BT = _rows(input_ids, pad_token_id, torch.long)
    lengths_B1 = torch.tensor([[len(ids)] for ids in input_ids])
    step_mask_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
    judged_mask_BT, labels_BT = torch.zeros_like(step_mask_BT), torch.zeros(input_ids_BT.shape)
    for row, (places, judged) in enumerate(zip(ends, labels, strict=True)):
        for place, label in zip(places, judged, strict=True):
            step_mask_BT[row, place] = True
            judged_mask_BT[row, place] = label is not None
            labels_BT[row, place] = label or 0.0
    attention_mask_BT = torch.arange(input_ids_BT.shape[1]) < lengths_B1
    return StepBatch(input_ids_BT, attention_mask_BT, step_mask_BT, judged_mask_BT, labels_BT)


def pad_right(examples: Sequence[TokenExample], pad_token_id: int) -> Batch:
    """Return the examples as rows padded on the right to the longest of them."""
    input_ids_BT = _rows([example.input_ids for example in examples], pad_token_id, torch.long)
    loss_mask_BT = _rows([example.loss_mask for example in examples], False, torch.bool)
    loss_mask_BT[:, :1] = False
    lengths_B = torch.tensor([len(example.input_ids) for example in examples])
    positions_T = torch.arange(input_ids_BT.shape[1])
    return Batch(
        input_ids_BT=input_ids_BT,
        attention_mask_BT=positions_T[None, :] < lengths_B[:, None],
        loss_mask_BT=loss_mask_BT,
        position_ids_BT=positions_T.repeat(len(examples), 1),
    )


def pad_left(prompt_ids: Sequence[Sequence[int]], pad_token_id: int) -> PromptBatch:
    """Return prompts as rows padded on the left to the longest of them."""
    reversed_ids = _rows([list(reversed(ids)) for ids in prompt_ids], pad_token_id, torch.long)
    reversed_mask = _rows([[True] * len(ids) for ids in prompt_ids], False, torch.bool)
    return PromptBatch(reversed_ids.flip(1), reversed_mask.flip(1))


def pair_batch(examples: Sequence[PreferenceExample], pad_token_id: int) -> PairBatch:
    """Return preference pairs as one batch, chosen rows first; the loss mask is True on the answers."""
    chosen = [join(example.prompt_ids, example.chosen_ids) for example in examples]
    rejected = [join(example.prompt_ids, example.rejected_ids) for example in examples]
    return PairBatch(pad_right([*chosen, *rejected], pad_token_id), _margins(examples))


def pair_forest(examples: Sequence[PreferenceExample], pad_token_id: int, suffix_ids: Sequence[int] = ()) -> PairBatch:
    """Return preference pairs with both answers in one row behind their prompt, which is read once."""
    answers = [[example.chosen_ids, example.rejected_ids] for example in examples]
    forest = plant([example.prompt_ids for example in examples], answers, pad_token_id, suffix_ids)
    return PairBatch(forest, _margins(examples))


def _margins(examples: Sequence[PreferenceExample]) -> Tensor:
    return torch.tensor([example.margin or 0.0 for example in examples], dtype=torch.float32)


def pack(examples: Sequence[TokenExample], max_length: int) -> list[list[int]]:
    """Group example indices so that each group fits into `max_length` tokens and few tokens are padding.

    Best-fit decreasing: the longest example first, into the fullest group that still has room (at most 11/9 of the
    optimal number of groups, and O(n log n) with a sorted list of what is left).
    """
    lengths = [len(example.input_ids) for example in examples]
    if lengths and max(lengths) > max_length:
        raise UserError(
            f"an example has {max(lengths)} tokens but packing was asked for rows of {max_length}; "
            "raise the row length or filter the data by length"
        )
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, group), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(room, (lengths[index], -1))
        if place == len(room):
            groups.append([])
            left, group = max_length, len(groups) - 1
        else:
            left, group = room.pop(place)
        groups[group].append(index)
        insort(room, (left - lengths[index], group))
    return groups


def collate_packed(groups: Sequence[Sequence[TokenExample]], pad_token_id: int) -> Batch:
    """Return one row per group with the group's examples one behind the other, positions restarting at each.

    Gives the losses of the unpacked examples with models that take position ids (GPT-2, Llama, Qwen2, ...).
    """
    ids = [[token for example in group for token in example.input_ids] for group in groups]
    positions = [[place for example in group for place in range(len(example.input_ids))] for group in groups]
    masks = [
        [trained and place > 0 for example in group for place, trained in enumerate(example.loss_mask)]
        for group in groups
    ]
    return Batch(
        input_ids_BT=_rows(ids, pad_token_id, torch.long),
        attention_mask_BT=None,
        loss_mask_BT=_rows(masks, False, torch.bool),
        position_ids_BT=_rows(positions, 0, torch.long),  # each padding token is then an example of its own
    )


def batches_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group indices, sorted by length, so that rows times longest row stays within `max_tokens` in every group.

    Of all such cuts of the sorted rows, the one with the fewest positions to compute is taken, where a group costs
    1 / 16 of `max_tokens` on top of its own: padding is weighed against the price of one more pass. An example longer
    than `max_tokens` gets a group of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    per_group = max_tokens / 16
    best, starts = [0.0], [0]  # cost of the first n rows, and where their last group begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        most = max(1, max_tokens // max(1, longest))
        costs = ((best[start] + (end - start) * longest + per_group, start) for start in range(max(0, end - most), end))
        cost, start = min(costs)
        best.append(cost)
        starts.append(start)
    batches: list[list[int]] = []
    end = len(order)
    while end > 0:
        batches.append(order[starts[end] : end])
        end = starts[end]
    return batches[::-1]


def _rows(rows: Sequence[Sequence[int]], fill: int, dtype: torch.dtype) -> Tensor:
    """Return ragged rows as one tensor, filled up on the right."""
    if not rows:
        raise UserError("a batch was asked for with no rows in it; expected at least one")
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], dtype=dtype)
