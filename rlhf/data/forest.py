"""Several answers to one prompt as one row: the prompt is read once, and the answers do not see each other.

    prompt without its last token | last token, answer 1 | last token, answer 2 | ...

Every branch begins with the prompt's last token, from which its first answer token is predicted, so that a token is
predicted from the column before it as in any other row. Positions in a branch go on from the prompt.
Suffixes: B rows, T columns, K branches (answers per prompt, the most of any row).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

PROMPT, PADDING = 0, -1
# What a flop of attention's two products costs beside one of a dense layer's: on a CPU small products reach a third of
# the rate of large ones, and softmax and mask pass over the scores besides. Taken for GPUs as well, where it was not
# measured.
SCORE_PRICE = 4


@dataclass(frozen=True)
class Forest:
    """Rows of branches. `branch_BT` is `PROMPT`, the number of a branch from 1, or `PADDING`.

    `loss_mask_BT` is True on the answers' tokens, without what a branch begins or ends with besides.
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    branch_BT: Tensor
    loss_mask_BT: Tensor
    num_branches: int

    def to(self, device: torch.device | str) -> Forest:
        """Return the rows on `device`."""
        tensors = (self.input_ids_BT, self.position_ids_BT, self.branch_BT, self.loss_mask_BT)
        return Forest(*(tensor.to(device) for tensor in tensors), self.num_branches)

    def attention_mask(self, dtype: torch.dtype) -> Tensor:
        """What is added to the scores (B, 1, T, T): 0 where a query sees a key, the lowest number elsewhere.

        A token sees what stands before it in the prompt and in its own branch. Padding sees itself, so that no row of
        scores is without a key.
        """
        key_B1T, query_BT1 = self.branch_BT.unsqueeze(1), self.branch_BT.unsqueeze(2)
        columns = torch.arange(self.branch_BT.shape[1], device=self.branch_BT.device)
        before_TT = columns[None, :] <= columns[:, None]
        seen_BTT = before_TT & ((key_B1T == PROMPT) | (key_B1T == query_BT1))
        zero = torch.zeros((), dtype=dtype, device=self.branch_BT.device)
        return torch.where(seen_BTT, zero, torch.finfo(dtype).min).unsqueeze(1)

    def branch_sums(self, values_BT: Tensor) -> Tensor:
        """Sum of the values of each branch: (K * B,), all first branches before all second ones."""
        return torch.cat([(values_BT * (self.branch_BT == k)).sum(dim=1) for k in range(1, self.num_branches + 1)])

    def branch_ends(self) -> Tensor:
        """True at the last column of every branch: (B, T)."""
        following_BT = torch.cat([self.branch_BT[:, 1:], self.branch_BT.new_full((len(self.branch_BT), 1), PADDING)], 1)
        return (self.branch_BT > PROMPT) & (following_BT != self.branch_BT)


def plant(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    pad_token_id: int,
    suffix_ids: Sequence[int] = (),
) -> Forest:
    """One row per prompt (at least one token) with its answers, padded on the right; the suffix ends every branch."""
    num_branches = max(map(len, answers))
    lengths = [
        row_length(len(prompt), [*map(len, row)], len(suffix_ids)) for prompt, row in zip(prompts, answers, strict=True)
    ]
    shape = (len(prompts), max(lengths))
    ids_BT, positions_BT = torch.full(shape, pad_token_id), torch.zeros(shape, dtype=torch.long)
    branch_BT, loss_mask_BT = torch.full(shape, PADDING), torch.zeros(shape, dtype=torch.bool)
    for b, (prompt, row) in enumerate(zip(prompts, answers, strict=True)):
        ids, positions = list(prompt[:-1]), list(range(len(prompt) - 1))
        branches, trained = [PROMPT] * len(ids), [False] * len(ids)
        for k, answer in enumerate(row, start=1):
            branch = [prompt[-1], *answer, *suffix_ids]
            ids += branch
            positions += range(len(prompt) - 1, len(prompt) - 1 + len(branch))
            branches += [k] * len(branch)
            trained += [False, *[True] * len(answer), *[False] * len(suffix_ids)]
        ids_BT[b, : len(ids)], positions_BT[b, : len(ids)] = torch.tensor(ids), torch.tensor(positions)
        branch_BT[b, : len(ids)], loss_mask_BT[b, : len(ids)] = torch.tensor(branches), torch.tensor(trained)
    return Forest(ids_BT, positions_BT, branch_BT, loss_mask_BT, num_branches)


def trees_per_prompt(num_prompt: int, num_answer: float, num_answers: int, model_width: int) -> int:
    """In how many rows the answers to one prompt are read cheapest.

    In one row the prompt is read once, but every token is scored against every other. Counted for blocks whose dense
    layers have 12 `model_width` ** 2 weights, 2 flops each a token.
    """

    def cost(num_rows: int) -> float:
        length = num_prompt - 1 + num_answers / num_rows * (1 + num_answer)
        return num_rows * length * (24 * model_width + 4 * SCORE_PRICE * length)

    return min(range(1, num_answers + 1), key=cost)


def split_evenly(rows: Sequence[int], num_parts: int) -> list[list[int]]:
    """Rows in order, in parts whose sizes differ by one at most."""
    size, larger = divmod(len(rows), num_parts)
    ends = [part * size + min(part, larger) for part in range(num_parts + 1)]
    return [list(rows[start:end]) for start, end in pairwise(ends)]


def row_length(num_prompt: int, answers: Sequence[int], num_suffix: int = 0) -> int:
    """Columns that a prompt of so many tokens takes with answers of so many each."""
    return num_prompt - 1 + sum(1 + num_answer + num_suffix for num_answer in answers)
