"""The local rollout engine: prompts in, one `Trajectory` out, sampled in batches by the policy itself."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from rlhf.data.collate import pad_left
from rlhf.models.decoding import GenerationConfig
from rlhf.models.policy import Policy
from rlhf.rollout.trajectory import Trajectory, concatenate


class Sampler:
    """Batched generation from a policy. `weights_version` is stamped on what it samples, so stale samples show."""

    def __init__(self, policy: Policy, config: GenerationConfig, stop_token_ids: Sequence[int]) -> None:
        self.policy, self.config = policy, config
        self.stop_token_ids = list(stop_token_ids)
        self.weights_version = 0

    def sample(self, prompts: Sequence[Sequence[int]], seed: int) -> Trajectory:
        """One response per prompt, in the order of the prompts.

        What is drawn for a prompt is a function of the weights, the settings, `seed`, its tokens and how often it stood
        before in `prompts`; batching and sorting by length change nothing but rounding.
        """
        backbone, width = self.policy.backbone, self.config.max_new_tokens
        uniforms = row_uniforms(prompts, seed, width)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        parts = []
        for start in range(0, len(order), self.config.batch_size):
            rows = order[start : start + self.config.batch_size]
            batch = pad_left([list(prompts[i]) for i in rows], backbone.tokenizer.pad_token_id).to(backbone.device)
            before = backbone.num_tokens_through
            drawn = self.policy.generate(
                batch.input_ids_BP,
                batch.attention_mask_BP,
                torch.from_numpy(uniforms[rows]).to(backbone.device),
                self.config,
                self.stop_token_ids,
            )
            through = backbone.num_tokens_through - before
            # A prompt is read once for all its answers, and the last token of a response is never fed back.
            num_prompt = sum(map(len, {tuple(prompts[i]) for i in rows}))
            read = num_prompt + int(drawn.response_mask_NR.sum()) - len(rows)
            parts.append(
                Trajectory(
                    batch.input_ids_BP,
                    batch.attention_mask_BP,
                    drawn.response_ids_NR,
                    drawn.response_mask_NR,
                    drawn.logprobs_NR,
                    drawn.entropy_NR,
                    drawn.values_NR,
                    drawn.finished_N,
                    self.config.temperature,
                    self.weights_version,
                    drawn.truncated_mass,
                    through,
                    through - read,
                )
            )
        whole = concatenate(parts, backbone.tokenizer.pad_token_id)
        return whole.select(torch.tensor(order, device=backbone.device).argsort())


def row_uniforms(prompts: Sequence[Sequence[int]], seed: int, width: int) -> np.ndarray:
    """Random numbers (N, width) in [0, 1): each row's stream is keyed by seed, prompt and its count so far."""
    seen: Counter[bytes] = Counter()
    rows = np.empty((len(prompts), width))
    for row, prompt in enumerate(prompts):
        content = np.asarray(prompt, dtype=np.int64).tobytes()
        key = hashlib.blake2b(content, digest_size=16, key=f"{seed}/{seen[content]}".encode()[:64]).digest()
        seen[content] += 1
        rows[row] = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(width)
    return rows
