"""Speed on one GPU, results checked first: python bench/gpu.py [--parts check,comparison,large] [--without-peer] ...

    check        every kind of work on a small model: the device's losses, log-probabilities and answers against the
                 CPU's, with the base in 4 bits as well, and the compiled decoding against the plain one; a difference
                 beyond rounding ends the run before anything is timed
    comparison   what `compare.py` measures, on this device: TRL and `rlhf` in turn (`--without-peer`: ours alone)
    large        a model of 7B shape with random weights: a QLoRA PPO iteration, a DPO step, and generation as the
                 product does it, with CUDA graphs and by torch's compiler

A table is printed and every number written as JSON, after each measurement. `--small` runs all of it on the CPU with a
tiny shape, which says nothing about speed: it is how the tests know that the script works.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ours
import torch
from compare import DATA, DTYPES, HERE, LOSS_TOLERANCE, WORK, WORKS, Comparison, check_data, json_of, prepare, processor
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig
from workload import build, build_large

from rlhf.infra.device import resolve_device
from rlhf.infra.matmul_rate import measure_matmul_rate
from rlhf.models.lora import LoRAConfig

PARTS = ("check", "comparison", "large")
# Of an iteration's loss, where one answer drawn otherwise would already show; and of 4-bit codes, which are rounded on
# the device that loads them.
PPO_TOLERANCE, FOUR_BIT_TOLERANCE = 2e-3, 2e-3
# Share of the drawn tokens that must be the same: rounding moves a draw that lies between two tokens.
LEAST_EQUAL = 0.9
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 2048}
TINY = LlamaConfig(
    vocab_size=8192,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.1,
    **TOKEN_IDS,
)
# 7.25e9 weights: the sizes of Mistral-7B-v0.3.
SEVEN_B = LlamaConfig(
    vocab_size=32768,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
    **TOKEN_IDS,
)


@dataclass(frozen=True)
class Form:
    """How much is done; `backends` are the compiled ways of decoding, the first of which is checked."""

    shape: LlamaConfig
    rank: int
    steps: dict[str, int]
    new_tokens: int
    micro_batch: int
    backends: tuple[str, ...]


FULL = Form(SEVEN_B, 16, {"ppo": 3, "dpo": 8, "generate": 2}, 128, 8192, ("cuda-graphs", "inductor"))
SMALL = Form(TINY, 4, {"ppo": 1, "dpo": 1, "generate": 1}, 6, 2048, ("aot_eager",))


class GPUBench:
    """What was found so far, kept in a file after every measurement."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.console = asked, Console()
        self.form = SMALL if asked.small else FULL
        self.device = resolve_device("cpu" if asked.small else "cuda")
        self.folder: Path = asked.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, Any] = {"machine": self.machine(), "checks": [], "comparison": [], "large": []}

    def run(self) -> None:
        """The parts asked for, in their order."""
        self.build()
        for part in PARTS:
            if part in self.asked.parts:
                {"check": self.check, "comparison": self.comparison, "large": self.large}[part]()
        self.console.print(self.table())
        if failed := [row["name"] for row in self.found["large"] if "failed" in row]:
            raise SystemExit(f"not measured: {'; '.join(failed)}; {self.asked.json} says why")

    def machine(self) -> dict[str, Any]:
        is_gpu = self.device.type == "cuda"
        rates = {name: measure_matmul_rate(dtype, self.device) for name, dtype in DTYPES.items()}
        return {
            "device": processor(self.device),
            "is_gpu": is_gpu,
            "memory_gb": torch.cuda.get_device_properties(self.device).total_memory / 1e9 if is_gpu else None,
            "gflops": rates,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "small": bool(self.asked.small),
        }

    def build(self) -> None:
        """Models and rows, where they are not there yet."""
        lora = LoRAConfig(r=self.form.rank, lora_alpha=2 * self.form.rank, target_modules=LINEAR)
        wanted = [(self.folder / "tiny", TINY)]
        if "large" in self.asked.parts and not self.asked.small:
            wanted.append((self.folder / "large", self.form.shape))
        for folder, shape in wanted:
            if (folder / "prompts.jsonl").is_file():
                continue
            check_data(self.asked.data)
            self.check_disk(shape)
            build_large(folder, self.asked.data, shape, lora, self.device)
        if self.device.type == "cuda":  # measured is in other processes, which need the memory
            gc.collect()
            torch.cuda.empty_cache()
        if not self.asked.small and not (self.folder / "model" / "prompts.jsonl").is_file():
            check_data(self.asked.data)
            build(self.folder / "model", self.asked.data)

    def check_disk(self, shape: LlamaConfig) -> None:
        per_layer = 3 * shape.hidden_size * shape.intermediate_size + 3 * shape.hidden_size**2
        needed = 2 * (per_layer * shape.num_hidden_layers + 2 * shape.vocab_size * shape.hidden_size)
        free = shutil.disk_usage(self.folder).free
        if free < 1.1 * needed:
            raise SystemExit(
                f"the model needs {needed / 1e9:.0f} GB in {self.folder}, where {free / 1e9:.0f} GB are free; name "
                "another --folder, or leave it out with --parts check,comparison"
            )

    @property
    def small_model(self) -> Path:
        """What work is checked on: the comparison's model, the tiny one where everything is small."""
        return self.folder / ("tiny" if self.asked.small else "model")

    @property
    def large_model(self) -> Path:
        return self.folder / ("tiny" if self.asked.small else "large")

    def measure(self, kind: str, folder: Path, steps: int, *flags: str, device: str | None = None) -> dict[str, Any]:
        """One measurement of ours; in a process of its own, so that one cannot use up the memory of the next."""
        words = [kind, str(folder), str(steps), "--device", device or self.device.type, *flags]
        if self.asked.small:  # one machine and little memory: a process for each would take longer than the work
            return ours.measure([*words, "--new-tokens", str(self.form.new_tokens)])
        return json_of([sys.executable, str(HERE / "ours.py"), *words])

    def check(self) -> None:
        """The device against the CPU, and the compiled decoding against the plain one.

        Raises:
            SystemExit: they differ by more than rounding.
        """
        for kind in ("sft", "rm", "dpo"):
            self.same_losses(kind, self.small_model, LOSS_TOLERANCE, 3, "--same-batch")
        self.same_losses("ppo", self.small_model, PPO_TOLERANCE, 1)
        for kind, steps in (("dpo", 3), ("ppo", 1)):
            flags = ["--same-batch"] if kind == "dpo" else []
            self.same_losses(kind, self.folder / "tiny", FOUR_BIT_TOLERANCE, steps, "--load-in-4bit", *flags)
        on_cpu, on_device = (self.measure("logprobs", self.small_model, 1, device=d) for d in ("cpu", None))
        self.hold("log-probs", abs(on_cpu["mean_logprob"] - on_device["mean_logprob"]), LOSS_TOLERANCE)
        plain = self.measure("answers", self.small_model, 1)
        self.same_answers("answers", self.measure("answers", self.small_model, 1, device="cpu"), plain)
        for backend in self.form.backends:
            compiled = self.measure("answers", self.small_model, 1, "--static", backend)
            self.same_answers(f"answers, {backend}", plain, compiled)
        four_bit = ("answers", self.folder / "tiny", 1, "--load-in-4bit")
        compiled = self.measure(*four_bit, "--static", self.form.backends[0])
        self.same_answers(f"answers, 4 bits, {self.form.backends[0]}", self.measure(*four_bit), compiled)

    def same_losses(self, kind: str, folder: Path, tolerance: float, steps: int, *flags: str) -> None:
        on_cpu, on_device = (self.measure(kind, folder, steps, *flags, device=d)["losses"] for d in ("cpu", None))
        name = " ".join([kind, *(flag.removeprefix("--") for flag in flags)])
        self.hold(name, max(abs(a - b) for a, b in zip(on_cpu, on_device, strict=True)), tolerance)

    def same_answers(self, name: str, one: dict[str, Any], other: dict[str, Any]) -> None:
        equal, apart = answers_apart(one, other)
        self.hold(f"{name}: tokens that are others", 1 - equal, 1 - LEAST_EQUAL)
        self.hold(f"{name}: log-probs", apart, LOSS_TOLERANCE)

    def hold(self, name: str, apart: float, tolerance: float) -> None:
        """Note a difference, and stop where it is too large (or no number)."""
        self.found["checks"].append({"name": name, "apart": apart, "tolerance": tolerance})
        self.save()
        self.console.print(f"check {name}: apart by {apart:.2e}, allowed {tolerance:.0e}")
        if not apart <= tolerance:
            raise SystemExit(f"{name}: apart by {apart}, more than {tolerance}: nothing is timed before this is mended")

    def comparison(self) -> None:
        """TRL and ours in turn; or ours alone, in the same kinds of work."""
        if not self.asked.without_peer:
            prepare(self.asked.data)
            settings = {"pairs": self.asked.pairs, "work": ",".join(WORKS), "dtypes": "fp32,bf16", "peer_bf16": True}
            both = Comparison(argparse.Namespace(**settings, device=self.device.type, json=None))
            both.run()
            self.found["comparison"] = both.pairs
            self.save()
            return
        for kind, work in WORKS.items():
            for dtype in DTYPES:
                steps = 1 if self.asked.small else work.steps
                runs = [self.measure(kind, self.small_model, steps, "--dtype", dtype) for _ in range(self.asked.pairs)]
                middle = statistics.median(run["s_per_step"] for run in runs)
                self.note("comparison", f"{kind} {dtype}, ours alone", runs[0] | {"s_per_step": middle}, runs)

    def large(self) -> None:
        """QLoRA training and generation at 7B shape."""
        form = self.form
        sampling = ["--dtype", "bf16", "--new-tokens", str(form.new_tokens)]
        training = [*sampling, "--load-in-4bit", "--gradient-checkpointing", "--micro-batch", str(form.micro_batch)]
        for kind in ("ppo", "dpo"):
            self.attempt(f"QLoRA {kind}", kind, *training)
        for base, flags in (("4 bits", ["--load-in-4bit"]), ("bf16", [])):
            asked = [*sampling, *flags]
            self.attempt(f"generate, base in {base}", "generate", *asked)
            for backend in form.backends:
                self.attempt(f"generate, base in {base}, {backend}", "generate", *asked, "--static", backend)

    def attempt(self, name: str, kind: str, *flags: str) -> None:
        """Measure the large model; where memory is too small or nothing can be compiled, note it for the run's end."""
        try:
            measured = self.measure(kind, self.large_model, self.form.steps[kind], *flags)
        except SystemExit as error:
            self.found["large"].append({"name": name, "failed": str(error)})
            self.save()
            self.console.print(f"large {name}: failed")
        else:
            self.note("large", name, measured)

    def note(self, part: str, name: str, measured: dict[str, Any], runs: Sequence[dict[str, Any]] = ()) -> None:
        self.found[part].append({"name": name, **measured, "runs": list(runs)})
        self.save()
        self.console.print(f"{part} {name}: {measured['s_per_step']:.3f} s, {measured['peak_mb']:.0f} MB")

    def save(self) -> None:
        text = json.dumps(self.found | {"form": asdict(self.form) | {"shape": self.form.shape.to_dict()}}, indent=1)
        Path(self.asked.json).write_text(text + "\n", encoding="utf-8")

    def table(self) -> Table:
        machine = self.found["machine"]
        rates = ", ".join(f"{name} {rate / 1000:.1f}" for name, rate in machine["gflops"].items())
        kind = "TINY SHAPES, no measure of speed" if self.asked.small else "7B shape with random weights"
        self.console.width = max(self.console.width, 120)  # a log file is no narrow terminal
        table = Table(title=f"{machine['device']}, matrix products {rates} TFLOP/s; {kind}")
        for column in ("part", "work", "s / step", "tokens / s", "peak MB", "compiling s"):
            table.add_column(column)
        for part in ("comparison", "large"):
            for row in self.found[part]:
                if "failed" in row:
                    table.add_row(part, row["name"], "failed", "", "", "")
                elif "name" in row:  # pairs with the peer have a table of their own
                    rate = row["tokens"] / row["steps"] / row["s_per_step"]
                    compiling = f"{row['compile_seconds']:.1f}" if "compile_seconds" in row else ""
                    cells = f"{row['s_per_step']:.3f}", f"{rate:.0f}", f"{row['peak_mb']:.0f}", compiling
                    table.add_row(part, row["name"], *cells)
        return table


