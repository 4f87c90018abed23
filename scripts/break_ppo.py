"""PPO broken on purpose on the built-in world, to see what its logs say of it (docs/failures.md).

python scripts/break_ppo.py [BREAK ...] policy=demo/sft reward_model=demo/reward [section.key=value ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from rlhf.data.rows import Prompt
from rlhf.data.tinychat import gold_reward
from rlhf.infra.config import load_config
from rlhf.models.policy import Policy
from rlhf.recipes.launch import launch
from rlhf.recipes.ppo import prepare, train
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.rollouts import OnlineParts

# The demo's settings, and gold beside the reward with no weight: what the reward is a proxy of.
SOUND = [
    "run.overwrite=true", "model.attn_implementation=eager", "generation.max_new_tokens=64",
    "ppo.num_iterations=16", "ppo.rollout_batch_size=96", "ppo.num_ppo_epochs=2", "ppo.num_mini_batches=2",
    "ppo.target_kl=0.05", "ppo.max_tokens_per_micro_batch=1024", "kl.coefficient=0.05", "optimizer.learning_rate=0.003",
    "optimizer.adam_epsilon=1e-5", "optimizer.lr_scheduler_type=linear",
    f"rewards=[{{name: model}}, {{name: '{__file__}:gold', weight: 0}}]",
]  # fmt: skip
SHOWN = {
    "reward/mean": "reward", f"reward/term/{__file__}:gold": "gold", "kl/mean": "KL", "length/mean": "length",
    "length/finished_share": "finished", "entropy/mean": "entropy", "value/explained_variance": "explained",
    "policy/clip_fraction": "clipped", "policy/logprob_gap": "gap", "train/updates_this_iteration": "updates",
    "train/grad_norm": "gradient",
}  # fmt: skip


def gold(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Any) -> list[float]:
    """What the world itself thinks of the answers."""
    return gold_reward(prompts, completions, columns["task"])


def length(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward that any policy can hack: a hundredth per character."""
    return [len(text) / 100 for text in completions]


def frozen_noise(policy: Policy) -> None:
    """A value head of random weights that no gradient reaches."""
    assert policy.value_head is not None
    last = policy.value_head.last
    nn.init.normal_(last.weight, generator=torch.Generator().manual_seed(0))
    last.register_forward_hook(lambda module, inputs, output: output.detach())


def dropout_in_updates(policy: Policy) -> None:
    """What a model left in training mode does: a tenth of its activations is dropped where gradients are taken."""

    def drop(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return dropout(output, 0.1) if torch.is_grad_enabled() else output

    for name, module in policy.backbone.model.named_modules():
        if name.endswith("input_layernorm"):
            module.register_forward_hook(drop)


Break = tuple[list[str], Callable[[Policy], None] | None]
BREAKS: dict[str, Break] = {
    "sound": ([], None),
    "no_kl": (["kl.coefficient=0", "ppo.target_kl=null"], None),
    "learning_rate": (["optimizer.learning_rate=0.03"], None),
    "length_reward": ([f"rewards=[{{name: '{__file__}:length'}}, {{name: '{__file__}:gold', weight: 0}}]"], None),
    "value_head": ([], frozen_noise),
    "dropout": ([], dropout_in_updates),
}


def main(arguments: Sequence[str]) -> None:
    """Run the breaks that are named, or all, and print the first and the last iteration of each."""
    settings = [text for text in arguments if "=" in text]
    for name in [text for text in arguments if "=" not in text] or BREAKS:
        if name not in BREAKS:
            raise SystemExit(f"no break '{name}'; there are: {', '.join(BREAKS)}")
        own, damage = BREAKS[name]
        texts = [*SOUND, f"run.name={name}", *settings, *own]
        # A reward for length needs no reward model, and one that has no effect is refused.
        texts = [text for text in texts if name != "length_reward" or not text.startswith("reward_model=")]
        lines = broken(load_config(PPOConfig, overrides=texts), damage)
        for which, line in (("first", lines[0]), ("last", lines[-1])):
            print(f"{name:14} {which:5}", *(f"{label} {line[key]:.3g}" for key, label in SHOWN.items()), flush=True)


def broken(config: PPOConfig, damage: Callable[[Policy], None] | None) -> list[dict[str, float]]:
    """The log of a run whose policy was damaged before it began."""

    def damaged(config: PPOConfig, device: torch.device, rejected_rows: Path) -> OnlineParts:
        parts = prepare(config, device, rejected_rows)
        if damage is not None:
            damage(parts.policy)
        return parts

    run = launch("ppo", config, damaged, train, settings=config.run, data_files=config.data.files())
    text = (run.folder / "logs" / "train.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


if __name__ == "__main__":
    main(sys.argv[1:])
