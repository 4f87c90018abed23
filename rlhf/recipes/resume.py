"""From a run folder back to the recipe that made it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rlhf.infra.config import Config, load_config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run
from rlhf.infra.run_folder import CONFIG, read_run_info
from rlhf.recipes.ablation_config import AblationConfig
from rlhf.recipes.best_of_n import run_best_of_n
from rlhf.recipes.best_of_n_config import BestOfNConfig
from rlhf.recipes.dpo import DPOConfig, run_dpo
from rlhf.recipes.evaluate_config import EvaluateConfig
from rlhf.recipes.grpo import run_grpo
from rlhf.recipes.grpo_config import GRPOConfig
from rlhf.recipes.judge_compare import CompareConfig, run_compare
from rlhf.recipes.judge_validate import ValidateConfig, run_validate
from rlhf.recipes.kto import KTOConfig, run_kto
from rlhf.recipes.online_dpo import run_online_dpo
from rlhf.recipes.online_dpo_config import OnlineDPOConfig
from rlhf.recipes.overoptimize import OveroptimizeConfig, run_overoptimize
from rlhf.recipes.pairs import run_pairs
from rlhf.recipes.pairs_config import PairsConfig
from rlhf.recipes.pipeline import PipelineConfig
from rlhf.recipes.ppo import run_ppo
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.pretrain import PretrainConfig, run_pretrain
from rlhf.recipes.prm import ProcessRewardConfig, run_prm
from rlhf.recipes.prm_label import run_prm_label
from rlhf.recipes.prm_label_config import StepLabelConfig
from rlhf.recipes.reward import RewardConfig, run_reward
from rlhf.recipes.reward_report import RewardReportConfig, run_reward_report
from rlhf.recipes.sft import SFTConfig, run_sft
from rlhf.recipes.suites import run_eval

CONFIGS: dict[str, type[Config]] = {
    "pretrain": PretrainConfig,
    "sft": SFTConfig,
    "reward": RewardConfig,
    "rm-report": RewardReportConfig,
    "prm": ProcessRewardConfig,
    "prm_label": StepLabelConfig,
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "ppo": PPOConfig,
    "grpo": GRPOConfig,
    "best_of_n": BestOfNConfig,
    "pairs": PairsConfig,
    "online_dpo": OnlineDPOConfig,
    "eval": EvaluateConfig,
    "judge_compare": CompareConfig,
    "judge_validate": ValidateConfig,
    "overoptimize": OveroptimizeConfig,
    "pipeline": PipelineConfig,
    "ablate": AblationConfig,
}


def config_class(recipe: str) -> type[Config]:
    """The config class of a recipe by its name; `rm` is another word for reward, a hyphen as good as an underscore."""
    spelt = {name.replace("_", "-"): cls for name, cls in CONFIGS.items()} | {"rm": RewardConfig}
    found = spelt.get(recipe.replace("_", "-"))
    if found is None:
        raise UserError(f"no recipe '{recipe}'; choose from {', '.join(CONFIGS)}")
    return found


def resume_run(folder: Path, composed: Callable[[PipelineConfig | AblationConfig, Path], None]) -> Run | None:
    """Take a run up with the configuration it was started with; needs nothing but the folder.

    `composed` takes up runs that are made of others, and shows what they came to.

    Raises:
        UserError: the folder is no run, or its run is finished.
    """
    info = read_run_info(folder)
    if info["status"] == "finished" and info.get("stop_reason") is None:
        raise UserError(f"run '{folder}' is finished; there is nothing to resume")
    config = load_config(config_class(info["recipe"]), folder / CONFIG)
    if isinstance(config, PipelineConfig | AblationConfig):
        composed(config, folder)
        return None
    if isinstance(config, PretrainConfig):
        return run_pretrain(config, folder)
    if isinstance(config, SFTConfig):
        return run_sft(config, folder)
    if isinstance(config, RewardConfig):
        return run_reward(config, folder)
    if isinstance(config, ProcessRewardConfig):
        return run_prm(config, folder)
    if isinstance(config, StepLabelConfig):
        return run_prm_label(config, folder)
    if isinstance(config, DPOConfig):
        return run_dpo(config, folder)
    if isinstance(config, KTOConfig):
        return run_kto(config, folder)
    if isinstance(config, PPOConfig):
        return run_ppo(config, folder)
    if isinstance(config, GRPOConfig):
        return run_grpo(config, folder)
    if isinstance(config, BestOfNConfig):
        return run_best_of_n(config, folder)
    if isinstance(config, PairsConfig):
        return run_pairs(config, folder)
    if isinstance(config, OnlineDPOConfig):
        return run_online_dpo(config, folder)
    # Evaluating and judging have no half-way state but the answers and replies in the cache.
    again = {"overwrite": True, "name": folder.name, "output_dir": folder.parent}
    assert isinstance(config, EvaluateConfig | RewardReportConfig | CompareConfig | ValidateConfig | OveroptimizeConfig)
    anew = config.model_copy(update={"run": config.run.model_copy(update=again)})
    if isinstance(anew, CompareConfig):
        return run_compare(anew)[0]
    if isinstance(anew, ValidateConfig):
        return run_validate(anew)[0]
    if isinstance(anew, OveroptimizeConfig):
        return run_overoptimize(anew)[0]
    if isinstance(anew, RewardReportConfig):
        return run_reward_report(anew)[0]
    return run_eval(anew)[0]
