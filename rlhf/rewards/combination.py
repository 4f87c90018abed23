"""Rewards with different aims made into one: their weighted sum, the lowest, or one that stands before the others.

Legend: K terms, B answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from rlhf.algo.reward_combination import gated_score, lowest_weighted, weighted_sum
from rlhf.data.data_config import Values, as_values
from rlhf.infra.config import Config
from rlhf.infra.errors import UserError

# Of a probability of 0.15, below which Llama 2 counts an answer as unsafe (arXiv:2307.09288 section 3.2.3).
UNSAFE_LOGIT = -1.73


class CombinationConfig(Config):
    """How the terms of `rewards` become the score of an answer."""

    rule: Literal["sum", "lowest", "gate"] = Field(
        "sum", description="weighted sum; the lowest weighted term; or the gate's term where that is low, else the sum"
    )
    gate: str | None = Field(None, description="name of the term that stands before the others, such as harmless")
    threshold: float = Field(
        UNSAFE_LOGIT,
        description="weighted value of the gate's term below which it is all that counts; of a reward model in "
        "deviations from its mean",
    )
    always: dict[str, Values] = Field(
        default={}, description="prompts for which it always is: {column: value or list}, such as {subset: harmless}"
    )

    @field_validator("always", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return as_values(value)

    def idle_keys(self) -> dict[str, str]:
        """See `Config.idle_keys`."""
        if self.rule == "gate":
            return {}
        return dict.fromkeys(["gate", "threshold", "always"], f"rule is {self.rule}")

    def refuse_strangers(self, weights: Mapping[str, float]) -> None:
        """Raise `ValueError` where the rule does not fit terms of these names and weights."""
        names = [name for name, weight in weights.items() if weight != 0]
        if self.rule != "sum" and len(names) < 2:
            raise ValueError(
                f"combination.rule={self.rule} needs several rewards with a weight, but there is "
                f"{', '.join(names) or 'none'}"
            )
        if self.rule == "gate" and self.gate is None:
            raise ValueError(f"combination.rule=gate needs combination.gate, one of the rewards {', '.join(names)}")
        if self.rule == "gate" and self.gate not in names:
            raise ValueError(f"combination.gate is '{self.gate}', but the rewards are called {', '.join(names)}")


def combine(
    by_term: Mapping[str, Sequence[float]],
    weights: Sequence[float],
    config: CombinationConfig,
    columns: Mapping[str, Sequence[Any]],
) -> tuple[list[float], dict[str, list[float]]]:
    """Scores of the answers, and what the rule did with each: 1 where a term was the lowest, or the gate was closed.

    Raises:
        UserError: the prompts lack a column that the rule asks for.
    """
    names = list(by_term)
    if not names:
        return [], {}
    scores_KB = torch.tensor([list(by_term[name]) for name in names], dtype=torch.float64)
    weights_K = torch.tensor(list(weights), dtype=torch.float64)
    if config.rule == "sum":
        return weighted_sum(scores_KB, weights_K).tolist(), {}
    if config.rule == "lowest":
        counting = [k for k, weight in enumerate(weights) if weight != 0]  # the others are only looked at
        scores_KB, weights_K = scores_KB[counting], weights_K[counting]
        lowest_B = (weights_K.unsqueeze(1) * scores_KB).argmin(dim=0)
        which = {f"{names[k]}/lowest": (lowest_B == i).double().tolist() for i, k in enumerate(counting)}
        return lowest_weighted(scores_KB, weights_K).tolist(), which
    place = names.index(str(config.gate))
    others_K = torch.arange(len(names)) != place
    always_B = _always(config.always, scores_KB.shape[1], columns)
    gate_B = weights_K[place] * scores_KB[place]
    sum_B = weighted_sum(scores_KB[others_K], weights_K[others_K])
    closed_B = always_B | (gate_B < config.threshold)
    total_B = gated_score(sum_B, gate_B, config.threshold, always_B)
    return total_B.tolist(), {f"{config.gate}/closed": closed_B.double().tolist()}


def _always(always: Mapping[str, Sequence[str]], num_answers: int, columns: Mapping[str, Sequence[Any]]) -> Tensor:
    found_B = torch.zeros(num_answers, dtype=torch.bool)
    for name, wanted in always.items():
        if name not in columns:
            raise UserError(
                f"combination.always asks for the column '{name}', but the prompts have {', '.join(columns) or 'none'}"
            )
        found_B |= torch.tensor([str(value) in wanted for value in columns[name]], dtype=torch.bool)
    return found_B
