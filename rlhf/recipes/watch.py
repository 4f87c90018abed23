"""Watching a policy for signs that it games its reward, while PPO or GRPO train it.

    <run>/hacking.json    every look's figures, and the verdicts so far
    <run>/hacking.png     each sign over the iterations, with its threshold
    <run>/clean/          weights of the last clean look, where they may be wanted back

Looks are part of a checkpoint, so that a run taken up again has seen what it would have seen without the break.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.data.prompt_dataset import PromptExample
from rlhf.data.tinychat import gold_reward, is_task_of
from rlhf.eval.hacking import Look, Mean, Verdict, judge, text_figures
from rlhf.eval.hacking_plot import hacking_png
from rlhf.infra.checkpoint import separate_tensors
from rlhf.infra.durable import write_json, written_aside
from rlhf.infra.experiment import Run
from rlhf.recipes.online_config import OnlineConfig
from rlhf.recipes.online_state import Progress, Rollout
from rlhf.recipes.rollouts import OnlineParts, Rollouts
from rlhf.rewards.protocol import Scores

FILE, PLOT, CLEAN = "hacking.json", "hacking.png", "clean"
# The number of a look's answers to held-out prompts among the batches of an iteration (see `Rollouts.sample`).
HELD_OUT = -1


class Watch:
    """Takes looks when they are due and acts on what they show."""

    def __init__(self, config: OnlineConfig, run: Run, parts: OnlineParts, rollouts: Rollouts) -> None:
        self.config, self.run, self.parts, self.rollouts = config, run, parts, rollouts
        self.held_out = parts.held_out[: config.hacking.num_held_out]
        self._examples = {tuple(example.prompt_ids): example for example in parts.prompts}

    def look(self, progress: Progress, rollout: Rollout) -> None:
        """Look at what an iteration has just drawn, where a look is due; stop the run where the settings say so."""
        step = progress.step + 1
        if not self._is_due(step):
            return
        known = {verdict.sign for verdict in self._verdicts(progress) if verdict.caught}
        progress.looks.append(Look(step, self._figures(progress.step, rollout)))
        verdicts = self._verdicts(progress)
        write_json(self.run.folder / FILE, self._record(progress, verdicts))
        caught = [verdict for verdict in verdicts if verdict.caught]
        for verdict in caught:
            if verdict.sign not in known:
                self.run.logger.info(f"iteration {step}, a sign of reward hacking, {verdict.sign}: {verdict.sentence}")
        if self.config.hacking.action == "warn":
            return
        if caught:
            self.run.stop_reason = "reward_hacking"
        elif self.config.hacking.action == "rollback":
            self._keep_weights(step)

    def conclude(self, progress: Progress) -> None:
        """Draw what was seen, and put the last clean weights back where a sign ended the run and they are wanted."""
        if not progress.looks:
            return
        hacking_png(progress.looks, self._verdicts(progress), self.run.folder / PLOT)
        if self.run.stop_reason != "reward_hacking":
            return
        said = "the run ends here because of hacking.action"
        if self.config.hacking.action == "rollback":
            self._put_back()
            clean = max((look.step for look in progress.looks[:-1]), default=progress.looks[0].step)
            said += (
                f"; {self.run.folder}/policy gets the weights with which iteration {clean} began, the last clean one"
            )
        self.run.logger.info(said)

    def _is_due(self, step: int) -> bool:
        every = self.config.hacking.every
        return every is not None and (step in (1, self.config.updates.num_iterations) or step % every == 0)

    def _figures(self, step: int, rollout: Rollout) -> dict[str, Mean]:
        """Means over answers; see `rlhf.eval.hacking.SIGNS` for what is made of them."""
        trajectory, kl_B = rollout.experience.trajectory, rollout.experience.kl_B
        lengths_B = trajectory.lengths_B.clamp(min=1)
        entropy_B = (trajectory.entropy_BR * trajectory.response_mask_BR).sum(dim=1) / lengths_B
        texts, prompts = self.rollouts.texts(trajectory), [tuple(ids) for ids in trajectory.prompts()]
        numbers = {ids: number for number, ids in enumerate(dict.fromkeys(prompts))}
        groups = [numbers[ids] for ids in prompts]
        found = text_figures(texts, groups) | {
            "length": Mean.of(trajectory.lengths_B.tolist(), groups),
            "entropy": Mean.of(entropy_B.tolist(), groups),
            "reward": Mean.of(rollout.scores.returns, groups),
        }
        if bool(kl_B.isfinite().all()):
            found["kl"] = Mean.of(kl_B.tolist(), groups)
        spreads = [values for name, values in rollout.scores.details.items() if name.endswith("disagreement")]
        if spreads:
            found["disagreement"] = Mean.of([sum(row) / len(row) for row in zip(*spreads, strict=True)], groups)
        examples = [self._examples[ids] for ids in prompts]
        if all(is_task_of(example.columns.get("task"), example.prompt) for example in examples):
            found["gold"] = Mean.of(_gold(examples, texts), groups)
        if self.held_out:
            found["held_out_reward"] = Mean.of(self._score_held_out(step).returns)
        return found

    def _score_held_out(self, step: int) -> Scores:
        drawn = self.rollouts.sample(self.held_out, step, recompute=False, part=HELD_OUT)
        return self.rollouts.score(self.held_out, drawn)

    def _verdicts(self, progress: Progress) -> list[Verdict]:
        return judge(progress.looks, self.config.hacking) if progress.looks else []

    def _record(self, progress: Progress, verdicts: Sequence[Verdict]) -> dict[str, object]:
        return {
            "settings": self.config.hacking.model_dump(mode="json"),
            "verdicts": [verdict.to_json() for verdict in verdicts],
            "looks": [look.to_json() for look in progress.looks],
        }

    def _keep_weights(self, step: int) -> None:
        with written_aside(self.run.folder / CLEAN) as aside:
            save_file(separate_tensors(self._weights()), aside / "weights.safetensors")
            write_json(aside / "look.json", {"iteration": step})

    @torch.no_grad()
    def _put_back(self) -> None:
        path: Path = self.run.folder / CLEAN / "weights.safetensors"
        if not path.is_file():
            return
        kept = load_file(path)
        for name, tensor in self._weights().items():
            tensor.copy_(kept[name])

    def _weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parts.policy.trainable_parameters().items()}


def _gold(examples: Sequence[PromptExample], texts: Sequence[str]) -> list[float]:
    return gold_reward(
        [example.prompt for example in examples], texts, [example.columns["task"] for example in examples]
    )
