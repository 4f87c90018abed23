"""What was sampled, and what was made of it: `Trajectory -> Experience`, both frozen.

Legend: B sequences, P prompt columns (left-padded), R response columns (right-padded), T = P + R.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trajectory:
    """Prompts and sampled responses, as token ids: they are never turned into text and back before they are scored.

    `logprobs_BR` (nats, at the sampling temperature), `entropy_BR` and `values_BR` come from the forward that sampled.
    `finished_B` is True where a stop token or string ended the answer, False where it was cut off. `num_through` counts
    the tokens that the model was fed to draw all that was drawn together, `num_padding` those of them that were padding
    or belonged to finished answers; both stay as they are when rows are chosen. `trees` says of how many rows, one
    after another, the prompt is read once (see `rollout.passes`); where it is empty, each row is read alone.
    """

    prompt_ids_BP: Tensor
    prompt_mask_BP: Tensor
    response_ids_BR: Tensor
    response_mask_BR: Tensor
    logprobs_BR: Tensor
    entropy_BR: Tensor
    values_BR: Tensor | None
    finished_B: Tensor
    temperature: float
    weights_version: int = 0
    truncated_mass: float = 0.0
    num_through: int = 0
    num_padding: int = 0
    trees: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.prompt_ids_BP.shape[0]

    @property
    def input_ids_BT(self) -> Tensor:
        return torch.cat([self.prompt_ids_BP, self.response_ids_BR], dim=1)

    @property
    def attention_mask_BT(self) -> Tensor:
        return torch.cat([self.prompt_mask_BP, self.response_mask_BR], dim=1)

    @property
    def lengths_B(self) -> Tensor:
        """Response tokens of each row, the stop token included."""
        return self.response_mask_BR.sum(dim=1)

    @property
    def dones_BR(self) -> Tensor:
        """True on the last token of each answer that ended by itself."""
        return self.last_token_BR & self.finished_B.unsqueeze(1)

    @property
    def last_token_BR(self) -> Tensor:
        """True on the last sampled token of each row, where its score is paid."""
        columns_R = torch.arange(self.response_mask_BR.shape[1], device=self.response_mask_BR.device)
        return self.response_mask_BR & (columns_R == (self.lengths_B - 1).unsqueeze(1))

    def prompts(self) -> list[list[int]]:
        return _rows(self.prompt_ids_BP, self.prompt_mask_BP)

    def responses(self) -> list[list[int]]:
        return _rows(self.response_ids_BR, self.response_mask_BR)

    def select(self, indices: Tensor) -> Trajectory:
        """Some rows, with the columns that are padding in all of them taken away."""
        prompts = int(self.prompt_mask_BP[indices].sum(dim=1).max())
        responses = int(self.lengths_B[indices].max())
        return _narrowed(self, indices, prompts, responses)

    def of_pass(self, trees: Sequence[Sequence[int]]) -> Trajectory:
        """The rows of a pass, those of a tree one after another."""
        return replace(self.select(self.rows(trees)), trees=tuple(map(len, trees)))

    def rows(self, trees: Sequence[Sequence[int]]) -> Tensor:
        """Numbers of the rows of a pass."""
        return torch.tensor([row for tree in trees for row in tree], device=self.response_ids_BR.device)

    def in_passes(self, passes: Sequence[Sequence[Sequence[int]]], function: Callable[[Trajectory], Tensor]) -> Tensor:
        """Apply a (..., b, r) valued function to passes, which hold every row once between them: (..., B, R)."""
        whole: Tensor | None = None
        for trees in passes:
            values = function(self.of_pass(trees))
            if whole is None:
                whole = values.new_zeros(*values.shape[:-2], *self.response_mask_BR.shape)
            whole[..., self.rows(trees), : values.shape[-1]] = values
        assert whole is not None
        return whole


@dataclass(frozen=True)
class Experience:
    """A scored trajectory, ready to learn from; tensors (B, R) are 0 where the mask is False.

    `rewards_BR` already holds the KL penalty, where it is paid there, and on the last token the shaped score;
    `scores_B` is what the reward functions said before shaping, `kl_B` the sum over a response of log pi - log pi_ref
    (k1, nats). Values and returns are there where there is a critic.
    """

    trajectory: Trajectory
    reference_logprobs_BR: Tensor
    rewards_BR: Tensor
    advantages_BR: Tensor
    scores_B: Tensor
    kl_B: Tensor
    values_BR: Tensor | None = None
    returns_BR: Tensor | None = None

    def __len__(self) -> int:
        return len(self.trajectory)

    def select(self, indices: Tensor) -> Experience:
        responses = int(self.trajectory.lengths_B[indices].max())
        narrowed = {
            name: tensor[indices, :responses]
            for name, tensor in vars(self).items()
            if name.endswith("_BR") and tensor is not None
        }
        return replace(
            self,
            trajectory=self.trajectory.select(indices),
            scores_B=self.scores_B[indices],
            kl_B=self.kl_B[indices],
            **narrowed,
        )

    def of_pass(self, trees: Sequence[Sequence[int]]) -> Experience:
        """See `Trajectory`."""
        part = self.select(self.trajectory.rows(trees))
        return replace(part, trajectory=replace(part.trajectory, trees=tuple(map(len, trees))))


def concatenate(parts: Sequence[Trajectory], pad_token_id: int) -> Trajectory:
    """Put trajectories under one another, padding prompts on the left and responses on the right to a common width."""
    prompt_width = max(part.prompt_ids_BP.shape[1] for part in parts)
    response_width = max(part.response_ids_BR.shape[1] for part in parts)

    def stacked(tensors: Sequence[Tensor], width: int, fill: float, *, left: bool) -> Tensor:
        padded = []
        for tensor in tensors:
            missing = width - tensor.shape[1]
            padded.append(torch.nn.functional.pad(tensor, (missing, 0) if left else (0, missing), value=fill))
        return torch.cat(padded)

    values = [part.values_BR for part in parts if part.values_BR is not None]
    tokens = sum(int(part.response_mask_BR.sum()) for part in parts)
    lost = sum(part.truncated_mass * int(part.response_mask_BR.sum()) for part in parts)
    return Trajectory(
        stacked([part.prompt_ids_BP for part in parts], prompt_width, pad_token_id, left=True),
        stacked([part.prompt_mask_BP for part in parts], prompt_width, False, left=True),
        stacked([part.response_ids_BR for part in parts], response_width, pad_token_id, left=False),
        stacked([part.response_mask_BR for part in parts], response_width, False, left=False),
        stacked([part.logprobs_BR for part in parts], response_width, 0.0, left=False),
        stacked([part.entropy_BR for part in parts], response_width, 0.0, left=False),
        stacked(values, response_width, 0.0, left=False) if values else None,
        torch.cat([part.finished_B for part in parts]),
        parts[0].temperature,
        parts[0].weights_version,
        lost / max(1, tokens),
        sum(part.num_through for part in parts),
        sum(part.num_padding for part in parts),
    )


def _narrowed(trajectory: Trajectory, indices: Tensor, prompts: int, responses: int) -> Trajectory:
    start = trajectory.prompt_ids_BP.shape[1] - prompts
    return replace(
        trajectory,
        prompt_ids_BP=trajectory.prompt_ids_BP[indices, start:],
        prompt_mask_BP=trajectory.prompt_mask_BP[indices, start:],
        response_ids_BR=trajectory.response_ids_BR[indices, :responses],
        response_mask_BR=trajectory.response_mask_BR[indices, :responses],
        logprobs_BR=trajectory.logprobs_BR[indices, :responses],
        entropy_BR=trajectory.entropy_BR[indices, :responses],
        values_BR=None if trajectory.values_BR is None else trajectory.values_BR[indices, :responses],
        finished_B=trajectory.finished_B[indices],
        trees=(),
    )


def _rows(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
