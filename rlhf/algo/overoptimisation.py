"""The law of reward-model over-optimisation: gold against the distance from the policy that was started from.

    best of n   R(d) = d (alpha - beta d)
    RL          R(d) = d (alpha - beta log d)

d = sqrt(KL) with KL in nats, R the gain in gold over the start, so R(0) = 0 (arXiv:2210.10760). Both are linear in
alpha and beta, which least squares therefore finds exactly. Where beta is positive gold has a peak; beyond it the
policy pays for what the proxy gets wrong.

Legend: M points, L coefficients (alpha, beta), any shape where a coefficient may come in many resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Law:
    """One form: what alpha and beta are multiplied with (M, L) at distances (M,), and where its peak is."""

    terms: Callable[[Tensor], Tensor]
    peak: Callable[[Tensor, Tensor], Tensor]


def best_of_n_terms(distances_M: Tensor) -> Tensor:
    """(d, -d^2), whose sum weighted with alpha and beta is d (alpha - beta d) (M, L) (arXiv:2210.10760 section 3.1)."""
    return torch.stack((distances_M, -(distances_M**2)), dim=1)


def rl_terms(distances_M: Tensor) -> Tensor:
    """(d, -d log d), whose weighted sum is d (alpha - beta log d) (M, L); 0 at 0 (arXiv:2210.10760 section 3.1)."""
    return torch.stack((distances_M, -torch.xlogy(distances_M, distances_M)), dim=1)


def best_of_n_peak(alpha: Tensor, beta: Tensor) -> Tensor:
    """The distance alpha / (2 beta) at which d (alpha - beta d) is highest; 0 where it only falls.

    Infinite where beta is not positive and the curve rises in the end. Elementwise.
    """
    return _where_it_bends(alpha, beta, (alpha / (2 * beta)).clamp(min=0))


def rl_peak(alpha: Tensor, beta: Tensor) -> Tensor:
    """The distance exp(alpha / beta - 1) at which d (alpha - beta log d) is highest, where its value is beta d.

    Infinite where beta is not positive and the curve rises in the end, 0 where it only falls. Elementwise.
    """
    return _where_it_bends(alpha, beta, (alpha / beta - 1).exp())


def least_squares(terms_ML: Tensor, values_M: Tensor) -> Tensor:
    """Coefficients (L,) with the least sum of squared residuals; double precision.

    Raises:
        ValueError: the terms do not determine them: too few points, or too few different distances.
    """
    scale_L: Tensor = terms_ML.norm(dim=0)
    if terms_ML.shape[0] < terms_ML.shape[1] or not bool((scale_L > 0).all()):
        raise ValueError(f"got {terms_ML.shape[0]} points; expected at least {terms_ML.shape[1]} with a KL above 0")
    unit_ML = (terms_ML / scale_L).double()
    if float(torch.linalg.matrix_rank(unit_ML, rtol=1e-9)) < terms_ML.shape[1]:
        raise ValueError("the points have too few different KLs to tell alpha from beta")
    solution_L: Tensor = torch.linalg.lstsq(unit_ML, values_M.double().unsqueeze(1)).solution.squeeze(1)
    return solution_L / scale_L


def _where_it_bends(alpha: Tensor, beta: Tensor, peak: Tensor) -> Tensor:
    never = torch.where((beta < 0) | (alpha > 0), torch.inf, 0.0).to(peak.dtype)
    return torch.where(beta > 0, peak, never)


LAWS: dict[str, Law] = {
    "best_of_n": Law(best_of_n_terms, best_of_n_peak),
    "rl": Law(rl_terms, rl_peak),
}
