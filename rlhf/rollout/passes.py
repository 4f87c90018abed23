"""Which rows of a trajectory go through a model together, and which of them share a prompt there."""

from __future__ import annotations

import torch

from rlhf.data.collate import batches_by_tokens
from rlhf.data.forest import row_length, split_evenly, trees_per_prompt
from rlhf.models.backbone import Backbone
from rlhf.rollout.trajectory import Trajectory

Pass = list[list[int]]


def passes(trajectory: Trajectory, backbone: Backbone, max_tokens: int, *, share_prompts: bool = True) -> list[Pass]:
    """Row numbers of every pass: rows of like length, at most `max_tokens` at once unless one row alone is longer.

    A pass is a list of trees: rows in a tree have the same prompt, which is read once for all of them. A row alone is a
    tree too; there are no others where prompts differ, where the backbone cannot keep answers apart, and without
    `share_prompts`.
    """
    prompts, responses = trajectory.prompt_mask_BP.sum(dim=1).tolist(), trajectory.lengths_B.tolist()
    trees = [[row] for row in range(len(prompts))]
    groups = _same_prompt(trajectory) if share_prompts else trees
    if len(groups) < len(trees) and backbone.takes_forests:
        trees = [tree for rows in groups for tree in _trees(rows, prompts, responses, backbone.width, max_tokens)]
    lengths = [_length(tree, prompts, responses) for tree in trees]
    return [[trees[tree] for tree in together] for together in batches_by_tokens(lengths, max_tokens)]


def _same_prompt(trajectory: Trajectory) -> list[list[int]]:
    """Rows by prompt, prompts in the order of their first rows."""
    prompts_BP = trajectory.prompt_ids_BP.where(trajectory.prompt_mask_BP, -1)
    numbers = torch.unique(prompts_BP, dim=0, return_inverse=True)[1].tolist()
    groups: dict[int, list[int]] = {}
    for row, number in enumerate(numbers):
        groups.setdefault(number, []).append(row)
    return list(groups.values())


def _trees(
    rows: list[int], prompts: list[int], responses: list[int], model_width: int, max_tokens: int
) -> list[list[int]]:
    """Rows with one prompt in as many trees as are cheapest, or in more where those would be too long for a pass."""
    num_response = sum(responses[row] for row in rows) / len(rows)
    fewest = trees_per_prompt(prompts[rows[0]], num_response, len(rows), model_width)
    for num_trees in range(fewest, len(rows)):
        trees = split_evenly(rows, num_trees)
        if max(_length(tree, prompts, responses) for tree in trees) <= max_tokens:
            return trees
    return [[row] for row in rows]


def _length(tree: list[int], prompts: list[int], responses: list[int]) -> int:
    return row_length(prompts[tree[0]], [responses[row] for row in tree])
