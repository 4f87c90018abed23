"""Preference losses on the log-probabilities of two answers. Legend: B pairs; each function returns (B,), minimised.

What a loss compares is one number per answer: log pi(y | x), minus log pi_ref(y | x) where the loss has a reference,
summed over the tokens of y or divided by their number. `PREFERENCE_LOSSES` says which of these each name takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# Log odds need log(1 - p): nearer to certainty than this the answers of a pair are held to be equally certain.
MAX_MEAN_LOGPROB = -1e-6


@dataclass(frozen=True)
class PairLogRatios:
    """log pi(y | x) - log pi_ref(y | x) for both sides of each pair, (B,) in nats; without a reference log pi alone.

    Summed over the tokens of y, or their mean where a loss is defined on that.
    """

    chosen_B: Tensor
    rejected_B: Tensor

    @property
    def margin_B(self) -> Tensor:
        return self.chosen_B - self.rejected_B


@dataclass(frozen=True)
class LossSettings:
    """The numbers that a loss may take besides the pairs; each loss reads its own."""

    beta: float
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.0


def dpo_loss(ratios: PairLogRatios, beta: float) -> Tensor:
    """-log sigma(beta (h_chosen - h_rejected)): DPO (arXiv:2305.18290 eq. 7). ln 2 at the start."""
    return -logsigmoid(beta * ratios.margin_B)


def conservative_dpo_loss(ratios: PairLogRatios, beta: float, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigma(beta m) - e log sigma(-beta m) with m the margin and e the smoothing, 0 <= e < 0.5: cDPO.

    E. Mitchell, "A note on DPO with noisy preferences and relationship to IPO" (2023). Lowest where sigma(beta m) is
    1 - e: behind that margin a pair is pulled back, which `robust_dpo_loss` does not do.
    """
    logits_B = beta * ratios.margin_B
    return -(1 - label_smoothing) * logsigmoid(logits_B) - label_smoothing * logsigmoid(-logits_B)


def robust_dpo_loss(ratios: PairLogRatios, beta: float, label_smoothing: float) -> Tensor:
    """(-(1 - e) log sigma(beta m) + e log sigma(-beta m)) / (1 - 2 e), 0 <= e < 0.5: rDPO (arXiv:2403.00409).

    Its mean over labels that are flipped with probability e is the DPO loss of the true ones. It can be negative.
    """
    logits_B = beta * ratios.margin_B
    kept, flipped = -logsigmoid(logits_B), -logsigmoid(-logits_B)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge_loss(ratios: PairLogRatios, beta: float) -> Tensor:
    """max(0, 1 - beta m): the hinge of SLiC (arXiv:2305.10425) on log-ratios to a reference (RSO, arXiv:2309.06657).

    A pair whose margin is 1 / beta or more takes no gradient.
    """
    return torch.relu(1 - beta * ratios.margin_B)


def ipo_loss(ratios: PairLogRatios, beta: float) -> Tensor:
    """(m - 1 / (2 beta))^2: IPO (arXiv:2310.12036 eq. 17, whose tau is beta here). Lowest at the margin 1 / (2 beta).

    The paper has sums over the answer, `ipo_summed`. TRL divides each answer's log-ratio by its tokens, `ipo`, so that
    the same beta asks for the same margin per token of short and long answers.
    """
    return (ratios.margin_B - 1 / (2 * beta)).square()


def simpo_loss(logprobs: PairLogRatios, beta: float, gamma: float) -> Tensor:
    """-log sigma(beta m - gamma) with m the margin of mean log-probs per token: SimPO (arXiv:2405.14734 eq. 6)."""
    return -logsigmoid(beta * logprobs.margin_B - gamma)


def orpo_loss(logprobs: PairLogRatios, beta: float) -> Tensor:
    """-log p_chosen - beta log sigma(log odds_chosen - log odds_rejected): ORPO (arXiv:2403.07691 eq. 6 and 7).

    `logprobs` are means per token, p their exponential, odds p / (1 - p); beta is the paper's lambda. The first term
    is the loss of imitating the chosen answer, so no policy that already answers is needed.
    """
    return -logprobs.chosen_B - beta * odds_ratio_term(logprobs)


def odds_ratio_term(logprobs: PairLogRatios) -> Tensor:
    """log sigma(log odds_chosen - log odds_rejected), <= 0, of mean log-probs per token (arXiv:2403.07691 eq. 4)."""
    return logsigmoid(_log_odds(logprobs.chosen_B) - _log_odds(logprobs.rejected_B))


def _log_odds(mean_logprob_B: Tensor) -> Tensor:
    held_B = mean_logprob_B.clamp(max=MAX_MEAN_LOGPROB)
    return held_B - torch.log(-torch.expm1(held_B))


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss by name: the function, what it is to be given, and which settings it reads besides beta.

    `per_token`: log-ratios divided by the answer's tokens. `has_reference`: without one the ratios are log pi alone.
    """

    of: Callable[[PairLogRatios, LossSettings], Tensor]
    beta: float = 0.1
    has_reference: bool = True
    per_token: bool = False
    settings: frozenset[str] = frozenset()


# Names and the usual beta as in TRL; cdpo and ipo_summed have none there.
PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(lambda pairs, with_: dpo_loss(pairs, with_.beta)),
    "cdpo": PreferenceLoss(
        lambda pairs, with_: conservative_dpo_loss(pairs, with_.beta, with_.label_smoothing),
        settings=frozenset({"label_smoothing"}),
    ),
    "robust": PreferenceLoss(
        lambda pairs, with_: robust_dpo_loss(pairs, with_.beta, with_.label_smoothing),
        settings=frozenset({"label_smoothing"}),
    ),
    "hinge": PreferenceLoss(lambda pairs, with_: hinge_loss(pairs, with_.beta)),
    "ipo": PreferenceLoss(lambda pairs, with_: ipo_loss(pairs, with_.beta), per_token=True),
    "ipo_summed": PreferenceLoss(lambda pairs, with_: ipo_loss(pairs, with_.beta)),
    "simpo": PreferenceLoss(
        lambda pairs, with_: simpo_loss(pairs, with_.beta, with_.simpo_gamma),
        beta=2.0,
        has_reference=False,
        per_token=True,
        settings=frozenset({"simpo_gamma"}),
    ),
    "orpo": PreferenceLoss(lambda pairs, with_: orpo_loss(pairs, with_.beta), has_reference=False, per_token=True),
}
