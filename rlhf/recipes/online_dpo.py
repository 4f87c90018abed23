"""Online and iterative DPO, read from top to bottom: every round

    (judge some answers of the newest policy -> train a reward model on them ->)
    sample answers by the newest policy -> pair them by what they are worth -> DPO on the pairs

Each of these is an ordinary run inside the run's folder, made by the recipe that stands alone (`rlhf pairs`, `rlhf rm`,
`rlhf dpo`), with its own log and lineage: `round_1/pairs`, `round_1/dpo`, `round_2/pairs` and so on. Against the run's
start as reference this is online DPO (arXiv:2402.04792) with a round's worth of samples between updates of the
sampler; against the previous round's policy it is iterative DPO (arXiv:2312.16682).

Left out on purpose: an optimizer state that lives across rounds; every round begins its schedule anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.data.data_config import DataConfig
from rlhf.infra.config import refuse_idle_keys
from rlhf.infra.device import resolve_device
from rlhf.infra.durable import written_aside
from rlhf.infra.experiment import Run, RunConfig
from rlhf.infra.run_folder import read_run_info
from rlhf.recipes.chain import chain, run_stage
from rlhf.recipes.dpo import DPOConfig, run_dpo
from rlhf.recipes.judging import RewardModelJudgeConfig
from rlhf.recipes.lineage import fingerprints, refuse_changed
from rlhf.recipes.online_config import SamplingConfig
from rlhf.recipes.online_dpo_config import OnlineDPOConfig
from rlhf.recipes.pairs import PAIRS, REPORT, run_pairs
from rlhf.recipes.pairs_config import ComparisonSettings, PairsConfig, PairSettings
from rlhf.recipes.reward import REWARD_REPORT, RewardConfig, run_reward
from rlhf.recipes.stages import POLICY, PROCESS_MODEL, REWARD_MODEL, check_reward_names, locate
from rlhf.rewards.protocol import RewardTermConfig

OF_JUDGING = ("pairs/kept", "pairs/alike", "pairs/no_verdict")
OF_TRAINING = ("train/loss", "train/accuracy", "train/margin", "train/tokens")


def run_online_dpo(config: OnlineDPOConfig, resume: Path | None = None) -> Run:
    """Sample, label and train by rounds; the policy of the last round is in `<run>/policy`.

    Raises:
        UserError: a source cannot serve, or on resuming is not what it was; or a round cannot start.
        Stopped: Ctrl-C; the command to go on is in the message.
    """
    run = _opened(config, resume)
    with chain(run):
        rounds = Rounds(config, run)
        finished = 0
        for number in range(1, config.rounds.num_rounds + 1):
            if run.should_stop():
                break
            if not rounds.make(number):
                run.logger.info(f"round {number}: no two answers differ in what they are worth; training ends here")
                break
            rounds.log(number)
            finished = number
        if run.stop_reason != "interrupted":
            rounds.keep(finished)
    return run


def _opened(config: OnlineDPOConfig, resume: Path | None) -> Run:
    refuse_idle_keys(config)
    resolve_device(config.run.device)
    if not config.judges:
        check_reward_names(config.rewards, config.reward_model, config.process_model)
    found, files = fingerprints(config.lineage, config.run.output_dir), config.data.files()
    if resume is None:
        return Run.create("online_dpo", config, config.run, config.lineage, files, found)
    refuse_changed(resume, found, files)
    return Run.open(resume)


class Rounds:
    """The configs of a run's rounds, and what their runs left behind."""

    def __init__(self, config: OnlineDPOConfig, run: Run) -> None:
        self.config, self.run = config, run
        self.start = locate(config.policy, config.run.output_dir, POLICY)
        # Runs inside this one look for others inside it, so what the user named is found here.
        place, scored = config.run.output_dir, not config.judges
        asks_model, asks_steps = config.reward_model if scored else None, config.process_model
        self.reward_model = asks_model and locate(asks_model, place, REWARD_MODEL)
        self.process_model = asks_steps and locate(asks_steps, place, PROCESS_MODEL)
        self.rewards = [self._located(term) for term in config.rewards]
        self.judges = tuple(
            judge.model_copy(update={"source": locate(judge.source, place, REWARD_MODEL)})
            if isinstance(judge, RewardModelJudgeConfig)
            else judge
            for judge in config.judges
        )
        self.backbone = self.start
        if config.refresh is not None and config.refresh.backbone is not None:
            self.backbone = locate(config.refresh.backbone, place, POLICY)

    def make(self, number: int) -> bool:
        """Run what the round consists of; False where its answers gave no pair to learn from."""
        self.run.logger.info(f"round {number} of {self.config.rounds.num_rounds}")
        if self.config.refresh is not None:
            run_stage(self.name(number, "judged"), lambda resume: run_pairs(self.judged(number), resume), self.run)
            if not self.taught_by(number):
                return False
            run_stage(self.name(number, "reward"), lambda resume: run_reward(self.reward(number), resume), self.run)
        run_stage(self.name(number, "pairs"), lambda resume: run_pairs(self.pairs(number), resume), self.run)
        if not self.folder(number, "pairs").joinpath(PAIRS).stat().st_size:
            return False
        run_stage(self.name(number, "dpo"), lambda resume: run_dpo(self.dpo(number), resume), self.run)
        return True

    def judged(self, number: int) -> PairsConfig:
        """The config of the answers from which the round's reward model learns, compared by the judges."""
        refresh = self.config.refresh
        assert refresh is not None
        pairs = self._settings(number, after=0).model_copy(
            update={"num_prompts": refresh.num_prompts, "choose": "neighbours"}
        )
        stage = {"run": self._inner(number, "judged"), "pairs": pairs}
        return self._sampling(number).model_copy(
            update=stage | {"judges": self.judges, "rule": self.config.rule, "reward_model": None}
        )

    def taught_by(self, number: int) -> list[str]:
        """The files of pairs that a round's reward model learns from: those given, and all that judges found so far."""
        refresh = self.config.refresh
        assert refresh is not None
        found = [self.folder(earlier, "judged") / PAIRS for earlier in range(1, number + 1)]
        return [*refresh.train_files, *(str(path) for path in found if path.stat().st_size)]

    def reward(self, number: int) -> RewardConfig:
        """The config of the round's reward model."""
        refresh = self.config.refresh
        assert refresh is not None
        data = self._data(self.taught_by(number)) | {"validation_fraction": refresh.validation_fraction}
        return RewardConfig().model_copy(
            update={
                "run": self._inner(number, "reward"),
                "backbone": self.backbone,
                "model": self.config.model,
                "reward": refresh.reward,
                "data": DataConfig().model_copy(update=data),
                "training": refresh.training,
                "optimizer": refresh.optimizer,
            }
        )

    def pairs(self, number: int) -> PairsConfig:
        """The config of the round's sampling and labelling; every round takes the next prompts."""
        refresh = self.config.refresh
        stage = {
            "run": self._inner(number, "pairs"),
            "pairs": self._settings(number, after=refresh.num_prompts if refresh is not None else 0),
        }
        if refresh is not None:
            stage["reward_model"] = str(self.folder(number, "reward"))
        elif self.config.judges:
            stage |= {"judges": self.judges, "rule": self.config.rule}
        return self._sampling(number).model_copy(update=stage)

    def _sampling(self, number: int) -> PairsConfig:
        config = self.config
        shared = {name: value for name, value in config if name in SamplingConfig.model_fields}
        # `model_copy`: nothing counts as set by the user, whose keys were examined as those of the whole.
        return PairsConfig().model_copy(
            update=shared
            | {
                "policy": self.policy(number - 1),
                "reward_model": self.reward_model,
                "process_model": self.process_model,
                "rewards": self.rewards,
                "reference": self.start if number > 1 else None,
                "model": config.model.model_copy(update={"train": "lora"}),
            }
        )

    def _settings(self, number: int, after: int) -> PairSettings:
        """What is compared in a round; `after` counts the prompts of the round that are used before."""
        rounds, refresh = self.config.rounds, self.config.refresh
        of_a_round = rounds.num_prompts + (refresh.num_prompts if refresh is not None else 0)
        settings = {name: value for name, value in rounds if name in ComparisonSettings.model_fields}
        return PairSettings().model_copy(update=settings | {"first_prompt": (number - 1) * of_a_round + after})

    def dpo(self, number: int) -> DPOConfig:
        """The config of the round's training."""
        config = self.config
        compares = config.rounds.reference == "start" and config.preference_loss.has_reference
        data = self._data([str(self.folder(number, "pairs") / PAIRS)])
        shared = {name: value for name, value in config if name in DPOConfig.model_fields}
        return DPOConfig().model_copy(
            update=shared
            | {
                "run": self._inner(number, "dpo"),
                "policy": self.policy(number - 1),
                "reference": self.start if compares and number > 1 else None,
                "data": DataConfig().model_copy(update=data),
            }
        )

    def _data(self, files: Sequence[str]) -> dict[str, Any]:
        config = self.config
        return {
            "train_files": tuple(files),
            "validation_fraction": 0.0,
            "min_length": 1,
            # The text of an answer may make more tokens than were sampled.
            "max_length": config.data.max_prompt_length + 2 * config.generation.max_new_tokens,
            "system_prompt": config.data.system_prompt,
        }

    def log(self, number: int) -> None:
        """A line of the log for the round: what its policy sampled, and how training on that went."""
        sampled = _read(self.folder(number, "pairs") / REPORT)
        trained = _lines(self.folder(number, "dpo"))
        line = {"kl/mean": 0.0} if number == 1 else {}  # the start samples the first round
        line |= sampled | {name: trained[-1][name] for name in OF_TRAINING}
        line["train/first_loss"] = trained[0]["train/loss"]
        if self.config.refresh is not None:
            report = _read(self.folder(number, "judged") / REPORT)
            line |= {f"judged/{name.removeprefix('pairs/')}": v for name, v in report.items() if name in OF_JUDGING}
            measured = _read(self.folder(number, "reward") / REWARD_REPORT)
            line["refresh/accuracy"] = measured["accuracy"]["estimate"]
        self.run.logger.log(number, line)

    def keep(self, number: int) -> None:
        """Put what a round left behind where other recipes look for it (0: nothing), and sum up what all cost."""
        if number > 0:
            products = {POLICY: "dpo"} | ({REWARD_MODEL: "reward"} if self.config.refresh is not None else {})
            for product, stage in products.items():
                with written_aside(self.run.folder / product) as aside:
                    shutil.copytree(self.folder(number, stage) / product, aside, dirs_exist_ok=True)
        infos = [read_run_info(path.parent) for path in sorted(self.run.folder.glob("round_*/*/run.json"))]
        costs = [info["cost"] for info in infos if "cost" in info]
        self.run.info["cost"] = self.run.info.get("cost", {}) | {
            "tokens": sum(cost["tokens"] for cost in costs),
            "optimizer_steps": sum(cost["optimizer_steps"] for cost in costs),
            "peak_memory_mb": max((cost["peak_memory_mb"] for cost in costs), default=0.0),
        }

    def policy(self, number: int) -> str:
        """The policy that a round left behind; 0 is the run's start."""
        return self.start if number == 0 else str(self.folder(number, "dpo"))

    def name(self, number: int, stage: str) -> str:
        """A stage of a round by its place in the run's folder."""
        return f"round_{number}/{stage}"

    def folder(self, number: int, stage: str) -> Path:
        """Where a stage of a round is, or will be."""
        return self.run.folder / self.name(number, stage)

    def _located(self, term: RewardTermConfig) -> RewardTermConfig:
        if term.model is None:
            return term
        kind = PROCESS_MODEL if term.name == "process" else REWARD_MODEL
        return term.model_copy(update={"model": locate(term.model, self.config.run.output_dir, kind)})

    def _inner(self, number: int, stage: str) -> RunConfig:
        """The run section of a stage; the time budget is the outer run's, which looks at it between stages."""
        place = {"name": stage, "output_dir": self.run.folder / f"round_{number}", "overwrite": True}
        return self.config.run.model_copy(update={**place, "max_minutes": None})


def _read(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def _lines(folder: Path) -> Sequence[dict[str, Any]]:
    """A stage's log."""
    text = (folder / "logs" / "train.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
