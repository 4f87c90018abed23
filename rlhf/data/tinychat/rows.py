"""Datasets of the tinychat world as plain rows: preference pairs, prompts, and gold as a reward function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from random import Random
from typing import Any

from rlhf.data.tinychat.gold import GoldScore, GoldScorer
from rlhf.data.tinychat.labeller import Labeller, LabellerConfig
from rlhf.data.tinychat.quality import Candidate, QualityConfig, write_candidate
from rlhf.data.tinychat.schema import Task
from rlhf.data.tinychat.tasks import make_tasks
from rlhf.infra.errors import UserError

Row = dict[str, Any]
Pair = tuple[Candidate, Candidate]
# Rounds of drawing two fresh candidates for the tasks that have no fitting pair yet.
_MAX_ROUNDS = 60


def preference_pairs(
    split: str,
    num: int,
    seed: int,
    labeller_config: LabellerConfig | None = None,
    quality: QualityConfig | None = None,
    families: Sequence[str] | None = None,
    scorer: GoldScorer | None = None,
) -> list[Row]:
    """Return `num` labelled pairs of candidates with TRL's columns and everything the labeller knew.

    Columns: prompt (messages), chosen, rejected, task, family, gold_chosen, gold_rejected, gold_preferred_chosen (gold
    agrees with the label), clean_preferred_chosen (the labeller did before its noise), attributes_chosen and
    attributes_rejected. Both candidates answer the same task, differ in text, and in gold by `min_gap` or more.
    """
    labeller = Labeller(labeller_config)
    quality = quality or QualityConfig()
    scorer = scorer or shared_scorer()
    rng = Random(f"tinychat pairs {split} {seed}")
    tasks = make_tasks(split, num, seed, families)
    rows: list[Row | None] = [None] * num
    open_slots = list(range(num))
    for _ in range(_MAX_ROUNDS):
        if not open_slots:
            break
        # All candidates of a round are scored at once, so that their code runs as one batch.
        pairs = [(write_candidate(tasks[i], rng, quality), write_candidate(tasks[i], rng, quality)) for i in open_slots]
        golds = _score_pairs([tasks[i] for i in open_slots], pairs, scorer)
        for slot, pair, gold in zip(open_slots, pairs, golds, strict=True):
            if _differ(pair, gold, labeller.config.min_gap):
                rows[slot] = _pair_row(tasks[slot], pair, gold, labeller, rng)
        open_slots = [slot for slot in open_slots if rows[slot] is None]
    if open_slots:
        raise UserError(
            f"{len(open_slots)} of {num} tasks gave no two candidates whose gold differs by "
            f"min_gap={labeller.config.min_gap:g}; lower it or raise the defect rates."
        )
    return [row for row in rows if row is not None]


def prompt_rows(split: str, num: int, seed: int, families: Sequence[str] | None = None) -> list[Row]:
    """Return `num` prompts as messages, each with its task (see `Task.from_row`) and family."""
    return [prompt_row(task) for task in make_tasks(split, num, seed, families)]


def prompt_row(task: Task) -> Row:
    """Return one task as a dataset row with the columns prompt, task, family and subset.

    As in HH-RLHF, the subset `harmless` is of requests that should be refused, `helpful` of all others.
    """
    subset = "harmless" if task.spec.get("kind") == "harmful" else "helpful"
    prompt = [{"role": "user", "content": task.prompt}]
    return {"prompt": prompt, "task": task.to_row(), "family": task.family, "subset": subset}


def gold_reward(
    prompts: Sequence[Any], completions: Sequence[Any], task: Sequence[Mapping[str, Any]], **columns: Any
) -> list[float]:
    """Reward function with the ecosystem's signature: the gold total of each completion (str or messages).

    `task` is the column of that name in `prompt_rows` and `preference_pairs`; nothing else is read.
    """
    texts = [said if isinstance(said, str) else str(said[-1]["content"]) for said in completions]
    return [score.total for score in shared_scorer().score([Task.from_row(row) for row in task], texts)]


def answer_reward(
    prompts: Sequence[Any], completions: Sequence[Any], task: Sequence[Mapping[str, Any]], **columns: Any
) -> list[float]:
    """Reward function: what gold says of correctness alone (1; 0.5 for a right result with a false equation; 0)."""
    texts = [said if isinstance(said, str) else str(said[-1]["content"]) for said in completions]
    return [score.parts["correct"] for score in shared_scorer().score([Task.from_row(row) for row in task], texts)]


@lru_cache(maxsize=1)
def shared_scorer() -> GoldScorer:
    """Return the process-wide scorer with default settings, so that its sandbox starts once and outcomes are kept."""
    return GoldScorer()


def _score_pairs(tasks: Sequence[Task], pairs: Sequence[Pair], scorer: GoldScorer) -> list[tuple[GoldScore, GoldScore]]:
    texts = [candidate.text for pair in pairs for candidate in pair]
    scores = scorer.score([task for task in tasks for _ in range(2)], texts)
    return list(zip(scores[0::2], scores[1::2], strict=True))


def _differ(pair: Pair, golds: tuple[GoldScore, GoldScore], min_gap: float) -> bool:
    gap = abs(golds[0].total - golds[1].total)
    # Scores are sums of floats: what is equal but for rounding is equal.
    return gap > 1e-9 and gap >= min_gap - 1e-9 and pair[0].text != pair[1].text


def _pair_row(task: Task, pair: Pair, golds: tuple[GoldScore, GoldScore], labeller: Labeller, rng: Random) -> Row:
    label = labeller.label(golds[0].total, golds[1].total, pair[0].text, pair[1].text, rng)
    chosen, rejected = (0, 1) if label.prefers_a else (1, 0)
    return {
        **prompt_row(task),
        "chosen": pair[chosen].text,
        "rejected": pair[rejected].text,
        "gold_chosen": golds[chosen].total,
        "gold_rejected": golds[rejected].total,
        "gold_preferred_chosen": golds[chosen].total > golds[rejected].total,
        "clean_preferred_chosen": label.clean_prefers_a == label.prefers_a,
        "attributes_chosen": pair[chosen].attributes,
        "attributes_rejected": pair[rejected].attributes,
    }
