from __future__ import annotations

import json
import random

import numpy as np
import torch

from rlhf.infra.determinism import (
    derive_seed,
    generator_state,
    restore_generator_state,
    restore_rng_state,
    rng_state,
    seed_everything,
)


def draw() -> tuple[float, float, float, float, float]:
    """One draw from each generator; the Gaussian ones keep a second value in hand, which is state too."""
    normal = float(torch.randn(()))
    return random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()), normal


def test_same_seed_same_draws() -> None:
    seed_everything(5)
    first = draw()
    seed_everything(6)
    other = draw()
    seed_everything(5)
    assert draw() == first
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_seed_may_be_larger_than_numpy_takes() -> None:
    seed_everything(2**62)
    assert torch.initial_seed() == 2**62


def test_state_goes_through_json_and_back() -> None:
    seed_everything(0)
    draw()  # leaves half of a pair of Gaussians behind
    text = json.dumps(rng_state())
    expected = [draw() for _ in range(3)]
    seed_everything(99)
    restore_rng_state(json.loads(text))
    assert [draw() for _ in range(3)] == expected


def test_generator_state_goes_through_text_and_back() -> None:
    generator = torch.Generator().manual_seed(1)
    torch.rand(3, generator=generator)
    text = generator_state(generator)
    expected = torch.rand(4, generator=generator)
    other = torch.Generator()
    restore_generator_state(other, text)
    assert torch.equal(torch.rand(4, generator=other), expected)


def test_derived_seeds_are_fixed_numbers() -> None:
    # sha256 of '[0, "rollout", 12]', its first 63 bits, worked out with sha256sum
    assert derive_seed(0, "rollout", 12) == 0x608BB491B2005C12


def test_derived_seeds_differ_by_every_part() -> None:
    seeds = {
        derive_seed(0),
        derive_seed(1),
        derive_seed(0, "a"),
        derive_seed(0, "b"),
        derive_seed(0, "a", 1),
        derive_seed(0, "a1"),
        derive_seed(0, "a", "1"),
    }
    assert len(seeds) == 7
    assert all(0 <= seed < 2**63 for seed in seeds)
