"""Answers that need not be sampled again: for evaluation, never for training.

The key is the hash of the weights, the generation settings, the seed and the prompt's tokens. Since every row of a
rollout owns its random numbers (see `sampler`), an answer read from here is the one that would be drawn again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlhf.infra.errors import UserError
from rlhf.models.backbone import Backbone
from rlhf.models.decoding import GenerationConfig
from rlhf.models.lora import adapter_state_dict, lora_layers
from rlhf.models.quantized import scales_of
from rlhf.rollout.trajectory import Trajectory


@dataclass(frozen=True)
class CachedAnswer:
    """One answer as ids; `logprob` is the sum over its tokens in nats, `entropy` the mean, both as when sampled."""

    prompt_ids: list[int]
    response_ids: list[int]
    finished: bool
    logprob: float
    entropy: float


class ResponseCache:
    """Answers on disk: one JSONL file per (weights, settings, seed), one line per prompt."""

    def __init__(self, folder: Path, weights: str, config: GenerationConfig, seed: int) -> None:
        settings = json.dumps(config.model_dump(mode="json", exclude={"batch_size", "merge_adapter"}), sort_keys=True)
        key = hashlib.blake2b(f"{weights}/{settings}/{seed}".encode(), digest_size=16).hexdigest()
        self.path = folder / f"{key}.jsonl"
        self._answers: dict[tuple[int, ...], CachedAnswer] = {}
        self._torn = False
        if self.path.is_file():
            self._read()

    def get(self, prompt_ids: Sequence[int]) -> CachedAnswer | None:
        return self._answers.get(tuple(prompt_ids))

    def put(self, answers: Sequence[CachedAnswer]) -> None:
        """Remember answers; a line is whole or absent, so a run that is killed here loses at most its last line."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                if self._torn:
                    file.write("\n")  # what a killed process began stays a line of its own
                    self._torn = False
                for answer in answers:
                    self._answers[tuple(answer.prompt_ids)] = answer
                    file.write(json.dumps(asdict(answer)) + "\n")
        except OSError as error:
            raise UserError(f"the response cache {self.path.parent} cannot be written: {error.strerror}") from error

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        self._torn = not text.endswith("\n") and text != ""
        for line in text.splitlines():
            try:
                answer = CachedAnswer(**json.loads(line))
            except (ValueError, TypeError):
                continue  # the last line of a process that was killed while writing it
            self._answers[tuple(answer.prompt_ids)] = answer


def answers_of(trajectory: Trajectory) -> list[CachedAnswer]:
    """Each row of a trajectory as an answer."""
    mask_BR = trajectory.response_mask_BR
    entropies = (trajectory.entropy_BR * mask_BR).sum(dim=1) / trajectory.lengths_B.clamp(min=1)
    columns = (
        trajectory.prompts(),
        trajectory.responses(),
        trajectory.finished_B.tolist(),
        trajectory.logprobs_BR.sum(dim=1).tolist(),
        entropies.tolist(),
    )
    return [CachedAnswer(*row) for row in zip(*columns, strict=True)]


@torch.no_grad()
def weights_hash(backbone: Backbone, adapter: str | None) -> str:
    """SHA-256 over every byte of the base and of the adapter, by name, whatever other adapters lie beside it."""
    digest = hashlib.sha256()
    wrapped = tuple(f"{path}.base." for path in lora_layers(backbone.model))
    tensors: dict[str, Tensor] = {}
    for name, parameter in backbone.model.named_parameters():
        if ".lora_" not in name:
            before = next((prefix for prefix in wrapped if name.startswith(prefix)), None)
            plain = name if before is None else name.replace(before, before.removesuffix("base."))
            tensors |= {plain: parameter} | {f"{plain}.{key}": scale for key, scale in scales_of(parameter).items()}
    if adapter is not None:
        tensors |= adapter_state_dict(backbone.model, adapter)
        layers = lora_layers(backbone.model, adapter)
        digest.update(repr({path: layers[path].settings[adapter].scaling for path in sorted(layers)}).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
