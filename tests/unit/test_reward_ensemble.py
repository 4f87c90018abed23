"""Ensembles of reward models: what a score is made of, what training gives each member, and what survives a save."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_backbones import add_trained_adapter, random_prompts, tiny_backbone, tiny_model, word_tokenizer
from torch import Tensor

from rlhf.data.chat import TokenExample
from rlhf.data.collate import pad_right
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import RunConfig
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.models.ensemble import EnsembleConfig, EnsembleRuleName
from rlhf.models.lora import LoRAConfig
from rlhf.models.reward_model import RewardEnsemble, RewardModel, RewardModelConfig, ScoreScale, load_reward_model
from rlhf.models.scoring import TrainMode
from rlhf.recipes.export_request import ExportConfig, find_source
from rlhf.recipes.lineage import fingerprints
from rlhf.recipes.reward import PairScores, ensemble_validation
from rlhf.recipes.reward_ensemble import member_rows, start_ensemble
from rlhf.recipes.stages import build_reward
from rlhf.rewards.learned import LearnedReward
from rlhf.rewards.protocol import CombinedReward, RewardTerm, RewardTermConfig, Scores, joined_scores

ROWS = random_prompts(7, longest=9, seed=2)
SMALL = ModelConfig(lora=LoRAConfig(r=4))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("base"), word_tokenizer()
    tiny_model("llama", len(tokenizer), spread=0.3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def ensemble_of(backbone: Backbone, rule: EnsembleRuleName = "mean", penalty: float = 0.5) -> RewardEnsemble:
    """Three members with weights and scales of their own."""
    members = []
    for k, scale in enumerate([ScoreScale(0.25, 2.0), ScoreScale(-1.0, 0.5), ScoreScale(0.0, 1.0)]):
        add_trained_adapter(backbone, f"reward_{k}", seed=k)
        member = RewardModel(backbone, f"reward_{k}")
        member.scale = scale
        members.append(member)
    return RewardEnsemble(members, rule, penalty).requires_grad_(False)


@pytest.fixture(scope="module")
def ensemble() -> RewardEnsemble:
    return ensemble_of(tiny_backbone())


def padded(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    batch = pad_right([TokenExample(row, [False] * len(row)) for row in rows], 0)
    assert batch.attention_mask_BT is not None
    return batch.input_ids_BT, batch.attention_mask_BT


def scores_alone(ensemble: RewardEnsemble) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Standardised scores (K, B) by asking each member for each row."""
    return np.array(
        [
            [(float(member(torch.tensor([row]))) - member.scale.mean) / member.scale.std for row in ROWS]
            for member in ensemble.members
        ]
    )


def test_members_are_brought_to_one_scale_before_they_are_combined(ensemble: RewardEnsemble) -> None:
    array, mean_std = scores_alone(ensemble), (2.0 + 0.5 + 1.0) / 3
    expected = {
        "mean": array.mean(axis=0),
        "worst": array.min(axis=0),
        "penalised": array.mean(axis=0) - 0.7 * array.var(axis=0),
    }
    for rule, values in expected.items():
        one = RewardEnsemble(ensemble.members, rule, 0.7)  # type: ignore[arg-type]
        raw = one(*padded(ROWS))
        np.testing.assert_allclose(one.standardised(raw), values, atol=1e-4)
        np.testing.assert_allclose(raw, values * mean_std, atol=1e-4)


def test_an_ensemble_is_a_reward_and_says_what_its_members_think(ensemble: RewardEnsemble) -> None:
    reward, array = LearnedReward(ensemble, word_tokenizer(), max_batch_tokens=20), scores_alone(ensemble)
    prompts, answers = [row[:1] for row in ROWS], [row[1:] for row in ROWS]
    columns = {"prompt_ids": prompts, "completion_ids": answers}
    values = reward(["p"] * 7, ["a"] * 7, **columns)
    np.testing.assert_allclose(values, array.mean(axis=0), atol=1e-4)
    found = CombinedReward([RewardTerm("model", reward, 2.0), RewardTerm("model", reward)])(
        ["p"] * 7, ["a"] * 7, columns
    )
    np.testing.assert_allclose(found.total, 3 * array.mean(axis=0), atol=1e-4)
    assert found.by_term["model"] == found.by_term["model_2"] == values
    np.testing.assert_allclose(found.details["model/disagreement"], array.std(axis=0), atol=1e-4)
    np.testing.assert_allclose(found.details["model_2/member_1"], array[1], atol=1e-4)
    assert len(found.details) == 2 * 4


def test_scores_are_taken_apart_and_put_together_with_their_details() -> None:
    scores = Scores([1.0, 2.0, 3.0], {"a": [4.0, 5.0, 6.0]}, {"a/disagreement": [7.0, 8.0, 9.0]})
    assert scores.select([2, 0]) == Scores([3.0, 1.0], {"a": [6.0, 4.0]}, {"a/disagreement": [9.0, 7.0]})
    assert joined_scores([scores.select([0]), scores.select([1, 2])]) == scores


