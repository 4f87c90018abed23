"""What the peer's scripts have in common: their arguments, and the one JSON object that each prints last."""

import argparse
import json
import resource
from pathlib import Path

import torch


def arguments(*kinds: str, steps: str = "steps", flags: tuple[str, ...] = ()) -> argparse.Namespace:
    """What was asked for: [KIND] FOLDER STEPS [--bf16] [--device cuda], and flags of one script."""
    parser = argparse.ArgumentParser()
    if kinds:
        parser.add_argument("kind", choices=kinds)
    parser.add_argument("folder", type=Path)
    parser.add_argument("steps", metavar=steps, type=int)
    for flag in ("--bf16", *flags):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser.parse_args()


def tell(asked: argparse.Namespace, seconds: float, *, optimizer_steps: int, tokens: int, **more: object) -> None:
    """Print what was measured."""
    measured = {
        "seconds": seconds,
        "steps": asked.steps,
        "optimizer_steps": optimizer_steps,
        "s_per_step": seconds / asked.steps,
        "tokens": tokens,
        "peak_mb": peak_mb(asked.device),
    }
    print(json.dumps(measured | more))


def peak_mb(device: str) -> float:
    """Most memory at once: allocated on a GPU, resident on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
