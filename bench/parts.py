"""What each saving is worth: python bench/parts.py FOLDER [--dtype bf16] [--repeats 9].

FOLDER comes from `bench/workload.py`. A pass over the PPO batch (32 rows of 64 + 48 tokens, forward and backward
through policy and value head) runs with and without each saving, alternating; so do a step on eight preference pairs
and one on four prompts with eight answers each.
Printed is the median of the ratios, and their spread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from transformers.activations import GELUTanh, NewGELUActivation
from workload import LORA

from rlhf.algo import logprobs
from rlhf.data.collate import pair_batch, pair_forest
from rlhf.data.forest import split_evenly, trees_per_prompt
from rlhf.data.preference_dataset import PreferenceExample
from rlhf.data.rows import PreferenceRow
from rlhf.infra import products
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.models.last_mlp import LastMLP
from rlhf.models.lora_layer import LoRALinear
from rlhf.models.policy import Policy
from rlhf.models.value_head import ValueHead
from rlhf.recipes.offline import summed_logprobs

PROMPT, RESPONSE, MICRO_ROWS, GROUP, PAIRS = 64, 48, 9, 8, 8


def make_policy(folder: Path, dtype: str, attention: str | None = None) -> Policy:
    torch.manual_seed(0)
    backbone = Backbone.load(ModelConfig(name_or_path=str(folder / "policy"), attn_implementation=attention), dtype)
    backbone.add_adapter("policy", LORA)
    backbone.train_only(["policy"])
    return Policy(backbone, "policy", ValueHead(backbone.width))


def ppo_pass(policy: Policy, num_rows: int) -> None:
    """Forward and backward over the batch, in passes of `MICRO_ROWS` rows."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(2, policy.backbone.vocab_size, (num_rows, PROMPT + RESPONSE), generator=generator)
    for rows_BT in ids_BT.split(MICRO_ROWS):
        mask_BT = torch.ones_like(rows_BT, dtype=torch.bool)
        found = policy.response_statistics(rows_BT, mask_BT, mask_BT[:, PROMPT:], 1.0, entropy_gradient=False)
        assert found.values_BR is not None
        (found.logprobs_BR.sum() + found.values_BR.sum()).backward()


def group_step(policy: Policy, num_rows: int, *, shared: bool) -> None:
    """Forward and backward over rows of which eight have one prompt, a prompt after another."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(2, policy.backbone.vocab_size, (num_rows, PROMPT + RESPONSE), generator=generator)
    num_trees = trees_per_prompt(PROMPT, RESPONSE, GROUP, policy.backbone.width)
    trees = [len(tree) for tree in split_evenly(range(GROUP), num_trees)] if shared else []
    for rows_BT in ids_BT.split(GROUP):
        rows_BT[:, :PROMPT] = rows_BT[:1, :PROMPT]
        mask_BT = torch.ones_like(rows_BT, dtype=torch.bool)
        found = policy.response_statistics(rows_BT, mask_BT, mask_BT[:, PROMPT:], 1.0, trees, entropy_gradient=False)
        found.logprobs_BR.sum().backward()


def pair_step(policy: Policy, _: int, *, shared: bool) -> None:
    """Log-probs of eight pairs of HH's mean lengths (78 + 44 and 42 tokens), forward and backward."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(2, policy.backbone.vocab_size, (count,), generator=generator).tolist()

    row = PreferenceRow("", "", "")
    pairs = [PreferenceExample(tokens(78), tokens(44), tokens(42), None, row) for _ in range(PAIRS)]
    batch = (pair_forest if shared else pair_batch)(pairs, 0).batch
    summed_logprobs(policy.backbone, "policy", batch).sum().backward()


def spelt_out(policy: Policy) -> AbstractContextManager[object]:
    gelu = NewGELUActivation()
    return patch.object(GELUTanh, "forward", lambda self, x: gelu(x))


def measure(on: Callable[[], None], off: Callable[[], None], repeats: int) -> str:
    on(), off()
    ratios, seconds = [], []
    for _ in range(repeats):
        taken = []
        for side in (on, off):
            started = time.perf_counter()
            side()
            taken.append(time.perf_counter() - started)
        ratios.append(taken[1] / taken[0])
        seconds.append(taken)
    before, after = (statistics.median(pair[i] for pair in seconds) for i in (1, 0))
    return f"{before:.3f} -> {after:.3f} s, {statistics.median(ratios):.2f} x ({min(ratios):.2f}-{max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="What each saving is worth.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rows", type=int, default=32, help="of a pass")
    asked = parser.parse_args()
    policy = make_policy(asked.folder, asked.dtype)
    fused_kernel = make_policy(asked.folder, asked.dtype, "sdpa")

    def under(context: Callable[[], AbstractContextManager[object]], who: Policy = policy) -> Callable[[], None]:
        def run() -> None:
            with context():
                ppo_pass(who, asked.rows)

        return run

    plain = under(nullcontext)
    without = {
        "products in fp32 by oneDNN, against MKL": under(
            lambda: patch.object(products, "BLAS_LEAVES_LANES_EMPTY", False)
        ),
        "GELU in one pass": under(lambda: spelt_out(policy)),
        "gradient of a frozen head with its logits": under(
            lambda: patch.object(logprobs, "_is_frozen", lambda *_: False)
        ),
        "short rows attended plainly, against sdpa": under(nullcontext, fused_kernel),
        "last MLP at answers only": under(lambda: patch.object(LastMLP, "only_at", lambda *_: nullcontext())),
        "LoRA and base as one node": under(lambda: patch.object(LoRALinear, "_is_plain", lambda *_: False)),
    }
    for name, off in without.items():
        print(f"{name}: {measure(plain, off, asked.repeats)}")
    for name, step in (("pair", pair_step), ("group", group_step)):
        on, off = (partial(step, policy, asked.rows, shared=shared) for shared in (True, False))
        print(f"prompt of a {name} read once: {measure(on, off, asked.repeats)}")


if __name__ == "__main__":
    main()
