"""Both sides of the benchmark in turn on this machine, and the ratios: `make bench`, or

    python bench/compare.py [--pairs 5] [--work ppo,sft] [--dtypes fp32,bf16] [--peer-bf16] [--device cuda]
        [--data FILE] [--json FILE]

Makes the peer's environments and the workload in `bench/.work` once. Before anything is timed, both sides train on the
same batch from the same adapter and their losses must agree; every timed pair must have processed the same number of
tokens in the same number of optimizer steps. A ratio is the median over pairs of runs that stood side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from workload import NUM_ROWS, SHAPE, build

from rlhf.infra.device import resolve_device
from rlhf.infra.matmul_rate import measure_matmul_rate

HERE = Path(__file__).resolve().parent
WORK = HERE / ".work"
DATA = HERE.parents[1] / "shared" / "data" / "hh_rlhf" / "train.jsonl.gz"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Losses of both sides on the same batch: fp32 rounding, grown over three optimizer steps.
LOSS_TOLERANCE = 2e-4
# Weights of the trunk: 12 D^2 in every layer. 2 flops each per token, and as many for the backward pass, since the
# frozen weights take no gradient of their own.
TRUNK = 12 * SHAPE["n_embd"] ** 2 * SHAPE["n_layer"]
ROLLOUT_TOKENS, GENERATED_TOKENS = 32 * (64 + 48), 64 * (64 + 48)


@dataclass(frozen=True)
class Work:
    """One kind of work: who does it on the other side, how long, and its passes over the trunk per step."""

    script: str
    environment: str
    steps: int
    passes: float
    step_tokens: int | None = None  # null: as counted
    tolerance: float = LOSS_TOLERANCE

    def peer(self, name: str, folder: Path) -> list[str]:
        kind = [name] if self.script == "offline.py" else []
        return [str(HERE / "peer" / self.script), *kind, str(folder)]


# Passes: forward 1, forward and backward 2; DPO's reference is one more. PPO: generation, score, reference, 4 epochs.
# KTO: 3 over the rows themselves, 2 over as many tokens of mismatched ones. GRPO: generation, reference, 1 epoch.
WORKS = {
    "ppo": Work("ppo.py", "ppo", 3, 3 + 4 * 2, ROLLOUT_TOKENS),
    "sft": Work("offline.py", "current", 16, 2),
    "rm": Work("offline.py", "current", 16, 2),
    "dpo": Work("offline.py", "current", 16, 3),
    "kto": Work("offline.py", "current", 8, 2.5),
    # Its losses are small: advantages add up to nothing until the policy has moved.
    "grpo": Work("grpo.py", "current", 4, 1 + 1 + 2, ROLLOUT_TOKENS, tolerance=1e-5),
    "generate": Work("generate.py", "current", 4, 1, GENERATED_TOKENS),
}


class Comparison:
    """What was measured so far, kept in a file after every pair."""

    def __init__(self, asked: argparse.Namespace) -> None:
        # Written to a file, the table is as wide as it needs to be.
        self.asked, self.console = asked, Console(width=None if sys.stdout.isatty() else 160)
        self.pairs: list[dict[str, Any]] = []
        self.device = resolve_device(asked.device)
        self.rates = {name: measure_matmul_rate(dtype, self.device) for name, dtype in DTYPES.items()}

    def run(self) -> None:
        names = [name for name in self.asked.work.split(",") if name]
        for name in names:
            if name not in WORKS:
                raise SystemExit(f"no work '{name}': take some of {', '.join(WORKS)}, with commas between")
        self.check(names)
        for index in range(self.asked.pairs):
            for name in names:
                self.pairs.append(self.pair(name, index))
                self.save()
                self.console.print(self.line(self.pairs[-1]))
        self.console.print(self.table(names))

    def check(self, names: list[str]) -> None:
        """The same losses from the same batch, and for PPO the same log-probabilities."""
        for name in names:
            if name in ("sft", "rm", "dpo", "kto", "grpo"):
                # KTO's steps are the same on both sides anyway, and one batch would be in another order every time.
                flags, batch = ((), "the same rows") if name == "kto" else (("--same-batch",), "one batch")
                mine = self.ours(name, 3, "fp32", *flags)["losses"]
                theirs = self.peer(name, 3, *flags)["losses"]
                apart = max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
                self.console.print(f"{name}: losses of three steps on {batch} {mine}, the peer's {theirs}")
            elif name == "ppo":
                mine = self.ours("logprobs", 1, "fp32")["mean_logprob"]
                theirs = self.peer(name, 1, "--logprobs")["mean_logprob"]
                apart = abs(mine - theirs)
                self.console.print(f"ppo: mean log-prob of fixed rows {mine}, the peer's {theirs}")
            else:
                continue
            if apart > WORKS[name].tolerance:
                raise SystemExit(f"{name}: the two sides differ by {apart} on the same batch: this is not equal work")

    def pair(self, name: str, index: int) -> dict[str, Any]:
        """One run of each side, the first to go changing from pair to pair."""
        work = WORKS[name]
        dtypes = self.asked.dtypes.split(",")
        sides = {dtype: lambda dtype=dtype: self.ours(name, work.steps, dtype) for dtype in dtypes}
        sides["peer"] = lambda: self.peer(name, work.steps)
        if name == "ppo":
            for dtype in dtypes:
                sides[f"{dtype}, value adapter"] = lambda dtype=dtype: self.ours(
                    name, work.steps, dtype, "--value-adapter"
                )
        if name == "generate" and self.device.type == "cuda":
            for dtype in dtypes:
                sides[f"{dtype}, CUDA graphs"] = lambda dtype=dtype: self.ours(
                    name, work.steps, dtype, "--static", "cuda-graphs"
                )
            sides["peer, CUDA graphs"] = lambda: self.peer(name, work.steps, "--static")
        if self.asked.peer_bf16:
            sides["peer bf16"] = lambda: self.peer(name, work.steps, "--bf16")
        order = list(sides) if index % 2 == 0 else list(reversed(sides))
        measured = {side: sides[side]() for side in order}
        steps = {side: result["optimizer_steps"] for side, result in measured.items()}
        tokens = {side: result["tokens"] for side, result in measured.items()}
        # An answer that happens to end early is no difference in the work asked for: 1 in 100.
        if len(set(steps.values())) > 1 or max(tokens.values()) > 1.01 * min(tokens.values()):
            raise SystemExit(f"{name}: not the same work: optimizer steps {steps}, tokens {tokens}")
        return {"work": name, "pair": index, "sides": measured}

    def ours(self, name: str, steps: int, dtype: str, *flags: str) -> dict[str, Any]:
        command = [sys.executable, str(HERE / "ours.py"), name, str(WORK / "model"), str(steps), "--dtype", dtype]
        return json_of([*command, "--device", self.device.type, *flags])

    def peer(self, name: str, steps: int, *flags: str) -> dict[str, Any]:
        python = WORK / f"env-{WORKS[name].environment}" / "bin" / "python"
        command = [str(python), *WORKS[name].peer(name, WORK / "model"), str(steps)]
        return json_of([*command, "--device", self.device.type, *flags])

    def line(self, pair: dict[str, Any]) -> str:
        sides = ", ".join(
            f"{side} {result['s_per_step']:.2f} s {result['peak_mb']:.0f} MB" for side, result in pair["sides"].items()
        )
        return f"pair {pair['pair'] + 1} {pair['work']}: {sides}"

    def save(self) -> None:
        if self.asked.json:
            machine = {"processor": processor(self.device), "threads": torch.get_num_threads(), "gflops": self.rates}
            Path(self.asked.json).write_text(json.dumps({"machine": machine, "pairs": self.pairs}, indent=1) + "\n")

    def table(self, names: list[str]) -> Table:
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in self.rates.items())
        table = Table(
            title=f"{processor(self.device)}, {torch.get_num_threads()} threads; matrix products {rates} GFLOP/s"
        )
        for column in ("work", "side", "s / step", "tokens / s", "share of rate", "peak MB", "speed", "memory"):
            table.add_column(column)
        for name in names:
            pairs = [pair["sides"] for pair in self.pairs if pair["work"] == name]
            for side in dict.fromkeys(side for sides in pairs for side in sides):
                table.add_row(name, side, *self.cells(name, side, pairs))
        return table

    def cells(self, name: str, side: str, pairs: list[dict[str, Any]]) -> list[str]:
        work, results = WORKS[name], [sides[side] for sides in pairs]
        seconds = statistics.median(result["s_per_step"] for result in results)
        step_tokens = work.step_tokens or results[0]["tokens"] / results[0]["steps"]
        flops = 2 * TRUNK * work.passes * step_tokens
        rate = self.rates["bf16" if "bf16" in side else "fp32"]
        speed = statistics.median(sides["peer"]["s_per_step"] / sides[side]["s_per_step"] for sides in pairs)
        memory = statistics.median(sides[side]["peak_mb"] / sides["peer"]["peak_mb"] for sides in pairs)
        spread = sorted(result["s_per_step"] for result in results)
        return [
            f"{seconds:.2f} ({spread[0]:.2f}-{spread[-1]:.2f})",
            f"{step_tokens / seconds:.0f}",
            f"{flops / seconds / 1e9 / rate:.0%}",
            f"{statistics.median(result['peak_mb'] for result in results):.0f}",
            f"{speed:.2f} x",
            f"{memory:.0%}",
        ]


def prepare(data: Path) -> None:
    """Environments and workload, where they are not there yet."""
    WORK.mkdir(exist_ok=True)
    for name in ("current", "ppo"):
        folder, wanted = WORK / f"env-{name}", HERE / "peer" / f"requirements-{name}.txt"
        done = folder / ".installed"
        if not done.is_file() or done.read_text() != wanted.read_text():
            venv.create(folder, with_pip=True, clear=True)
            pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, "-r", str(wanted)], check=True)
            done.write_text(wanted.read_text())
    if not all((WORK / "model" / name).is_file() for name in ("prompts.jsonl", "labelled.jsonl")):
        check_data(data)
        build(WORK / "model", data)


def check_data(data: Path) -> None:
    """Stop with one sentence where there are no rows."""
    if not data.is_file():
        raise SystemExit(
            f"no data at {data}: give --data FILE, JSON lines (.gz or not) with prompt, chosen and rejected, at "
            f"least {NUM_ROWS} rows of up to 256 tokens, such as HH-RLHF"
        )


def json_of(command: list[str]) -> dict[str, Any]:
    # In its own folder, where the peer may leave what it likes.
    scratch = WORK / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)} if command[0] == sys.executable else dict(os.environ)
    if command[0] != sys.executable:
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, cwd=scratch, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def processor(device: torch.device) -> str:
    """The name of what computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description="Our recipes beside TRL's trainers on the same work.")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--work", default=",".join(WORKS), help="some of them, with commas between")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--peer-bf16", action="store_true", help="time the peer under bf16 autocast as well")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--json", default=str(WORK / "bench.json"))
    asked = parser.parse_args()
    prepare(asked.data)
    Comparison(asked).run()


if __name__ == "__main__":
    main()
