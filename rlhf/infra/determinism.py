"""Seeds and random-number states, so that the same seed gives the same run and a resumed run goes on as it was.

States are plain JSON values: they are stored without pickle.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices) and ask PyTorch for deterministic kernels where it has them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    # cuBLAS reads this when it starts; without it its matrix products may differ from run to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling fresh memory with NaN is a debugging aid that costs time and changes no result of correct code.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed of 63 bits for the purpose that the names describe; equal in every process and on every machine.

    `derive_seed(0, "rollout", 12)` and `derive_seed(0, "rollout", 13)` are unrelated streams.
    """
    text = json.dumps([seed, *names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rng_state() -> dict[str, Any]:
    """States of the global generators of Python, NumPy, PyTorch and each CUDA device, as JSON values."""
    version, words, gauss_next = random.getstate()
    numpy_name, numpy_words, position, has_gauss, cached_gauss = np.random.get_state(legacy=True)
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(words), gauss_next],
        "numpy": [str(numpy_name), [int(word) for word in numpy_words], int(position), int(has_gauss), cached_gauss],
        "torch": _to_text(torch.get_rng_state()),
        "cuda": [_to_text(state) for state in cuda_states],
    }


def restore_rng_state(state: dict[str, Any]) -> None:
    """Put the global generators back to what `rng_state` returned.

    CUDA states are restored for the devices that are here: a run may go on where there are fewer or none.
    """
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words), gauss_next))
    name, numpy_words, position, has_gauss, cached_gauss = state["numpy"]
    np.random.set_state((name, np.array(numpy_words, dtype=np.uint32), position, has_gauss, cached_gauss))
    torch.set_rng_state(_to_tensor(state["torch"]))
    num_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index, text in enumerate(state["cuda"][:num_cuda]):
        torch.cuda.set_rng_state(_to_tensor(text), index)


def generator_state(generator: torch.Generator) -> str:
    """State of one generator as text for JSON."""
    return _to_text(generator.get_state())


def restore_generator_state(generator: torch.Generator, state: str) -> None:
    """Put a generator of the same kind of device back to what `generator_state` returned."""
    generator.set_state(_to_tensor(state))


def _to_text(state_bytes: torch.Tensor) -> str:
    return base64.b64encode(state_bytes.cpu().numpy().tobytes()).decode("ascii")


def _to_tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
