"""Rewards: rules, users' functions, their weighted sum, learned ones, and what shaping makes of a score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_backbones import add_trained_adapter, random_prompts, tiny_backbone, word_tokenizer
from tiny_tokenizers import byte_level
from torch import Tensor

from rlhf.data.chat import ChatEncoder
from rlhf.data.rows import Prompt
from rlhf.infra.errors import UserError
from rlhf.models.reward_model import RewardModel, ScoreScale
from rlhf.recipes.stages import build_reward
from rlhf.rewards.detectors import refusal_flags, repetition_share
from rlhf.rewards.learned import LearnedReward, same_tokenizer
from rlhf.rewards.process import process_term_config, step_rewards
from rlhf.rewards.protocol import (
    CombinedReward,
    RewardTerm,
    RewardTermConfig,
    StepValue,
    StepwiseReward,
    joined_scores,
    load_function,
)
from rlhf.rewards.rules import RULES, make_rule
from rlhf.rewards.shaping import RunningMoments, ShapingConfig, shape_scores, token_rewards
from rlhf.rollout.trajectory import Trajectory


def values_of(rule: str, answers: Sequence[str], **arguments: Any) -> list[float]:
    return list(make_rule(rule, arguments)(["a prompt"] * len(answers), answers, anything=[1] * len(answers)))


# ---------------------------------------------------------------- rules


def test_target_string() -> None:
    answers = ["The answer is 4.", "the ANSWER", ""]
    assert values_of("target_string", answers, text="answer") == [1, 0, 0]
    assert values_of("target_string", answers, text="Answer", ignore_case=True) == [1, 1, 0]


def test_target_format_matches_the_whole_answer() -> None:
    answers = [" Answer: 12 \n", "Answer: 12 apples", "so\nAnswer: 3"]
    assert values_of("target_format", answers, pattern=r"Answer: \d+") == [1, 0, 0]
    assert values_of("target_format", answers, pattern=r".*Answer: \d+") == [1, 0, 1]  # the dot takes new lines


def test_length_penalty_counts_words_either_way() -> None:
    answers = ["one two three", "one", "one two three four five", ""]
    assert values_of("length_penalty", answers, target_words=3, per_word=0.5) == [0, -1, -1, -1.5]


def test_keyword_sentiment() -> None:
    answers = ["A great, HAPPY day", "bad and good", "sad. awful! nice?", "goods", "it's nice"]
    assert values_of("keyword_sentiment", answers) == pytest.approx([1, 0, -1 / 3, 0, 1])
    assert values_of("keyword_sentiment", ["Yes no no"], positive=["YES"], negative=["no"]) == pytest.approx([-1 / 3])


def test_phrase_endings() -> None:
    answers = ["Have a nice day! ", "have a nice DAY!", "nice day! And more"]
    assert values_of("phrase_endings", answers, phrases=["nice day!", "bye"]) == [1, 1, 0]


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [
        ("target_format", {"pattern": "("}, r"'\(', which is no regular expression"),
        ("length_penalty", {"target_words": -1}, "both must be 0 or more"),
        ("phrase_endings", {"phrases": "bye"}, "give a list with at least one phrase"),
        ("target_string", {"txt": "a"}, r"reward 'target_string' does not take \{'txt': 'a'\}"),
        ("target_string", {}, "missing 1 required positional argument: 'text'"),
    ],
)
def test_rules_refuse_settings_that_cannot_serve(rule: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_rule(rule, arguments)


def test_every_rule_scores_an_empty_batch() -> None:
    arguments = {
        "target_string": {"text": "a"},
        "target_format": {"pattern": "a"},
        "length_penalty": {"target_words": 3},
        "keyword_sentiment": {},
        "phrase_endings": {"phrases": ["a"]},
    }
    assert set(arguments) == set(RULES)
    assert all(values_of(rule, [], **some) == [] for rule, some in arguments.items())


# ---------------------------------------------------------------- users' functions

GOOD = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Settings:
    factor: float = 2.0

def by_length(prompts, completions, **columns):
    return [Settings().factor * len(answer) for answer in completions]

def with_column(prompts, completions, target, **columns):
    return [float(answer == wanted) for answer, wanted in zip(completions, target)]

def no_columns(prompts, completions):
    return [0.0] * len(completions)

number = 3
"""


def test_a_function_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "json.py"  # a name that a module of Python's has already
    file.write_text(GOOD)
    assert load_function(f"{file}:by_length")(["p"], ["abc"], finished=[True]) == [6.0]
    assert load_function(f"{file}:with_column")(["p", "p"], ["a", "b"], target=["a", "c"]) == [1.0, 0.0]
    import json

    assert json.loads("1") == 1


