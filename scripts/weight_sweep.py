"""Helpful or harmless? python scripts/weight_sweep.py FOLDER [SEED ...] draws the trade-off of the weight between them.

On the safety tasks of the built-in world, where gold is known: a reward model learns from requests that should be
helped with, another from requests that should be refused, both on one base; PPO climbs their weighted sum at several
weights, or another rule, and each policy answers held-out requests of both kinds. What is done is not done again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf.data.chat import ChatEncoder
from rlhf.data.tinychat import GoldScorer, Task, preference_pairs, prompt_rows
from rlhf.infra.config import load_config
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.models.decoding import GenerationConfig
from rlhf.models.policy import Policy
from rlhf.recipes.ppo import run_ppo
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.reward import RewardConfig, run_reward
from rlhf.rollout.sampler import Sampler

PAIRS, HELDOUT, ITERATIONS = 1_000, 240, 20
# The weight of helpfulness, or another rule over both.
SETTINGS: dict[str, tuple[float, list[str]]] = {
    **{f"{weight:g}": (weight, []) for weight in (0.0, 0.25, 0.5, 0.75, 1.0)},
    "lowest": (0.5, ["combination.rule=lowest"]),
    "gate": (1.0, ["combination.rule=gate", "combination.gate=harmless", "combination.threshold=0"]),
}


def shared(folder: Path, name: str, seed: int) -> list[str]:
    """What all runs have."""
    return [
        f"run.name={name}", f"run.output_dir={folder}", f"run.seed={seed}", "run.num_threads=1", "run.overwrite=true",
        "model.lora.r=8", "model.attn_implementation=eager",
    ]  # fmt: skip


def head(folder: Path, subset: str, seed: int) -> Path:
    """The reward model of one subset, from the rows of a file that holds both."""
    run, data = folder / f"{subset}_{seed}", folder / f"pairs_{seed}.jsonl"
    if not (run / "reward_model").is_dir():
        if not data.is_file():
            rows = preference_pairs("train", PAIRS, seed, families=["safety"])
            data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        more = [
            f"data.train_files={data}", f"data.where={{subset: {subset}}}", "data.validation_fraction=0.15",
            'reward.suffix="\\n<|im_start|>user\\n"', "training.per_device_train_batch_size=16",
            "training.max_tokens_per_micro_batch=768", "training.eval_steps=10", "optimizer.learning_rate=0.002",
            "optimizer.lr_scheduler_type=cosine",
        ]  # fmt: skip
        run_reward(load_config(RewardConfig, overrides=[*shared(folder, run.name, seed), *more]))
    return run / "reward_model"


def policy(folder: Path, setting: str, seed: int) -> Path:
    """The policy of PPO against both heads at a weight."""
    run, (weight, rule) = folder / f"ppo_{seed}_{setting}", SETTINGS[setting]
    if not (run / "policy").is_dir():
        weights = {"helpful": weight, "harmless": 1.0 if setting == "gate" else 1 - weight}
        terms = [f"{{name: {s}, model: '{head(folder, s, seed)}', weight: {w}}}" for s, w in weights.items()]
        more = [
            f"rewards=[{', '.join(terms)}]", *rule, "data.families=[safety]", "data.max_samples=2000",
            "generation.max_new_tokens=48", f"ppo.num_iterations={ITERATIONS}", "ppo.rollout_batch_size=64",
            "ppo.num_ppo_epochs=2", "ppo.num_mini_batches=2", "ppo.target_kl=0.05",
            "ppo.max_tokens_per_micro_batch=1024", "kl.coefficient=0.05", "optimizer.learning_rate=0.003",
            "optimizer.adam_epsilon=1e-5",
        ]  # fmt: skip
        run_ppo(load_config(PPOConfig, overrides=[*shared(folder, run.name, seed), *more]))
    return run


def measured(folder: Path, setting: str | None, seed: int) -> dict[str, float]:
    """Gold and refusals on held-out requests of both kinds; `setting` None: of the base model."""
    run = None if setting is None else policy(folder, setting, seed)
    file = folder / f"base_{seed}.json" if run is None else run / "measured.json"
    if not file.is_file():
        file.write_text(json.dumps(answered(run, seed)), encoding="utf-8")
    found: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    if run is not None:
        log = (run / "logs" / "train.jsonl").read_text(encoding="utf-8").splitlines()
        last = [json.loads(line) for line in log[-5:]]
        for name in ("helpful", "harmless"):
            found[name] = float(np.mean([line[f"reward/term/{name}"] for line in last]))
        found["kl"] = float(np.mean([line["kl/mean"] for line in last]))
    return found


def answered(run: Path | None, seed: int) -> dict[str, float]:
    """One answer to each held-out request by the policy of a run, or by the base model, as gold sees them."""
    backbone, adapter = Backbone.load(ModelConfig(attn_implementation="eager")), None
    if run is not None:
        adapter = "policy"
        backbone.load_adapter(run / "policy", adapter)
    encoder, rows = ChatEncoder(backbone.tokenizer), prompt_rows("heldout", HELDOUT, seed, ["safety"])
    settings = GenerationConfig(max_new_tokens=48, batch_size=512)
    sampler = Sampler(Policy(backbone, adapter), settings, encoder.stop_token_ids)
    drawn = sampler.sample(encoder.prompt_ids_batch([row["prompt"] for row in rows]), seed)
    scores = GoldScorer().score([Task.from_row(row) for row in rows], encoder.decode_batch(drawn.responses()))
    found = {}
    for subset in ("helpful", "harmless"):
        part = [score for score, row in zip(scores, rows, strict=True) if row["subset"] == subset]
        found[f"{subset}_gold"] = float(np.mean([score.total for score in part]))
        found[f"{subset}_right"] = float(np.mean([score.parts["correct"] for score in part]))
        found[f"{subset}_refused"] = float(np.mean([score.refused for score in part]))
        found[f"{subset}_requests"] = float(len(part))
    return found


def draw(axes: Axes, results: dict[str, list[dict[str, float]]], x: str, y: str) -> None:
    """A line through the weights, a mark for the other rules, every seed as a point."""
    seen = {name: some for name, some in results.items() if x in some[0]}
    points = {name: [float(np.mean([one[key] for one in some])) for key in (x, y)] for name, some in seen.items()}
    for some in seen.values():
        axes.plot([one[x] for one in some], [one[y] for one in some], ".", color="#bbbbbb", zorder=0)
    weights = [name for name in points if name[0].isdigit()]
    line = np.array([points[name] for name in weights]).T
    axes.plot(*line, "-o", color="#1f77b4", label="weighted sum, by the weight of helpfulness")
    for name in weights:
        axes.annotate(name, points[name], textcoords="offset points", xytext=(6, 5), fontsize=8)
    for name, marker in (("lowest", "s"), ("gate", "^"), ("base", "x")):
        if name in points:
            axes.plot(*points[name], marker, color="#d62728", label=name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def main() -> None:
    """Everything, with a table on the terminal and the figure in the folder."""
    torch.set_num_threads(1)
    folder, seeds = Path(sys.argv[1]), [int(text) for text in sys.argv[2:]] or [0, 1, 2]
    folder.mkdir(parents=True, exist_ok=True)
    results = {"base": [measured(folder, None, seed) for seed in seeds]}
    results |= {setting: [measured(folder, setting, seed) for seed in seeds] for setting in SETTINGS}
    keys = ["helpful_right", "helpful_refused", "helpful_gold", "harmless_right", "harmless_gold"]
    keys += ["helpful", "harmless", "kl"]
    print(f"| | {' | '.join(keys)} |")
    for name, some in results.items():
        columns = [[one[key] for one in some if key in one] for key in keys]
        cells = [f"{np.mean(c):.3f} ({min(c):.3f} to {max(c):.3f})" if c else "-" for c in columns]
        print(f"| {name} | {' | '.join(cells)} |")
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw(left, results, "helpful", "harmless")
    left.set(title="what the two rewards say, last 5 iterations", xlabel="helpful, deviations", ylabel="harmless")
    draw(right, results, "helpful_right", "harmless_right")
    right.set(title="what is true, held-out requests", xlabel="benign requests helped with, share")
    right.set_ylabel("harmful requests refused, share")
    figure.savefig(folder / "reward_weights.png", dpi=100)


if __name__ == "__main__":
    main()
