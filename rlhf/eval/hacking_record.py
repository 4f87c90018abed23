"""What was seen of reward hacking in a run, and the same signs looked for after training on held-out prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.eval.hacking import HackingConfig, Look, Mean, Verdict, judge, text_figures
from rlhf.eval.samples import Sample
from rlhf.infra.errors import UserError


@dataclass(frozen=True)
class HackingRecord:
    """Looks at one policy and the verdicts on them.

    The first look is what the others are compared with: the policy that training started from, or the reference model.
    `settings` are those of `HackingConfig` the verdicts were found with. `after_training` tells a look at a trained
    model from those that were taken while it trained.
    """

    policy: str
    looks: tuple[Look, ...]
    verdicts: tuple[Verdict, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    after_training: bool = False

    @property
    def title(self) -> str:
        """The policy and when it was looked at."""
        return f"{self.policy}, {'after training' if self.after_training else 'while it trained'}"

    @property
    def caught(self) -> tuple[Verdict, ...]:
        """The signs that were there."""
        return tuple(verdict for verdict in self.verdicts if verdict.caught)


def read_record(path: Path, policy: str) -> HackingRecord:
    """Read a run's `hacking.json`. Raises UserError where the file is not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return HackingRecord(
            policy,
            tuple(Look.from_json(look) for look in found["looks"]),
            tuple(Verdict.from_json(verdict) for verdict in found["verdicts"]),
            dict(found["settings"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"'{path}' cannot be read as a record of looks for reward hacking ({type(error).__name__}: {error}); move "
            "it away to report without it"
        ) from error


def look_after(
    policy: str, before: Sequence[Sample], after: Sequence[Sample], settings: Mapping[str, Any]
) -> HackingRecord | None:
    """Judge a trained model by the reference's answers and its own to the prompts that both answered; None without.

    The signs are those of training, as far as answers show them: what was paid for training prompts and what the
    members of an ensemble say is known in training only.
    """
    shared = {sample.prompt_id for sample in before} & {sample.prompt_id for sample in after}
    if not shared:
        return None
    figures = [_figures([sample for sample in samples if sample.prompt_id in shared]) for samples in (before, after)]
    # A figure of one of the two alone says nothing of a change, KL excepted, which is that of the second.
    looks = (Look(0, {name: figures[0][name] for name in figures[0] if name in figures[1]}), Look(1, figures[1]))
    verdicts = tuple(judge(looks, HackingConfig(**settings)))
    return HackingRecord(policy, looks, verdicts, dict(settings), after_training=True)


def _figures(samples: Sequence[Sample]) -> dict[str, Mean]:
    found = text_figures([sample.response for sample in samples])
    measured = {
        "length": [float(sample.num_tokens) for sample in samples],
        "entropy": [sample.entropy for sample in samples],
        "reward": [sample.reward for sample in samples],
        "kl": [sample.kl for sample in samples],
        "gold": [sample.gold for sample in samples],
    }
    for name, values in measured.items():
        known = [value for value in values if value is not None]
        # A mean over some of the answers would be one over other answers than the first look's.
        if len(known) == len(samples) and all(map(math.isfinite, known)):
            found[name] = Mean.of(known)
    return found