def test_a_function_from_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_tiny_rewards.py").write_text(GOOD)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_function("my_tiny_rewards:by_length")([], ["ab"]) == [4.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{file}:absent", "defines no function 'absent'"),
        ("{file}:number", "defines no function 'number'"),
        ("{file}:no_columns", r"must take \*\*columns beside prompts and completions"),
        ("{folder}/absent.py:f", "there is no file"),
        ("no_such_package_at_all:f", "No module named 'no_such_package_at_all'"),
        (":f", "no reward ':f'"),
        ("{folder}/broken.py:f", "cannot be read"),
    ],
)
def test_bad_names_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "broken.py").write_text("def f(:")
    with pytest.raises(UserError, match=message):
        load_function(name.format(file=tmp_path / "good.py", folder=tmp_path))


def constant(*values: float) -> Any:
    return lambda prompts, completions, **columns: list(values)


def test_terms_are_weighted_and_kept_by_name() -> None:
    seen: list[Any] = []

    def watching(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        seen.append((prompts, completions, columns))
        return [10.0, 20.0]

    reward = CombinedReward([RewardTerm("a", constant(1, 2), 0.5), RewardTerm("b", watching, -1.0)])
    scores = reward(["p", "q"], ["x", "y"], {"finished": [True, False]})
    assert scores.total == [-9.5, -19.0]
    assert scores.by_term == {"a": [1.0, 2.0], "b": [10.0, 20.0]}
    assert seen == [(["p", "q"], ["x", "y"], {"finished": [True, False]})]


def test_two_terms_of_one_name_are_both_kept() -> None:
    reward = CombinedReward([RewardTerm("a", constant(1), 1.0), RewardTerm("a", constant(2), 1.0)])
    scores = reward(["p"], ["x"], {})
    assert scores.total == [3.0]
    assert scores.by_term == {"a": [1.0], "a_2": [2.0]}


def test_wrong_numbers_of_values_and_no_terms_are_refused() -> None:
    with pytest.raises(UserError, match="reward 'a' returned 3 values for 2 completions"):
        CombinedReward([RewardTerm("a", constant(1, 2, 3))])(["p", "q"], ["x", "y"], {})
    with pytest.raises(UserError, match="no reward was given"):
        CombinedReward([])


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "much"])
def test_a_value_that_is_no_finite_number_is_refused(value: Any) -> None:
    with pytest.raises(
        UserError, match=r"reward 'a' returned (nan|inf|None|'much') for completion 1; expected a finite"
    ):
        CombinedReward([RewardTerm("a", constant(1.0, value))])(["p", "q"], ["x", "y"], {})


