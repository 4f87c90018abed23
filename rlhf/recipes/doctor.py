"""`rlhf doctor`: check a set-up before compute is spent, with the config and the code of the recipe it is for.

A pipeline is checked stage by stage: each leaves an untrained stand-in, its weights shaken a little, in a temporary
folder, and the next stage starts from that as it would from the real one. Nothing is written elsewhere.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from rlhf.eval.doctor.finding import LEVELS, Finding, Level, worst
from rlhf.infra.config import Config
from rlhf.infra.determinism import seed_everything
from rlhf.infra.device import check_dtype, resolve_device, set_num_threads
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import RunConfig
from rlhf.recipes.doctor_online import examine_grpo, examine_ppo
from rlhf.recipes.doctor_stages import START, examine_dpo, examine_kto, examine_reward, examine_sft
from rlhf.recipes.doctor_subject import NUM_PAIRS, NUM_ROWS, CannotGoOnError, sampled
from rlhf.recipes.dpo import DPOConfig
from rlhf.recipes.grpo_config import GRPOConfig
from rlhf.recipes.kto import KTOConfig
from rlhf.recipes.pipeline import PipelineConfig, with_sources
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.pretrain import prepare as prepare_pretrain
from rlhf.recipes.resume import config_class
from rlhf.recipes.reward import RewardConfig
from rlhf.recipes.sft import SFTConfig
from rlhf.recipes.stages import save_policy

RECIPES = ("sft", "rm", "dpo", "kto", "ppo", "grpo", "pipeline")


@dataclass(frozen=True)
class StageFinding:
    """A finding and the stage it was made in."""

    stage: str
    finding: Finding


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found, in order, and the seconds it took."""

    recipe: str
    findings: list[StageFinding]
    seconds: float

    @property
    def level(self) -> Level:
        """The worst level found."""
        return worst(found.finding for found in self.findings)

    def to_json(self) -> str:
        """One object: recipe, level, seconds, and `findings` with the fields of `Finding` and their stage."""
        rows = [{"stage": found.stage, **asdict(found.finding)} for found in self.findings]
        whole = {"recipe": self.recipe, "level": self.level, "seconds": round(self.seconds, 2), "findings": rows}
        return json.dumps(whole, indent=1, ensure_ascii=False)

    def summary(self) -> str:
        """How many checks came out at which level."""
        levels = [found.finding.level for found in self.findings]
        counts = ", ".join(f"{levels.count(level)} {level}" for level in LEVELS)
        return f"{counts}; {self.seconds:.1f} s"


def doctor_config(recipe: str) -> type[Config]:
    """The config class of a recipe that the doctor knows.

    Raises:
        UserError: it does not know the recipe.
    """
    if recipe not in RECIPES and recipe != "reward":
        raise UserError(f"the doctor has no checks for '{recipe}'; choose from {', '.join(RECIPES)}")
    return config_class(recipe)


def run_doctor(recipe: str, config: Config, tell: Callable[[StageFinding], None] = lambda found: None) -> Diagnosis:
    """Make every check that applies; `tell` hears of each finding at once."""
    started = time.perf_counter()
    disable_progress_bar()  # bars of loading weights would stand between the lines
    findings = []
    with tempfile.TemporaryDirectory(prefix="rlhf-doctor-") as folder:
        for found in _examined(config, Path(folder)):
            findings.append(found)
            tell(found)
    return Diagnosis(recipe, findings, time.perf_counter() - started)


def _examined(config: Config, scratch: Path) -> Iterator[StageFinding]:
    if isinstance(config, PipelineConfig):
        yield from _pipeline(config, scratch)
    elif isinstance(config, SFTConfig):
        yield from _stage("sft", config.run, lambda device: examine_sft(config, device, scratch))
    elif isinstance(config, RewardConfig):
        yield from _stage("rm", config.run, lambda device: examine_reward(config, device, scratch))
    elif isinstance(config, DPOConfig):
        yield from _stage("dpo", config.run, lambda device: examine_dpo(config, device, scratch))
    elif isinstance(config, KTOConfig):
        yield from _stage("kto", config.run, lambda device: examine_kto(config, device, scratch))
    elif isinstance(config, GRPOConfig):
        yield from _stage("grpo", config.run, lambda device: examine_grpo(config, device, scratch))
    else:
        assert isinstance(config, PPOConfig)
        yield from _stage("ppo", config.run, lambda device: examine_ppo(config, device, scratch))


def _stage(name: str, run: RunConfig, examine: Callable[[torch.device], Iterable[Finding]]) -> Iterator[StageFinding]:
    """The findings of a stage; what would end its run becomes the last of them, and is red."""
    try:
        device = resolve_device(run.device)
        check_dtype(device, run.dtype)
        set_num_threads(run.num_threads)
        seed_everything(run.seed)
        for finding in examine(device):
            yield StageFinding(name, finding)
    except CannotGoOnError as stopped:
        yield StageFinding(name, stopped.finding)
    except UserError as error:
        yield StageFinding(name, START.red(str(error), "mend what the sentence names; nothing behind it was looked at"))
    # What libraries raise over models and settings that do not fit: the run would end with it, so it is a finding.
    except (ValueError, OSError, RuntimeError, IndexError) as error:
        seen = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        yield StageFinding(name, START.red(seen, "run the recipe to see where; nothing behind it was looked at"))


def _pipeline(config: PipelineConfig, scratch: Path) -> Iterator[StageFinding]:
    """Stage after stage until one cannot start: those behind it would have nothing to start from."""
    small = config.world.model_copy(
        update={
            "num_pairs": min(config.world.num_pairs, NUM_ROWS),
            "num_validation_pairs": min(config.world.num_validation_pairs, NUM_PAIRS),
            "num_prompts": min(config.world.num_prompts, NUM_ROWS),
        }
    )
    config = with_sources(config.model_copy(update={"world": small}), scratch)
    sft, reward, dpo, ppo = config.sft, config.reward, config.dpo, config.ppo
    stages: dict[str, Callable[[torch.device], Iterable[Finding]]] = {}
    if config.pretrain is not None:
        stages["pretrain"] = lambda device: _untrained_base(config, device, scratch)
    stages["sft"] = lambda device: examine_sft(sft, device, scratch, scratch / "sft")
    stages["reward"] = lambda device: examine_reward(reward, device, scratch, scratch / "reward")
    if dpo is not None:
        stages["dpo"] = lambda device: examine_dpo(dpo, device, scratch)
    if ppo is not None:
        stages["ppo"] = lambda device: examine_ppo(ppo, device, scratch, stand_in=True)
    for name, examine in stages.items():
        for found in _stage(name, config.run, examine):
            yield found
            if found.finding.id == START.id and found.finding.level == "red":
                return


def _untrained_base(config: PipelineConfig, device: torch.device, scratch: Path) -> Iterator[Finding]:
    """Tokenizer and random weights where pre-training would leave its model."""
    pretrain = config.pretrain
    assert pretrain is not None
    limited = pretrain.model_copy(update={"data": sampled(pretrain.data)})
    parts = prepare_pretrain(limited, device, scratch / "rejected.jsonl")
    save_policy(parts.backbone, None, scratch / "pretrain")
    yield START.green(f"tokenizer and random weights instead of a pre-trained base; {parts.report}")
