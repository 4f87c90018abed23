"""What asking an API may cost, and what it has cost so far."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pydantic import Field, model_validator

from rlhf.infra.config import Config
from rlhf.infra.errors import UserError


class BudgetConfig(Config):
    """Bounds that stop a run before it sends a request that could break them; null: no bound."""

    max_requests: int | None = Field(default=None, ge=1, description="most requests sent, repeated ones included")
    max_tokens: int | None = Field(default=None, ge=1, description="most tokens, prompts and replies together")
    max_cost: float | None = Field(default=None, gt=0, description="most money, in the currency of the prices below")
    price_per_million_prompt_tokens: float = Field(
        default=0.0, ge=0, description="what the server charges for a prompt"
    )
    price_per_million_completion_tokens: float = Field(
        default=0.0, ge=0, description="what the server charges for a reply"
    )

    @model_validator(mode="after")
    def _cost_needs_prices(self) -> BudgetConfig:
        if self.max_cost is not None and not self.price(1, 1):
            raise ValueError(
                "max_cost needs the prices: set price_per_million_prompt_tokens and price_per_million_completion_tokens"
            )
        return self

    def price(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What so many tokens cost."""
        prompt, completion = self.price_per_million_prompt_tokens, self.price_per_million_completion_tokens
        return (prompt_tokens * prompt + completion_tokens * completion) / 1e6


@dataclass(frozen=True)
class Usage:
    """What was asked of a server: requests sent, replies that were there already, tokens, and the money for them."""

    requests: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class Budget:
    """Counts what is spent. Requests under way are counted at an estimate until their true size is known."""

    def __init__(self, config: BudgetConfig) -> None:
        self.config = config
        self.usage = Usage()
        self._reserved_tokens = 0
        self._reserved_cost = 0.0

    def reserve(self, prompt_tokens: int, completion_tokens: int) -> bool:
        """Take a request of at most this size into account; False where one under way may yet leave room for it.

        Raises `UserError` when it could break a bound.
        """
        config, tokens = self.config, prompt_tokens + completion_tokens
        cost = config.price(prompt_tokens, completion_tokens)
        if config.max_requests is not None and self.usage.requests + 1 > config.max_requests:
            raise UserError(f"the budget of {config.max_requests} requests is spent; raise budget.max_requests")
        spent = self.usage.prompt_tokens + self.usage.completion_tokens
        too_long = config.max_tokens is not None and spent + self._reserved_tokens + tokens > config.max_tokens
        too_dear = config.max_cost is not None and self.usage.cost + self._reserved_cost + cost > config.max_cost
        if (too_long or too_dear) and self._reserved_tokens:
            return False
        if too_long:
            raise UserError(
                f"the budget of {config.max_tokens} tokens allows no further request ({spent} are spent, one more may "
                f"take {tokens}); raise budget.max_tokens"
            )
        if too_dear:
            raise UserError(
                f"the budget of {config.max_cost:g} allows no further request ({self.usage.cost:.4g} is spent, one "
                f"more may cost {cost:.4g}); raise budget.max_cost"
            )
        self.usage = replace(self.usage, requests=self.usage.requests + 1)
        self._reserved_tokens += tokens
        self._reserved_cost += cost
        return True

    def settle(self, reserved: tuple[int, int], used: tuple[int, int]) -> None:
        """Replace an estimate (prompt tokens, completion tokens) by what was used."""
        self._reserved_tokens -= sum(reserved)
        self._reserved_cost -= self.config.price(*reserved)
        self.usage = replace(
            self.usage,
            prompt_tokens=self.usage.prompt_tokens + used[0],
            completion_tokens=self.usage.completion_tokens + used[1],
            cost=self.usage.cost + self.config.price(*used),
        )

    def count_cached(self) -> None:
        """A reply was there already."""
        self.usage = replace(self.usage, cached=self.usage.cached + 1)
