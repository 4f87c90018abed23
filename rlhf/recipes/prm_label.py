"""Step labels without people: sample solutions, complete each of their steps several times, count right completions.

    questions -> solutions -> beginnings up to each step -> completions -> right or wrong -> labels

After Math-Shepherd (arXiv:2312.08935 section 3.3). The label of the last step of a finished solution is whether the
solution is right, since there is nothing left to complete. Tokens are never made of text again: a beginning consists of
the very tokens that were sampled. Questions are worked in portions; a run that was interrupted goes on with the next.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlhf.algo.process_loss import ESTIMATES
from rlhf.data.chat import ChatEncoder
from rlhf.data.prompt_dataset import PromptDataset, PromptExample, gather_columns
from rlhf.data.rows import prompt_key
from rlhf.data.step_splitter import StepSplitter, tokens_until, tokens_within
from rlhf.data.tinychat.steps import known_truth
from rlhf.eval.label_agreement import LabelledSolution, label_agreement
from rlhf.infra.experiment import Run
from rlhf.models.decoding import text_before_stop
from rlhf.models.policy import Policy
from rlhf.recipes.launch import launch
from rlhf.recipes.portions import Portion, fill_in_portions
from rlhf.recipes.prm_label_config import StepLabelConfig
from rlhf.recipes.sft import announce
from rlhf.recipes.stages import build_reward, load_policy
from rlhf.rewards.protocol import CombinedReward, reward_sources
from rlhf.rollout.cache import CachedAnswer, weights_hash
from rlhf.rollout.completions import Completer

LABELS, REPORT = "steps.jsonl", "label_report.json"


@dataclass(frozen=True)
class LabelParts:
    """Policy, rewards and questions, loaded and found usable."""

    policy: Policy
    reward: CombinedReward
    questions: PromptDataset
    encoder: ChatEncoder


@dataclass
class Solution:
    """A sampled solution with the beginnings (tokens of the answer) that are completed, at most one for each step."""

    question: PromptExample
    answer: CachedAnswer
    text: str
    steps: list[str]
    beginnings: list[list[int]]
    is_right: bool = False
    num_right: list[int] = field(default_factory=list)


def run_prm_label(config: StepLabelConfig, resume: Path | None = None) -> Run:
    """Label solutions; rows with TRL's columns (prompt, completions, labels) are in `<run>/steps.jsonl`."""
    return launch(
        "prm_label",
        config,
        prepare,
        label,
        settings=config.run,
        lineage={"policy": config.policy} | reward_sources(config.rewards, None, None),
        data_files=config.data.files(),
        resume=resume,
    )


def prepare(config: StepLabelConfig, device: torch.device, rejected_rows: Path) -> LabelParts:
    """The policy, the rewards that tell right from wrong, and the questions."""
    loaded = load_policy(config.policy, config.in_effect().model, config.run.output_dir, device, config.run.dtype)
    encoder = ChatEncoder(loaded.backbone.tokenizer, config.data.system_prompt)
    questions, _ = PromptDataset.load(config.data, encoder, rejected_rows)
    reward = build_reward(config.rewards, None, config.run.output_dir, loaded.backbone, config.data.system_prompt)
    StepSplitter(config.sampling.split)  # a pattern that is none is refused before anything is written
    return LabelParts(Policy(loaded.backbone, loaded.adapter), reward, questions, encoder)


def label(config: StepLabelConfig, run: Run, parts: LabelParts) -> tuple[int, int]:
    """All portions, then the file gets its name and the report is written."""
    announce(run, parts.policy.backbone, str(parts.questions.report))
    labeller = StepLabeller(config, run, parts)
    progress = fill_in_portions(run, LABELS, labeller.num_portions, "step labels", labeller.portion)
    if run.stop_reason is None:
        report(run)
    return progress.step, progress.tokens


