"""Our side of the benchmark: python bench/ours.py KIND FOLDER STEPS [--dtype bf16] [--value-adapter] [--same-batch].

KIND is sft, rm, dpo, ppo or generate; FOLDER comes from `workload.py`. The recipes run as `rlhf` runs them; what is
timed is their `train`: everything from the first batch to the saved policy, DPO's reference pass and the checkpoint
included. The last line printed is one JSON object. `--same-batch` trains on the same first rows in every step.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from workload import LORA, MAX_LENGTH, PROMPT_TOKENS

from rlhf.algo.kl import KLConfig
from rlhf.algo.trainer import OptimizerConfig
from rlhf.data.chat import ChatEncoder
from rlhf.data.data_config import DataConfig, InstructionDataConfig, PromptDataConfig
from rlhf.data.prompt_dataset import PromptDataset
from rlhf.infra.config import Config
from rlhf.infra.experiment import Run, RunConfig
from rlhf.models.backbone import ModelConfig
from rlhf.models.decoding import GenerationConfig
from rlhf.models.policy import Policy
from rlhf.recipes import dpo, ppo, reward, sft
from rlhf.recipes.launch import launch
from rlhf.recipes.ppo_config import PPOConfig, PPOSettings
from rlhf.recipes.stages import load_policy
from rlhf.recipes.supervised import TrainingConfig
from rlhf.rollout.sampler import Sampler

Parts = TypeVar("Parts")
ROWS, ROLLOUT, NEW_TOKENS, GENERATED = 8, 32, 48, 64
# Rows of like length side by side, in passes that leave the activations in the cache.
MICRO_BATCH = {"fp32": 1024, "bf16": 2048}


class Bench:
    """The settings of one measurement."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder, self.steps, self.dtype = Path(arguments.folder), arguments.steps, arguments.dtype
        self.value_adapter, self.same_batch = arguments.value_adapter, arguments.same_batch
        self.scratch = Path(tempfile.mkdtemp(prefix="rlhf-bench-"))

    def run(self) -> RunConfig:
        return RunConfig(name="bench", output_dir=self.scratch, device="cpu", dtype=self.dtype)

    def rows(self, name: str, count: int) -> tuple[str]:
        """A file of the first `count` rows, or of those of one step."""
        lines = (self.folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
        kept = lines[: ROWS if self.same_batch else count]
        path = self.scratch / name
        path.write_text("".join(kept), encoding="utf-8")
        return (str(path),)

    def training(self) -> TrainingConfig:
        epochs = self.steps if self.same_batch else 1
        return TrainingConfig(
            num_train_epochs=epochs,
            per_device_train_batch_size=ROWS,
            max_tokens_per_micro_batch=MICRO_BATCH[self.dtype],
        )

    def pairs(self) -> DataConfig:
        files = self.rows("pairs.jsonl", ROWS * self.steps)
        return DataConfig(train_files=files, max_length=MAX_LENGTH, min_length=1, validation_fraction=0.0)

    def timed(self, recipe: str, config: Config, prepare: Any, train: Any) -> dict[str, Any]:
        seconds = 0.0

        def timed_train(config: Config, run: Run, parts: Any) -> tuple[int, int]:
            nonlocal seconds
            started = time.perf_counter()
            cost: tuple[int, int] = train(config, run, parts)
            seconds = time.perf_counter() - started
            return cost

        run = launch(recipe, config, prepare, timed_train, settings=config.run)
        log = [json.loads(line) for line in (run.folder / "logs" / "train.jsonl").read_text().splitlines()]
        cost = run.info["cost"]
        return {
            "seconds": seconds,
            "steps": self.steps,
            "optimizer_steps": cost["optimizer_steps"],
            "tokens": cost["tokens"],
            "losses": [line["train/loss"] for line in log if "train/loss" in line],
            "phases": {
                name: sum(line.get(name, 0.0) for line in log)
                for name in sorted({name for line in log for name in line if name.startswith("time/")})
            },
        }


def run_sft(bench: Bench) -> dict[str, Any]:
    files = bench.rows("answers.jsonl", ROWS * bench.steps)
    config = sft.SFTConfig(
        run=bench.run(),
        model=ModelConfig(name_or_path=str(bench.folder / "start"), lora=LORA),
        data=InstructionDataConfig(
            train_files=files, max_length=MAX_LENGTH, min_length=1, validation_fraction=0.0, train_on="last"
        ),
        training=bench.training(),
        optimizer=OptimizerConfig(learning_rate=1e-4),
    )
    return bench.timed("sft", config, sft.prepare, sft.train)


def run_rm(bench: Bench) -> dict[str, Any]:
    config = reward.RewardConfig(
        run=bench.run(),
        backbone=str(bench.folder / "start"),
        model=ModelConfig(lora=LORA),
        data=bench.pairs(),
        training=bench.training(),
        optimizer=OptimizerConfig(learning_rate=1e-4),
    )

    def prepare(config: reward.RewardConfig, device: torch.device, rejected: Path) -> reward.RewardParts:
        """The peer's head to start from, so that losses can be compared."""
        parts = reward.prepare(config, device, rejected)
        head = load_file(bench.folder / "reward_start" / "reward_head.safetensors")["head.weight"]
        parts.model.head.weight.data.copy_(head)
        return parts

    return bench.timed("reward", config, prepare, reward.train)


def run_dpo(bench: Bench) -> dict[str, Any]:
    config = dpo.DPOConfig(
        run=bench.run(),
        policy=str(bench.folder / "start"),
        model=ModelConfig(lora=LORA),
        data=bench.pairs(),
        training=bench.training(),
        optimizer=OptimizerConfig(learning_rate=1e-4),
    )
    return bench.timed("dpo", config, dpo.prepare, dpo.train)


def run_ppo(bench: Bench) -> dict[str, Any]:
    config = PPOConfig(
        run=bench.run(),
        policy=str(bench.folder / "start"),
        model=ModelConfig(lora=LORA),
        reward_model=str(bench.folder / "reward_start"),
        data=PromptDataConfig(
            train_files=bench.rows("prompts.jsonl", ROLLOUT * bench.steps),
            max_prompt_length=PROMPT_TOKENS,
            validation_fraction=0.0,
        ),
        generation=GenerationConfig(max_new_tokens=NEW_TOKENS),
        ppo=PPOSettings(
            num_iterations=bench.steps,
            rollout_batch_size=ROLLOUT,
            num_ppo_epochs=4,
            num_mini_batches=1,
            target_kl=None,
            max_tokens_per_micro_batch=MICRO_BATCH[bench.dtype],
            value_adapter=bench.value_adapter,
        ),
        kl=KLConfig(coefficient=0.05),
        optimizer=OptimizerConfig(learning_rate=1e-5),
    )
    return bench.timed("ppo", config, ppo.prepare, ppo.train)


def run_generate(bench: Bench) -> dict[str, Any]:
    loaded = load_policy(
        str(bench.folder / "start"), ModelConfig(lora=LORA), bench.scratch, torch.device("cpu"), bench.dtype
    )
    encoder = ChatEncoder(loaded.backbone.tokenizer)
    data = PromptDataConfig(
        train_files=bench.rows("prompts.jsonl", GENERATED), max_prompt_length=PROMPT_TOKENS, validation_fraction=0.0
    )
    bench.same_batch = False
    prompts, _ = PromptDataset.load(data, encoder)
    ids = [example.prompt_ids for example in prompts.examples]
    # Every answer to its full length on both sides.
    sampler = Sampler(Policy(loaded.backbone, loaded.adapter), GenerationConfig(max_new_tokens=NEW_TOKENS), [])
    started, tokens = time.perf_counter(), 0
    for step in range(bench.steps):
        tokens += int(sampler.sample(ids, seed=step).response_mask_BR.sum())
    return {"seconds": time.perf_counter() - started, "steps": bench.steps, "tokens": tokens, "optimizer_steps": 0}


def run_logprobs(bench: Bench) -> dict[str, Any]:
    """Mean log-probability of the prompts' last 16 tokens, as PPO's update computes it, to hold beside the peer's."""
    loaded = load_policy(str(bench.folder / "start"), ModelConfig(lora=LORA), bench.scratch, torch.device("cpu"))
    lines = (bench.folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:ROLLOUT]
    encoder = ChatEncoder(loaded.backbone.tokenizer)
    ids_BT = torch.tensor(encoder.prompt_ids_batch([json.loads(line)["prompt"] for line in lines]))
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    policy = Policy(loaded.backbone, loaded.adapter)
    found = policy.response_statistics(ids_BT, mask_BT, mask_BT[:, -16:], 1.0)
    return {
        "mean_logprob": float(found.logprobs_BR.mean()),
        "seconds": 0.0,
        "steps": 1,
        "tokens": 0,
        "optimizer_steps": 0,
    }


KINDS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "sft": run_sft,
    "rm": run_rm,
    "dpo": run_dpo,
    "ppo": run_ppo,
    "generate": run_generate,
    "logprobs": run_logprobs,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("folder")
    parser.add_argument("steps", type=int)
    parser.add_argument("--dtype", choices=sorted(MICRO_BATCH), default="fp32")
    parser.add_argument("--value-adapter", action="store_true")
    parser.add_argument("--same-batch", action="store_true")
    arguments = parser.parse_args()
    measured = KINDS[arguments.kind](Bench(arguments))
    measured["s_per_step"] = measured["seconds"] / measured["steps"]
    measured["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
