"""The algorithms against numbers that other packages computed (see tests/golden/README.md), in float64 to 1e-6."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.algo.advantages import GROUP_ADVANTAGES, gae, group_relative
from rlhf.algo.best_of_n import best_of_n_kl
from rlhf.algo.kl import KL_ESTIMATORS, KLConfig, KLController
from rlhf.algo.kto_loss import kto_kl, kto_loss
from rlhf.algo.loss_weights import LOSS_WEIGHTS
from rlhf.algo.masked import masked_whiten
from rlhf.algo.ppo_loss import policy_loss, reference_kl_loss, value_loss
from rlhf.algo.preference_loss import (
    PREFERENCE_LOSSES,
    LossSettings,
    PairLogRatios,
    conservative_dpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    odds_ratio_term,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)
from rlhf.algo.reward_loss import bradley_terry_loss, compute_preference_loss
from rlhf.rewards.shaping import soft_overlong_penalty, token_rewards
from rlhf.rollout.trajectory import Trajectory

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN: dict[str, Any] = json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))
EXPECTED = GOLDEN["expected"]
MASK = torch.tensor(GOLDEN["inputs"]["mask"], dtype=torch.bool)
NUM_TOKENS = 8

# Values of what this package does not compute; whoever adds the method takes its line out and tests against the value.
WAITING = {
    "ppo_policy_loss_dual_clip1.05": "there is no dual clip",
    "truncated_importance_weights_cap1.2": "there is no outside engine to correct for",
    "nf4_codebook": "bitsandbytes quantises",
    "alpaca_eval_2_alpaca-7b": "there is no length-controlled win rate",
    "binomial_test_64_of_100": "win rates come with intervals, not with p-values",
    "masked_whiten_note": "a note",
}


def given(name: str) -> Tensor:
    return torch.tensor(GOLDEN["inputs"][name], dtype=torch.float64)


def assert_golden(actual: Tensor | float, expected: Any, mask: Tensor | None = None) -> None:
    """Equal to 1e-6 where the mask is True; the published digits are never fewer than six."""
    wanted = torch.tensor(
        [[0.0 if value is None else value for value in row] for row in expected] if mask is not None else expected,
        dtype=torch.float64,
    )
    found = torch.as_tensor(actual, dtype=torch.float64)
    if mask is not None:
        found, wanted = found[mask], wanted[mask]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_the_vectors_are_those_that_were_received() -> None:
    digest = hashlib.sha256((FOLDER / "golden.json").read_bytes()).hexdigest()
    assert digest == "e42f3bbbe040a0b9e770e63e7e695e5aeff184c8264629d394cc085cf49b4763"
    assert digest in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_every_value_is_tested_or_waits_for_its_method() -> None:
    tests = [Path(__file__), Path(__file__).with_name("test_winrate.py")]
    text = re.sub(r"(?s)^WAITING = .*?^}", "", "".join(test.read_text(encoding="utf-8") for test in tests), flags=re.M)
    tested = {name for name in EXPECTED if f'"{name}"' in text}
    assert tested | WAITING.keys() == EXPECTED.keys()
    assert not tested & WAITING.keys()


def gae_of(gamma: float, lam: float, mask: Tensor) -> Any:
    return gae(given("rewards"), given("values"), mask, gamma=gamma, lam=lam)


def test_gae_over_right_padded_responses() -> None:
    result, expected = gae_of(1.0, 0.95, MASK), EXPECTED["gae_gamma1_lam0.95"]
    assert_golden(result.advantages_BR, expected["advantages"], MASK)
    assert_golden(result.returns_BR, expected["returns"], MASK)
    assert result.advantages_BR.dtype == torch.float64
    assert result.advantages_BR[1, 3:].tolist() == [0.0, 0.0]


def test_gae_with_discount_and_without_padding() -> None:
    everything = torch.ones_like(MASK)
    expected = EXPECTED["gae_gamma0.99_lam0.9_no_mask"]["advantages"]
    assert_golden(gae_of(0.99, 0.9, everything).advantages_BR, expected, everything)


def test_whitened_advantages() -> None:
    advantages = gae_of(1.0, 0.95, MASK).advantages_BR
    assert_golden(masked_whiten(advantages, MASK), EXPECTED["whitened_advantages_bessel"], MASK)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("masked_whiten_bessel", {}),
        ("masked_whiten_bessel_keep_mean", {"subtract_mean": False}),
        ("masked_whiten_biased_variance", {"unbiased": False}),
    ],
)
def test_whitening_variants(name: str, settings: dict[str, bool]) -> None:
    whitened = masked_whiten(given("rewards"), MASK, **settings)
    assert_golden(whitened, EXPECTED[name], MASK)
    assert whitened[~MASK].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_kl_estimators(name: str) -> None:
    log_ratio = given("logprobs") - given("reference_logprobs")
    everything = torch.ones_like(MASK)
    assert_golden(KL_ESTIMATORS[name](log_ratio), EXPECTED["kl"][name], everything)


def test_adaptive_kl_controller_over_six_batches() -> None:
    golden = EXPECTED["adaptive_kl"]
    controller = KLController.from_config(
        KLConfig(coefficient=golden["start"], controller="adaptive", target=golden["target"], horizon=golden["horizon"])
    )
    coefficients = []
    for observed in golden["observed"]:
        controller = controller.updated(observed, golden["batch"])
        coefficients.append(controller.coefficient)
    assert coefficients == pytest.approx(golden["coefficients"], abs=1e-9)


def test_ppo_policy_loss() -> None:
    log_ratio, golden = given("logprobs") - given("old_logprobs"), EXPECTED["ppo_policy_loss_clip0.2"]
    result = policy_loss(log_ratio, given("advantages"), MASK, NUM_TOKENS)
    assert_golden(result.loss, golden["loss"])
    assert_golden(-log_ratio[MASK].mean(), golden["mean_old_minus_new"])
    # Ratios outside 0.8 ... 1.2 are e^0.5 in either row. verl counts only the first, where the advantage is positive.
    assert float(result.clip_fraction) == 2 / 8
    assert golden["clip_fraction"] == 1 / 8
    binding = (log_ratio.exp() > 1.2) & (given("advantages") > 0) & MASK
    assert int(binding.sum()) / NUM_TOKENS == golden["clip_fraction"]


def test_ppo_policy_loss_with_a_higher_upper_bound() -> None:
    log_ratio = given("logprobs") - given("old_logprobs")
    result = policy_loss(log_ratio, given("advantages"), MASK, NUM_TOKENS, clip_low=0.2, clip_high=0.28)
    assert_golden(result.loss, EXPECTED["ppo_policy_loss_clip0.2_0.28"]["loss"])


def weights(name: str, max_length: int) -> Tensor:
    return LOSS_WEIGHTS[name](MASK.sum(dim=1), NUM_TOKENS, 2, max_length).unsqueeze(1)


@pytest.mark.parametrize(
    ("golden", "name", "max_length"),
    [
        ("ppo_policy_loss_sequence_mean_of_token_means", "sequence_mean", 5),
        ("ppo_policy_loss_sequence_mean_of_token_sums", "constant_length", 1),
    ],
)
def test_ppo_policy_loss_as_another_mean(golden: str, name: str, max_length: int) -> None:
    log_ratio, one_mean = given("logprobs") - given("old_logprobs"), weights(name, max_length)
    result = policy_loss(log_ratio, given("advantages"), MASK, NUM_TOKENS, weights_B1=one_mean)
    assert_golden(result.loss, EXPECTED[golden])


@pytest.mark.parametrize(
    ("name", "loss_mean", "beta"),
    [
        ("grpo", "sequence_mean", 0.0),
        ("grpo_beta0.04", "sequence_mean", 0.04),
        ("dapo", "token_mean", 0.0),
        ("dr_grpo", "constant_length", 0.0),
    ],
)
def test_losses_of_groups(name: str, loss_mean: str, beta: float) -> None:
    # "sequence_level" is there as well: ratios of whole sequences (GSPO) are not built here.
    log_ratio, to_reference = given("logprobs") - given("old_logprobs"), given("logprobs") - given("reference_logprobs")
    advantages, one_mean = given("sequence_advantages").unsqueeze(1).expand(2, 5), weights(loss_mean, 5)
    policy = policy_loss(log_ratio, advantages, MASK, NUM_TOKENS, clip_low=0.2, clip_high=0.28, weights_B1=one_mean)
    kl = reference_kl_loss(to_reference, MASK, NUM_TOKENS, weights_B1=one_mean)
    assert_golden(policy.loss + beta * kl, EXPECTED["grpo_losses_clip0.2_0.28_maxlen5"][name])


def test_advantages_within_groups() -> None:
    scores_NG = given("group_rewards").view(2, 4)
    by_name = {
        "group_relative": EXPECTED["group_relative_std"]["values"],
        "group_centred": EXPECTED["group_relative_no_std"],
        "leave_one_out": EXPECTED["rloo"],
    }
    for name, expected in by_name.items():
        assert_golden(GROUP_ADVANTAGES[name](scores_NG).flatten(), expected)
    # With TRL's epsilon the scale is another by one in ten thousand.
    theirs = group_relative(scores_NG, epsilon=1e-4)
    assert float(theirs[0, 3]) == pytest.approx(1.625 / (1.625 / 1.37542279 + 1e-4), abs=1e-5)


def test_soft_penalty_of_overlong_answers() -> None:
    golden = EXPECTED["dapo_overlong_penalty_max20_cache4"]
    found = soft_overlong_penalty(torch.tensor([int(length) for length in golden]), max_length=20, buffer=4)
    assert_golden(found, list(golden.values()))


def test_value_loss() -> None:
    golden = EXPECTED["value_loss_clip0.2"]
    result = value_loss(given("value_predictions"), given("values"), given("returns"), MASK, NUM_TOKENS, 0.2)
    assert_golden(result.loss, golden["loss"])
    assert_golden(result.clip_fraction, golden["clip_fraction"])


def log_ratios() -> PairLogRatios:
    return PairLogRatios(
        given("policy_chosen") - given("reference_chosen"), given("policy_rejected") - given("reference_rejected")
    )


def mean_logprobs() -> PairLogRatios:
    return PairLogRatios(given("policy_chosen") / given("len_chosen"), given("policy_rejected") / given("len_rejected"))


def test_dpo_loss_and_implicit_rewards() -> None:
    ratios = log_ratios()
    assert_golden(dpo_loss(ratios, 0.1), EXPECTED["preference_beta0.1"]["dpo"])
    assert_golden(0.1 * ratios.chosen_B, EXPECTED["dpo_implicit_rewards_beta0.1"]["chosen"])
    assert_golden(0.1 * ratios.rejected_B, EXPECTED["dpo_implicit_rewards_beta0.1"]["rejected"])


def test_the_relatives_of_dpo() -> None:
    ratios, golden = log_ratios(), EXPECTED["preference_beta0.1"]
    assert golden.keys() == {"dpo", "cdpo_0_1", "robust_0_1", "hinge", "ipo_summed"}
    assert_golden(conservative_dpo_loss(ratios, 0.1, 0.1), golden["cdpo_0_1"])
    assert_golden(robust_dpo_loss(ratios, 0.1, 0.1), golden["robust_0_1"])
    assert_golden(hinge_loss(ratios, 0.1), golden["hinge"])
    assert_golden(ipo_loss(ratios, 0.1), golden["ipo_summed"])


def test_losses_without_a_reference() -> None:
    logprobs, golden = mean_logprobs(), EXPECTED["orpo_term_beta0.1"]["values"]
    assert_golden(simpo_loss(logprobs, 2.0, 1.0), EXPECTED["simpo_beta2_gamma1"])
    assert_golden(0.1 * odds_ratio_term(logprobs), golden)
    # The published term is what the loss takes from the negative log-likelihood of the chosen answer.
    assert_golden(-logprobs.chosen_B - orpo_loss(logprobs, 0.1), golden)


def test_each_name_stands_for_its_loss() -> None:
    ratios, summed, free = log_ratios(), EXPECTED["preference_beta0.1"], mean_logprobs()
    lengths = PairLogRatios(given("len_chosen"), given("len_rejected"))
    per_token = [(ratios.chosen_B / lengths.chosen_B), (ratios.rejected_B / lengths.rejected_B)]
    expected = {
        "sigmoid": (ratios, summed["dpo"]),
        "cdpo": (ratios, summed["cdpo_0_1"]),
        "robust": (ratios, summed["robust_0_1"]),
        "hinge": (ratios, summed["hinge"]),
        "ipo_summed": (ratios, summed["ipo_summed"]),
        "ipo": (PairLogRatios(*per_token), [(c - r - 5) ** 2 for c, r in zip(*per_token, strict=True)]),
        "simpo": (free, EXPECTED["simpo_beta2_gamma1"]),
        "orpo": (free, (-free.chosen_B - torch.tensor(EXPECTED["orpo_term_beta0.1"]["values"])).tolist()),
    }
    assert expected.keys() == PREFERENCE_LOSSES.keys()
    for name, (given_pairs, values) in expected.items():
        loss = PREFERENCE_LOSSES[name]
        settings = LossSettings(2.0 if name == "simpo" else 0.1, label_smoothing=0.1, simpo_gamma=1.0)
        assert settings.beta == loss.beta
        assert loss.per_token == (given_pairs is not ratios)
        assert loss.has_reference == (given_pairs is not free)
        assert_golden(loss.of(given_pairs, settings), values)


def test_kto_loss_and_its_reference_point() -> None:
    golden, ratios = EXPECTED["kto_beta0.1"], log_ratios()
    kl = kto_kl(given("kto_kl_policy") - given("kto_kl_reference"))
    assert_golden(kl, golden["kl"])
    answers = torch.cat([ratios.chosen_B[:2], ratios.rejected_B[2:]])
    desirable = torch.tensor([True, True, False, False])
    assert_golden(kto_loss(answers, desirable, kl, 0.1), golden["losses"])


def test_bradley_terry_is_the_log_loss_of_a_classifier() -> None:
    # scikit-learn's log-loss of p for label 1 is the loss of a pair with difference logit p, for label 0 of -logit p.
    golden = EXPECTED["calibration_5_uniform_bins"]
    difference = given("calibration_probabilities").logit() * (2 * given("calibration_labels") - 1)
    rejected = torch.linspace(-1, 1, len(difference), dtype=torch.float64)
    assert_golden(bradley_terry_loss(rejected + difference, rejected).mean(), golden["log_loss"])
    assert_golden(
        bradley_terry_loss(rejected + difference + 0.5, rejected, torch.tensor(0.5)).mean(), golden["log_loss"]
    )
    loss, metrics = compute_preference_loss(rejected + difference, rejected)
    assert_golden(loss, golden["log_loss"])
    assert metrics["loss"] == pytest.approx(golden["log_loss"], abs=1e-6)
    # DPO is the same loss on the implicit rewards.
    chosen, refused = (torch.tensor(EXPECTED["dpo_implicit_rewards_beta0.1"][side]) for side in ("chosen", "rejected"))
    assert_golden(bradley_terry_loss(chosen.double(), refused.double()), EXPECTED["preference_beta0.1"]["dpo"])


def test_token_rewards_with_kl_and_score_on_the_last_token() -> None:
    prompts = torch.zeros(2, 1, dtype=torch.long)
    trajectory = Trajectory(
        prompt_ids_BP=prompts,
        prompt_mask_BP=prompts == 0,
        response_ids_BR=torch.zeros(2, 5, dtype=torch.long),
        response_mask_BR=MASK,
        logprobs_BR=given("logprobs"),
        entropy_BR=torch.zeros(2, 5),
        values_BR=None,
        finished_B=torch.tensor([True, True]),
        temperature=1.0,
    )
    rewards = token_rewards(trajectory, given("scores"), given("reference_logprobs"), 0.05, "k1")
    assert_golden(rewards, EXPECTED["rewards_with_kl_beta0.05_score_on_last_response_token"], MASK)
    assert rewards[~MASK].tolist() == [0.0, 0.0]


def test_best_of_n_kl() -> None:
    for n, expected in EXPECTED["best_of_n_kl"].items():
        if n != "note":
            assert_golden(best_of_n_kl(int(n)), expected)