class StepLabeller:
    """The work over its parts; `portion` is the whole of it."""

    def __init__(self, config: StepLabelConfig, run: Run, parts: LabelParts) -> None:
        self.config, self.parts = config, parts
        self.splitter = StepSplitter(config.sampling.split)
        backbone = parts.policy.backbone
        cache = None
        if config.use_cache:
            cache = (config.run.output_dir / "cache", weights_hash(backbone, parts.policy.adapter))
        stop_ids = parts.encoder.stop_token_ids
        self.completer = Completer(parts.policy, config.generation, stop_ids, run.config.seed, cache)

    @property
    def num_portions(self) -> int:
        return -(-len(self.parts.questions) // self.config.sampling.questions_at_once)

    def portion(self, number: int) -> Portion:
        """Label the solutions of the questions of one portion."""
        size = self.config.sampling.questions_at_once
        tokens_before = self.completer.num_tokens
        solutions, counts = self.solutions(self.parts.questions.examples[number * size : (number + 1) * size])
        self.complete(solutions)
        rows = [self.row(solution) for solution in solutions]
        labels = [value for row in rows for value in row["labels"]]
        metrics = {"labels/solutions": float(len(rows)), "labels/steps": float(len(labels))}
        metrics |= {f"labels/solutions_{reason}": float(counts[reason]) for reason in ("twice", "without_step")}
        if rows:
            metrics |= {
                "labels/solutions_right": sum(row["is_right"] for row in rows) / len(rows),
                "labels/mean": sum(labels) / len(labels),
                "labels/share_zero": labels.count(0.0) / len(labels),
            }
        return Portion(rows, self.completer.num_tokens - tokens_before, metrics)

    def solutions(self, questions: Sequence[PromptExample]) -> tuple[list[Solution], Counter[str]]:
        """Different solutions to these questions with their beginnings, and counts of what was left out."""
        found: list[Solution] = []
        counts: Counter[str] = Counter()
        for number in range(self.config.sampling.num_solutions):
            answers = self.completer.draw([question.prompt_ids for question in questions], number)
            found += [self._split(*pair) for pair in zip(questions, answers, strict=True)]
        kept: dict[tuple[str, tuple[str, ...], bool], Solution] = {}
        for solution in found:
            key = (prompt_key(solution.question.prompt), tuple(solution.steps), solution.answer.finished)
            reason = "without_step" if not solution.steps else "twice" if key in kept else "kept"
            counts[reason] += 1
            if reason == "kept":
                kept[key] = solution
        # Questions stay together, whatever the number of the solution.
        order = {prompt_key(question.prompt): place for place, question in enumerate(questions)}
        chosen = sorted(kept.values(), key=lambda solution: order[prompt_key(solution.question.prompt)])
        for solution, is_right in zip(chosen, self.right(chosen, [s.text for s in chosen]), strict=True):
            solution.is_right = is_right
        return chosen, counts

    def _split(self, question: PromptExample, answer: CachedAnswer) -> Solution:
        """Cut an answer into steps, and its tokens behind each of them (before the next step's first)."""
        decode, ids = self.parts.encoder.decode, answer.response_ids
        text = text_before_stop(decode(ids), self.config.generation.stop)
        spans = self.splitter.spans(text)
        following = [start for start, _ in spans[1:]]
        places = [
            max(tokens_until(decode, ids, end), tokens_within(decode, ids, start))
            for (_, end), start in zip(spans, following, strict=False)
        ]
        beginnings = [ids[:place] for place in places]
        if spans and not answer.finished:
            beginnings.append(list(ids))
        return Solution(question, answer, text, [text[start:end] for start, end in spans], beginnings)

    def complete(self, solutions: Sequence[Solution]) -> None:
        """Count for every beginning how many of its completions are right."""
        places = [(solution, ids) for solution in solutions for ids in solution.beginnings]
        counts = [0] * len(places)
        for number in range(self.config.sampling.num_completions if places else 0):
            drawn = self.completer.draw([[*one.question.prompt_ids, *ids] for one, ids in places], number)
            texts = self.parts.encoder.decode_batch(
                [[*ids, *answer.response_ids] for (_, ids), answer in zip(places, drawn, strict=True)]
            )
            stop = self.config.generation.stop
            texts = [text_before_stop(text, stop) for text in texts]
            is_right = self.right([one for one, _ in places], texts)
            counts = [count + one for count, one in zip(counts, is_right, strict=True)]
        for (solution, _), count in zip(places, counts, strict=True):
            solution.num_right.append(count)

    def right(self, solutions: Sequence[Solution], texts: Sequence[str]) -> list[bool]:
        """Whether the rewards find each text right as an answer to the question of the solution beside it."""
        if not solutions:
            return []
        columns = gather_columns([solution.question for solution in solutions])
        scores = self.parts.reward([solution.question.prompt for solution in solutions], texts, columns)
        return [total >= self.config.sampling.right_from for total in scores.total]

    def row(self, solution: Solution) -> dict[str, Any]:
        """The solution with TRL's stepwise columns, the counts behind its labels, and the question's own columns."""
        num, estimate = self.config.sampling.num_completions, ESTIMATES[self.config.sampling.estimate]
        counted = [(count, num) for count in solution.num_right]
        if solution.answer.finished:
            counted.append((int(solution.is_right), 1))
        return {
            **solution.question.columns,
            "prompt": solution.question.prompt,
            "completions": solution.steps,
            "labels": [estimate(count, of) for count, of in counted],
            "num_right": [count for count, _ in counted],
            "num_sampled": [of for _, of in counted],
            "is_right": solution.is_right,
            "finished": solution.answer.finished,
        }


def report(run: Run) -> None:
    """Say what the labels are like, by place of the step and, where it is known, beside the truth.

    The numbers are kept in `<run>/label_report.json`.
    """
    with (run.folder / LABELS).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    values = [[a / b for a, b in zip(row["num_right"], row["num_sampled"], strict=True)] for row in rows]
    found: dict[str, Any] = {
        "num_solutions": len(rows),
        "num_steps": sum(map(len, values)),
        "solutions_right": sum(row["is_right"] for row in rows) / max(1, len(rows)),
        "mean_by_step": _means_by_place(values),
    }
    run.logger.info(
        f"{found['num_solutions']} solutions with {found['num_steps']} steps, {found['solutions_right']:.3f} right; "
        f"mean share of right completions by step {', '.join(f'{mean:.2f}' for mean in found['mean_by_step'][:6])}"
    )
    judged = []
    for row, value in zip(rows, values, strict=True):
        # The last step of a finished solution was not completed: its label is the outcome.
        num_completed = len(value) - row["finished"]
        truth = known_truth(row, row["completions"])
        if truth is not None and num_completed:
            judged.append(LabelledSolution(prompt_key(row["prompt"]), value[:num_completed], truth[:num_completed]))
    if judged:
        agreement = label_agreement(judged)
        found["agreement"] = asdict(agreement)
        shown = {name: one for name, one in asdict(agreement).items() if isinstance(one, dict)}
        run.logger.info(
            f"against the truth of {agreement.num_steps} completed steps ({agreement.share_right:.3f} right): "
            + ", ".join(f"{n} {v['estimate']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for n, v in shown.items())
        )
    (run.folder / REPORT).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _means_by_place(values: Sequence[Sequence[float]]) -> list[float]:
    longest = max(map(len, values), default=0)
    columns = [[row[place] for row in values if place < len(row)] for place in range(longest)]
    return [sum(column) / len(column) for column in columns]
