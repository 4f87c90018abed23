"""Commands of `rlhf` in processes of their own, each of which may die by SIGKILL at a chosen moment.

A process is a fork of the one that runs the tests, so that torch need not be imported again: all of them are single-
threaded. Where a GPU is present autograd has threads that a fork would lose; there a clean server process forks.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_backbones import tiny_model, word_tokenizer

from rlhf.algo.trainer import Trainer

PROCESSES: Any = multiprocessing.get_context("forkserver" if torch.cuda.is_available() else "fork")
WORDS = ["red", "green", "blue", "black", "cat", "dog", "bird", "fish", "one", "two", "three"]
CLOCK_AND_MACHINE = ("time/", "rate/", "memory/")


@dataclass(frozen=True)
class Ended:
    """How a process ended, what it said, and by name the moments it went through: steps, syncs, renames."""

    code: int
    output: str
    moments: list[str]


def command(
    folder: Path, *arguments: str, kill_at: int | None = None, prepare: Callable[[], None] | None = None
) -> Ended:
    """Run a command to its end, or until SIGKILL at the moment of that number; `prepare` runs in the process first."""
    folder.mkdir(parents=True, exist_ok=True)
    output, moments = folder / "output.txt", folder / "moments.txt"
    moments.write_text("")
    process = PROCESSES.Process(target=_work, args=(list(arguments), output, moments, kill_at, prepare))
    process.start()
    process.join()
    return Ended(process.exitcode, output.read_text(), moments.read_text().splitlines())


def _work(
    arguments: list[str], output: Path, moments: Path, kill_at: int | None, prepare: Callable[[], None] | None
) -> None:
    from rlhf.cli import main

    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if prepare is not None:
        prepare()
    _die_at(kill_at, moments)
    sys.argv = ["rlhf", *arguments]
    main()


def _die_at(kill_at: int | None, moments: Path) -> None:
    """Number the moments of this process, write their names down and kill it at one of them."""
    count = 0

    def before(function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            with moments.open("a") as file:
                file.write(f"{name(*arguments)}\n")
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return function(*arguments, **options)

        return watched

    Trainer.step = before(Trainer.step, lambda trainer, *_: f"step {trainer.step_count}")  # type: ignore[method-assign]
    Trainer._apply = before(Trainer._apply, lambda trainer, *_: f"gradients {trainer.step_count}")  # type: ignore[method-assign]
    os.fsync = before(os.fsync, lambda descriptor: f"sync {os.readlink(f'/proc/self/fd/{descriptor}')}")  # type: ignore[assignment]
    os.replace = before(os.replace, lambda source, target: f"rename to {target}")


def assert_same_run(found: Path, wanted: Path) -> None:
    """Final weights, newest checkpoint and logs are equal bit for bit; what the clock and the machine decide is not."""
    assert log_lines(found) == log_lines(wanted)
    assert scalars(found) == scalars(wanted)
    for product in ("policy", "reward_model"):
        assert (found / product).is_dir() == (wanted / product).is_dir()
        assert_same_tensors(found / product, wanted / product)
    ours, theirs = (newest_checkpoint(folder) for folder in (found, wanted))
    assert ours.name == theirs.name
    assert_same_tensors(ours, theirs)
    assert plain_state(ours) == plain_state(theirs)


def assert_same_tree(found: Path, wanted: Path) -> None:
    """The same of a run whose work is files of rows, and of one that has runs inside it."""
    for path in sorted(wanted.rglob("*")):
        ours, name = found / path.relative_to(wanted), path.name
        if path.is_dir() and (path / "run.json").is_file():
            assert status(ours) == "finished"
            if (path / "checkpoints").is_dir():
                assert_same_run(ours, path)
        elif name.endswith(".jsonl") and path.parent.name != "logs":
            assert ours.read_bytes() == path.read_bytes(), ours
    assert log_lines(found) == log_lines(wanted)
    assert_same_tensors(found / "policy", wanted / "policy")


def assert_same_tensors(found: Path, wanted: Path) -> None:
    files = sorted(path.name for path in wanted.glob("*.safetensors"))
    assert files == sorted(path.name for path in found.glob("*.safetensors"))
    for file in files:
        ours, theirs = load_file(found / file), load_file(wanted / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), file


def log_lines(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "logs" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(CLOCK_AND_MACHINE)} for line in lines]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The points TensorBoard shows."""
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith(CLOCK_AND_MACHINE)]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def newest_checkpoint(folder: Path) -> Path:
    return max(path for path in (folder / "checkpoints").iterdir() if path.name.startswith("step_"))


def plain_state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    del state["log_bytes"]  # a resumed run says that it was resumed
    del state["seconds_by_phase"]
    state.get("progress", {}).pop("seconds", None)
    return state


