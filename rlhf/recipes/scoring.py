"""What training a reward model and a process reward model have in common: which weights train, and how they start."""

from __future__ import annotations

import torch

from rlhf.infra.experiment import RunConfig
from rlhf.models.backbone import ModelConfig
from rlhf.models.scoring import TrainMode
from rlhf.recipes.stages import LoadedPolicy, load_policy


def refuse_lost_weights(model: ModelConfig, train: TrainMode, section: str) -> None:
    """Raise `ValueError` where what would train cannot, or what it stands on would not be saved.

    `section` is the config section whose key `train` says what trains.
    """
    if model.load_in_4bit and train == "full":
        raise ValueError(
            f"model.load_in_4bit=true with {section}.train=full would train weights that are 4-bit codes; use "
            f"{section}.train=lora or frozen, or model.load_in_4bit=false"
        )
    if model.random_init and train != "full":
        raise ValueError(
            f"model.random_init=true with {section}.train={train} saves a head without the random base "
            f"that it belongs to; use {section}.train=full"
        )


def held(model: ModelConfig, train: TrainMode) -> ModelConfig:
    """How the base is held: `model.train` follows what trains."""
    return model.model_copy(update={"train": "full" if train == "full" else "lora"})


def idle_model_keys(train: TrainMode, section: str) -> dict[str, str]:
    """Idle keys of `model`, with the reason (see `Config.idle_keys`)."""
    idle = {"model.name_or_path": "`backbone` names the model", "model.train": f"{section}.train says what trains"}
    if train != "lora":
        idle["model.lora"] = f"{section}.train is {train}, so no adapter trains"
    return idle


def start_backbone(
    source: str, model: ModelConfig, train: TrainMode, run: RunConfig, device: torch.device, adapter: str
) -> LoadedPolicy:
    """The backbone, and the name of the adapter to read through or to train; the global generator is seeded.

    An adapter that trains starts from the SFT adapter's weights where there is one.
    """
    loaded = load_policy(source, held(model, train), run.output_dir, device, run.dtype)
    torch.manual_seed(run.seed)
    if loaded.adapter is not None and train == "lora":
        loaded.backbone.copy_adapter(loaded.adapter, adapter)
    return loaded if train == "frozen" else LoadedPolicy(loaded.backbone, adapter)
