"""Our side of the benchmark: python bench/ours.py KIND FOLDER STEPS [--dtype bf16] [--value-adapter] [--same-batch].

KIND is sft, rm, dpo, kto, ppo, grpo or generate; FOLDER comes from `workload.py`. The recipes run as `rlhf` runs them;
what is timed is their `train`: everything from the first batch to the saved policy, reference passes and the checkpoint
included. The last line printed is one JSON object. `--same-batch` trains on the same first rows in every step; grpo
makes STEPS updates from answers that are given then, not drawn.
Two kinds are for holding results beside others': logprobs, and answers (tokens drawn for the first prompts).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from static_decode import BACKENDS, StaticPolicy
from workload import MAX_LENGTH, PROMPT_TOKENS, TARGET_WORDS

from rlhf.algo.kl import KLConfig
from rlhf.algo.trainer import OptimizerConfig, StepReport, Trainer
from rlhf.data.chat import ChatEncoder
from rlhf.data.collate import pad_left
from rlhf.data.data_config import DataConfig, InstructionDataConfig, PromptDataConfig
from rlhf.data.order import epoch_order
from rlhf.infra.config import Config
from rlhf.infra.device import resolve_device
from rlhf.infra.experiment import Run, RunConfig
from rlhf.infra.profiling import PhaseTimer, peak_memory_mb
from rlhf.models.backbone import ModelConfig
from rlhf.models.decoding import GenerationConfig
from rlhf.models.policy import Policy
from rlhf.recipes import dpo, grpo, kto, ppo, reward, sft
from rlhf.recipes.grpo_config import GRPOConfig, GRPOKLConfig, GRPOSettings
from rlhf.recipes.launch import launch
from rlhf.recipes.online_report import OnlineReport
from rlhf.recipes.online_state import Progress, Rollout
from rlhf.recipes.ppo_config import PPOConfig, PPOSettings
from rlhf.recipes.rollouts import OnlineParts
from rlhf.recipes.stages import LoadedPolicy, load_policy
from rlhf.recipes.supervised import TrainingConfig
from rlhf.rewards.protocol import RewardTermConfig
from rlhf.rollout.sampler import Sampler
from rlhf.rollout.trajectory import Trajectory

Parts = TypeVar("Parts")
ROWS, ROLLOUT, NEW_TOKENS, GENERATED = 8, 32, 48, 64
GROUP = 8
# Rows of like length side by side, in passes that leave the activations in the cache.
MICRO_BATCH = {"fp32": 1024, "bf16": 2048}


class Bench:
    """The settings of one measurement."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.folder, self.steps, self.dtype = Path(asked.folder), asked.steps, asked.dtype
        self.value_adapter, self.same_batch = asked.value_adapter, asked.same_batch
        self.device, self.static = resolve_device(asked.device), asked.static
        self.new_tokens = asked.new_tokens
        self.micro_batch = asked.micro_batch or MICRO_BATCH[asked.dtype]
        self.model = ModelConfig(load_in_4bit=asked.load_in_4bit, gradient_checkpointing=asked.gradient_checkpointing)
        self._scratch = tempfile.TemporaryDirectory(prefix="rlhf-bench-")  # removed with the last reference to it
        self.scratch = Path(self._scratch.name)

    def run(self) -> RunConfig:
        return RunConfig(name="bench", output_dir=self.scratch, device=self.device.type, dtype=self.dtype)

    def rows(self, name: str, count: int) -> tuple[str]:
        """A file of the first `count` rows, or of those of one step."""
        lines = (self.folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
        kept = lines[: min(ROWS, count) if self.same_batch else count]
        path = self.scratch / name
        path.write_text("".join(kept), encoding="utf-8")
        return (str(path),)

    def training(self) -> TrainingConfig:
        epochs = self.steps if self.same_batch else 1
        return TrainingConfig(
            num_train_epochs=epochs,
            per_device_train_batch_size=ROWS,
            max_tokens_per_micro_batch=self.micro_batch,
        )

    def pairs(self) -> DataConfig:
        files = self.rows("pairs.jsonl", ROWS * self.steps)
        return DataConfig(train_files=files, max_length=MAX_LENGTH, min_length=1, validation_fraction=0.0)

    def labelled(self) -> DataConfig:
        """Answers with a label in such an order that the recipe's shuffling gives the steps that the peer's has.

        The peer takes the file as it is and puts an answer behind the prompt of the row after its own, in a round of
        the step; ours behind that of the row before. So within a step the rows stand the other way round.
        """
        path = Path(self.rows("labelled.jsonl", ROWS * self.steps)[0])
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        placed = dict(zip(epoch_order(len(lines), RunConfig().seed, 0), range(len(lines)), strict=True))
        steps = [lines[start : start + ROWS][::-1] for start in range(0, len(lines), ROWS)]
        wanted = [line for step in steps for line in step]
        path.write_text("".join(wanted[placed[row]] for row in range(len(lines))), encoding="utf-8")
        return DataConfig(train_files=(str(path),), max_length=MAX_LENGTH, min_length=1, validation_fraction=0.0)

    def loaded(self) -> LoadedPolicy:
        return load_policy(str(self.folder / "start"), self.model, self.scratch, self.device, self.dtype)

    def prompt_ids(self, loaded: LoadedPolicy, count: int) -> list[list[int]]:
        """The first prompts; all of them have the same length."""
        lines = (self.folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        encoder = ChatEncoder(loaded.backbone.tokenizer)
        return encoder.prompt_ids_batch([json.loads(line)["prompt"] for line in lines])

    def sampler(self, loaded: LoadedPolicy) -> Sampler:
        """Draws every answer to its full length."""
        policy = Policy(loaded.backbone, loaded.adapter)
        if self.static is not None:
            policy = StaticPolicy(loaded.backbone, loaded.adapter, backend=self.static)
        return Sampler(policy, GenerationConfig(max_new_tokens=self.new_tokens), [])

    def wait(self) -> None:
        """Until the device has done what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, recipe: str, config: Config, prepare: Any, train: Any) -> dict[str, Any]:
        seconds = 0.0

        def timed_train(config: Config, run: Run, parts: Any) -> tuple[int, int]:
            nonlocal seconds
            started = time.perf_counter()
            cost: tuple[int, int] = train(config, run, parts)
            self.wait()
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
        model=bench.model.model_copy(update={"name_or_path": str(bench.folder / "start")}),
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
        model=bench.model,
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
        model=bench.model,
        data=bench.pairs(),
        training=bench.training(),
        optimizer=OptimizerConfig(learning_rate=1e-4),
    )
    return bench.timed("dpo", config, dpo.prepare, dpo.train)


def run_ppo(bench: Bench) -> dict[str, Any]:
    config = PPOConfig(
        run=bench.run(),
        policy=str(bench.folder / "start"),
        model=bench.model,
        reward_model=str(bench.folder / "reward_start"),
        data=PromptDataConfig(
            train_files=bench.rows("prompts.jsonl", ROLLOUT * bench.steps),
            max_prompt_length=PROMPT_TOKENS,
            validation_fraction=0.0,
        ),
        generation=GenerationConfig(max_new_tokens=bench.new_tokens),
        ppo=PPOSettings(
            num_iterations=bench.steps,
            rollout_batch_size=ROLLOUT,
            num_ppo_epochs=4,
            num_mini_batches=1,
            target_kl=None,
            max_tokens_per_micro_batch=bench.micro_batch,
            value_adapter=bench.value_adapter,
        ),
        kl=KLConfig(coefficient=0.05),
        optimizer=OptimizerConfig(learning_rate=1e-5),
    )
    return bench.timed("ppo", config, ppo.prepare, ppo.train)


def run_kto(bench: Bench) -> dict[str, Any]:
    config = kto.KTOConfig(
        run=bench.run(),
        policy=str(bench.folder / "start"),
        model=bench.model,
        data=bench.labelled(),
        training=bench.training(),
        optimizer=OptimizerConfig(learning_rate=1e-4),
    )
    return bench.timed("kto", config, kto.prepare, kto.train)


def run_grpo(bench: Bench) -> dict[str, Any]:
    num_prompts = ROLLOUT // GROUP
    config = GRPOConfig(
        run=bench.run(),
        policy=str(bench.folder / "start"),
        model=bench.model,
        rewards=[RewardTermConfig(name="length_penalty", arguments={"target_words": TARGET_WORDS, "per_word": 1.0})],
        data=PromptDataConfig(
            train_files=bench.rows("prompts.jsonl", num_prompts if bench.same_batch else num_prompts * bench.steps),
            max_prompt_length=PROMPT_TOKENS,
            validation_fraction=0.0,
        ),
        generation=GenerationConfig(max_new_tokens=bench.new_tokens),
        grpo=GRPOSettings(
            num_iterations=1 if bench.same_batch else bench.steps,
            num_prompts=num_prompts,
            num_generations=GROUP,
            num_epochs=bench.steps if bench.same_batch else 1,
            max_tokens_per_micro_batch=bench.micro_batch,
            recompute_logprobs=bench.same_batch,
        ),
        kl=GRPOKLConfig(coefficient=0.05),
        optimizer=OptimizerConfig(learning_rate=1e-4),
    )
    losses: list[float] = []

    def train_on_given_answers(config: GRPOConfig, run: Run, parts: OnlineParts) -> tuple[int, int]:
        algorithm = grpo.GRPO(config, run, parts)
        algorithm.rollouts.sampler = GivenAnswers(bench, parts.policy)
        algorithm.report = EveryLoss(run, run.timer, losses)
        progress = algorithm.train()
        return algorithm.updates.trainer.step_count, progress.tokens

    measured = bench.timed("grpo", config, grpo.prepare, train_on_given_answers if bench.same_batch else grpo.train)
    return measured | ({"losses": losses} if bench.same_batch else {})


class GivenAnswers(Sampler):
    """Draws nothing: answer k of prompt n is the start of prompt 4 + 8 n + k, k tokens short of all 48.

    Prompts are numbered as they stand in the workload; their log-probabilities are for the recipe to compute.
    """

    def __init__(self, bench: Bench, policy: Policy) -> None:
        super().__init__(policy, GenerationConfig(max_new_tokens=bench.new_tokens), [])
        encoder = ChatEncoder(policy.backbone.tokenizer)
        lines = (bench.folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
        self.known = encoder.prompt_ids_batch(
            [json.loads(line)["prompt"] for line in lines[: ROLLOUT + ROLLOUT // GROUP]]
        )

    def sample(self, prompts: Sequence[Sequence[int]], seed: int) -> Trajectory:
        answers, pad = [], self.policy.backbone.tokenizer.pad_token_id
        for row, prompt in enumerate(prompts):
            number, k = self.known.index(list(prompt)), row % GROUP
            answers.append(self.known[ROLLOUT // GROUP + GROUP * number + k][: self.config.max_new_tokens - k])
        width = max(map(len, answers))
        ids_BR = torch.tensor([[*answer, *[pad] * (width - len(answer))] for answer in answers])
        mask_BR = torch.arange(width) < torch.tensor([[len(answer)] for answer in answers])
        nothing_BR = torch.zeros(ids_BR.shape)
        batch = pad_left([list(prompt) for prompt in prompts], pad)
        tensors = (batch.input_ids_BP, batch.attention_mask_BP, ids_BR, mask_BR, nothing_BR, nothing_BR)
        on_device = (tensor.to(self.policy.backbone.device) for tensor in tensors)
        unfinished_B = torch.zeros(len(answers), dtype=torch.bool, device=self.policy.backbone.device)
        return Trajectory(*on_device, None, unfinished_B, self.config.temperature)


class EveryLoss(OnlineReport):
    """Keeps the loss of every update, where the log has their mean."""

    def __init__(self, run: Run, timer: PhaseTimer, losses: list[float]) -> None:
        super().__init__(run, timer)
        self.losses = losses

    def log(self, progress: Progress, rollout: Rollout, updates: Sequence[StepReport], trainer: Trainer) -> None:
        self.losses += [update.loss for update in updates]
        super().log(progress, rollout, updates, trainer)


def run_generate(bench: Bench) -> dict[str, Any]:
    loaded = bench.loaded()
    ids, sampler, tokens = bench.prompt_ids(loaded, GENERATED), bench.sampler(loaded), 0
    # A graph is recorded at the second run; a GPU loads its kernels in the first.
    num_warm, started = 2 if bench.static is not None else 1 if bench.device.type == "cuda" else 0, time.perf_counter()
    for _ in range(num_warm):
        sampler.sample(ids, seed=0)
    bench.wait()
    compile_seconds = time.perf_counter() - started
    started = time.perf_counter()
    for step in range(bench.steps):
        tokens += int(sampler.sample(ids, seed=step).response_mask_BR.sum())
    bench.wait()
    seconds = time.perf_counter() - started
    measured = {"seconds": seconds, "steps": bench.steps, "tokens": tokens, "optimizer_steps": 0}
    return measured | ({"compile_seconds": compile_seconds} if bench.static is not None else {})


def run_answers(bench: Bench) -> dict[str, Any]:
    """What is drawn for the first prompts, token by token, to hold beside another device's or another loop's."""
    loaded = bench.loaded()
    drawn = bench.sampler(loaded).sample(bench.prompt_ids(loaded, ROWS), seed=0)
    return {
        "responses": drawn.responses(),
        "logprobs": drawn.logprobs_BR.tolist(),
        "seconds": 0.0,
        "steps": 1,
        "tokens": int(drawn.response_mask_BR.sum()),
        "optimizer_steps": 0,
    }


def run_logprobs(bench: Bench) -> dict[str, Any]:
    """Mean log-probability of the prompts' last 16 tokens, as PPO's update computes it, to hold beside the peer's."""
    loaded = bench.loaded()
    ids_BT = torch.tensor(bench.prompt_ids(loaded, ROLLOUT), device=bench.device)
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
    "kto": run_kto,
    "ppo": run_ppo,
    "grpo": run_grpo,
    "generate": run_generate,
    "logprobs": run_logprobs,
    "answers": run_answers,
}


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for; `words` are the command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("folder")
    parser.add_argument("steps", type=int)
    parser.add_argument("--dtype", choices=sorted(MICRO_BATCH), default="fp32")
    parser.add_argument("--value-adapter", action="store_true")
    parser.add_argument("--same-batch", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--micro-batch", type=int, help="tokens of one pass; default: as is best for the small model")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--static", choices=sorted(BACKENDS), help="sample with fixed shapes, compiled so")
    return parser.parse_args(words)


def measure(words: Sequence[str] | None = None) -> dict[str, Any]:
    """One measurement; `words` are the command's arguments."""
    asked = arguments(words)
    torch.compiler.reset()  # of what an earlier measurement in this process compiled
    bench = Bench(asked)
    measured = KINDS[asked.kind](bench)
    measured["s_per_step"] = measured["seconds"] / measured["steps"]
    measured["peak_mb"] = peak_memory_mb(bench.device)
    return measured


def main() -> None:
    print(json.dumps(measure()))


if __name__ == "__main__":
    main()
