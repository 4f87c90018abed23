"""Step-wise rewards: the loss of a process reward model, its labels by sampling, what its steps are worth together and
one by one.

Legend: B solutions, S steps (padded; `mask_BS` is True on steps that count). Logits are of P(step is right).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid


def step_loss(logits: Tensor, labels: Tensor, mask: Tensor, num_steps: int | Tensor) -> Tensor:
    """-sum (y log p + (1 - y) log (1 - p)) / num_steps over the counted steps (arXiv:2312.08935 eq. 2).

    Labels lie in [0, 1]; one strictly between (a soft estimate) is the probability the logit is drawn to. `num_steps`
    is counted by the caller over the whole optimizer step, so that a long solution weighs as its steps do and any split
    into micro-batches has the same gradient.
    """
    return binary_cross_entropy_with_logits(logits[mask], labels[mask], reduction="sum") / num_steps


def soft_estimate(num_right: int, num_sampled: int) -> float:
    """Share of the completions of a step that came to the right answer (arXiv:2312.08935 eq. 4)."""
    if not 0 <= num_right <= num_sampled or num_sampled < 1:
        raise ValueError(f"got {num_right} right of {num_sampled}; expected 0 to all of at least one sample")
    return num_right / num_sampled


def hard_estimate(num_right: int, num_sampled: int) -> float:
    """1 where any completion of a step came to the right answer, else 0 (arXiv:2312.08935 eq. 3)."""
    return float(soft_estimate(num_right, num_sampled) > 0)


def minimum(logits_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Probability (B,) of the step that is most doubted (arXiv:2312.08935 section 3.4)."""
    _check_steps(mask_BS)
    return logits_BS.masked_fill(~mask_BS, torch.inf).amin(dim=1).sigmoid()


def product(logits_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Probability (B,) that every step is right, taken as independent (arXiv:2305.20050 section 2.6)."""
    _check_steps(mask_BS)
    return logsigmoid(logits_BS).masked_fill(~mask_BS, 0.0).sum(dim=1).exp()


def last(logits_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Probability (B,) of the last step, which in a model of values already knows all steps before it."""
    _check_steps(mask_BS)
    columns_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    place_B1 = (mask_BS.long() * columns_S).argmax(dim=1, keepdim=True)
    return logits_BS.gather(1, place_B1).squeeze(1).sigmoid()


def step_probability(logits_S: Tensor) -> Tensor:
    """What a step is worth: the probability (S,) that it is right (arXiv:2312.08935 section 3.5).

    Every step is worth something, so an answer gains by having more of them.
    """
    return logits_S.sigmoid()


def step_log_probability(logits_S: Tensor) -> Tensor:
    """Logarithm (S,) of the probability that a step is right; over an answer they add up to that of `product`.

    Every step costs something, so an answer gains by having fewer of them.
    """
    return logsigmoid(logits_S)


def step_change(logits_S: Tensor) -> Tensor:
    """What a step adds (S,) to the probability that all is right; over an answer they add up to that of `last`.

    A potential (Ng, Harada and Russell 1999): what an answer gets does not depend on how many steps it is cut into.
    """
    probabilities_S = logits_S.sigmoid()
    before_S = torch.cat([torch.zeros_like(probabilities_S[:1]), probabilities_S[:-1]])
    return probabilities_S - before_S


def _check_steps(mask_BS: Tensor) -> None:
    if not bool(mask_BS.any(dim=1).all()):
        raise ValueError("a solution without a step has no score; expected at least one step in every row")


ESTIMATES: dict[str, Callable[[int, int], float]] = {"soft": soft_estimate, "hard": hard_estimate}
AGGREGATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"min": minimum, "product": product, "last": last}
STEP_REWARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "probability": step_probability,
    "log_probability": step_log_probability,
    "change": step_change,
}
