"""The comparison of methods: what may be asked, how long each trains, what the numbers say."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from rlhf.eval.ablation_report import (
    Ablation,
    Outcome,
    Spent,
    baseline,
    brief_table,
    outcome,
    sentences,
    table_of,
    write_ablation,
)
from rlhf.eval.intervals import Interval, student_interval
from rlhf.eval.samples import Sample
from rlhf.infra.config import load_config
from rlhf.infra.errors import UserError
from rlhf.models.decoding import GenerationConfig
from rlhf.recipes.ablation import Parts, shared_by_all
from rlhf.recipes.ablation_config import AblationConfig
from rlhf.recipes.ablation_methods import METHODS, Arm, Shared, make_arm
from rlhf.recipes.ablation_time import fitting_length, seconds_spent

FILES = [
    "policy=tinychat",
    "reward_model=some/reward",
    "pairs.train_files=[pairs.jsonl]",
    "prompts.train_files=[prompts.jsonl]",
    "model.attn_implementation=eager",
    "generation.max_new_tokens=17",
]


def configured(*more: str) -> tuple[AblationConfig, Shared]:
    config = load_config(AblationConfig, overrides=[*FILES, *more])
    return config, shared_by_all(config)


def arm(name: str, settings: Mapping[str, Any] | None = None) -> Arm:
    return make_arm(name, settings or {}, configured()[1])


# ---------------------------------------------------------------- methods


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gets_the_same_start_rows_and_ways(name: str) -> None:
    found = arm(name)
    config = found.config
    assert (config.policy, config.model.attn_implementation) == ("tinychat", "eager")
    assert config.data.train_files == (f"{found.recipe.reads}.jsonl",)
    if found.recipe.reads == "prompts":
        assert (config.reward_model, config.generation.max_new_tokens) == ("some/reward", 17)
    if found.imitation is not None:
        assert found.imitation.model.name_or_path == "tinychat" and not config.use_cache


def test_a_method_is_its_own_recipe_with_its_own_file() -> None:
    assert arm("rloo").config.grpo.advantage == "leave_one_out"
    assert arm("grpo").config.grpo.advantage == "group_relative"
    assert arm("ipo").config.loss == "ipo" and arm("ipo").config.optimizer.learning_rate == 0.002
    assert arm("dpo", {"config": "configs/dpo.yaml"}).config.optimizer.learning_rate == 0.0005


def test_settings_change_one_method_and_make_others() -> None:
    changed = arm("dpo", {"beta": 0.7, "data": {"max_samples": 5}, "model": {"attn_implementation": "sdpa"}}).config
    assert (changed.beta, changed.data.max_samples, changed.model.attn_implementation) == (0.7, 5, "sdpa")
    assert changed.data.train_files == ("pairs.jsonl",)
    assert arm("timid", {"like": "ppo", "kl": {"coefficient": 0.5}}).config.kl.coefficient == 0.5
    other = arm("best_of_n", {"sft": {"optimizer": {"learning_rate": 0.25}}, "best_of_n": {"num_answers": 3}})
    assert other.imitation is not None and other.imitation.optimizer.learning_rate == 0.25
    assert other.config.best_of_n.num_answers == 3


@pytest.mark.parametrize(
    ("name", "length", "of"),
    [
        ("ppo", 7, lambda config: config.ppo.num_iterations),
        ("rloo", 7, lambda config: config.grpo.num_iterations),
        ("dpo", 7, lambda config: config.training.num_steps(10_000)),
        ("kto", 7, lambda config: config.training.num_steps(1)),
        ("online_dpo", 7, lambda config: config.rounds.num_rounds),
        ("best_of_n", 7, lambda config: config.data.max_samples),
    ],
)
def test_the_length_is_what_the_recipe_counts(name: str, length: int, of: Any) -> None:
    found = arm(name)
    assert of(found.recipe.at_length(found.config, length)) == length


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        (
            "dpo",
            {"run": {"seed": 1}},
            "settings.dpo.run.seed has no effect here because the ablation's own section `run`",
        ),
        ("ppo", {"policy": "x"}, "settings.ppo.policy has no effect here because every method starts from"),
        ("ppo", {"ppo": {"num_iterations": 3}}, "seconds, or lengths.ppo, say how long it trains"),
        ("dpo", {"loss": "nothing"}, "settings.dpo: config key 'loss'"),
        ("dpo", {"sft": {}}, "only best_of_n imitates"),
        ("best_of_n", {"sft": {"model": {"name_or_path": "x"}}}, "settings.best_of_n.sft.model.name_or_path has no"),
        ("best_of_n", {"sft": {"optimizer": {"lr": 1}}}, "settings.best_of_n.sft: unknown config key 'optimizer.lr'"),
        ("dpo", {"config": "nowhere.yaml"}, "settings.dpo: config file 'nowhere.yaml' does not exist"),
    ],
)
def test_a_setting_that_is_not_the_methods_is_refused(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as refused:
        arm(name, settings)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["seconds=0"], "config key 'seconds'"),
        (["methods=[]"], "config key 'methods'"),
        (["methods=[gpo]"], "there is no method 'gpo'; did you mean 'grpo'?"),
        (["methods=[mine]", "settings.mine.like=gpo"], "there is no method 'gpo'"),
        (["methods=[a/b]", "settings={a/b: {like: dpo}}"], "'a/b' cannot be the name of a method"),
        (["methods=[sft]", "settings.sft.like=dpo"], "'sft' cannot be the name of a method"),
        (["run.seed=3"], "config key 'run.seed' has no effect here because `seeds` names them"),
        (["evaluate.generation.top_k=3"], "config key 'evaluate.generation.top_k' has no effect here"),
        (["evaluate.reward_model=x"], "config key 'evaluate.reward_model' has no effect here"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(texts: list[str], words: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(AblationConfig, overrides=[*FILES, *texts])
    assert words in str(refused.value)


def test_a_file_may_hold_settings_of_methods_that_are_not_compared_this_time() -> None:
    config = load_config(AblationConfig, "configs/ablate.yaml", ["methods=[mine, rloo]", "settings.mine.like=ppo"])
    assert set(config.methods) < set(config.settings) | {"rloo"}


def test_all_policies_of_a_seed_are_measured_alike_on_prompts_of_that_seed(tmp_path: Path) -> None:
    config, shared = configured("methods=[dpo, best_of_n]", "evaluate.suite.seed=7", "evaluate.greedy=false")
    arms = {name: make_arm(name, {}, shared) for name in config.methods}
    for folder in ("dpo", "best_of_n", "best_of_n_sft"):
        (tmp_path / "seed_2" / folder / "policy").mkdir(parents=True)

    class Place:
        folder = tmp_path

    found = Parts(config, Place(), shared, arms).evaluation(2)  # type: ignore[arg-type]
    assert found.models == {
        "sft": "tinychat",
        "dpo": str(tmp_path / "seed_2/dpo/policy"),
        "best_of_n": str(tmp_path / "seed_2/best_of_n_sft/policy"),
    }
    assert (found.reference, found.reward_model, found.run.seed, found.greedy) == ("sft", "some/reward", 2, False)
    assert found.suite.seed == 207 and found.generation == GenerationConfig(max_new_tokens=17)
    assert found.model.attn_implementation == "eager"


# ---------------------------------------------------------------- time


@pytest.mark.parametrize(
    ("fixed", "each", "wanted"), [(0.0, 0.5, 60), (5.0, 0.25, 100), (20.0, 0.1, 100), (40.0, 1.0, 1)]
)
def test_a_length_fits_the_seconds_whatever_does_not_grow_with_it(fixed: float, each: float, wanted: int) -> None:
    asked: list[int] = []

    def time_of(length: int) -> float:
        asked.append(length)
        return fixed + each * length

    assert fitting_length(30.0, 4, time_of) == wanted
    assert asked[0] == 4 and time_of(asked[-1]) >= 10 and sum(map(time_of, asked[:-1])) < 100


def test_where_chance_makes_the_longer_run_the_quicker_one_the_length_follows_that_one() -> None:
    assert fitting_length(30.0, 4, {4: 12.0, 8: 11.0}.__getitem__) == 22


def test_seconds_are_added_up_by_what_they_are_for(tmp_path: Path) -> None:
    runs = {
        "ppo": {"load": 1, "generate": 2, "score": 4, "update": 8, "save": 16, "other": 32},
        "online": {},
        "online/round_1/pairs": {"load": 1, "work": 2},
        "online/round_1/dpo": {"reference": 3, "update": 4},
    }
    for name, phases in runs.items():
        (tmp_path / name).mkdir(parents=True)
        info = {"seconds_by_phase": phases} if phases else {}
        (tmp_path / name / "run.json").write_text(json.dumps(info))
    assert seconds_spent([tmp_path / "ppo"]) == Spent(40, 6, 17)
    assert seconds_spent([tmp_path / "online"]) == Spent(7, 2, 1)
    assert seconds_spent([tmp_path / "ppo", tmp_path / "online"]).training == 55


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("num", [2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.999])
def test_students_interval_is_scipys(num: int, level: float) -> None:
    values = [math.sin(7 * n) for n in range(num)]
    low, high = stats.t.interval(level, num - 1, loc=sum(values) / num, scale=stats.sem(values))
    found = student_interval(values, level)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)


def test_a_single_value_has_no_interval() -> None:
    assert student_interval([0.5]).estimate == 0.5 and not student_interval([0.5]).has_bounds


def sample(prompt: int, gold: float | None, reward: float, kl: float = 0.0, num_tokens: int = 5) -> Sample:
    return Sample(str(prompt), "?", "f", "heldout", "!", num_tokens, True, gold=gold, reward=reward, kl=kl)


def test_an_outcome_pairs_answers_to_the_same_prompt() -> None:
    sft = [sample(n, gold, 1.0) for n, gold in enumerate([0.0, 0.5, 1.0, 0.25])]
    ours = [sample(n, gold, 3.0, kl=n, num_tokens=n) for n, gold in reversed(list(enumerate([0.5, 0.5, 0.5, 0.75])))]
    found = outcome("dpo", 1, "9 steps", Spent(1, 2, 3), ours, sft)
    assert (found.measure, found.gain.estimate, found.score.estimate) == ("gold", 0.125, 0.5625)
    assert found.win_rate.estimate == (1 + 0.5 + 0 + 1) / 4
    assert found.reward_gain is not None and found.reward_gain.estimate == 2.0
    assert (found.kl, found.length, found.spent.training) == (1.5, 1.5, 3)
    assert baseline(1, sft).score.estimate == 0.4375


def test_without_gold_the_reward_model_measures_and_that_is_said() -> None:
    sft, ours = [sample(n, None, 1.0) for n in range(4)], [sample(n, None, 1.0 + n) for n in range(4)]
    found = outcome("ppo", 0, "1 iterations", Spent(1, 2, 3), ours, sft)
    assert (found.measure, found.gain.estimate) == ("reward", 1.5)
    said = sentences(Ablation(3.0, ("ppo",), (baseline(0, sft),), (found,)))
    assert "it flatters them" in said[-1]


def made(method: str, seed: int, gain: float, low: float, kl: float, seconds: float = 25.0) -> Outcome:
    interval = Interval(gain, low, 2 * gain - low, 400)
    spent = Spent(seconds / 2, seconds / 2, 1.0)
    return Outcome(method, seed, "gold", "9 steps", interval, interval, interval, None, kl, 20.0, spent)


def comparison() -> Ablation:
    """A winner, one that is as good per nat, one that is beaten, one not above, one that diverged once."""
    start = [baseline(seed, [sample(n, 0.5, 0.0) for n in range(4)]) for seed in (0, 1)]
    of = {
        "beaten": [(0.1, 0.05, 3.0), (0.11, 0.06, 3.0)],
        "winner": [(0.3, 0.2, 2.0), (0.32, 0.2, 2.0)],
        "frugal": [(0.2, 0.1, 0.5), (0.21, 0.1, 0.5)],
        "idle": [(0.05, 0.01, 4.0), (-0.01, -0.1, 4.0)],
        "lost": [(0.15, 0.1, 2.5)],
    }
    outcomes = [made(name, seed, *one) for name, found in of.items() for seed, one in enumerate(found)]
    outcomes[-1] = made("lost", 0, 0.15, 0.1, 2.5, seconds=40.0)
    return Ablation(25.0, tuple(of), tuple(start), tuple(outcomes))


def test_what_is_said_of_a_comparison() -> None:
    said = sentences(comparison())
    assert (
        said[0] == "winner gained most: +0.310 gold at a KL of 2.00 nats, in 25.0 s, 12.5 of them sampling and scoring."
    )
    assert said[1] == "Not beaten both in gold and in KL by another: frugal, winner."
    assert said[2] == "Above SFT with every seed and over seeds: winner, frugal, lost, beaten."
    assert said[3] == "idle is not shown to be above SFT: 1 of 2 seeds are."
    assert said[4] == "lost diverged with 1 of 2 seeds."
    assert said[5].startswith("Not of equal time: lost 40.0 s instead of 25 s.")


def test_the_table_has_every_method_over_seeds_and_seed_by_seed() -> None:
    table = table_of(comparison())
    assert [(name, cells[0].text) for name, cells in table.rows] == [
        *(("winner", seed) for seed in ("all", "0", "1")),
        *(("frugal", seed) for seed in ("all", "0", "1")),
        ("lost", "0"),
        *(("beaten", seed) for seed in ("all", "0", "1")),
        *(("idle", seed) for seed in ("all", "0", "1")),
        *(("sft", seed) for seed in ("0", "1")),
    ]
    assert all(len(cells) + 1 == len(table.columns) for _, cells in table.rows)
    low, high = stats.t.interval(0.95, 1, loc=0.31, scale=0.01)
    assert (table.rows[0][1][1].text, table.rows[0][1][1].interval) == ("+0.310", f"[{low:+.3f}, {high:+.3f}]")
    assert [cell.text for _, cells in brief_table(comparison()).rows for cell in cells[1:2]] == [
        *("2/2", "2/2", "1/1", "2/2", "1/2"),
    ]


def test_table_numbers_and_figure_are_written(tmp_path: Path) -> None:
    write_ablation(tmp_path, comparison())
    text = (tmp_path / "ablation.md").read_text(encoding="utf-8")
    assert "- winner gained most" in text and "| winner | all | +0.310 [" in text
    numbers = json.loads((tmp_path / "ablation.json").read_text(encoding="utf-8"))
    assert numbers["outcomes"][2]["kl"] == 2.0 and len(numbers["said"]) == 6
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
