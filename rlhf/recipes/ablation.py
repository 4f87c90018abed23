"""Methods compared on equal terms, read from top to bottom:

    time each method -> as many steps as fit -> train, method by method and seed by seed -> measure -> table and figure

All start from one SFT policy, are scored by one reward model, read the same pairs or prompts and are given the same
seconds. Every part is an ordinary run inside the run's folder, made by the recipe that stands alone: `timing/dpo_4`,
`seed_0/dpo`, `seed_0/eval`. Taken up again, what is finished is passed by.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from rlhf.algo.trainer import NonFiniteError
from rlhf.eval.ablation_report import Ablation, baseline, outcome, write_ablation
from rlhf.eval.samples import Sample, read_samples
from rlhf.infra.config import refuse_idle_keys
from rlhf.infra.device import resolve_device
from rlhf.infra.durable import write_json
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run, RunConfig
from rlhf.infra.profiling import measured_by
from rlhf.recipes.ablation_config import AblationConfig
from rlhf.recipes.ablation_methods import Arm, Shared, make_arm
from rlhf.recipes.ablation_time import fitting_length, seconds_spent
from rlhf.recipes.chain import chain, run_stage
from rlhf.recipes.evaluate import run_evaluation
from rlhf.recipes.evaluate_config import EvaluateConfig
from rlhf.recipes.lineage import fingerprints, refuse_changed
from rlhf.recipes.stages import POLICY, REWARD_MODEL, locate

SFT, EVAL, TIMING = "sft", "eval", "timing"
LENGTHS, SAMPLES = "lengths.json", "samples.jsonl"
PROMPTS_APART = 100  # between the suites of two seeds, which no two of them share


def run_ablation(config: AblationConfig, resume: Path | None = None) -> tuple[Run, Ablation | None]:
    """Train and measure every method with every seed; None instead of a comparison where time ran out before it.

    Raises:
        UserError: a method's settings or a source cannot serve; nothing was written.
        Stopped: Ctrl-C; the command to go on is in the message.
    """
    shared = shared_by_all(config)
    arms = {name: make_arm(name, config.settings.get(name, {}), shared) for name in config.methods}
    run, found = _opened(config, resume), None
    with chain(run), _clock(config):
        parts = Parts(config, run, shared, arms)
        lengths = parts.lengths()
        if lengths is not None and parts.train(lengths) and parts.measure():
            found = parts.compared(lengths)
            write_ablation(run.folder, found)
    return run, found


def shared_by_all(config: AblationConfig) -> Shared:
    """What every method starts from, is scored by and reads.

    Raises:
        UserError: a source is not there, or nothing can measure answers.
    """
    if config.reward_model is None and not config.evaluate.data.is_tinychat:
        raise UserError(
            "nothing measures the answers: reward_model is null, and evaluate.data is not the built-in world with its "
            "gold score; name a reward model"
        )
    # Runs inside this one look for others inside it, so what the user named is found here.
    place, model = config.run.output_dir, config.reward_model
    sections = {"pairs": config.pairs, "prompts": config.prompts, "model": config.model}
    return Shared(
        locate(config.policy, place, POLICY),
        None if model is None else locate(model, place, REWARD_MODEL),
        sections | {"generation": config.generation},
    )


def _opened(config: AblationConfig, resume: Path | None) -> Run:
    refuse_idle_keys(config)
    if resolve_device(config.run.device).type != "cpu" and config.clock == "cpu":
        raise UserError("clock=cpu does not see what a GPU does; use clock=wall, or run.device=cpu")
    lineage = {"policy": config.policy}
    if config.reward_model is not None:
        lineage["reward_model"] = config.reward_model
    found = fingerprints(lineage, config.run.output_dir)
    files = [*config.pairs.files(), *config.prompts.files(), *config.evaluate.data.files()]
    if resume is None:
        return Run.create("ablate", config, config.run, lineage, files, found)
    refuse_changed(resume, found, files)
    return Run.open(resume)


def _clock(config: AblationConfig) -> AbstractContextManager[None]:
    """What the runs inside add up as their seconds."""
    return measured_by(time.process_time) if config.clock == "cpu" else nullcontext()


class Parts:
    """The runs of an ablation, and what they left behind."""

    def __init__(self, config: AblationConfig, run: Run, shared: Shared, arms: Mapping[str, Arm]) -> None:
        self.config, self.run, self.shared, self.arms = config, run, shared, arms

    def lengths(self) -> dict[str, int] | None:
        """How long each method trains, as given or by timing it; None where the run is to stop before all are known."""
        lengths = dict(self.config.lengths)
        for name, arm in self.arms.items():
            if name not in lengths:
                if self.run.should_stop():
                    return None
                lengths[name] = fitting_length(self.config.seconds, arm.recipe.trial, partial(self.timed, arm))
                self.run.logger.info(f"{name}: {lengths[name]} {arm.recipe.unit} for {self.config.seconds:g} s")
        write_json(self.run.folder / LENGTHS, lengths)
        return lengths

    def timed(self, arm: Arm, length: int) -> float:
        """Seconds that a method takes at a length. A run that was interrupted would not tell: it is made again."""
        place = f"{TIMING}/{arm.name}_{length}"
        stages = arm.stages(self.run.folder / place, self.inner(self.config.seeds[0]), length)
        for name, start in stages.items():
            run_stage(f"{place}/{name}", lambda _, start=start: start(None), self.run)
        return seconds_spent([self.run.folder / place / name for name in stages]).training

    def train(self, lengths: Mapping[str, int]) -> bool:
        """Every method with every seed; False where the run is to stop before all are done."""
        for seed in self.config.seeds:
            for name, arm in self.arms.items():
                if self.run.should_stop():
                    return False
                self.run.logger.info(f"{name}, seed {seed}: {lengths[name]} {arm.recipe.unit}")
                stages = arm.stages(self.place(seed), self.inner(seed), lengths[name])
                try:
                    for stage, start in stages.items():
                        run_stage(f"{self.place(seed).name}/{stage}", start, self.run)
                except NonFiniteError as error:
                    self.run.logger.info(f"{name}, seed {seed}, diverged and is left out: {error}")
        return True

    def measure(self) -> bool:
        """Every seed's policies and the SFT policy on that seed's prompts; False where the run is to stop."""
        for seed in self.config.seeds:
            if self.run.should_stop():
                return False
            config = self.evaluation(seed)
            run_stage(f"{self.place(seed).name}/{EVAL}", lambda _, it=config: run_evaluation(it)[0], self.run)
        return True

    def evaluation(self, seed: int) -> EvaluateConfig:
        """The comparison of what was trained with a seed, on prompts that no other seed is measured on."""
        config, suite = self.config, self.config.evaluate.suite
        trained = {name: str(folder) for name in self.arms if (folder := self.policy(name, seed)).is_dir()}
        update = {
            "run": self.inner(seed).model_copy(update={"name": EVAL, "output_dir": self.place(seed)}),
            "models": {SFT: self.shared.policy} | trained,
            "reference": SFT,
            "reward_model": self.shared.reward_model,
            "num_reward_pairs": 0,
            "model": config.model,
            "generation": config.generation,
            "suite": suite.model_copy(update={"seed": suite.seed + PROMPTS_APART * seed}),
        }
        return EvaluateConfig().model_copy(update=dict(config.evaluate) | update)

    def compared(self, lengths: Mapping[str, int]) -> Ablation:
        """What came of it, for every method and seed; a method that diverged has no outcome with that seed."""
        outcomes, baselines = [], []
        for seed in self.config.seeds:
            samples: dict[str, list[Sample]] = {}
            for sample in read_samples(self.place(seed) / EVAL / SAMPLES):
                if (sample.mode, sample.split) == ("sampled", "heldout"):
                    samples.setdefault(sample.model, []).append(sample)
            baselines.append(baseline(seed, samples[SFT]))
            for name, arm in self.arms.items():
                if name in samples:
                    spent = seconds_spent([self.place(seed) / stage for stage in arm.stage_names])
                    length = f"{lengths[name]} {arm.recipe.unit}"
                    outcomes.append(outcome(name, seed, length, spent, samples[name], samples[SFT]))
        seconds = None if set(self.arms) <= set(self.config.lengths) else self.config.seconds
        return Ablation(seconds, tuple(self.arms), tuple(baselines), tuple(outcomes), self.config.clock)

    def place(self, seed: int) -> Path:
        """Where the runs of a seed are."""
        return self.run.folder / f"seed_{seed}"

    def policy(self, name: str, seed: int) -> Path:
        """Where a method leaves its policy."""
        return self.place(seed) / self.arms[name].stage_names[-1] / POLICY

    def inner(self, seed: int) -> RunConfig:
        """The run section of every part; the time budget is the outer run's, which looks at it between parts."""
        return self.config.run.model_copy(update={"seed": seed, "overwrite": True, "max_minutes": None})
