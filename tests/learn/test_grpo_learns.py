"""Critic-free learning raises a reward in all its forms, counts groups that say nothing, and resumes bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_some import fast_some
from safetensors.torch import load_file
from toy_runs import WriteRows, column, interrupt_after, log_lines, mean, prompts, settings

from rlhf.algo.kl import k2
from rlhf.data.chat import ChatEncoder
from rlhf.data.prompt_dataset import PromptExample
from rlhf.data.rows import Prompt
from rlhf.infra.config import load_config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run
from rlhf.infra.interrupt import Stopped
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.models.lora import LoRAConfig, get_lora_parameters
from rlhf.models.policy import Policy
from rlhf.models.reference import Reference
from rlhf.recipes.grpo import GRPO, run_grpo
from rlhf.recipes.grpo_config import GRPOConfig
from rlhf.recipes.resume import resume_run
from rlhf.recipes.rollouts import OnlineParts
from rlhf.rewards.protocol import CombinedReward, RewardFunction, RewardTerm
from rlhf.rollout.trajectory import Experience

RED = "rewards=[{name: target_string, arguments: {text: red}}]"
VARIANTS = {
    "grpo": (),
    "rloo": ("grpo.advantage=leave_one_out", "grpo.loss_mean=constant_length", "kl.place=reward"),
    "dr_grpo": ("grpo.advantage=group_centred", "grpo.loss_mean=constant_length", "kl.coefficient=0"),
    "dapo": ("grpo.loss_mean=token_mean", "grpo.num_mini_batches=2", "grpo.clip_range_high=0.28",
             "grpo.max_sampling_rounds=4", "kl.coefficient=0", "shaping.overlong_buffer=2",
             "shaping.overlong_penalty=0.1"),
}  # fmt: skip


def grpo_config(tmp_path: Path, data: Path, name: str, *more: str) -> GRPOConfig:
    shared = [
        f"data.train_files={data}",
        "data.validation_fraction=0",
        "generation.max_new_tokens=6",
        "grpo.num_prompts=8",
        "grpo.num_generations=8",
        "optimizer.learning_rate=0.01",
        "optimizer.lr_scheduler_type=constant",
        "model.lora.r=8",
    ]
    return load_config(GRPOConfig, overrides=settings(tmp_path, name, *shared, *more))


@pytest.fixture
def prompt_file(write_rows: WriteRows) -> Path:
    return write_rows([{"prompt": prompt} for prompt in prompts(24)])


@pytest.mark.parametrize("name", fast_some(["grpo", "rloo", "dr_grpo", "dapo"], "dapo"))
def test_a_rule_reward_is_learnt(tmp_path: Path, base: Path, prompt_file: Path, name: str) -> None:
    more = (f"policy={base}", RED, "grpo.num_iterations=16", *VARIANTS[name])
    run = run_grpo(grpo_config(tmp_path, prompt_file, "grpo", *more))
    rewards = column(run.folder, "grpo/sampled_reward_mean")
    assert rewards[0] < 0.5  # six random words of twenty-seven rarely hold one of them
    assert mean(rewards[-2:]) > 0.85
    first, last = log_lines(run.folder)[0], log_lines(run.folder)[-1]
    assert first["kl/mean"] == pytest.approx(0, abs=1e-4)
    assert first["policy/logprob_gap"] < 1e-4  # the ratio of the first update is one
    assert 0 < last["kl/mean"] < 20
    assert all(math.isfinite(value) for line in log_lines(run.folder) for value in line.values())
    assert not any(name.startswith("value/") for name in last)  # there is no critic
    assert (run.folder / "policy").is_dir()


# ---------------------------------------------------------------- on parts made by hand


def nothing(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    return [0.0] * len(completions)


def words(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """Something to say of every answer."""
    return [0.3 * text.count("red") - 0.1 * len(text.split()) for text in completions]


def of_some_prompts(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """Answers differ where the prompt begins with "one"; to every other prompt all are worth the same."""
    scores = words(prompts, completions)
    return [score if str(prompt).startswith("one") else 0.5 for prompt, score in zip(prompts, scores, strict=True)]


class Bench:
    """GRPO on a policy that was pushed away from its reference."""

    def __init__(self, base: Path, config: GRPOConfig, reward: RewardFunction = nothing) -> None:
        backbone = Backbone.load(ModelConfig(name_or_path=str(base)))
        with torch.no_grad():
            backbone.model.base_model.norm.weight *= 3  # an untrained model is hardly decided about anything
        backbone.add_adapter("policy", LoRAConfig(r=8))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in get_lora_parameters(backbone.model, "policy"):
                parameter.copy_(0.45 * torch.randn(parameter.shape, generator=generator))
        backbone.train_only(["policy"])
        self.policy, encoder = Policy(backbone, "policy"), ChatEncoder(backbone.tokenizer)
        examples = [PromptExample(encoder.prompt_ids(text), text, {}) for text in prompts(24)]
        rewards = CombinedReward([RewardTerm("reward", reward)])
        self.run = Run.create("grpo", config, config.run)
        self.grpo = GRPO(
            config, self.run, OnlineParts(self.policy, Reference(backbone, None), rewards, examples, encoder)
        )

    def train(self) -> Path:
        with self.run:
            self.grpo.train()
        return self.run.folder

    def experience(self) -> Experience:
        self.run.finish()
        return self.grpo.compare(self.grpo.draw().groups)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.policy.trainable_parameters().items()}


@pytest.mark.parametrize(
    "more", fast_some([(), ("kl.estimator=k2",), ("kl.place=reward",)], ()), ids=["k3", "k2", "in the reward"]
)
def test_with_the_kl_alone_the_policy_returns_to_the_reference(
    tmp_path: Path, base: Path, prompt_file: Path, more: tuple[str, ...]
) -> None:
    config = grpo_config(tmp_path, prompt_file, "kl", "grpo.num_iterations=18", "kl.coefficient=1", *more)
    kl = column(Bench(base, config).train(), "kl/mean")
    assert kl[0] > 10
    assert mean(kl[-3:]) < 0.8 * mean(kl[:2])


def test_V5_where_all_answers_are_worth_the_same_nothing_moves_and_it_is_counted(
    tmp_path: Path, base: Path, prompt_file: Path
) -> None:
    config = grpo_config(tmp_path, prompt_file, "same", "grpo.num_iterations=3", "kl.coefficient=0")
    bench = Bench(base, config)
    before = bench.weights()
    lines = log_lines(bench.train())
    after = bench.weights()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [line["grpo/groups_without_variance"] for line in lines] == [8, 8, 8]
    assert [line["advantage/max"] for line in lines] == [line["train/grad_norm"] for line in lines] == [0, 0, 0]


def test_advantages_and_returns_against_a_loop(tmp_path: Path, base: Path, prompt_file: Path) -> None:
    """RLOO with the KL in the reward, row by row: score minus beta times the summed k1, against the other answers."""
    more = ("grpo.advantage=leave_one_out", "kl.place=reward", "kl.coefficient=0.3", "shaping.missing_eos_penalty=0.7")
    bench = Bench(base, grpo_config(tmp_path, prompt_file, "loop", *more), words)
    experience = bench.experience()
    trajectory = experience.trajectory
    log_ratio = (trajectory.logprobs_BR - experience.reference_logprobs_BR).tolist()
    texts = bench.grpo.rollouts.texts(trajectory)
    returns = []
    for row, answer in enumerate(trajectory.responses()):
        score = words([""], [texts[row]])[0] - (0.0 if trajectory.finished_B[row] else 0.7)
        returns.append(score - 0.3 * sum(log_ratio[row][: len(answer)]))
    assert [len(set(map(tuple, trajectory.prompts()[start : start + 8]))) for start in range(0, 64, 8)] == [1] * 8
    assert len(set(map(tuple, trajectory.responses()))) > 40  # one prompt's answers are different draws
    for row, answer in enumerate(trajectory.responses()):
        group = [other for other in range(row - row % 8, row - row % 8 + 8) if other != row]
        expected = returns[row] - sum(returns[other] for other in group) / 7
        found = experience.advantages_BR[row]
        assert found[: len(answer)].tolist() == pytest.approx([expected] * len(answer), abs=1e-4)
        assert not found[len(answer) :].any()


@pytest.mark.parametrize("loss_mean", ["sequence_mean", "token_mean", "constant_length"])
def test_the_gradient_does_not_depend_on_the_micro_batches(
    tmp_path: Path, base: Path, prompt_file: Path, loss_mean: str
) -> None:
    def gradients(name: str, tokens: int) -> dict[str, torch.Tensor]:
        more = [f"grpo.max_tokens_per_micro_batch={tokens}", "grpo.entropy_coef=0.1", "optimizer.max_grad_norm=1000"]
        bench = Bench(base, grpo_config(tmp_path, prompt_file, name, f"grpo.loss_mean={loss_mean}", *more), words)
        experience, updates = bench.experience(), bench.grpo.updates
        updates.trainer.step(updates.micro_batches(experience), bench.grpo.loss(experience))
        assert (len(updates.micro_batches(experience)) == 1) == (tokens > 1000)
        return {name: p.grad for name, p in updates.trainer.parameters.items() if p.grad is not None}

    whole, parts = gradients("whole", 10_000), gradients("parts", 45)
    assert whole.keys() == parts.keys() and len(whole) > 20
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-5, rtol=1e-3)


def test_the_loss_against_a_loop(tmp_path: Path, base: Path, prompt_file: Path) -> None:
    """The first update of GRPO: ratios are 1, so the loss is minus the advantages plus beta k2, as means of means."""
    more = ("kl.coefficient=0.2", "kl.estimator=k2", "grpo.max_tokens_per_micro_batch=60")
    bench = Bench(base, grpo_config(tmp_path, prompt_file, "loss", *more), words)
    experience, updates = bench.experience(), bench.grpo.updates
    log_ratio = experience.trajectory.logprobs_BR - experience.reference_logprobs_BR
    expected = 0.0
    for row, answer in enumerate(experience.trajectory.responses()):
        terms = [
            -float(experience.advantages_BR[row, t]) + 0.2 * float(k2(log_ratio[row, t])) for t in range(len(answer))
        ]
        expected += sum(terms) / len(terms) / 64
    loss = bench.grpo.loss(experience)
    outputs = [loss(part) for part in updates.micro_batches(experience)]
    assert len(outputs) > 3
    assert sum(float(output.loss.detach()) for output in outputs) == pytest.approx(expected, abs=1e-3)
    kl = sum(float(output.metrics["policy/kl_to_reference"]) for output in outputs)
    rows = [k2(log_ratio[row, : len(a)]).mean() for row, a in enumerate(experience.trajectory.responses())]
    assert kl == pytest.approx(float(torch.stack(rows).mean()), abs=1e-3)


# ---------------------------------------------------------------- groups that are drawn again


def test_groups_without_spread_are_replaced_until_the_batch_is_full(
    tmp_path: Path, base: Path, prompt_file: Path
) -> None:
    bench = Bench(base, grpo_config(tmp_path, prompt_file, "again", "grpo.max_sampling_rounds=9"), of_some_prompts)
    drawn = bench.grpo.draw()
    bench.run.finish()
    # The stream of prompts by hand: each round asks for as many as are still missing.
    taken, missing, equal, rounds = 0, 8, 0, 0
    while missing and rounds < 9:
        batch = [str(example.prompt) for example in bench.grpo.rollouts.prompts(taken, missing)]
        taken, rounds = taken + missing, rounds + 1
        equal += sum(not prompt.startswith("one") for prompt in batch)
        missing -= sum(prompt.startswith("one") for prompt in batch)
    assert missing == 0 and rounds > 2
    assert drawn.counts["grpo/groups_sampled"] == taken == bench.grpo.progress.prompts
    assert drawn.counts["grpo/groups_without_variance"] == drawn.counts["grpo/groups_dropped"] == equal
    assert drawn.counts["grpo/sampling_rounds"] == rounds
    groups = drawn.groups
    assert len(groups) == 8 and groups.worths_NG.shape == (8, 8)
    assert bool((groups.worths_NG.std(dim=1) > 0).all())
    assert groups.shaped.scores_B.tolist() == pytest.approx(groups.scores.total)
    texts = bench.grpo.rollouts.texts(groups.trajectory)
    assert groups.scores.total == pytest.approx(words([""] * 64, texts), abs=1e-6)  # rows and scores stay together
    assert groups.scores.by_term["reward"] == groups.scores.total
    assert drawn.dropped_tokens > 0


def test_drawing_again_is_bounded_and_empty_places_are_filled(tmp_path: Path, base: Path, prompt_file: Path) -> None:
    bench = Bench(base, grpo_config(tmp_path, prompt_file, "bound", "grpo.max_sampling_rounds=3"), nothing)
    drawn = bench.grpo.draw()
    bench.run.finish()
    assert drawn.counts["grpo/groups_sampled"] == 24 and drawn.counts["grpo/sampling_rounds"] == 3
    assert drawn.counts["grpo/groups_without_variance"] == 24 and drawn.counts["grpo/groups_dropped"] == 16
    assert len(drawn.groups) == 8  # whose advantages are 0


def test_the_same_prompt_drawn_again_gets_other_answers(tmp_path: Path, base: Path, prompt_file: Path) -> None:
    bench = Bench(base, grpo_config(tmp_path, prompt_file, "others"))
    bench.run.finish()
    batch = bench.grpo.rollouts.prompts(0, 4)
    first, again, other = (bench.grpo.rollouts.sample(batch, 0, recompute=False, part=part) for part in (0, 0, 1))
    assert first.responses() == again.responses() != other.responses()


# ---------------------------------------------------------------- resumed, refused


@pytest.mark.parametrize("name", fast_some(["grpo", "dapo"], "dapo"))
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    tmp_path: Path, base: Path, prompt_file: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = (
        *(f"policy={base}", RED, "grpo.num_iterations=4", "grpo.num_prompts=3", "grpo.num_generations=4"),
        *("grpo.num_epochs=2", "optimizer.lr_scheduler_type=linear", "shaping.normalise=true", *VARIANTS[name]),
    )
    straight = run_grpo(grpo_config(tmp_path, prompt_file, "straight", *more))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "should_stop", interrupt_after(2))
        with pytest.raises(Stopped, match="rlhf resume"):
            run_grpo(grpo_config(tmp_path, prompt_file, "stopped", *more))
    folder = tmp_path / "stopped"
    assert len(log_lines(folder)) == 2
    resume_run(folder, lambda *_: None)
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
    assert log_lines(folder) == log_lines(straight.folder)
    if name == "dapo":
        assert max(column(folder, "grpo/sampling_rounds")) > 1
    wanted, found = (load_file(next((place / "policy").glob("*.safetensors"))) for place in (straight.folder, folder))
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[key], found[key]) for key in wanted)


def test_tokens_of_dropped_groups_count_as_sampled(tmp_path: Path, base: Path, prompt_file: Path) -> None:
    more = ("grpo.num_iterations=2", "grpo.max_sampling_rounds=3", "grpo.num_prompts=4")
    kept: list[int] = []
    bench = Bench(base, grpo_config(tmp_path, prompt_file, "tokens", *more), of_some_prompts)
    draw = bench.grpo.sample_groups

    def counted(num_prompts: int, part: int) -> Any:
        groups = draw(num_prompts, part)
        kept.append(int(groups.trajectory.response_mask_BR.sum()))
        return groups

    bench.grpo.sample_groups = counted  # type: ignore[method-assign]
    lines = log_lines(bench.train())
    assert lines[-1]["train/tokens"] == sum(kept)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("grpo.num_generations=1",), "grpo.num_generations is 1, but an answer is compared with the others"),
        (("grpo.num_mini_batches=65",), "grpo.num_mini_batches is 65, but a rollout has only 64 rows"),
        (("kl.estimator=k1",), "kl.estimator is k1, whose gradient in the loss is zero on average"),
        (("shaping.overlong_buffer=7",), "shaping.overlong_buffer is 7, but no answer is longer than"),
        (("rewards=[{name: math_answer}]",), "checks answers against the column 'answer', which no prompt has"),
        (("rewards=[{name: math_answer, arguments: {colum: a}}]",), "does not take"),
        (("kl.coefficient=0", "kl.place=reward"), "'kl.place' has no effect here because kl.coefficient is 0"),
    ],
)
def test_settings_that_cannot_serve_are_refused_before_anything_is_sampled(
    tmp_path: Path, base: Path, prompt_file: Path, more: tuple[str, ...], sentence: str
) -> None:
    rewards = () if any(text.startswith("rewards") for text in more) else (RED,)
    with pytest.raises(UserError, match=sentence):
        run_grpo(grpo_config(tmp_path, prompt_file, "refused", f"policy={base}", *rewards, *more))
    assert not (tmp_path / "refused").exists()
