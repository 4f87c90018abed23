"""Checks of a few real forward passes: padding, dropout, the first ratio, the first KL, and whether weights can move.

Legend: B sequences, R response columns, T all columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlhf.algo.trainer import LossOutput, OptimizerConfig, Trainer
from rlhf.data.chat import TokenExample
from rlhf.data.collate import pad_left
from rlhf.eval.doctor.finding import LOGPROB_BOUNDS, REPEAT_BOUNDS, Check, Finding, Gap
from rlhf.infra.device import DtypeName, torch_dtype
from rlhf.models.backbone import Backbone
from rlhf.models.policy import Policy, masked_logprobs
from rlhf.rollout.trajectory import Trajectory

LEFT_PADDING = Check("T1", "left padding changes no log-prob", "rollouts are drawn from and scored by another model")
RATIO = Check("P1", "the first ratio is 1", "PPO clips and weighs tokens before anything was learnt")
DROPOUT = Check("P2", "no dropout in the forward pass", "ratios, reference and margins are noise")
REFERENCE = Check("P8", "KL to the reference is 0 at the start", "the policy is held near another one")
RATE = Check("O12", "the learning rate moves the weights", "updates are rounded away, and the run changes nothing")

_EXTRA = 8  # columns of padding beyond what a batch needs
_NUM_UPDATES = 10
_PER_TENSOR = 4_096  # weights of each parameter that the updates are tried on


@torch.no_grad()
def left_padding_changes_nothing(backbone: Backbone, adapter: str | None, rows: Sequence[TokenExample]) -> Finding:
    """T1: log-probs of each row alone equal those of the same row left-padded in one batch."""
    device = backbone.device
    batch = pad_left([row.input_ids for row in rows], backbone.tokenizer.pad_token_id).to(device)
    # Wider than need be, so that rows of one length are padded as well.
    ids_BT = functional.pad(batch.input_ids_BP, (_EXTRA, 0), value=backbone.tokenizer.pad_token_id)
    mask_BT = functional.pad(batch.attention_mask_BP, (_EXTRA, 0), value=False)
    width, masks = ids_BT.shape[1], [[False, *row.loss_mask[1:]] for row in rows]
    actions_BT = torch.tensor([[False] * (width - len(mask)) + mask for mask in masks], device=device)
    together_BT = masked_logprobs(backbone, adapter, ids_BT, mask_BT, actions_BT)
    alone_BT = torch.zeros_like(together_BT)
    for place, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        ids_1T, mask_1T = torch.tensor([row.input_ids], device=device), torch.tensor([mask], device=device)
        alone = masked_logprobs(backbone, adapter, ids_1T, torch.ones_like(mask_1T), mask_1T)
        alone_BT[place, width - len(mask) :] = alone[0]
    lengths = sorted(len(row.input_ids) for row in rows)
    return LEFT_PADDING.graded(
        Gap.between(alone_BT, together_BT, actions_BT),
        LOGPROB_BOUNDS[backbone.dtype_name],
        f"between {len(rows)} rows alone and in a batch, {lengths[0]} to {lengths[-1]} tokens, {backbone.dtype_name}",
        "give the model position ids that count real tokens, and an attention mask; or another attn_implementation",
    )


@torch.no_grad()
def no_dropout(forward: Callable[[], Tensor], model: nn.Module) -> Finding:
    """P2: the same forward pass twice gives the same numbers; `model` is asked which of its dropouts are on."""
    active = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Dropout) and module.training and module.p > 0
    ]
    by = f"; on: {', '.join(active[:3])}{' ...' if len(active) > 3 else ''}" if active else ""
    return DROPOUT.graded(
        Gap.between(forward(), forward()),
        REPEAT_BOUNDS,
        f"between two equal forward passes{by}",
        "put the model into evaluation mode, or set its dropout probabilities to 0",
    )


@torch.no_grad()
def ratio_starts_at_one(policy: Policy, trajectory: Trajectory, *, recomputes: bool) -> Finding:
    """P1: log-probs kept from generation equal those of the forward pass that trains, in the dtype of the run.

    `recomputes`: the run takes its old log-probs from such a forward pass, so that a gap is harmless.
    """
    backbone = policy.backbone
    old = Gap.between(_policy_logprobs(policy, trajectory), trajectory.logprobs_BR, trajectory.response_mask_BR)
    tokens, dtype = int(trajectory.response_mask_BR.sum()), backbone.dtype_name
    seen = f"in log-prob between generation and forward pass, {tokens} tokens, {dtype}"
    if recomputes:
        again = Gap.between(_policy_logprobs(policy, trajectory), _policy_logprobs(policy, trajectory))
        return RATIO.graded(again, REPEAT_BOUNDS, f"between two forward passes ({old.largest:.1e} {seen})", "see P2")
    return RATIO.graded(
        old, LOGPROB_BOUNDS[dtype], seen, "set recompute_logprobs=true in the recipe's section, or run.dtype=fp32"
    )


@torch.no_grad()
def rollout_starts_at_reference(
    policy: Policy, reference: Callable[[Trajectory], Tensor], trajectory: Trajectory
) -> Finding:
    """P8 for PPO: policy and reference give the samples the same log-probs; `reference` returns them (B, R)."""
    gap = Gap.between(_policy_logprobs(policy, trajectory), reference(trajectory), trajectory.response_mask_BR)
    return _at_reference(gap, f"in log-prob over {int(trajectory.response_mask_BR.sum())} sampled tokens")


@torch.no_grad()
def pairs_start_at_reference(policy: Callable[[], Tensor], reference: Callable[[], Tensor]) -> Finding:
    """P8 for DPO: every answer has the same summed log-prob under both, so that the first loss is ln 2."""
    policy_B, reference_B = policy(), reference()
    return _at_reference(Gap.between(policy_B, reference_B), f"in summed log-prob of {len(policy_B)} answers")


def learning_rate_moves_weights(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, num_steps: int, compute_dtype: DtypeName
) -> Finding:
    """O12: ten updates at the peak rate, by the recipe's own trainer on copies of some weights, change them.

    Yellow where the weights move but those that the forward pass sees, in `compute_dtype`, could not be changed by all
    `num_steps` steps of the run together.
    """
    copies = {name: nn.Parameter(_some(parameter)) for name, parameter in parameters.items()}
    before = {name: copy.detach().clone() for name, copy in copies.items()}
    steady = config.model_copy(update={"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "weight_decay": 0.0})
    trainer = Trainer(copies, steady, _NUM_UPDATES)
    for _ in range(_NUM_UPDATES):
        trainer.step([list(copies.values())], _sum_of)
    stuck = _share([(before[name], copies[name] == before[name]) for name in copies])
    kinds = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters.values()})
    seen = (
        f"{stuck:.1%} of the weights ({', '.join(kinds)}) stand still in {_NUM_UPDATES} updates at a rate of "
        f"{config.learning_rate:g}"
    )
    if stuck > 0.05:
        fix = "raise optimizer.learning_rate, or keep the trained weights in fp32"
        return RATE.red(seen, fix) if stuck > 0.5 else RATE.yellow(seen, fix)
    farthest, dtype = config.learning_rate * num_steps, torch_dtype(compute_dtype)
    unseen = _share([(weights, (weights - farthest).to(dtype) == weights.to(dtype)) for weights in before.values()])
    if unseen > 0.5:
        return RATE.yellow(
            f"{seen}, but {unseen:.1%} of them look the same in {compute_dtype} after all {num_steps} steps",
            "raise optimizer.learning_rate or train longer; a model saved in that format would be the one it began as",
        )
    return RATE.green(seen)


@torch.no_grad()
def stop_probability(policy: Policy, trajectory: Trajectory, stop_ids: Sequence[int]) -> float:
    """Mean probability that the token behind each sampled response is a stop token."""
    backbone = policy.backbone
    hidden_BTD = backbone.hidden(trajectory.input_ids_BT, trajectory.attention_mask_BT, adapter=policy.adapter)
    rows = torch.arange(len(trajectory), device=hidden_BTD.device)
    last_B = trajectory.prompt_ids_BP.shape[1] + trajectory.lengths_B - 1
    logits_BV = backbone.logits(hidden_BTD[rows, last_B], adapter=policy.adapter).float()
    return float(logits_BV.softmax(dim=-1)[:, list(stop_ids)].sum(dim=-1).mean())


def _policy_logprobs(policy: Policy, trajectory: Trajectory) -> Tensor:
    return policy.response_statistics(
        trajectory.input_ids_BT, trajectory.attention_mask_BT, trajectory.response_mask_BR, trajectory.temperature
    ).logprobs_BR


def _at_reference(gap: Gap, seen: str) -> Finding:
    return REFERENCE.graded(
        gap, REPEAT_BOUNDS, seen, "start both from the same SFT policy: the reference is what the policy starts from"
    )


def _sum_of(weights: Sequence[Tensor]) -> LossOutput:
    """A loss whose gradient is 1 everywhere."""
    return LossOutput(torch.stack([one.float().sum() for one in weights]).sum())


def _some(parameter: nn.Parameter) -> Tensor:
    flat = parameter.detach().flatten()
    return flat[:: max(1, flat.numel() // _PER_TENSOR)].clone()


def _share(tensors: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Share of weights whose flag is True, from pairs of (weights, flags).

    Any step moves a 0, so weights that are 0 count only where there is nothing else.
    """
    weights = torch.cat([one.flatten().float() for one, _ in tensors])
    flags = torch.cat([flags.flatten() for _, flags in tensors])
    return float((flags[weights != 0] if bool((weights != 0).any()) else flags).float().mean())
