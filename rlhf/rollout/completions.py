"""Several completions of each of many beginnings, by a policy, remembered across runs where a cache is given.

What is drawn is a function of weights, settings, seed and the beginning's tokens (see `sampler`), up to rounding, which
depends on the rows that are computed together: beginnings are therefore drawn in the batches they are handed over in,
or read from the cache, but never in other company.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf.infra.determinism import derive_seed
from rlhf.models.decoding import GenerationConfig
from rlhf.models.policy import Policy
from rlhf.rollout.cache import CachedAnswer, ResponseCache, answers_of
from rlhf.rollout.sampler import Sampler


class Completer:
    """Draws completions number 0, 1, 2, ... of beginnings; `num_tokens` counts their tokens, remembered or not."""

    def __init__(
        self,
        policy: Policy,
        config: GenerationConfig,
        stop_token_ids: Sequence[int],
        seed: int,
        cache: tuple[Path, str] | None = None,
    ) -> None:
        """`cache` is a folder and the hash of the weights (`rlhf.rollout.cache.weights_hash`)."""
        self.sampler = Sampler(policy, config, stop_token_ids)
        self.seed, self.cache, self.num_tokens = seed, cache, 0
        self._caches: dict[int, ResponseCache] = {}

    def draw(self, beginnings: Sequence[Sequence[int]], number: int) -> list[CachedAnswer]:
        """Completion `number` of each beginning; equal beginnings get the same one."""
        seed = derive_seed(self.seed, "completion", number)
        wanted = list(dict.fromkeys(tuple(ids) for ids in beginnings))
        cache = self._cache(number, seed)
        known = {ids: found for ids in wanted if cache is not None and (found := cache.get(ids)) is not None}
        if len(known) < len(wanted):
            drawn = answers_of(self.sampler.sample(wanted, seed))
            if cache is not None:
                cache.put([answer for answer in drawn if tuple(answer.prompt_ids) not in known])
            known = {tuple(answer.prompt_ids): answer for answer in drawn}
        self.num_tokens += sum(len(answer.response_ids) for answer in known.values())
        return [known[tuple(ids)] for ids in beginnings]

    def _cache(self, number: int, seed: int) -> ResponseCache | None:
        if self.cache is not None and number not in self._caches:
            folder, weights = self.cache
            self._caches[number] = ResponseCache(folder, weights, self.sampler.config, seed)
        return self._caches.get(number)
