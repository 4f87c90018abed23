"""Checklist O: losses and optimisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_some import fast_some
from parts import SHAPES, Shape, backbone_of, experience_of, labelled, pairs, policy_on, ppo_on, read_log
from tiny_backbones import random_prompts, tiny_model, word_tokenizer
from torch import Tensor, nn

from rlhf.algo.kto_loss import kto_loss
from rlhf.algo.logprobs import entropy_of
from rlhf.algo.ppo_loss import entropy_loss, policy_loss, value_loss
from rlhf.algo.preference_loss import PREFERENCE_LOSSES
from rlhf.algo.sft_loss import sft_loss
from rlhf.algo.trainer import LossOutput, OptimizerConfig, Trainer
from rlhf.data.chat import join
from rlhf.data.unpaired_dataset import UnpairedDataset
from rlhf.infra.config import load_config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.models.policy import Policy
from rlhf.models.reference import Reference
from rlhf.models.reward_model import RewardModel
from rlhf.recipes.dpo import DPOConfig, ReferencePass, dpo_method
from rlhf.recipes.kto import KTOConfig, kto_method
from rlhf.recipes.kto import ReferencePass as KTOReferencePass
from rlhf.recipes.language_model import language_model_method
from rlhf.recipes.reward import RewardConfig, pair_method
from rlhf.recipes.sft import SFTConfig
from rlhf.recipes.supervised import Method, SupervisedLoop, TrainingConfig

ONE_PASS, MANY = {"max_tokens_per_micro_batch": 10_000}, {"max_tokens_per_micro_batch": 25}


def answers(count: int) -> list[Any]:
    return [
        join(prompt, [*answer, 1])
        for prompt, answer in zip(random_prompts(count), random_prompts(count, seed=9), strict=True)
    ]


def supervised(stage: str, backbone: Backbone, training: dict[str, Any]) -> tuple[Method[Any], dict[str, nn.Parameter]]:
    """The method of a stage over eight rows, and what it trains; everything in float64."""
    backbone.model.double()
    if stage == "sft":
        config = TrainingConfig.model_validate(training)
        method: Method[Any] = language_model_method(backbone, "policy", answers(8), [], config)
        return method, Policy(backbone, "policy").trainable_parameters()
    if stage == "reward":
        torch.manual_seed(0)
        model = RewardModel(backbone, "policy")
        return pair_method(
            model, pairs(8), [], RewardConfig.model_validate({"training": training})
        ), model.trainable_parameters()
    policy = Policy(backbone, "policy")
    torch.manual_seed(0)
    if stage == "kto":
        data, kto_config = labelled(8), KTOConfig.model_validate({"training": training, "undesirable_weight": 1.5})
        known = random_reference(data, range(8))
        return kto_method(policy, data, None, known, None, kto_config), policy.trainable_parameters()
    dpo_config = DPOConfig.model_validate({"training": training, "loss": stage})
    reference = ReferencePass(-20 - torch.rand(8, 2, dtype=torch.float64))
    return dpo_method(
        policy, pairs(8), [], reference, ReferencePass(torch.zeros(0, 2)), dpo_config
    ), policy.trainable_parameters()


def random_reference(data: UnpairedDataset, *steps: Sequence[int]) -> KTOReferencePass:
    """A reference that differs from the policy, for every answer and for the mismatched pairs of these steps."""
    pairs = sorted({pair for rows in steps for pair in data.mismatches(rows)})
    drawn = -35 - torch.rand(len(data) + len(pairs), dtype=torch.float64)
    return KTOReferencePass(drawn[: len(data)], dict(zip(pairs, drawn[len(data) :].tolist(), strict=True)))


@pytest.mark.parametrize("stage", ["sft", "reward", "kto", *PREFERENCE_LOSSES])
@pytest.mark.parametrize("shape", SHAPES)
def test_O1_loss_and_gradient_do_not_depend_on_accumulation(shape: Shape, stage: str) -> None:
    found = []
    for training in (ONE_PASS, MANY):
        method, parameters = supervised(stage, backbone_of(shape), training)
        batches, loss = method.micro_batches(range(8)), method.loss(range(8))
        assert (len(batches) == 1) == (training is ONE_PASS) and len(batches) in (1, *range(4, 9))
        total = 0.0
        for batch in batches:
            output = loss(batch)
            output.loss.backward()
            total += float(output.loss.detach())
        found.append((total, [p.grad for p in parameters.values()]))
    (one, gradients), (many, accumulated) = found
    assert many == pytest.approx(one, abs=1e-6)
    for first, second in zip(gradients, accumulated, strict=True):
        assert first is not None and second is not None
        torch.testing.assert_close(second, first, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_O1_the_gradient_of_ppo_does_not_depend_on_accumulation(tmp_path: Path, shape: Shape) -> None:
    found = []
    for tokens in (10_000, 25):
        ppo = ppo_on(
            tmp_path,
            backbone_of(shape),
            f"run_{tokens}",
            ppo={"max_tokens_per_micro_batch": tokens, "rollout_batch_size": 8},
        )
        experience = experience_of(ppo)
        ppo.run.finish()
        batches, loss = ppo.updates.micro_batches(experience), ppo.loss(experience)
        assert (len(batches) == 1) == (tokens > 1000)
        for batch in batches:
            loss(batch).loss.backward()
        found.append([p.grad for p in ppo.updates.trainer.parameters.values()])
    for first, second in zip(*found, strict=True):
        assert first is not None and second is not None
        torch.testing.assert_close(second, first, atol=1e-5, rtol=1e-4)


def loop_on(folder: Path, training: dict[str, Any], num_rows: int = 32) -> tuple[SupervisedLoop[Any], list[list[int]]]:
    """The loop of the supervised stages over a single weight, and the rows of every step it takes."""
    config = SFTConfig.model_validate(
        {"run": {"output_dir": folder, "name": "run", "device": "cpu"}, "training": training}
    )
    weight, seen = nn.Parameter(torch.zeros(1)), list[list[int]]()

    def loss(rows: Iterable[int]) -> Callable[[list[int]], LossOutput]:
        seen.append(list(rows))
        return lambda batch: LossOutput((weight - 1).square().sum() * len(batch) / len(seen[-1]))

    method = Method[Any](num_rows, lambda rows: [[row] for row in rows], loss, len)
    optimizer = OptimizerConfig(learning_rate=0.1, warmup_ratio=0.25, lr_scheduler_type="cosine")
    trainer = Trainer({"weight": weight}, optimizer, config.training.num_steps(num_rows))
    return SupervisedLoop(Run.create("sft", config, config.run), trainer, config.training, method, "toy"), seen


@pytest.mark.parametrize("accumulation", [1, 4])
def test_O2_the_learning_rate_is_a_function_of_the_optimizer_step(tmp_path: Path, accumulation: int) -> None:
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation, "num_train_epochs": 2}
    loop, seen = loop_on(tmp_path, training)
    with loop.run:
        loop.train()
    steps = 2 * 32 // (2 * accumulation)
    assert len(seen) == steps and all(len(rows) == 2 * accumulation for rows in seen)
    warmup = steps // 4
    analytic = [
        0.1 * (step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))
        for step in range(steps)
    ]
    assert [line["train/learning_rate"] for line in read_log(loop.run.folder)] == pytest.approx(analytic)


def test_O3_a_vanishing_gradient_norm_holds_the_weights() -> None:
    for limit, moves in ((1e-12, False), (1.0, True)):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        before = [p.detach().clone() for p in model.parameters()]
        config = OptimizerConfig(learning_rate=1.0, max_grad_norm=limit, lr_scheduler_type="constant")
        trainer = Trainer(dict(model.named_parameters()), config, 3)
        trainer.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # type: ignore[assignment]
        for _ in range(3):
            report = trainer.step(
                [torch.ones(2, 4)], lambda batch, model=model: LossOutput(100 * model(batch).square().sum())
            )
            assert report.grad_norm > 1
        assert all(torch.equal(p, start) for p, start in zip(model.parameters(), before, strict=True)) != moves


@pytest.mark.parametrize(("epochs", "minis", "rows"), [(1, 1, 8), (3, 2, 8), (2, 8, 8), (1, 6, 9)])
def test_O4_optimizer_steps_are_epochs_times_mini_batches(tmp_path: Path, epochs: int, minis: int, rows: int) -> None:
    settings = {"num_ppo_epochs": epochs, "num_mini_batches": minis, "rollout_batch_size": rows, "target_kl": None}
    ppo = ppo_on(tmp_path, backbone_of("qwen2"), ppo={**settings, "num_iterations": 2})
    with ppo.run:
        ppo.train()
    assert [line["train/updates_this_iteration"] for line in read_log(ppo.run.folder)] == [epochs * minis] * 2
    assert ppo.updates.trainer.step_count == 2 * epochs * minis == ppo.config.num_optimizer_steps


@pytest.mark.parametrize(("loss", "per_token"), [("ipo", True), ("ipo_summed", False)])
@pytest.mark.parametrize("shape", fast_some(SHAPES, "gpt2"))
def test_O6_ipo_ends_where_its_name_says(shape: Shape, loss: str, per_token: bool) -> None:
    """Trained to its end on one pair: the margin is 1 / (2 beta), of sums or of means over each answer's tokens."""
    backbone = backbone_of(shape)
    policy, prompt = Policy(backbone, "policy"), [4, 7]
    example = replace(pairs(1)[0], prompt_ids=prompt, chosen_ids=[5, 6, 1], rejected_ids=[8, 9, 10, 11, 6, 1])
    sides = [join(prompt, ids) for ids in (example.chosen_ids, example.rejected_ids)]
    frozen = torch.tensor([[alone(backbone, "sft", side) for side in sides]])
    config = DPOConfig.model_validate({"loss": loss, "beta": 0.8})
    method = dpo_method(policy, [example], [], ReferencePass(frozen), ReferencePass(torch.zeros(0, 2)), config)
    (batch,), one_loss = method.micro_batches([0]), method.loss([0])
    trainer = Trainer(policy.trainable_parameters(), OptimizerConfig(learning_rate=0.003), 100)
    reports = [trainer.step([batch], one_loss) for _ in range(100)]
    assert reports[0].loss == pytest.approx((1 / 1.6) ** 2, rel=1e-4) and reports[-1].loss < 2e-3
    chosen, rejected = (alone(backbone, "policy", side) - float(frozen[0, i]) for i, side in enumerate(sides))
    lengths = (3, 6) if per_token else (1, 1)
    assert chosen / lengths[0] - rejected / lengths[1] == pytest.approx(1 / 1.6, abs=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_O7_the_reference_point_of_kto_comes_from_mismatched_pairs_of_the_step(shape: Shape) -> None:
    backbone, data = backbone_of(shape), labelled(9)
    backbone.model.double()
    policy, rows = Policy(backbone, "policy"), [4, 0, 1, 8, 2, 7]
    config, known = KTOConfig.model_validate({"beta": 0.5, "desirable_weight": 1.3}), random_reference(data, rows, [3])
    strangers = data.mismatches(rows)
    assert [row for row, _ in strangers] == rows  # one each
    assert all(data.examples[i].prompt_ids != data.examples[j].prompt_ids for i, j in strangers)
    assert (0, 8) in strangers and (1, 8) in strangers  # 0 and 1 are two sides of a pair
    gaps = [alone(backbone, "policy", data.mismatched(pair)) - known.mismatched[pair] for pair in strangers]
    kl = sum(gaps) / len(gaps)
    assert kl > 0.1
    ratios = [alone(backbone, "policy", data.examples[row].tokens) - float(known.logprobs_N[row]) for row in rows]
    up = torch.tensor([data.examples[row].desirable for row in rows])
    expected = kto_loss(torch.tensor(ratios, dtype=torch.float64), up, torch.tensor(kl), 0.5, 1.3, 1.0).mean()
    method = kto_method(policy, data, None, known, None, config)
    (batch,), loss = method.micro_batches(rows), method.loss(rows)
    output = loss(batch)
    assert float(output.loss.detach()) == pytest.approx(float(expected), abs=1e-6)
    assert float(output.metrics["train/kl"]) == pytest.approx(kl, abs=1e-6)
    assert float(output.metrics["train/num_mismatched"]) == 6
    likelier = replace(known, mismatched=dict.fromkeys(known.mismatched, 1e3))  # to the reference, all of them
    below = kto_method(policy, data, None, likelier, None, config).loss(rows)(batch)
    assert float(below.metrics["train/kl"]) == 0.0
    assert float(below.loss.detach()) != pytest.approx(float(output.loss.detach()), abs=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_O7_steps_without_a_stranger_or_with_one_label_are_defined(shape: Shape) -> None:
    backbone, data = backbone_of(shape), labelled(9)
    cases = {(3,): (0, 1), (3, 4): (0, 1), (5, 6): (2, 1), (0, 3): (2, 0)}
    known = random_reference(data, *cases)
    method = kto_method(Policy(backbone, "policy"), data, None, known, None, KTOConfig())
    for rows, (mismatched, one_label) in cases.items():
        (batch,), loss = method.micro_batches(rows), method.loss(rows)
        output = loss(batch)
        assert bool(output.loss.isfinite()) and float(output.metrics["train/num_mismatched"]) == mismatched
        assert float(output.metrics["train/kl"]) >= 0
        assert float(output.metrics["train/one_label"]) == one_label


def test_O7_a_batch_of_one_is_refused() -> None:
    for texts in (["training.per_device_train_batch_size=1"], ["training.per_device_train_batch_size=1", "beta=0.3"]):
        with pytest.raises(UserError, match="KTO measures its KL on answers put behind other prompts of the same step"):
            load_config(KTOConfig, overrides=texts)
    accumulated = ["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=2"]
    assert load_config(KTOConfig, overrides=accumulated).training.rows_per_step == 2


@pytest.mark.parametrize("shape", SHAPES)
def test_O8_dpo_starts_at_ln_2_and_its_sides_are_not_exchanged(shape: Shape) -> None:
    backbone, examples = backbone_of(shape), pairs(6)
    policy, reference = Policy(backbone, "policy"), Reference(backbone, "sft")
    turned = [replace(e, chosen_ids=e.rejected_ids, rejected_ids=e.chosen_ids) for e in examples]

    def step(rows: list[Any], frozen: Tensor) -> LossOutput:
        method = dpo_method(policy, rows, [], ReferencePass(frozen), ReferencePass(torch.zeros(0, 2)), DPOConfig())
        (batch,) = method.micro_batches(range(6))
        return method.loss(range(6))(batch)

    def told(adapter: str) -> Tensor:
        """Summed log-probabilities of chosen and rejected answers, each row by itself."""
        sides = [[join(e.prompt_ids, ids) for ids in (e.chosen_ids, e.rejected_ids)] for e in examples]
        one = [[alone(backbone, adapter, example) for example in both] for both in sides]
        return torch.tensor(one)

    frozen = told("sft")
    start = step(examples, frozen)
    assert float(start.loss.detach()) == pytest.approx(math.log(2), abs=1e-5)
    assert float(start.metrics["train/margin"]) == pytest.approx(0, abs=1e-5)
    start.loss.backward()
    assert all(p.grad is None for name, p in backbone.named_parameters() if ".policy" not in name)
    torch.optim.SGD(policy.trainable_parameters().values(), lr=0.5).step()
    torch.testing.assert_close(told(reference.adapter or ""), frozen, atol=1e-5, rtol=0)
    after, swapped = step(examples, frozen), step(turned, frozen.flip(1))
    assert float(after.loss.detach()) < float(start.loss.detach()) < float(swapped.loss.detach())
    margins = 0.1 * ((told("policy") - frozen)[:, 0] - (told("policy") - frozen)[:, 1])
    assert float(after.metrics["train/margin"]) == pytest.approx(float(margins.mean()), abs=1e-5)
    assert float(swapped.metrics["train/margin"]) == pytest.approx(-float(margins.mean()), abs=1e-5)


def alone(backbone: Backbone, adapter: str, example: Any) -> float:
    ids, trained = example.input_ids, [t for t, kept in enumerate(example.loss_mask) if kept]
    with torch.no_grad(), backbone.using(adapter):
        log_p = backbone.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(log_p[t - 1, ids[t]]) for t in trained)


def test_O9_a_token_weighs_the_same_in_a_long_answer_and_in_a_short_one() -> None:
    log_ratio, advantages = torch.zeros(2, 5, requires_grad=True), torch.full((2, 5), 0.7)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    policy_loss(log_ratio, advantages, mask, 7).loss.backward()
    assert log_ratio.grad is not None
    assert log_ratio.grad.tolist() == [pytest.approx([-0.1] * 5), pytest.approx([-0.1, -0.1, 0, 0, 0])]
    logprobs = torch.zeros(7, requires_grad=True)
    sft_loss(logprobs, 7).backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([-1 / 7] * 7)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (0.5, 2.0, -1.0, -2.0),  # below the band, to be made likelier: free
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -2.4, 0.0),  # above, likelier than allowed: held at 1.2
        (0.5, -2.0, 1.6, 0.0),  # below, rarer than allowed: held at 0.8
        (1.0, -2.0, 2.0, 2.0),
        (1.5, -2.0, 3.0, 2.0),  # above, to be made rarer: free
    ],
)
def test_O10_the_six_cases_of_the_clip(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    log_ratio = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    found = policy_loss(log_ratio, torch.tensor([[advantage]]), torch.tensor([[True]]), 1)
    found.loss.backward()
    assert float(found.loss.detach()) == pytest.approx(loss)
    assert log_ratio.grad is not None
    assert float(log_ratio.grad) == pytest.approx(gradient * ratio)  # d rho / d log rho is rho
    assert float(found.clip_fraction) == float(ratio != 1.0)


@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient"),
    [
        (0.1, 2.0, 1.805, -1.9),  # inside the range around the old value 0: the plain error
        (1.0, 2.0, 1.62, 0.0),  # moved too far towards the target: the error of 0.2, larger, without a gradient
        (1.0, 0.5, 0.125, 0.5),  # moved past the target: its own error is the larger one and brings it back
        (-1.0, -2.0, 1.62, 0.0),
        (-1.0, 2.0, 4.5, -3.0),  # moved the wrong way: nothing is hidden
    ],
)
def test_O11_the_larger_of_two_value_errors(value: float, target: float, loss: float, gradient: float) -> None:
    values, zero = torch.tensor([[value]], requires_grad=True), torch.zeros(1, 1)
    found = value_loss(values, zero, torch.tensor([[target]]), torch.tensor([[True]]), 1, 0.2)
    found.loss.backward()
    assert float(found.loss.detach()) == pytest.approx(loss)
    assert values.grad is not None and float(values.grad) == pytest.approx(gradient)