def status(folder: Path) -> str:
    return str(json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"])


def chosen(moments: Sequence[str], *words: str) -> list[int]:
    """Numbers of the moments whose name holds one of the words."""
    return [number for number, name in enumerate(moments) if any(word in name for word in words)]


class Workshop:
    """A base model, data, an SFT run and, for each recipe, the run that nobody interrupts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tokenizer = word_tokenizer()
        tiny_model("llama", len(tokenizer), spread=0.1).save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        prompts = [f"{a} {b}" for a in WORDS for b in WORDS[:3]]
        self._write("prompts", [{"prompt": prompt} for prompt in prompts])
        self._write("pairs", [{"prompt": prompt, "chosen": "good", "rejected": "bad"} for prompt in prompts])
        thumbs = [{"prompt": prompt, "completion": "good", "label": True} for prompt in prompts[::2]]
        self._write("thumbs", thumbs + [row | {"completion": "bad", "label": False} for row in thumbs])
        self._write("answers", [{"prompt": prompt, "completion": prompt} for prompt in prompts])
        # Held-out rows that contradict the others: the first validation is the best, and must survive all later ones.
        self._write("pairs_held", [{"prompt": "four", "chosen": "bad", "rejected": "good"}])
        self._write("thumbs_held", [{"prompt": "four", "completion": "bad", "label": True}])
        self._write("answers_held", [{"prompt": "four", "completion": "horse white horse"}])
        self.straight: dict[str, tuple[Path, Ended]] = {}
        made = command(folder / "made", "sft", *self.settings("sft", "source"))
        assert made.code == 0, made.output

    def _write(self, name: str, rows: list[dict[str, Any]]) -> None:
        (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def settings(self, recipe: str, name: str) -> list[str]:
        """A few steps in which everything that a checkpoint must hold is in use."""
        data = dict.fromkeys(["ppo", "grpo", "best-of-n", "online-dpo"], "prompts")
        data = (data | {"sft": "answers", "kto": "thumbs"}).get(recipe, "pairs")
        shared = [
            f"run.output_dir={self.folder}",
            f"run.name={name}",
            "run.device=cpu",
            "run.num_threads=1",
            "run.save_every_steps=1",
            f"data.train_files={self.folder / data}.jsonl",
        ]
        if recipe == "best-of-n":
            return [*shared, *self._sampled(), "best_of_n.num_answers=3", "best_of_n.prompts_at_once=9"]
        shared += ["optimizer.learning_rate=0.01", "optimizer.warmup_ratio=0.2"]
        if recipe == "online-dpo":
            rounds = ["rounds.num_rounds=2", "rounds.num_prompts=9", "rounds.cut_off=as_it_is"]
            return [*shared, *self._sampled(), *rounds, "training.per_device_train_batch_size=3"]
        if recipe in ("ppo", "grpo"):
            reward = "{name: target_string, arguments: {text: %s}}"
            epochs = {
                "ppo": ["ppo.rollout_batch_size=8", "ppo.num_ppo_epochs=2", "ppo.value_head=mlp", "ppo.target_kl=null"],
                "grpo": ["grpo.num_prompts=3", "grpo.num_generations=3", "grpo.num_epochs=2", "shaping.normalise=true",
                         "grpo.max_sampling_rounds=3"],
            }  # fmt: skip
            return [
                *shared,
                *epochs[recipe],
                "policy=source",
                "data.validation_fraction=0",
                f"rewards=[{reward % 'red'}, {reward % 'one'}]",
                "generation.max_new_tokens=5",
                f"{recipe}.num_iterations=3",
                f"{recipe}.num_mini_batches=2",
                f"{recipe}.max_tokens_per_micro_batch=40",
                f"{recipe}.save_every_updates=1",
                "kl.controller=adaptive",
                "kl.target=0.05",
                "kl.horizon=20",
            ]
        source = {"sft": "model.name_or_path", "rm": "backbone", "dpo": "policy", "kto": "policy"}[recipe]
        dropout = [] if source == "policy" else ["model.lora.lora_dropout=0.3"]
        return [
            *shared,
            f"{source}={self.folder / 'base'}",
            "model.lora.r=4",
            "data.min_length=1",
            f"data.validation_files={self.folder / data}_held.jsonl",
            "training.per_device_train_batch_size=7",
            "training.max_steps=6",
            "training.num_train_epochs=3",
            "training.eval_steps=2",
            "training.logging_steps=4",
            *dropout,
        ]

    def _sampled(self) -> list[str]:
        """Answers of the SFT run, and what they are worth."""
        reward = "rewards=[{name: target_string, arguments: {text: red}}]"
        return ["policy=source", "data.validation_fraction=0", reward, "generation.max_new_tokens=5"]

    def uninterrupted(self, recipe: str) -> tuple[Path, Ended]:
        if recipe not in self.straight:
            ended = command(self.folder / f"{recipe}-made", recipe, *self.settings(recipe, recipe))
            assert ended.code == 0, ended.output
            self.straight[recipe] = self.folder / recipe, ended
        return self.straight[recipe]

    def killed(self, recipe: str, moment: int, name: str = "") -> Path:
        """The folder of a run that died at a moment."""
        name = name or f"{recipe}-{moment}"
        ended = command(self.folder / f"{name}-made", recipe, *self.settings(recipe, name), kill_at=moment)
        assert ended.code == -signal.SIGKILL, ended.output
        return self.folder / name

    def resumed(self, folder: Path, kill_at: int | None = None) -> Ended:
        return command(self.folder / f"{folder.name}-made", "resume", str(folder), kill_at=kill_at)