@pytest.mark.parametrize("train", ["lora", "frozen"])
def test_V9_an_ensemble_survives_saving_alone_and_on_a_shared_base(
    base: Path, tmp_path: Path, train: TrainMode
) -> None:
    backbone = Backbone.load(ModelConfig(name_or_path=str(base)))
    settings = RewardModelConfig(train=train, ensemble=EnsembleConfig(members=3, rule="penalised", penalty=0.3))
    adapter = "reward_0" if train == "lora" else None
    trained = start_ensemble(backbone, adapter, settings, SMALL, RunConfig())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.trainable_parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for k, member in enumerate(trained.members):
            member.scale = ScoreScale(float(k), 1.0 + k)
        trained.save(tmp_path)
        expected, (ids, mask) = trained(*padded(ROWS)), padded(ROWS)
        shared = Backbone.load(ModelConfig(name_or_path=str(base)))
        for again in (load_reward_model(str(tmp_path)), load_reward_model(str(tmp_path), shared, adapter="judge")):
            assert isinstance(again, RewardEnsemble)
            assert torch.equal(again(ids, mask), expected)
            assert (again.rule, again.penalty, again.scale.std) == ("penalised", 0.3, 2.0)
            assert not any(parameter.requires_grad for parameter in again.parameters())
            assert len({id(member.backbone) for member in again.members}) == 1
        assert again.backbone is shared
        assert shared.adapter_names == ([f"judge_{k}" for k in range(3)] if train == "lora" else [])
        one = load_reward_model(str(tmp_path / "member_1"))
        assert isinstance(one, RewardModel) and torch.equal(one(ids, mask), trained.members[1](ids, mask))


def test_members_start_apart_and_the_first_as_a_single_model_does() -> None:
    backbone = tiny_backbone()
    add_trained_adapter(backbone, "sft")
    torch.manual_seed(3)  # as `start_backbone` does: seed, copy, head
    backbone.copy_adapter("sft", "reward_0")
    settings = RewardModelConfig(ensemble=EnsembleConfig(members=3))
    ensemble = start_ensemble(backbone, "reward_0", settings, SMALL, RunConfig(seed=3))
    torch.manual_seed(3)
    backbone.copy_adapter("sft", "single")
    single = RewardModel(backbone, "single")
    heads = [member.head.weight for member in ensemble.members]
    assert torch.equal(heads[0], single.head.weight)
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])
    ids, mask = padded(ROWS)
    states = [backbone.hidden(ids, mask, adapter=f"reward_{k}") for k in range(3)]
    assert torch.equal(states[0], states[1]) and torch.equal(states[1], states[2])  # all from the SFT adapter


def test_every_parameter_belongs_to_one_member_and_no_other_adapter_trains() -> None:
    backbone = tiny_backbone()
    add_trained_adapter(backbone, "sft")
    settings = RewardModelConfig(ensemble=EnsembleConfig(members=2))
    torch.manual_seed(0)
    ensemble = start_ensemble(backbone, "reward_0", settings, SMALL, RunConfig())
    parts = ensemble.parameters_by_member()
    training = {id(p) for p in ensemble.parameters() if p.requires_grad}
    assert {id(p) for part in parts for p in part.values()} == training
    assert len(training) == sum(map(len, parts)) == 2 * len(parts[0])
    assert all(("reward_1" in name) or ("head" in name) for name in parts[1])
    assert all(name.startswith("member_1.") for name in parts[1])
    # Fresh adapters differ as well: A is drawn, B starts at zero.
    first, second = (next(p for name, p in part.items() if "lora_A" in name) for part in parts)
    assert not torch.equal(first, second)


def test_every_member_sees_every_row_in_an_order_of_its_own() -> None:
    rows = list(range(20))
    orders = [member_rows(rows, 5, k) for k in range(3)]
    assert orders[0] == rows and orders[1] != rows and orders[1] != orders[2]
    assert all(sorted(order) == rows for order in orders)
    assert member_rows(rows, 5, 2) == orders[2] and member_rows(rows, 6, 2) != orders[2]


def test_validation_is_by_the_combined_score_beside_each_members() -> None:
    ensemble = ensemble_of(tiny_backbone(), "worst")
    one = PairScores(torch.tensor([1.0, -1.0]), torch.tensor([0.0, 0.0]), 1.0)  # right, wrong
    two = PairScores(torch.tensor([10.0, 30.0]), torch.tensor([0.0, 0.0]), 1.0)  # right, right
    found = ensemble_validation(ensemble, [one, two]).metrics
    scaled = [np.array([[1.0, -1.0], [0, 0]]), np.array([[10.0, 30.0], [0, 0]])]
    scaled = [(s - s.mean()) / s.std(ddof=1) for s in scaled]
    worst = np.minimum(*scaled)
    assert found["accuracy"] == np.mean(worst[0] > worst[1])
    assert (found["accuracy_member_0"], found["accuracy_member_1"]) == (0.5, 1.0)
    assert found["disagreement"] == pytest.approx(np.std(scaled, axis=0).mean())
    losses = [np.log1p(np.exp(-np.array(margins))).mean() for margins in ([1.0, -1.0], [10.0, 30.0])]
    assert found["loss"] == pytest.approx(np.mean(losses))


