"""Preference losses on summed response log-probabilities. Legend: B pairs; each function returns (B,), minimised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class PairLogRatios:
    """log pi(y | x) - log pi_ref(y | x), summed over the tokens of y, for both sides of each pair; (B,) in nats."""

    chosen_B: Tensor
    rejected_B: Tensor

    @property
    def margin_B(self) -> Tensor:
        return self.chosen_B - self.rejected_B


def dpo_loss(ratios: PairLogRatios, beta: float) -> Tensor:
    """-log sigma(beta (h_chosen - h_rejected)): DPO (arXiv:2305.18290 eq. 7). ln 2 at the start."""
    return -logsigmoid(beta * ratios.margin_B)


PREFERENCE_LOSSES: dict[str, Callable[[PairLogRatios, float], Tensor]] = {"sigmoid": dpo_loss}
