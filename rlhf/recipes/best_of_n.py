"""Best of n and rejection sampling: sample, score, keep.

    prompts -> N answers to each -> scores -> the best, to be imitated; the best beside the worst, as pairs; a report

The pool of answers is worked in portions, and a run that was interrupted goes on with the next; what is kept of it is a
function of the pool alone. `<run>/best.jsonl` is data for `rlhf sft`, `<run>/pairs.jsonl` for `rlhf rm` and `rlhf dpo`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf.data.chat import ChatEncoder
from rlhf.data.prompt_dataset import PromptDataset, PromptExample, gather_columns
from rlhf.eval.best_of_n_report import best_of_n_report, shown
from rlhf.infra.durable import write_json, write_text
from rlhf.infra.experiment import Run
from rlhf.models.decoding import text_before_stop
from rlhf.models.policy import Policy
from rlhf.recipes.best_of_n_config import BestOfNConfig
from rlhf.recipes.launch import launch
from rlhf.recipes.portions import Portion, fill_in_portions
from rlhf.recipes.selection import as_demonstrations, as_pairs, selected
from rlhf.recipes.sft import announce
from rlhf.recipes.stages import build_reward, load_policy
from rlhf.rewards.protocol import CombinedReward
from rlhf.rewards.verifiers import check_columns
from rlhf.rollout.cache import CachedAnswer, weights_hash
from rlhf.rollout.completions import Completer

POOL, BEST, PAIRS, REPORT = "pool.jsonl", "best.jsonl", "pairs.jsonl", "best_of_n.json"


@dataclass(frozen=True)
class BestOfNParts:
    """Policy, rewards and prompts, loaded and found usable; `notes` are on rows and columns."""

    policy: Policy
    reward: CombinedReward
    measure: CombinedReward | None
    prompts: PromptDataset
    encoder: ChatEncoder
    notes: str


def run_best_of_n(config: BestOfNConfig, resume: Path | None = None) -> Run:
    """Answer, score and keep; see the head of this file for what lies in the run folder."""
    return launch(
        "best_of_n",
        config,
        prepare,
        choose,
        settings=config.run,
        lineage=config.lineage,
        data_files=config.data.files(),
        resume=resume,
    )


def prepare(config: BestOfNConfig, device: torch.device, rejected_rows: Path) -> BestOfNParts:
    """The policy, the rewards that choose and those that measure, and the prompts."""
    loaded = load_policy(config.policy, config.in_effect().model, config.run.output_dir, device, config.run.dtype)
    encoder = ChatEncoder(loaded.backbone.tokenizer, config.data.system_prompt)
    prompts, _ = PromptDataset.load(config.data, encoder, rejected_rows)
    rewards = build_reward(
        [*config.rewards, *config.measured_by],
        config.reward_model,
        config.run.output_dir,
        loaded.backbone,
        config.data.system_prompt,
        config.process_model,
    )
    notes = check_columns(rewards.terms, [prompt.columns for prompt in prompts.examples])
    chosen, measuring = rewards.terms[: len(config.rewards)], rewards.terms[len(config.rewards) :]
    return BestOfNParts(
        Policy(loaded.backbone, loaded.adapter),
        CombinedReward(chosen, config.combination),
        CombinedReward(measuring) if measuring else None,
        prompts,
        encoder,
        "; ".join([str(prompts.report), *notes]),
    )


def choose(config: BestOfNConfig, run: Run, parts: BestOfNParts) -> tuple[int, int]:
    """The pool, then what is kept of it, and what choosing was worth."""
    announce(run, parts.policy.backbone, parts.notes)
    pool = Pool(config, run, parts)
    progress = fill_in_portions(run, POOL, pool.num_portions, "answers", pool.portion)
    if run.stop_reason is None:
        keep(config, run)
        report(run)
    return progress.step, progress.tokens


class Pool:
    """Scored answers, portion by portion."""

    def __init__(self, config: BestOfNConfig, run: Run, parts: BestOfNParts) -> None:
        self.config, self.parts = config, parts
        backbone = parts.policy.backbone
        cache = None
        if config.use_cache:
            cache = (config.run.output_dir / "cache", weights_hash(backbone, parts.policy.adapter))
        stop_ids = parts.encoder.stop_token_ids
        self.completer = Completer(parts.policy, config.generation, stop_ids, run.config.seed, cache)

    @property
    def num_portions(self) -> int:
        return -(-len(self.parts.prompts) // self.config.best_of_n.prompts_at_once)

    def portion(self, number: int) -> Portion:
        """Answer and score the prompts of one portion; a row holds a prompt with all its answers."""
        size, num_answers = self.config.best_of_n.prompts_at_once, self.config.best_of_n.num_answers
        prompts = self.parts.prompts.examples[number * size : (number + 1) * size]
        tokens_before = self.completer.num_tokens
        drawn = [self.completer.draw([one.prompt_ids for one in prompts], place) for place in range(num_answers)]
        columns = [self._scored(prompts, answers) for answers in drawn]
        rows = [
            {"prompt": prompt.prompt, "columns": prompt.columns}
            | {name: [one[name][place] for one in columns] for name in columns[0]}
            for place, prompt in enumerate(prompts)
        ]
        best = [max(row["scores"]) for row in rows]
        every = [score for row in rows for score in row["scores"]]
        metrics = {
            "best_of_n/score_mean": sum(every) / len(every),
            "best_of_n/score_best": sum(best) / len(best),
            "best_of_n/distinct": sum(len(set(row["answers"])) for row in rows) / len(every),
        }
        return Portion(rows, self.completer.num_tokens - tokens_before, metrics)

    def _scored(self, prompts: Sequence[PromptExample], answers: Sequence[CachedAnswer]) -> dict[str, list[Any]]:
        """One answer to each prompt with its score, what it is worth besides, and whether it ended by itself."""
        stop = self.config.generation.stop
        texts = self.parts.encoder.decode_batch([answer.response_ids for answer in answers])
        texts = [text_before_stop(text, stop) for text in texts]
        finished = [answer.finished for answer in answers]
        columns = gather_columns(prompts) | {
            "prompt_ids": [prompt.prompt_ids for prompt in prompts],
            "completion_ids": [answer.response_ids for answer in answers],
            "finished": finished,
        }
        said = [prompt.prompt for prompt in prompts]
        found = {"answers": texts, "scores": self.parts.reward(said, texts, columns).total, "finished": finished}
        if self.parts.measure is not None:
            found["worths"] = self.parts.measure(said, texts, columns).total
        return found


def keep(config: BestOfNConfig, run: Run) -> None:
    """Choose from the pool, and say how much that is."""
    settings = config.best_of_n
    rows = list(read_pool(run.folder))
    kept = selected(rows, settings)
    pairs = as_pairs(rows, settings.min_gap)
    write_rows(run.folder / BEST, as_demonstrations(rows, kept))
    write_rows(run.folder / PAIRS, pairs)
    num_prompts = len({place for place, _ in kept})
    run.logger.info(
        f"kept {len(kept)} answers to {num_prompts} of {len(rows)} prompts, and {len(pairs)} pairs of best and worst"
    )


def report(run: Run) -> None:
    """Say what choosing is worth for every n, beside how far it can have left the policy."""
    found = best_of_n_report(list(read_pool(run.folder)))
    write_json(run.folder / REPORT, asdict(found))
    for line in shown(found):
        run.logger.info(line)


def read_pool(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a finished pool."""
    with (folder / POOL).open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSONL file that has its name when it is whole."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
