"""Checklist P: log-probabilities, ratios and KL."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parts import SHAPES, Shape, asked, backbone_of, experience_of, pairs, policy_on, ppo_on, read_log, sampled
from tiny_backbones import Family, add_trained_adapter, random_prompts, tiny_backbone
from torch import Tensor

from rlhf.algo.kl import clamped_share, exact_kl, k1, k2, k3
from rlhf.algo.ppo_loss import policy_loss
from rlhf.data.collate import pair_batch
from rlhf.infra.config import load_config
from rlhf.infra.experiment import RunConfig
from rlhf.models.adapter_files import save_adapter
from rlhf.models.backbone import ModelConfig
from rlhf.models.policy import Policy, response_logprobs
from rlhf.models.reference import Reference
from rlhf.recipes.offline import summed_logprobs
from rlhf.recipes.ppo import run_ppo
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.stages import start_policy
from rlhf.recipes.updates import MAX_LOGPROB_GAP
from rlhf.rollout.trajectory import Trajectory


@pytest.mark.parametrize("shape", SHAPES)
def test_P1_the_ratio_is_one_before_the_first_update(tmp_path: Path, shape: Shape) -> None:
    """Of the same kind of forward pass 1e-5, kept from generation 1e-4; the log has the mean gap of every iteration."""
    backbone = backbone_of(shape)
    trajectory = sampled(policy_on(backbone), temperature=0.9)
    rows = torch.arange(len(trajectory))
    policy = Policy(backbone, "policy")
    with torch.no_grad():
        one = policy.response_statistics(*asked(trajectory)).logprobs_BR
    other = torch.zeros_like(one)
    for row in rows:
        part = trajectory.select(row.unsqueeze(0))
        found = policy.response_statistics(*asked(part)).logprobs_BR.detach()
        other[row, : found.shape[1]] = found
    assert (one - other).abs().max() < 1e-5
    assert (one - trajectory.logprobs_BR).abs().max() < 1e-4
    ppo = ppo_on(tmp_path, backbone, ppo={"num_iterations": 2, "num_ppo_epochs": 1})
    with ppo.run:
        ppo.train()
    gaps = [line["policy/logprob_gap_max"] for line in read_log(ppo.run.folder)]
    assert len(gaps) == 2 and max(gaps) < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_P1_in_bf16_the_gap_stays_under_its_bound_and_recomputing_closes_it(tmp_path: Path, shape: Shape) -> None:
    backbone = backbone_of(shape, bf16=True)
    ppo = ppo_on(tmp_path, backbone, generation={"max_new_tokens": 24}, ppo={"recompute_logprobs": True})
    ppo.run.finish()
    kept = sampled(ppo.policy, random_prompts(24), max_new_tokens=24)
    again = ppo.rollouts.recomputed(kept, logprobs=True)
    with torch.no_grad():
        now = ppo.policy.response_statistics(*asked(kept)).logprobs_BR
    gaps = [float(((now - part.logprobs_BR).exp() - 1).abs()[kept.response_mask_BR].mean()) for part in (kept, again)]
    assert 0 < gaps[0] < MAX_LOGPROB_GAP
    assert gaps[1] < 0.5 * gaps[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_P2_dropout_acts_in_no_stage(shape: Shape) -> None:
    backbone = backbone_of(shape, dropout=0.5)
    policy, reference = policy_on(backbone), Reference(backbone, "sft")
    for module in (backbone, policy):
        module.train()
    trajectory = sampled(policy)
    again = sampled(policy)
    assert again.responses() == trajectory.responses()
    now = policy.response_statistics(*asked(trajectory)).logprobs_BR
    assert torch.equal(now, policy.response_statistics(*asked(trajectory)).logprobs_BR)
    assert torch.equal(now, reference.logprobs(*asked(trajectory)))
    batch = pair_batch(pairs(4), backbone.tokenizer.pad_token_id).batch
    assert torch.equal(summed_logprobs(backbone, "policy", batch), summed_logprobs(backbone, "sft", batch))


@pytest.mark.parametrize("shape", SHAPES)
def test_P3_one_temperature_on_every_side(tmp_path: Path, shape: Shape) -> None:
    """Sampled at 0.7: kept, recomputed and reference log-probs are those of logits / 0.7, taken from the bare model."""
    backbone = backbone_of(shape)
    ppo = ppo_on(tmp_path, backbone, generation={"max_new_tokens": 6, "temperature": 0.7})
    experience = experience_of(ppo)
    ppo.run.finish()
    trajectory = experience.trajectory
    again = Policy(backbone, "policy").response_statistics(*asked(trajectory)).logprobs_BR.detach()
    for row, (prompt, answer) in enumerate(zip(trajectory.prompts(), trajectory.responses(), strict=True)):
        with torch.no_grad(), backbone.using("sft"):
            logits = backbone.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1)[range(len(answer)), answer]
        for found in (trajectory.logprobs_BR, again, experience.reference_logprobs_BR):
            torch.testing.assert_close(found[row, : len(answer)], expected, atol=1e-4, rtol=0)


def test_P4_the_log_says_how_much_mass_sampling_cuts_off(tmp_path: Path) -> None:
    ppo = ppo_on(tmp_path, backbone_of("qwen2"), generation={"max_new_tokens": 6, "top_k": 3})
    with ppo.run:
        ppo.train()
    masses = [line["policy/truncated_mass"] for line in read_log(ppo.run.folder)]
    assert all(0.05 < mass < 1 for mass in masses)


# ---------------------------------------------------------------- KL


def bandit(seed: int) -> Tensor:
    return torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_P6_with_the_kl_alone_the_policy_returns_to_its_reference() -> None:
    """The KL as minus the reward of a policy gradient over five tokens, each weighed by its probability: no noise."""
    reference, logits = bandit(1), bandit(2).requires_grad_(True)
    distances = [float(exact_kl(logits, reference).detach())]
    for _ in range(60):
        log_p = logits.log_softmax(-1)
        old = log_p.detach()
        rewards = -k1(old - reference.log_softmax(-1))
        advantages = rewards - (old.exp() * rewards).sum()
        # Every token counts as often as it is drawn.
        weighted = (old.exp() * advantages).unsqueeze(0)
        loss = policy_loss((log_p - old).unsqueeze(0), weighted, torch.ones(1, 5, dtype=torch.bool), 1).loss
        (gradient,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(gradient, torch.autograd.grad(exact_kl(logits, reference), logits)[0])
        with torch.no_grad():
            logits -= 0.5 * gradient
        distances.append(float(exact_kl(logits.detach(), reference)))
    assert distances[0] > 0.5 and distances[-1] < 0.05
    assert distances == sorted(distances, reverse=True)


def test_P7_what_each_estimator_would_do_as_a_loss() -> None:
    """Expected gradients on a five-token vocabulary, the sampling weights held still as they are in a training loop."""
    reference, logits = bandit(1), bandit(2).requires_grad_(True)
    drawn = logits.detach().softmax(-1)

    def expected_gradient(estimator) -> Tensor:
        log_ratio = logits.log_softmax(-1) - reference.log_softmax(-1)
        return torch.autograd.grad((drawn * estimator(log_ratio)).sum(), logits)[0]

    forward = torch.autograd.grad(exact_kl(logits, reference), logits)[0]
    backward = torch.autograd.grad(exact_kl(reference, logits), logits)[0]
    assert expected_gradient(k1).abs().max() < 1e-12
    torch.testing.assert_close(expected_gradient(k2), forward)
    torch.testing.assert_close(expected_gradient(k3), backward)
    assert (forward - backward).abs().max() > 0.05

    def reward_gradient(estimator: Callable[[Tensor], Tensor]) -> Tensor:
        """Of the estimate as a cost that a policy gradient lowers: the estimate itself is held still."""
        log_p = logits.log_softmax(-1)
        cost = estimator(log_p - reference.log_softmax(-1)).detach()
        return torch.autograd.grad((drawn * cost * log_p).sum(), logits)[0]

    torch.testing.assert_close(reward_gradient(k1), forward)
    # In the reward the other two also charge tokens that the policy finds too rare.
    assert all((reward_gradient(estimator) - forward).abs().max() > 0.05 for estimator in (k2, k3))


def test_P7_an_overflow_is_guarded_and_counted() -> None:
    far = torch.tensor([[-500.0, -21.0, 0.1, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True, False]])
    k3(far)[mask].sum().backward()
    assert far.grad is not None and bool(far.grad.isfinite().all())
    assert float(clamped_share(far.detach(), mask)) == pytest.approx(2 / 3)


@pytest.mark.parametrize("shape", SHAPES)
def test_P8_the_first_kl_is_zero(tmp_path: Path, shape: Shape) -> None:
    """Exactly, of the same kind of forward pass (recomputed); within 1e-4 per token when kept from generation."""
    for recompute in (True, False):
        more = {"rollout_batch_size": 8, "recompute_logprobs": recompute}
        ppo = ppo_on(tmp_path, backbone_of(shape), f"run_{recompute}", ppo=more)
        experience = experience_of(ppo)
        ppo.run.finish()
        kl = experience.kl_B.abs().max()
        assert kl == 0 if recompute else kl < 6e-4


def test_P9_the_share_of_clamped_tokens_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ppo = ppo_on(tmp_path, backbone_of("qwen2"), ppo={"num_iterations": 1, "rollout_batch_size": 8})
    far = {"tokens": 0, "all": 0}

    def with_far_tokens(part) -> Tensor:
        """A reference that finds the first token of every answer all but impossible."""
        found = part.logprobs_BR.clone()
        found[:, 0] -= 25.0
        far["tokens"] += len(part)
        far["all"] += int(part.response_mask_BR.sum())
        return found

    monkeypatch.setattr(ppo.rollouts, "reference_logprobs", with_far_tokens)
    with ppo.run:
        ppo.train()
    (line,) = read_log(ppo.run.folder)
    assert line["kl/clamped_share"] == pytest.approx(far["tokens"] / far["all"])
    assert line["kl/mean"] == pytest.approx(25.0, abs=1e-3)


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_P10_the_reference_is_the_base_with_the_frozen_sft_adapter(tmp_path: Path, shape: Family) -> None:
    source = tiny_backbone(shape)
    source.model.save_pretrained(tmp_path / "base")
    source.tokenizer.save_pretrained(tmp_path / "base")
    add_trained_adapter(source, "sft", seed=3)
    save_adapter(source.model, "sft", tmp_path / "sft", str(tmp_path / "base"))
    run = RunConfig(output_dir=tmp_path, device="cpu")
    started = start_policy(str(tmp_path / "sft"), ModelConfig(), run, torch.device("cpu"), "linear")
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.bool)
    answers = mask[:, 2:]

    def reference() -> Tensor:
        return started.reference.logprobs(ids, mask, answers, 1.0)

    with torch.no_grad():
        sft = response_logprobs(source, "sft", ids, mask, answers, 1.0)
        bare = response_logprobs(source, None, ids, mask, answers, 1.0)
    before = reference()
    torch.testing.assert_close(before, sft, atol=1e-5, rtol=0)
    assert not torch.allclose(sft, bare, atol=1e-2)
    optimizer = torch.optim.SGD(started.policy.trainable_parameters().values(), lr=1.0)
    started.policy.response_statistics(ids, mask, answers, 1.0).logprobs_BR.sum().backward()
    optimizer.step()
    assert torch.equal(reference(), before)
    moved = started.policy.response_statistics(ids, mask, answers, 1.0).logprobs_BR
    assert not torch.allclose(moved, sft, atol=1e-3)


def test_P1_log_probs_far_off_are_recomputed_from_then_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ppo = ppo_on(tmp_path, backbone_of("qwen2"), ppo={"num_iterations": 3, "rollout_batch_size": 8})
    draw = ppo.rollouts.sampler.sample

    def off_by_a_tenth(*arguments) -> Trajectory:
        found = draw(*arguments)
        return replace(found, logprobs_BR=(found.logprobs_BR - 0.1).where(found.response_mask_BR, 0.0))

    monkeypatch.setattr(ppo.rollouts.sampler, "sample", off_by_a_tenth)
    with ppo.run:
        ppo.train()
    gaps = [line["policy/logprob_gap"] for line in read_log(ppo.run.folder)]
    assert gaps[0] == pytest.approx(math.expm1(0.1), abs=1e-3)
    assert max(gaps[1:]) < 1e-5
    assert "recomputed" in (ppo.run.folder / "logs" / "train.log").read_text(encoding="utf-8")


@pytest.mark.slow
def test_P4_sampling_from_a_cut_distribution_is_warned_about(tmp_path: Path) -> None:
    backbone, data = backbone_of("qwen2"), tmp_path / "prompts.jsonl"
    backbone.model.save_pretrained(tmp_path / "base")
    backbone.tokenizer.save_pretrained(tmp_path / "base")
    data.write_text('{"prompt": "red cat"}\n{"prompt": "two dog"}\n', encoding="utf-8")
    shared = [f"run.output_dir={tmp_path}", f"policy={tmp_path / 'base'}", f"data.train_files={data}"]
    shared += ["data.validation_fraction=0", "ppo.num_iterations=1", "ppo.rollout_batch_size=2", "run.num_threads=1"]
    shared += ["generation.max_new_tokens=4", "rewards=[{name: keyword_sentiment}]", "run.device=cpu"]
    for name, more, warned in (("cut", ["generation.top_p=0.5"], True), ("whole", [], False)):
        run = run_ppo(load_config(PPOConfig, None, [*shared, f"run.name={name}", *more]))
        said = (run.folder / "logs" / "train.log").read_text(encoding="utf-8")
        assert ("policy/truncated_mass" in said) == warned
        assert (read_log(run.folder)[0]["policy/truncated_mass"] > 0.01) == warned
