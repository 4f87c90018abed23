"""Answers from any run, folder or hub model: what `rlhf generate` and `rlhf chat` call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.data.chat import ChatEncoder
from rlhf.data.rows import Prompt
from rlhf.infra.device import resolve_device
from rlhf.models.backbone import ModelConfig
from rlhf.models.decoding import GenerationConfig
from rlhf.models.policy import Policy
from rlhf.recipes.stages import load_policy
from rlhf.rollout.sampler import Sampler


@dataclass(frozen=True)
class Responder:
    """A policy with its encoder and sampler."""

    encoder: ChatEncoder
    sampler: Sampler

    @classmethod
    def load(
        cls,
        source: str,
        output_dir: Path = Path("runs"),
        temperature: float = 1.0,
        max_new_tokens: int = 128,
        system_prompt: str | None = None,
    ) -> Responder:
        """Load a policy for answering. Raises `UserError` when the source is nothing of the kind."""
        loaded = load_policy(source, ModelConfig(), output_dir, resolve_device("auto"))
        encoder = ChatEncoder(loaded.backbone.tokenizer, system_prompt)
        config = GenerationConfig(temperature=temperature, max_new_tokens=max_new_tokens)
        return cls(encoder, Sampler(Policy(loaded.backbone, loaded.adapter), config, encoder.stop_token_ids))

    def answers(self, prompts: Sequence[Prompt], seed: int = 0) -> list[str]:
        """One answer per prompt (text or messages); the same seed gives the same answers."""
        trajectory = self.sampler.sample(self.encoder.prompt_ids_batch(prompts), seed)
        return self.encoder.decode_batch(trajectory.responses())
