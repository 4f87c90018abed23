"""How many tokens a model is fed to draw answers, padding and finished rows included."""

from __future__ import annotations

import pytest
import torch
from tiny_backbones import random_prompts, tiny_backbone

from rlhf.models import decoding
from rlhf.models.decoding import GenerationConfig
from rlhf.models.policy import Policy
from rlhf.rollout.sampler import Sampler
from rlhf.rollout.trajectory import concatenate

PROMPTS = random_prompts(20, seed=3)


def drawn(batch_size: int, monkeypatch: pytest.MonkeyPatch, leave_share: float) -> tuple[int, list[int]]:
    """What the sampler counted, and the length of every answer."""
    monkeypatch.setattr(decoding, "LEAVE_SHARE", leave_share)
    backbone = tiny_backbone()
    sampler = Sampler(Policy(backbone, None), GenerationConfig(max_new_tokens=9, batch_size=batch_size), [1, 5, 9, 20])
    trajectory = sampler.sample(PROMPTS, 0)
    assert len(set(trajectory.lengths_B.tolist())) > 3
    lengths = trajectory.lengths_B.tolist()
    assert trajectory.num_padding == trajectory.num_through - sum(map(len, PROMPTS)) - sum(n - 1 for n in lengths)
    return trajectory.num_through, lengths


def test_rows_that_leave_at_once_are_fed_all_but_their_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    through, lengths = drawn(20, monkeypatch, leave_share=0.0)
    assert through == 20 * max(map(len, PROMPTS)) + sum(length - 1 for length in lengths)


def test_rows_that_never_leave_are_fed_as_long_as_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    through, lengths = drawn(20, monkeypatch, leave_share=2.0)
    assert through == 20 * (max(map(len, PROMPTS)) + max(lengths) - 1)


def test_batches_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    through, lengths = drawn(8, monkeypatch, leave_share=0.0)
    by_length = sorted(len(prompt) for prompt in PROMPTS)
    widest = [max(part) * len(part) for part in (by_length[:8], by_length[8:16], by_length[16:])]
    assert through == sum(widest) + sum(length - 1 for length in lengths)


def test_what_is_counted_stays_with_rows_that_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    trajectory = Sampler(Policy(backbone, None), GenerationConfig(max_new_tokens=4), [1]).sample(PROMPTS, 0)
    chosen = trajectory.select(torch.tensor([0, 3]))
    assert (chosen.num_through, chosen.num_padding) == (trajectory.num_through, trajectory.num_padding)
    both = concatenate([chosen, trajectory], pad_token_id=0)
    assert both.num_through == 2 * trajectory.num_through > 0 < both.num_padding == 2 * trajectory.num_padding