# ---------------------------------------------------------------- as a reward of PPO and GRPO


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An ensemble of two and a single model of the same base."""
    folder = tmp_path_factory.mktemp("saved")
    backbone = Backbone.load(ModelConfig(name_or_path=str(base)))
    settings = RewardModelConfig(ensemble=EnsembleConfig(members=2))
    start_ensemble(backbone, "reward_0", settings, SMALL, RunConfig()).save(folder / "ensemble")
    RewardModel(backbone, "single", model_config=SMALL).save(folder / "single")
    return {"ensemble": str(folder / "ensemble"), "single": str(folder / "single")}


def reward_of(base: Path, *terms: dict[str, Any], reward_model: str | None = None) -> CombinedReward:
    backbone = Backbone.load(ModelConfig(name_or_path=str(base)))
    return build_reward([RewardTermConfig(**term) for term in terms], reward_model, Path("runs"), backbone)


def test_terms_name_models_and_say_how_an_ensemble_is_combined(base: Path, saved: dict[str, str]) -> None:
    reward = reward_of(
        base,
        {"name": "model"},
        {"name": "careful", "model": saved["ensemble"], "rule": "penalised", "penalty": 2.0},
        {"name": "single", "model": saved["single"]},
        reward_model=saved["ensemble"],
    )
    assert reward.names == ["model", "careful", "single"]
    models = [term.function.model for term in reward.terms]  # type: ignore[attr-defined]
    assert [(model.rule, model.penalty) for model in models[:2]] == [("mean", 0.5), ("penalised", 2.0)]
    assert len({id(model.backbone) for model in models}) == 1
    scores = reward(["the cat"], ["is red"], {})
    by_hand = np.mean([scores.details[f"careful/member_{k}"][0] for k in range(2)])
    by_hand -= 2.0 * scores.details["careful/disagreement"][0] ** 2
    assert scores.by_term["careful"] == pytest.approx([by_hand], abs=1e-5)


@pytest.mark.parametrize(
    ("term", "words"),
    [
        ({"name": "model", "rule": "worst"}, "is a single reward model"),
        ({"name": "keyword_sentiment", "model": "{single}"}, "'keyword_sentiment' is a rule"),
        ({"name": "a", "model": "{ensemble}", "penalty": 1.0}, "the rule of the ensemble .* is mean"),
        ({"name": "helpful"}, "no reward 'helpful'"),
    ],
)
def test_terms_that_do_not_fit_are_refused(base: Path, saved: dict[str, str], term: dict[str, Any], words: str) -> None:
    filled = {key: value.format(**saved) if isinstance(value, str) else value for key, value in term.items()}
    with pytest.raises(UserError, match=words):
        reward_of(base, filled, reward_model=saved["single"])


def test_a_fingerprint_covers_every_member(saved: dict[str, str], tmp_path: Path) -> None:
    def fingerprint() -> str:
        return fingerprints({"reward_model_careful": saved["ensemble"]}, tmp_path)["reward_model_careful"]

    before, head = fingerprint(), Path(saved["ensemble"]) / "member_1" / "reward_head.safetensors"
    content = head.read_bytes()
    head.write_bytes(content + b" ")
    assert fingerprint() != before
    head.write_bytes(content)
    assert fingerprint() == before


def test_an_ensemble_has_no_form_to_export_to_but_a_member_has(saved: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"an ensemble of 2 reward models, .* name a member, such as .*member_0"):
        find_source(ExportConfig(source=saved["ensemble"]))
    assert find_source(ExportConfig(source=f"{saved['ensemble']}/member_1")).kind == "reward_model"


def test_an_ensemble_with_a_member_missing_is_refused(base: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(ModelConfig(name_or_path=str(base)))
    settings = RewardModelConfig(train="frozen", ensemble=EnsembleConfig(members=2))
    start_ensemble(backbone, None, settings, SMALL, RunConfig()).save(tmp_path)
    assert json.loads((tmp_path / "reward_config.json").read_text())["members"] == 2
    with pytest.raises(UserError, match="holds a reward ensemble model, but a reward model is needed"):
        RewardModel.load(tmp_path)
    (tmp_path / "member_1" / "reward_config.json").unlink()
    with pytest.raises(UserError, match="an ensemble of 2 reward models, but member_1 is missing"):
        load_reward_model(str(tmp_path))
    with pytest.raises(UserError, match="holds no ensemble"):
        RewardEnsemble.load(base)
