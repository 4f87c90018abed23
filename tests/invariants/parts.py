"""What the checklist's tests are made of: both shapes of model, sampled answers, PPO on parts made by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tiny_backbones import WORDS, add_trained_adapter, random_prompts, tiny_backbone, word_tokenizer
from torch import Tensor, nn

from rlhf.data.chat import ChatEncoder
from rlhf.data.data_config import DataConfig
from rlhf.data.preference_dataset import PreferenceExample
from rlhf.data.prompt_dataset import PromptExample
from rlhf.data.rows import LabelledRow, PreferenceRow, Prompt
from rlhf.data.unpaired_dataset import UnpairedDataset
from rlhf.infra.experiment import Run
from rlhf.models.backbone import Backbone
from rlhf.models.decoding import GenerationConfig
from rlhf.models.policy import Policy
from rlhf.models.reference import Reference
from rlhf.models.value_head import ValueHead
from rlhf.recipes.ppo import PPO
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.rollouts import OnlineParts
from rlhf.rewards.protocol import CombinedReward, RewardFunction, RewardTerm
from rlhf.rollout.sampler import Sampler
from rlhf.rollout.trajectory import Experience, Trajectory

Shape = Literal["gpt2", "qwen2"]
# Learned positions with EOS as padding, and rotary positions with a padding token of its own.
SHAPES: tuple[Shape, ...] = ("gpt2", "qwen2")
PROMPTS = random_prompts(8)


def backbone_of(shape: Shape, *, dropout: float = 0.0, bf16: bool = False) -> Backbone:
    """A frozen base with an SFT adapter and a policy that starts as its copy and trains."""
    backbone = tiny_backbone(shape, separate_pad=shape == "qwen2", dropout=dropout)
    if bf16:
        backbone.model.bfloat16()
        backbone.dtype_name = "bf16"
    add_trained_adapter(backbone, "sft", seed=3)
    backbone.copy_adapter("sft", "policy")
    backbone.train_only(["policy"])
    return backbone


def policy_on(backbone: Backbone) -> Policy:
    """The policy with a critic whose values are not zero."""
    torch.manual_seed(1)
    head = ValueHead(backbone.width)
    nn.init.normal_(head.last.weight)
    return Policy(backbone, "policy", head)


def sampled(policy: Policy, prompts: Sequence[Sequence[int]] = PROMPTS, **settings: Any) -> Trajectory:
    """Answers of at most 6 tokens."""
    config = GenerationConfig(**({"max_new_tokens": 6} | settings))
    return Sampler(policy, config, [policy.backbone.tokenizer.eos_token_id]).sample(prompts, 0)


def asked(trajectory: Trajectory) -> tuple[Tensor, Tensor, Tensor, float]:
    """What policy and reference are asked about a trajectory."""
    return (
        trajectory.input_ids_BT,
        trajectory.attention_mask_BT,
        trajectory.response_mask_BR,
        trajectory.temperature,
    )


def pairs(count: int, seed: int = 0) -> list[PreferenceExample]:
    """Preference pairs of ragged length; their ids end with EOS as an encoder's do (id 1 where padding is id 0)."""
    parts = [random_prompts(count, seed=seed + offset) for offset in range(3)]
    return [
        PreferenceExample(prompt, [*chosen, 1], [*rejected, 1], 0.1 * index, PreferenceRow("p", "c", "r"))
        for index, (prompt, chosen, rejected) in enumerate(zip(*parts, strict=True))
    ]


def labelled(count: int, seed: int = 0, **settings: Any) -> UnpairedDataset:
    """Answers with a thumb, three up for two down; every third prompt has two of them, as in a pair taken apart."""
    texts = [" ".join(WORDS[i - 3] for i in ids) for ids in random_prompts(2 * count, seed=seed)]
    rows = [
        LabelledRow(f"{WORDS[(i - (i % 3 == 1)) % 20]} {texts[0]}", texts[count + i], i % 5 < 3) for i in range(count)
    ]
    config = DataConfig.model_validate({"min_length": 1, "max_length": 40} | settings)
    return UnpairedDataset.from_rows(rows, ChatEncoder(word_tokenizer()), config)


def red_words(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """A reward with something to say of every answer: its length, and how often it says red."""
    return [0.3 * text.count("red") - 0.1 * len(text.split()) for text in completions]


def ppo_on(
    folder: Path,
    backbone: Backbone,
    name: str = "run",
    reward: RewardFunction = red_words,
    run: Run | None = None,
    **sections: dict[str, Any],
) -> PPO:
    """PPO from the SFT adapter of a backbone; `sections` are those of its configuration, `run` one to take up again."""
    run_section = {"output_dir": folder, "name": name, "device": "cpu", "num_threads": 1} | sections.pop("run", {})
    shared: dict[str, Any] = {
        "run": run_section,
        "generation": {"max_new_tokens": 6},
        "ppo": {"rollout_batch_size": 8, "num_iterations": 2},
        "optimizer": {"learning_rate": 0.01},
    }
    config = PPOConfig.model_validate({key: shared.get(key, {}) | sections.get(key, {}) for key in shared | sections})
    encoder = ChatEncoder(backbone.tokenizer)
    texts = [
        " ".join([WORDS[place], *(WORDS[i - 3] for i in ids)]) for place, ids in enumerate(random_prompts(12, seed=1))
    ]
    parts = OnlineParts(
        Policy(backbone, "policy", ValueHead(backbone.width)),
        Reference(backbone, "sft"),
        CombinedReward([RewardTerm("reward", reward)]),
        [PromptExample(encoder.prompt_ids(text), text, {}) for text in texts],
        encoder,
    )
    return PPO(config, Run.create("ppo", config, config.run) if run is None else run, parts)


def experience_of(ppo: PPO) -> Experience:
    """One rollout, scored and with its advantages."""
    batch = ppo.next_prompts()
    trajectory = ppo.sample(batch)
    scores = ppo.rollouts.score(batch, trajectory)
    shaped = ppo.rollouts.shape(trajectory, scores, ppo.progress.moments)
    return ppo.estimate_advantages(trajectory, scores, shaped)


def read_log(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's log without what depends on the clock and the machine."""
    lines = [json.loads(line) for line in (folder / "logs" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "rate/", "memory/"))} for line in lines]