def answers_apart(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Share of the tokens before the first that differs in a row, and the largest difference of their log-probs."""
    num_tokens, num_equal, apart = 0, 0, 0.0
    for place, (left, right) in enumerate(zip(one["responses"], other["responses"], strict=True)):
        differing = [column for column, (a, b) in enumerate(zip(left, right, strict=False)) if a != b]
        same = min([*differing, len(left), len(right)])
        columns = zip(one["logprobs"][place][:same], other["logprobs"][place][:same], strict=True)
        apart = max([apart, *(abs(a - b) for a, b in columns)])
        num_tokens, num_equal = num_tokens + max(len(left), len(right)), num_equal + same
    return num_equal / num_tokens, apart


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed on one GPU, results checked first.")
    parser.add_argument(
        "--small", action="store_true", help="tiny shapes on the CPU: tries the script, measures nothing"
    )
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--without-peer", action="store_true", help="no TRL: its environments need a package index")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--folder", type=Path, default=WORK, help="for models: 15 GB at 7B shape")
    parser.add_argument("--json", default=str(WORK / "gpu.json"))
    asked = parser.parse_args(words)
    if unknown := [part for part in asked.parts if part not in PARTS]:
        parser.error(f"--parts got {', '.join(unknown)}, expected some of {', '.join(PARTS)}")
    if not asked.small and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here; --small tries the script on the CPU")
    return asked


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    GPUBench(parse()).run()
