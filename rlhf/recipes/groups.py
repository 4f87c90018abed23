"""Groups of answers to one prompt, and the drawing of new ones for those that tell nothing.

Where all answers of a group are worth the same, none of them is better than the others and nothing can be learnt from
the prompt. Dynamic sampling (DAPO, arXiv:2503.14476 section 3.2) draws other prompts in their place, up to a bound.
Legend: B sequences, group after group; N groups, G answers in each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf.algo.advantages import has_spread
from rlhf.rewards.protocol import Scores, joined_scores
from rlhf.rewards.shaping import ShapedScores
from rlhf.rollout.trajectory import Trajectory, concatenate


@dataclass(frozen=True)
class ScoredGroups:
    """Answers and what they are worth, the `group_size` answers to a prompt one after the other."""

    trajectory: Trajectory
    scores: Scores
    shaped: ShapedScores
    group_size: int

    def __len__(self) -> int:
        """How many groups there are."""
        return len(self.trajectory) // self.group_size

    @property
    def num_tokens(self) -> int:
        """Response tokens of all answers."""
        return int(self.trajectory.response_mask_BR.sum())

    @property
    def worths_NG(self) -> Tensor:
        """Shaped scores, and what is paid step by step."""
        on_the_way = [whole - end for whole, end in zip(self.scores.returns, self.scores.total, strict=True)]
        shaped_B = self.shaped.scores_B
        return (shaped_B + torch.tensor(on_the_way, device=shaped_B.device)).view(-1, self.group_size)

    def select(self, groups: Sequence[int]) -> ScoredGroups:
        """Some of the groups, whole; metrics of shaping stay those of all."""
        rows = [group * self.group_size + place for group in groups for place in range(self.group_size)]
        indices = torch.tensor(rows, device=self.shaped.scores_B.device)
        return replace(
            self,
            trajectory=self.trajectory.select(indices),
            scores=self.scores.select(rows),
            shaped=replace(self.shaped, scores_B=self.shaped.scores_B[indices]),
        )


@dataclass(frozen=True)
class DrawnGroups:
    """The groups of an iteration, counts for the log, and the response tokens of the groups that were left out."""

    groups: ScoredGroups
    counts: dict[str, float]
    dropped_tokens: int = 0


def draw_until_they_differ(
    draw: Callable[[int, int], ScoredGroups], num_groups: int, max_rounds: int, pad_token_id: int
) -> DrawnGroups:
    """As many groups as asked for, of answers that are not all worth the same.

    `draw(number, round)` samples answers to that many new prompts. Groups without spread are put aside and as many
    others are drawn, until there are enough or the rounds are used up; the places that are then empty go to groups that
    were put aside, whose answers have the advantage 0. With one round everything drawn is kept, in its order.
    """
    rounds: list[ScoredGroups] = []
    differing: list[tuple[int, int]] = []  # (round, group)
    equal: list[tuple[int, int]] = []
    while len(differing) < num_groups and len(rounds) < max_rounds:
        rounds.append(draw(num_groups - len(differing), len(rounds)))
        for group, differs in enumerate(has_spread(rounds[-1].worths_NG).tolist()):
            (differing if differs else equal).append((len(rounds) - 1, group))
    kept = sorted([*differing, *equal[: num_groups - len(differing)]])
    sampled = sum(len(drawn) for drawn in rounds)
    scores = [value for drawn in rounds for value in drawn.scores.returns]
    counts = {
        "grpo/groups_sampled": float(sampled),
        "grpo/groups_without_variance": float(len(equal)),
        "grpo/groups_dropped": float(sampled - len(kept)),
        "grpo/sampling_rounds": float(len(rounds)),
        "grpo/sampled_reward_mean": sum(scores) / len(scores),
    }
    if len(rounds) == 1:
        return DrawnGroups(rounds[0], counts)
    joined, tokens = _joined(rounds, kept, pad_token_id), sum(drawn.num_tokens for drawn in rounds)
    return DrawnGroups(joined, counts, tokens - joined.num_tokens)


def _joined(rounds: Sequence[ScoredGroups], kept: Sequence[tuple[int, int]], pad_token_id: int) -> ScoredGroups:
    """The kept groups of all rounds; metrics of shaping are means over everything that was sampled."""
    parts = []
    for number, drawn in enumerate(rounds):
        groups = [group for round_, group in kept if round_ == number]
        if groups:
            parts.append(drawn.select(groups))
    sizes = [len(drawn) for drawn in rounds]
    metrics = {
        name: sum(size * drawn.shaped.metrics[name] for size, drawn in zip(sizes, rounds, strict=True)) / sum(sizes)
        for name in rounds[0].shaped.metrics
    }
    return ScoredGroups(
        concatenate([part.trajectory for part in parts], pad_token_id),
        joined_scores([part.scores for part in parts]),
        ShapedScores(torch.cat([part.shaped.scores_B for part in parts]), metrics),
        rounds[0].group_size,
    )