def test_rewards_are_built_by_name(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(GOOD)
    terms = [
        RewardTermConfig(name="target_string", weight=2.0, arguments={"text": "red"}),
        RewardTermConfig(name=f"{tmp_path / 'mine.py'}:by_length", weight=0.5),
    ]
    reward = build_reward(terms, None, tmp_path, tiny_backbone())
    assert reward(["p", "p"], ["red", "blue"], {}).total == [5.0, 4.0]
    with pytest.raises(UserError, match="no reward 'taret_string'"):
        build_reward([RewardTermConfig(name="taret_string")], None, tmp_path, tiny_backbone())
    with pytest.raises(UserError, match="the reward `model` needs reward_model"):
        build_reward([RewardTermConfig(name="model")], None, tmp_path, tiny_backbone())


# ---------------------------------------------------------------- detectors


def test_repetition_share_against_counting() -> None:
    assert repetition_share("a b c") == 0.0
    assert repetition_share("") == 0.0
    assert repetition_share("a b c d e f") == 0.0
    assert repetition_share("no no no no no no") == pytest.approx(2 / 3)  # three 4-grams, two of them seen before
    assert repetition_share("One two three four. one, two three FOUR!") == pytest.approx(1 / 5)


def test_refusal_flags() -> None:
    assert refusal_flags(["I'm sorry, but I can't help with that.", "The answer is 4."]) == [True, False]


# ---------------------------------------------------------------- from score to reward


def trajectory_of(lengths: list[int], finished: list[bool], width: int | None = None) -> Trajectory:
    mask = torch.arange(width or max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(lengths), 12, generator=generator)[:, : mask.shape[1]]
    prompt = torch.ones(len(lengths), 2, dtype=torch.long)
    return Trajectory(
        prompt_ids_BP=prompt,
        prompt_mask_BP=prompt.bool(),
        response_ids_BR=mask.long(),
        response_mask_BR=mask,
        logprobs_BR=torch.where(mask, noise, 0.0),
        entropy_BR=mask.float(),
        values_BR=None,
        finished_B=torch.tensor(finished),
        temperature=1.0,
    )


def shaped(
    scores: list[float],
    settings: dict[str, Any],
    moments: RunningMoments | None = None,
    repetition: list[float] | None = None,
    refused: list[bool] | None = None,
) -> list[float]:
    """Three answers of 2, 4 and 6 tokens, the last cut off; everything off but what the settings say."""
    config = ShapingConfig(**({"normalise": False, "clip": None, "missing_eos_penalty": 0.0} | settings))
    found = shape_scores(
        torch.tensor(scores),
        trajectory_of([2, 4, 6], [True, True, False]),
        config,
        moments or RunningMoments(),
        torch.tensor(repetition or [0.0] * 3),
        torch.tensor(refused or [False] * 3),
        max_length=6,
    )
    return [round(value, 5) for value in found.scores_B.tolist()]


def test_penalties_are_subtracted() -> None:
    scores = [1.0, 2.0, 3.0]
    assert shaped(scores, {}) == scores
    assert shaped(scores, {"missing_eos_penalty": 2.5}) == [1.0, 2.0, 0.5]
    assert shaped(scores, {"length_budget": 3, "length_penalty": 0.1}) == [1.0, 1.9, 2.7]
    # Free up to 6 - 4 = 2 tokens, then in a straight line to the whole penalty at 6, where answers are cut off.
    assert shaped(scores, {"overlong_buffer": 4, "overlong_penalty": 0.8}) == [1.0, 1.6, 2.2]
    assert shaped(scores, {"repetition_penalty": 2.0}, repetition=[0.0, 0.5, 1.0]) == [1.0, 1.0, 1.0]
    assert shaped(scores, {"refusal_penalty": 4.0}, refused=[True, False, False]) == [-3.0, 2.0, 3.0]


def test_normalising_comes_before_clipping_and_clipping_before_penalties() -> None:
    scores, std = [0.0, 0.0, 30.0], float(np.std([0, 0, 30], ddof=1))
    normalised = [(score - 10) / std for score in scores]
    assert shaped(scores, {"normalise": True}) == pytest.approx(normalised, abs=1e-4)
    clipped = shaped(scores, {"normalise": True, "clip": 0.7})
    assert clipped == pytest.approx([normalised[0], normalised[1], 0.7], abs=1e-4)
    everything = shaped(scores, {"normalise": True, "clip": 0.7, "missing_eos_penalty": 2.0})
    assert everything[2] == pytest.approx(0.7 - 2.0)  # the penalty is not clipped away


def test_V6_scores_are_normalised_by_all_scores_so_far() -> None:
    moments, earlier = RunningMoments(), [5.0, 7.0, 9.0]
    shaped(earlier, {"normalise": True}, moments)
    now = [1.0, 2.0, 3.0]
    every = np.array(earlier + now)
    expected = (np.array(now) - every.mean()) / every.std(ddof=1)
    assert shaped(now, {"normalise": True}, moments) == pytest.approx(expected.tolist(), abs=1e-4)


def test_running_moments_against_numpy() -> None:
    moments, seen = RunningMoments(), np.empty(0)
    assert moments.std == 1.0
    generator = torch.Generator().manual_seed(0)
    for size in (1, 7, 64, 3):
        batch = 1e4 + 0.1 * torch.randn(size, generator=generator, dtype=torch.float64)
        moments.update(batch)
        seen = np.append(seen, batch.numpy())
        assert moments.mean == pytest.approx(seen.mean(), rel=1e-12)
        assert moments.count == len(seen)
        assert moments.std == pytest.approx(seen.std(ddof=1) if len(seen) > 1 else 1.0, rel=1e-6)
    equal = RunningMoments()
    equal.update(torch.tensor([2.0, 2.0, 2.0]))
    assert (equal.mean, equal.std) == (2.0, 1.0)


def test_shaping_metrics() -> None:
    moments = RunningMoments()
    moments.update(torch.zeros(1000))
    moments.update(torch.tensor([1.0, -1.0]))
    found = shape_scores(
        torch.tensor([0.0, 0.1, 100.0]),
        trajectory_of([2, 4, 6], [True, True, False]),
        ShapingConfig(normalise=True, clip=5.0),
        moments,
        torch.tensor([0.0, 0.3, 0.6]),
        torch.tensor([True, False, False]),
        max_length=6,
    )
    assert found.metrics == pytest.approx(
        {"reward/outlier_share": 1 / 3, "refusal/rate": 1 / 3, "repetition/mean": 0.3, "reward/clipped_share": 1 / 3}
    )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_V1_token_rewards_charge_the_kl_and_pay_the_score_at_the_end(estimator: str) -> None:
    lengths = [2, 5, 1]
    trajectory, scores = trajectory_of(lengths, [True, False, True]), torch.tensor([1.0, -2.0, 0.5])
    reference = torch.where(trajectory.response_mask_BR, trajectory.logprobs_BR - 0.3, 0.0)
    charge = {"k1": 0.3, "k2": 0.045, "k3": math.exp(-0.3) - 1 + 0.3}[estimator]
    rewards = token_rewards(trajectory, scores, reference, 0.1, estimator)
    for row, length in enumerate(lengths):
        for t in range(5):
            expected = (-0.1 * charge + (float(scores[row]) if t == length - 1 else 0)) if t < length else 0
            assert float(rewards[row, t]) == pytest.approx(expected, abs=1e-6)


def test_V1_the_padding_width_changes_no_token_reward() -> None:
    scores = torch.tensor([1.0, -2.0, 0.5])
    narrow, wide = (trajectory_of([2, 5, 1], [True, False, True], width) for width in (5, 12))

    def rewards(trajectory: Trajectory) -> Tensor:
        rubbish = torch.full_like(trajectory.logprobs_BR, math.nan)
        reference = torch.where(trajectory.response_mask_BR, trajectory.logprobs_BR * 0.9, rubbish)
        return token_rewards(trajectory, scores, reference, 0.1, "k3")

    assert torch.equal(rewards(narrow), rewards(wide)[:, :5])
    assert not rewards(wide)[:, 5:].any()


def test_a_length_penalty_without_a_budget_is_an_idle_key() -> None:
    assert set(ShapingConfig().idle_keys()) == {"length_penalty", "overlong_penalty"}
    assert set(ShapingConfig(length_budget=5).idle_keys()) == {"overlong_penalty"}
    assert ShapingConfig(length_budget=5, overlong_buffer=2).idle_keys() == {}


# ---------------------------------------------------------------- learned rewards


@pytest.fixture(scope="module")
def model() -> RewardModel:
    backbone = tiny_backbone()
    add_trained_adapter(backbone, "reward")
    model = RewardModel(backbone, "reward")
    model.scale = ScoreScale(0.25, 2.0)
    return model.requires_grad_(False)


def score_alone(model: RewardModel, ids: list[int]) -> float:
    return (float(model(torch.tensor([ids]))) - 0.25) / 2.0


def test_T7_sampled_ids_are_scored_where_the_tokenizer_is_the_same(model: RewardModel) -> None:
    reward = LearnedReward(model, word_tokenizer(), max_batch_tokens=20)
    assert reward.by_ids
    prompts, answers = random_prompts(6), random_prompts(6, seed=1)
    texts = ["not what was sampled"] * 6
    found = reward(["p"] * 6, texts, prompt_ids=prompts, completion_ids=answers)
    expected = [score_alone(model, prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    assert found == pytest.approx(expected, abs=1e-5)


def test_C12_text_goes_through_the_reward_models_own_tokenizer_otherwise(model: RewardModel) -> None:
    other = word_tokenizer(separate_pad=False)
    assert not same_tokenizer(other, model.tokenizer)
    reward = LearnedReward(model, other)
    assert not reward.by_ids
    prompts, answers = ["the cat is", "a dog"], ["red", "not very big"]
    ids = model.tokenizer
    expected = [
        score_alone(model, [*ids(p)["input_ids"], *ids(a)["input_ids"], ids.eos_token_id])
        for p, a in zip(prompts, answers, strict=True)
    ]
    found = reward(prompts, answers, prompt_ids=[[0], [0]], completion_ids=[[0], [0]])
    assert found == pytest.approx(expected, abs=1e-5)
    assert LearnedReward(model)(prompts, answers) == pytest.approx(expected, abs=1e-5)


def test_C12_by_ids_and_by_text_agree_on_finished_answers(model: RewardModel) -> None:
    encoder, prompts, answers = ChatEncoder(word_tokenizer()), ["the cat is", "a dog"], ["red", "not very big"]
    by_ids = LearnedReward(model, word_tokenizer())(
        prompts,
        answers,
        prompt_ids=encoder.prompt_ids_batch(prompts),
        completion_ids=encoder.response_ids_batch(prompts, answers),
    )
    assert by_ids == pytest.approx(LearnedReward(model)(prompts, answers), abs=1e-5)


def test_raw_scores_on_request(model: RewardModel) -> None:
    reward = LearnedReward(model, word_tokenizer(), standardise=False)
    assert reward.score_ids([[5, 6]]).tolist() == pytest.approx([float(model(torch.tensor([[5, 6]])))], abs=1e-6)


# ---------------------------------------------------------------- paid step by step


class Sentences(StepwiseReward):
    """Every sentence is worth its number of words."""

    def by_step(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Any) -> list[list[StepValue]]:
        found = []
        for text in completions:
            ends = [place for place, character in enumerate(text) if character == "."]
            starts = [0, *(end + 1 for end in ends)]
            found.append([(end, len(text[start:end].split())) for start, end in zip(starts, ends, strict=False)])
        return found


def test_steps_are_weighted_and_kept_apart_from_scores() -> None:
    reward = CombinedReward(
        [RewardTerm("steps", Sentences(), 0.5), RewardTerm("words", lambda p, c, **_: [float(len(t)) for t in c], 2)]
    )
    assert reward.is_stepwise
    scores = reward(["", "", ""], ["a b. c. d", "nothing", "x."], {})
    assert scores.total == [18.0, 14.0, 4.0]
    assert scores.by_step == [[(3, 1.0), (6, 0.5)], [], [(1, 0.5)]]
    assert scores.by_term == {"steps": [3, 0, 1], "words": [9, 7, 2]}
    assert scores.returns == [19.5, 14.0, 4.5]
    some = scores.select([2, 0])
    assert (some.total, some.by_step, some.by_term["steps"]) == ([4.0, 18.0], [[(1, 0.5)], scores.by_step[0]], [1, 3])
    assert joined_scores([some, scores.select([1])]) == scores.select([2, 0, 1])
    plain = CombinedReward([RewardTerm("words", lambda p, c, **_: [1.0] * len(c))])([""], ["a"], {})
    assert not plain.by_step and plain.returns is plain.total and joined_scores([plain, plain]).total == [1.0, 1.0]
    with pytest.raises(UserError, match="returned nan for completion 0"):
        CombinedReward([RewardTerm("bad", NotANumber())])([""], ["a"], {})
    with pytest.raises(UserError, match="returned 1 values for 2 completions"):
        CombinedReward([RewardTerm("bad", NotANumber())])(["", ""], ["a", "b"], {})


class NotANumber(StepwiseReward):
    def by_step(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Any) -> list[list[StepValue]]:
        return [[(1, math.nan)]]


def test_steps_are_paid_on_their_last_tokens() -> None:
    encoder = ChatEncoder(byte_level(["</s>"], "</s>", vocab_size=256))
    texts = ["one. two. three.", "é. x", ""]
    ids = [encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    rows = torch.zeros(3, 20, dtype=torch.long)
    for row, some in zip(rows, ids, strict=True):
        row[: len(some)] = torch.tensor(some, dtype=torch.long)
    lengths = torch.tensor([len(some) for some in ids])
    mask = torch.arange(20) < lengths.unsqueeze(1)
    prompt, nothing = torch.zeros(3, 1, dtype=torch.long), torch.zeros(3, 20)
    ended = encoder.stop_token_ids[0]
    rows[0, 16], mask[0, 16] = ended, True
    trajectory = Trajectory(prompt, prompt == 0, rows, mask, nothing, nothing, None, lengths > 0, 1.0)
    paid = step_rewards([[(3, 1.0), (8, 2.0), (8, 0.25), (16, 0.0)], [(1, 4.0)], []], trajectory, encoder.decode)
    # One token a character, but two for the accented one, which is whole with the second, and one for the end.
    assert {tuple(place): float(paid.rewards_BR[tuple(place)]) for place in paid.ends_BR.nonzero().tolist()} == {
        (0, 2): 1.0,
        (0, 7): 2.25,
        (0, 16): 0.0,
        (1, 1): 4.0,
    }
    assert float(paid.rewards_BR.abs().sum()) == 7.25
    whole = token_rewards(trajectory, torch.tensor([10.0, 20.0, 30.0]), nothing, 0.5, "k1", paid.rewards_BR)
    assert whole.sum(dim=1).tolist() == [13.25, 24.0, 0.0]
    assert (whole[0, 2], whole[0, 16], whole[1, 4]) == (1.0, 10.0, 20.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"agregation": "min"}, r"agregation: .*it takes aggregation, split, per_step"),
        ({"aggregation": "mean"}, "'min', 'product' or 'last'"),
        ({"per_step": "change", "aggregation": "last"}, "aggregation has no effect here because per_step"),
    ],
)
def test_arguments_of_a_process_reward_are_checked(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        process_term_config(arguments)
