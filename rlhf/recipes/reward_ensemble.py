"""Training an ensemble of reward models: the members side by side in one loop, each as if it were trained alone.

An optimizer step takes every member once over as many rows, in an order of its own, and clips its gradients by their
own norm. So a member is the reward model that its seed alone would have made; what they share is the base, the log, the
checkpoints and the step whose weights are kept. Legend: K members, N pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rlhf.algo.reward_combination import disagreement
from rlhf.algo.trainer import LossOutput
from rlhf.data.collate import PairBatch
from rlhf.data.order import epoch_order
from rlhf.infra.determinism import derive_seed
from rlhf.infra.experiment import RunConfig
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.models.ensemble import member_adapters
from rlhf.models.reward_model import RewardEnsemble, RewardModel, RewardModelConfig
from rlhf.recipes.supervised import Method, Validation

RowT = TypeVar("RowT")


@dataclass(frozen=True)
class MemberBatch:
    """A micro-batch and the number of the member that it is for."""

    member: int
    pairs: PairBatch


def start_ensemble(
    backbone: Backbone, adapter: str | None, settings: RewardModelConfig, model: ModelConfig, run: RunConfig
) -> RewardEnsemble:
    """Members on one base; the first starts as the only reward model of this seed would.

    `adapter` is what the first reads through or trains. Where it is there already it is a copy of the SFT adapter, and
    the others start from copies too; else each starts from a fresh one. Heads are drawn anew for every member.
    """
    trains_adapters = settings.train == "lora"
    names = member_adapters("reward", settings.ensemble.members) if trains_adapters else [adapter]
    is_copied = trains_adapters and names[0] in backbone.adapter_names
    members: list[RewardModel] = []
    for k in range(settings.ensemble.members):
        name = names[k] if trains_adapters else adapter
        if k > 0:
            torch.manual_seed(member_seed(run.seed, k))
            if is_copied:
                assert names[0] is not None and name is not None
                backbone.copy_adapter(names[0], name)
        members.append(RewardModel(backbone, name, settings.pooling, settings.train, model, suffix=settings.suffix))
    if trains_adapters:
        backbone.train_only([name for name in names if name is not None])
    return RewardEnsemble(members, settings.ensemble.rule, settings.ensemble.penalty)


def member_seed(seed: int, k: int) -> int:
    """What the member number k is seeded with; the first one's is the run's own."""
    return seed if k == 0 else derive_seed(seed, "reward ensemble", k)


def member_rows(rows: Sequence[RowT], seed: int, k: int) -> list[RowT]:
    """The training rows as the member number k counts them: the loop's order goes through another one for each."""
    if k == 0:
        return list(rows)
    return [rows[i] for i in epoch_order(len(rows), member_seed(seed, k), 0)]


def side_by_side(
    methods: Sequence[Method[PairBatch]], validate: Callable[[], Validation] | None
) -> Method[MemberBatch]:
    """One method of many: micro-batches member by member, the sum of the losses, the mean of the metrics."""

    def micro_batches(rows: Sequence[int]) -> list[MemberBatch]:
        return [MemberBatch(k, batch) for k, method in enumerate(methods) for batch in method.micro_batches(rows)]

    def loss(rows: Sequence[int]) -> Callable[[MemberBatch], LossOutput]:
        losses = [method.loss(rows) for method in methods]

        def one(batch: MemberBatch) -> LossOutput:
            found = losses[batch.member](batch.pairs)
            return LossOutput(found.loss, {name: value / len(methods) for name, value in found.metrics.items()})

        return one

    return Method(
        num_rows=methods[0].num_rows,
        micro_batches=micro_batches,
        loss=loss,
        num_tokens=lambda rows: sum(method.num_tokens(rows) for method in methods),
        validate=validate,
        backbone=methods[0].backbone,
        num_read=lambda rows: sum((method.num_read or method.num_tokens)(rows) for method in methods),
    )


@dataclass(frozen=True)
class MemberScores:
    """What every member says of both answers of every pair, (K, 2, N): raw, and with mean 0 and deviation 1."""

    raw_K2N: Tensor
    standardised_K2N: Tensor

    @property
    def accuracies(self) -> list[float]:
        """Each member's share of pairs ordered as labelled, ties half."""
        margin_KN = self.raw_K2N[:, 0] - self.raw_K2N[:, 1]
        shares: list[float] = ((margin_KN > 0).float() + 0.5 * (margin_KN == 0).float()).mean(dim=1).tolist()
        return shares

    @property
    def disagreement_2N(self) -> Tensor:
        """Deviation over the members of the score of each answer."""
        return disagreement(self.standardised_K2N)

    def disagreement_on(self, chosen_N: Tensor) -> float:
        """Mean deviation over the members of the margin of some pairs; 0 of none."""
        margin_KN = self.standardised_K2N[:, 0] - self.standardised_K2N[:, 1]
        return float(disagreement(margin_KN)[chosen_N].mean()) if bool(chosen_N.any()) else 0.0
