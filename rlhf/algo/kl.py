"""KL divergence between policy and reference: estimators from sampled tokens, the exact sum, and the controllers.

In the reward, where nothing flows through an estimate, only k1 has the gradient of the KL: k2 and k3 also charge tokens
that the policy finds rarer than the reference does. As a loss it is the other way round.

Sign: `log_ratio` is log pi(token) - log pi_ref(token) on tokens sampled from pi, so that the mean of every estimator is
(an estimate of) KL(pi || pi_ref) >= 0. Source of k1, k2, k3: J. Schulman, "Approximating KL Divergence" (2020).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rlhf.infra.config import Config

# exp(-log_ratio) of k3 overflows fp32 beyond 88 and drowns every other token long before.
MAX_LOG_RATIO = 20.0


def k1(log_ratio: Tensor) -> Tensor:
    """r: unbiased, any sign, high variance. As a loss its gradient is zero in expectation; use it in the reward."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """r^2 / 2: biased, low variance; as a loss its on-policy gradient is that of KL(pi || pi_ref)."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """exp(-r) - 1 + r: unbiased and never negative; as a loss its gradient is that of KL(pi_ref || pi).

    -r is clamped to at most 20, where exp is already 5e8; the caller counts clamped tokens with `clamped_share`.
    """
    return torch.exp((-log_ratio).clamp(max=MAX_LOG_RATIO)) - 1 + log_ratio


def clamped_share(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Share of counted tokens whose log-ratio is beyond what the estimators and the PPO ratio take unclamped."""
    return (log_ratio[mask].abs() > MAX_LOG_RATIO).float().mean()


def exact_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(pi || pi_ref) over the whole vocabulary, in nats: (..., V) and (..., V) to (...)."""
    log_p, log_q = logits.log_softmax(dim=-1), reference_logits.log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


class KLConfig(Config):
    """How the distance from the reference is paid for."""

    coefficient: float = Field(0.05, ge=0, description="beta: reward lost per nat of KL(policy || reference)")
    estimator: Literal["k1", "k2", "k3"] = Field(
        "k1", description="per-token estimate that enters the reward; only with k1 is its gradient there that of the KL"
    )
    controller: Literal["fixed", "adaptive"] = Field("fixed", description="whether beta follows a target KL")
    target: float = Field(6.0, gt=0, description="adaptive: nats per response that beta steers to")
    horizon: float = Field(10_000.0, gt=0, description="adaptive: responses over which beta may change by about 20 %")

    def idle_keys(self) -> Mapping[str, str]:
        """See `Config.idle_keys`."""
        if self.coefficient == 0:
            reason = "kl.coefficient is 0, and an adaptive controller only multiplies it"
            names = ["estimator", "target", "horizon"] + (["controller"] if self.controller == "adaptive" else [])
            return dict.fromkeys(names, reason)
        if self.controller == "fixed":
            return dict.fromkeys(["target", "horizon"], "kl.controller is fixed")
        return {}


@dataclass(frozen=True)
class KLController:
    """The KL coefficient over time: constant, or steered to a target (arXiv:1909.08593 section 2.2).

    `updated` returns a new controller; the coefficient is state that a checkpoint must hold.
    """

    coefficient: float
    target: float | None = None
    horizon: float = 10_000.0

    @classmethod
    def from_config(cls, config: KLConfig) -> KLController:
        adaptive = config.controller == "adaptive"
        return cls(config.coefficient, config.target if adaptive else None, config.horizon)

    def updated(self, mean_kl: float, num_responses: int) -> KLController:
        """beta *= 1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon, KL in nats per response of the last batch."""
        if self.target is None:
            return self
        error = min(max(mean_kl / self.target - 1.0, -0.2), 0.2)
        return replace(self, coefficient=self.coefficient * (1.0 + error * num_responses / self.horizon))


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