@pytest.mark.parametrize("shape", SHAPES)
def test_O12_small_updates_move_the_weights_beside_a_bf16_base(shape: Shape) -> None:
    """At a rate of 1e-6 for ten steps: bf16 weights of ordinary size would not move at all."""
    backbone = backbone_of(shape, bf16=True)
    policy, example = policy_on(backbone), answers(1)[0]
    parameters = policy.trainable_parameters()
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    ids, mask = torch.tensor([example.input_ids]), torch.ones(1, len(example.input_ids), dtype=torch.bool)
    config = OptimizerConfig(learning_rate=1e-6, lr_scheduler_type="constant")
    trainer = Trainer(parameters, config, 10)
    before = {name: p.detach().clone() for name, p in parameters.items()}

    def loss(_: None) -> LossOutput:
        found = policy.response_statistics(ids, mask, mask[:, 1:], 1.0)
        assert found.values_BR is not None
        return LossOutput(found.values_BR.square().sum() - found.logprobs_BR.sum())

    for _ in range(10):
        trainer.step([None], loss)
    for name, parameter in parameters.items():
        assert not torch.equal(parameter, before[name]), name
    rounded = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    swallowing = Trainer({"weight": rounded}, config, 10)
    for _ in range(10):
        swallowing.step([None], lambda _: LossOutput(rounded.float().sum()))
    assert torch.equal(rounded, torch.ones_like(rounded))  # what the row is about


def test_O12_weights_that_train_are_held_in_fp32(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tiny_model("gpt2", len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for train, expected in (("full", torch.float32), ("lora", torch.bfloat16)):
        backbone = Backbone.load(ModelConfig.model_validate({"name_or_path": str(tmp_path), "train": train}), "bf16")
        assert {p.dtype for p in backbone.model.parameters()} == {expected}


def test_O13_the_bonus_alone_raises_entropy() -> None:
    logits = (3 * torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))).requires_grad_(True)
    mask, found = torch.ones(2, 4, dtype=torch.bool), list[float]()
    for _ in range(30):
        loss = entropy_loss(entropy_of(logits), mask, 8)
        found.append(-float(loss.detach()))
        (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= 8 * gradient
    assert found == sorted(found)
    assert found[-1] > found[0] + 0.5 and found[-1] <= math.log(9)
