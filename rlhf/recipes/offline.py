"""What DPO and KTO share: a policy learns from answers that are there already, by their log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.algo.trainer import OptimizerConfig, Trainer
from rlhf.data.chat import TokenExample
from rlhf.data.collate import Batch, batches_by_tokens, pad_right
from rlhf.data.forest import Forest
from rlhf.infra.durable import sync_file
from rlhf.infra.experiment import Run
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.models.policy import Policy, forest_logprobs, masked_logprobs
from rlhf.recipes.launch import stage_cost
from rlhf.recipes.stages import POLICY, save_policy
from rlhf.recipes.supervised import Method, SupervisedLoop, TrainingConfig


def idle_policy_keys(model: ModelConfig, training: TrainingConfig, has_validation: bool) -> dict[str, str]:
    """Idle keys of every recipe that trains a policy on such data (see `Config.idle_keys`)."""
    idle = training.idle_keys_with(has_validation)
    idle["model.name_or_path"] = "`policy` names the model"
    if model.lora.lora_dropout > 0:
        idle["model.lora.lora_dropout"] = "dropout acts in SFT and reward modelling only"
    return idle


def train_policy(
    run: Run, policy: Policy, method: Method[Any], training: TrainingConfig, optimizer: OptimizerConfig, name: str
) -> tuple[int, int]:
    """The loop, then the best policy into the run folder; returns (optimizer steps, tokens)."""
    trainer = Trainer(
        policy.trainable_parameters(),
        optimizer,
        training.num_steps(method.num_rows),
        scale_loss=run.config.dtype == "fp16",
    )
    progress = SupervisedLoop(run, trainer, training, method, name).train()
    if run.stop_reason != "interrupted":
        with run.timer("save"):
            save_policy(policy.backbone, policy.adapter, run.folder / POLICY)
    return stage_cost(progress)


def summed_logprobs(backbone: Backbone, adapter: str | None, batch: Batch | Forest) -> Tensor:
    """log pi(answer | prompt), in nats: the sum over the tokens under the loss mask.

    Of every row (B,) or of every branch (K * B,), all first branches before all second ones.
    """
    if isinstance(batch, Forest):
        return batch.branch_sums(forest_logprobs(backbone, adapter, batch))
    return masked_logprobs(backbone, adapter, batch.input_ids_BT, batch.attention_mask_BT, batch.loss_mask_BT).sum(
        dim=1
    )


@torch.no_grad()
def answer_logprobs(
    backbone: Backbone, adapter: str | None, answers: Sequence[TokenExample], max_tokens: int
) -> Tensor:
    """`summed_logprobs` of any number of answers, (N,) on the CPU, in passes of like length; without a gradient."""
    if not answers:
        return torch.zeros(0)
    groups = batches_by_tokens([len(answer.input_ids) for answer in answers], max_tokens)
    pad = backbone.tokenizer.pad_token_id
    batches = (pad_right([answers[i] for i in group], pad).to(backbone.device) for group in groups)
    sorted_N = torch.cat([summed_logprobs(backbone, adapter, batch).cpu() for batch in batches])
    logprobs_N = torch.empty_like(sorted_N)
    logprobs_N[[i for group in groups for i in group]] = sorted_N
    return logprobs_N


def kept_logprobs(run: Run, key: str, compute: Callable[[], Tensor]) -> Tensor:
    """What the reference says of a data set, computed once: kept in the run folder under a hash of the tokens."""
    place = run.folder / "cache" / f"reference-{key[:16]}.safetensors"
    if place.is_file():
        return load_file(place)["logprobs"]
    logprobs = compute()
    place.parent.mkdir(exist_ok=True)
    aside = place.with_suffix(".partial")  # a run killed while it writes must not find half of it
    save_file({"logprobs": logprobs}, aside)
    sync_file(aside)
    aside.replace(place)
    return logprobs
