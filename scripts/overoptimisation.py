"""Does an ensemble hold back over-optimisation? python scripts/overoptimisation.py FOLDER [SEED ...]

On the built-in world, where gold is known: four reward models learn from few and noisy pairs. Answers are then picked
(best of n) or learnt (PPO without a price on the KL) by one of them, their mean, the worst, and the mean less their
variance, and gold is looked at along the KL. What is done already is not done again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf.algo.best_of_n import best_of_n_kl, expected_best
from rlhf.algo.reward_combination import ENSEMBLE_RULES, disagreement
from rlhf.data.chat import ChatEncoder
from rlhf.data.tinychat import LabellerConfig, gold_reward, preference_pairs, prompt_rows
from rlhf.infra.config import load_config
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.models.decoding import GenerationConfig
from rlhf.models.policy import Policy
from rlhf.models.reward_model import load_reward_model
from rlhf.recipes.ppo import run_ppo
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.reward import RewardConfig, run_reward
from rlhf.rewards.learned import LearnedReward
from rlhf.rollout.sampler import Sampler

PAIRS, NOISE, MEMBERS = 100, 0.25, 4
PROMPTS, ANSWERS, NS = 128, 32, (1, 2, 4, 8, 16, 32)
ITERATIONS = 30
RULES = {"one member": ("mean", 0.0), "mean": ("mean", 0.0), "worst": ("worst", 0.0)}
RULES |= {"penalised 0.5": ("penalised", 0.5), "penalised 2": ("penalised", 2.0)}
COLOURS = dict(zip(RULES, ("#444444", "#1f77b4", "#d62728", "#8fd19e", "#2ca02c"), strict=True))
LEARNT = [name for name in RULES if name != "penalised 0.5"]
GOLD = "rlhf.data.tinychat:gold_reward"


def shared(folder: Path, name: str, seed: int) -> list[str]:
    """What all runs have."""
    return [
        f"run.name={name}", f"run.output_dir={folder}", f"run.seed={seed}", "run.num_threads=1", "run.overwrite=true",
        "model.lora.r=8", "model.attn_implementation=eager",
    ]  # fmt: skip


def judges_of(folder: Path, seed: int) -> Path:
    """An ensemble that has seen few pairs, a quarter of them labelled the wrong way round."""
    run, data = folder / f"judges_{seed}", folder / f"pairs_{seed}.jsonl"
    if not (run / "reward_model").is_dir():
        held = folder / f"held_{seed}.jsonl"
        for file, split in ((data, "train"), (held, "validation")):
            rows = preference_pairs(split, PAIRS, seed, LabellerConfig(label_noise=NOISE))
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        more = [
            f"data.train_files={data}", f"data.validation_files={held}", f"reward.ensemble.members={MEMBERS}",
            'reward.suffix="\\n<|im_start|>user\\n"', "training.num_train_epochs=3",
            "training.per_device_train_batch_size=16", "training.max_tokens_per_micro_batch=768",
            "optimizer.learning_rate=0.002", "optimizer.lr_scheduler_type=cosine",
        ]  # fmt: skip
        run_reward(load_config(RewardConfig, overrides=[*shared(folder, run.name, seed), *more]))
    return run / "reward_model"


def pool(folder: Path) -> tuple[list[list[int]], list[list[int]], torch.Tensor]:
    """Prompts and answers as ids, many answers to each held-out prompt by the base model, and their gold (N,)."""
    file = folder / "pool.json"
    if not file.is_file():
        backbone = Backbone.load(ModelConfig(attn_implementation="eager"))
        encoder = ChatEncoder(backbone.tokenizer)
        rows = [row for row in prompt_rows("heldout", PROMPTS, 0) for _ in range(ANSWERS)]
        prompts = encoder.prompt_ids_batch([row["prompt"] for row in rows])
        settings = GenerationConfig(max_new_tokens=64, batch_size=512)
        drawn = Sampler(Policy(backbone, None), settings, encoder.stop_token_ids).sample(prompts, 0)
        answers = drawn.responses()
        gold = gold_reward(prompts, encoder.decode_batch(answers), [row["task"] for row in rows])
        file.write_text(json.dumps([prompts, answers, gold]), encoding="utf-8")
    prompts, answers, gold = json.loads(file.read_text(encoding="utf-8"))
    return prompts, answers, torch.tensor(gold, dtype=torch.float64)


def pool_scores(folder: Path, seed: int) -> torch.Tensor:
    """What each member says of each answer of the pool, standardised (K, N)."""
    file = folder / f"scores_{seed}.json"
    if not file.is_file():
        prompts, answers, _ = pool(folder)
        learned = LearnedReward(load_reward_model(str(judges_of(folder, seed))))
        scores_KN = learned.member_scores([[*p, *a] for p, a in zip(prompts, answers, strict=True)])
        file.write_text(json.dumps(scores_KN.tolist()), encoding="utf-8")
    return torch.tensor(json.loads(file.read_text(encoding="utf-8")), dtype=torch.float64)


def best_of_n(folder: Path, seed: int) -> dict[str, np.ndarray]:
    """For each rule KL, gold and its own score (3, n) of the best of n; `one member` is the mean over all members."""
    gold_PA, scores_KN, found = pool(folder)[2].view(PROMPTS, ANSWERS), pool_scores(folder, seed), {}
    for name, (rule, penalty) in RULES.items():
        asked = scores_KN.split(1) if name == "one member" else [scores_KN]
        scores = [ENSEMBLE_RULES[rule](some_KN, penalty).view(PROMPTS, ANSWERS) for some_KN in asked]
        curves = [
            [[float(expected_best(score_PA, worth, n).mean()) for n in NS] for worth in (gold_PA, score_PA)]
            for score_PA in scores
        ]
        found[name] = np.array([[best_of_n_kl(n) for n in NS], *np.mean(curves, axis=0)])
    return found


def knows_its_errors(folder: Path, seed: int) -> dict[str, float]:
    """How well members and mean order the pool, how far members are apart, and whether that goes with their error."""
    gold_N, scores_KN = pool(folder)[2], pool_scores(folder, seed)
    mean_N, apart_N = scores_KN.mean(dim=0), disagreement(scores_KN)

    def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
        return float(np.corrcoef(one, other)[0, 1])

    too_high_N = (mean_N - mean_N.mean()) / mean_N.std() - (gold_N - gold_N.mean()) / gold_N.std()
    return {
        "members, correlation with gold": float(np.mean([correlation(scores_N, gold_N) for scores_N in scores_KN])),
        "mean, correlation with gold": correlation(mean_N, gold_N),
        "disagreement": float(apart_N.mean()),
        "disagreement, correlation with being too high": correlation(apart_N, too_high_N),
        "disagreement, correlation with the mean": correlation(apart_N, mean_N),
    }


def ppo(folder: Path, seed: int, name: str) -> np.ndarray:
    """KL, gold, the rule's own score and the members' disagreement (4, iterations) while PPO climbs."""
    judges, (rule, penalty) = judges_of(folder, seed), RULES[name]
    run = folder / f"ppo_{seed}_{name.replace(' ', '_')}"
    if not (run / "policy").is_dir():
        term = f"name: model, model: '{judges / 'member_0'}'"
        if name != "one member":
            term = f"name: model, model: '{judges}', rule: {rule}"
            term += f", penalty: {penalty}" if rule == "penalised" else ""
        more = [
            f"rewards=[{{{term}}}, {{name: '{GOLD}', weight: 0}}]", "generation.max_new_tokens=64", "kl.coefficient=0",
            f"ppo.num_iterations={ITERATIONS}", "ppo.rollout_batch_size=48", "ppo.num_ppo_epochs=2",
            "ppo.num_mini_batches=2", "ppo.target_kl=0.05", "ppo.max_tokens_per_micro_batch=1024",
            "optimizer.learning_rate=0.003", "optimizer.adam_epsilon=1e-5", "optimizer.lr_scheduler_type=constant",
            "data.max_samples=2000",
        ]  # fmt: skip
        run_ppo(load_config(PPOConfig, overrides=[*shared(folder, run.name, seed), *more]))
    lines = [json.loads(line) for line in (run / "logs" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = ("kl/mean", f"reward/term/{GOLD}", "reward/term/model", "reward/detail/model/disagreement")
    return np.array([[line.get(key, np.nan) for line in lines] for key in keys])


def draw(axes: Axes, curves: dict[str, list[np.ndarray]], row: int, title: str, label: str) -> None:
    """Every seed thin, their mean thick."""
    for name, seeds in curves.items():
        for one in seeds:
            axes.plot(one[0], one[row], color=COLOURS[name], alpha=0.3, linewidth=0.8)
        axes.plot(*np.mean(seeds, axis=0)[[0, row]], color=COLOURS[name], label=name, linewidth=2)
    axes.set(title=title, xlabel="KL from the base model, nats per answer", ylabel=label)
    axes.grid(alpha=0.3)


def smoothed(curve: np.ndarray, width: int = 5) -> np.ndarray:
    """Means over five iterations."""
    return np.stack([np.convolve(row, np.ones(width) / width, mode="valid") for row in curve])


def summary(curve: np.ndarray) -> list[float]:
    """Highest gold and its KL, gold and KL at the end, what was lost, own score and disagreement at the end."""
    top = int(curve[1].argmax())
    return [curve[1, top], curve[0, top], curve[1, -1], curve[0, -1], curve[1, top] - curve[1, -1], *curve[2:, -1]]


def row(name: str, cells: list[list[float]]) -> str:
    """A line of a table: mean and deviation over the seeds."""
    mean, std = np.mean(cells, axis=0), np.std(cells, axis=0)
    return f"| {name} | " + " | ".join(f"{m:.3f} +- {s:.3f}" for m, s in zip(mean, std, strict=True)) + " |"


def main() -> None:
    """Everything, with tables on the terminal and the figure in the folder."""
    torch.set_num_threads(1)
    folder, seeds = Path(sys.argv[1]), [int(text) for text in sys.argv[2:]] or [0, 1, 2]
    folder.mkdir(parents=True, exist_ok=True)
    known = [knows_its_errors(folder, seed) for seed in seeds]
    for name in known[0]:
        print(row(name, [[one[name]] for one in known]))
    found = [best_of_n(folder, seed) for seed in seeds]
    picked = {name: [one[name] for one in found] for name in RULES}
    print("| gold of the best of | " + " | ".join(f"{n}" for n in NS) + " |")
    for name, curves in picked.items():
        print(row(name, [list(curve[1]) for curve in curves]))
    learnt = {name: [smoothed(ppo(folder, seed, name)) for seed in seeds] for name in LEARNT}
    print("| PPO | highest gold | its KL | gold at the end | KL | lost | own score | disagreement |")
    for name, curves in learnt.items():
        print(row(name, [summary(curve) for curve in curves]))
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    draw(axes[0, 0], picked, 1, "best of n: what is true", "gold")
    draw(axes[0, 1], picked, 2, "best of n: what the rule says", "score, deviations")
    draw(axes[1, 0], learnt, 1, "PPO without a price on the KL: what is true", "gold")
    draw(axes[1, 1], learnt, 2, "PPO: what the rule says", "score, deviations")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(folder / "reward_overoptimisation.png", dpi=100)


if __name__ == "__main__":
    main()
