"""Does a test fail when a formula is wrong? `python tests/mutants.py [kl.py ...]` alters `rlhf/algo` place by place.

Each mutant replaces one piece of text in one file: a sign, a mask, a clip bound, a normaliser. The altered file lies in
a temporary folder and is imported instead of the real one; the working tree is never touched. The tests of the file run
on it, until the first failure, in a process forked after the slow imports. Exit code 1: a mutant SURVIVED (write the
test that is missing), a text does not occur exactly once any more (OUTDATED: mend the table), or the tests fail on the
code as it is (BROKEN).
"""

from __future__ import annotations

import importlib.util
import io
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.machinery import ModuleSpec
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ALGO = TESTS.parent / "rlhf" / "algo"
FORMULAS = ("test_algo_golden.py", "test_algo_properties.py", "test_algo_gradients.py", "test_group_advantages.py")
PREFERENCES = ("test_algo_golden.py", "test_preference_losses.py", "test_algo_gradients.py")
TESTS_OF = {
    "trainer.py": ("test_trainer.py", "test_algo_trainer.py"),
    "best_of_n.py": ("test_best_of_n.py", "test_algo_golden.py"),
    "preference_loss.py": PREFERENCES,
    "kto_loss.py": PREFERENCES,
    "process_loss.py": ("test_process_loss.py", "test_algo_gradients.py"),
    "reward_combination.py": ("test_reward_combination.py",),
    "overoptimisation.py": ("test_overoptimisation_law.py",),
}

# file: (old text, which occurs exactly once; new text; what is wrong then)
# fmt: off
MUTANTS: dict[str, list[tuple[str, str, str]]] = {
    "masked.py": [
        ("values[mask].sum()", "values.sum()", "masked_sum: mask ignored"),
        ("values[mask].sum()", "values[~mask].sum()", "masked_sum: mask turned round"),
        ("values[mask].sum()", "-values[mask].sum()", "masked_sum: sign"),
        ("counted = values[mask]", "counted = values.flatten()", "masked mean, variance: mask ignored"),
        ("_counted(values, mask).mean()", "_counted(values, mask).sum()", "masked_mean: normaliser"),
        ("_counted(values, mask).mean()", "masked_sum(values, mask) / values.numel()",
         "masked_mean: divided by padding too"),
        ("1 if unbiased else 0", "0 if unbiased else 1", "masked_var: corrections exchanged"),
        ("1 if unbiased else 0", "1", "masked_var: always corrected"),
        ("counted.numel() == 1", "counted.numel() == 0", "masked_var: 0 / 0 of a single value"),
        ("counted.numel() == 0", "counted.numel() < 0", "masked mean of nothing"),
        ("(values - mean) * torch.rsqrt", "(values + mean) * torch.rsqrt", "masked_whiten: sign of mean"),
        ("torch.rsqrt(masked_var", "torch.reciprocal(masked_var", "masked_whiten: by the variance"),
        ("scaled if subtract_mean else scaled + mean", "scaled + mean if subtract_mean else scaled",
         "masked_whiten: shift turned round"),
        ("unbiased=unbiased) + epsilon", "unbiased=True) + epsilon", "masked_whiten: one variance"),
        ("torch.where(mask, scaled if", "torch.where(mask | True, scaled if", "masked_whiten: padding kept"),
    ],
    "advantages.py": [
        ("gamma * next_value - values_BR[:, t]", "gamma * next_value + values_BR[:, t]", "gae: sign of the value"),
        ("rewards_BR[:, t] + gamma", "-rewards_BR[:, t] + gamma", "gae: sign of the reward"),
        ("rewards_BR[:, t] + gamma * next_value", "rewards_BR[:, t] + next_value", "gae: next value not discounted"),
        ("gamma * lam * next_advantage", "lam * next_advantage", "gae: trace not discounted"),
        ("gamma * lam * next_advantage", "gamma * next_advantage", "gae: lambda ignored"),
        ("delta + gamma * lam", "delta - gamma * lam", "gae: sign of the trace"),
        ("torch.where(counts, values_BR[:, t], next_value)", "values_BR[:, t]", "gae: padding enters the next value"),
        ("torch.where(counts, advantage, next_advantage)", "advantage", "gae: padding enters the trace"),
        ("columns.append(torch.where(counts, advantage, torch.zeros_like(advantage)))", "columns.append(advantage)",
         "gae: padded columns kept"),
        ("columns[::-1]", "columns", "gae: order of columns"),
        ("advantages_BR + values_BR", "advantages_BR - values_BR", "returns: sign of the value"),
        ("torch.where(mask_BR, advantages_BR + values_BR, torch.zeros_like(values_BR))", "advantages_BR + values_BR",
         "returns: mask ignored"),
        ("if bootstrap_values_B is None else bootstrap_values_B",
         "if bootstrap_values_B is None else torch.zeros_like(bootstrap_values_B)", "gae: bootstrap ignored"),
        ("with torch.no_grad():", "if True:", "gae: gradient flows into the targets"),
        ("scores_NG.amax(dim=1) - scores_NG.amin(dim=1) >", "scores_NG.amax() - scores_NG.amin() >",
         "has_spread: of all groups together"),
        ("scores_NG.amin(dim=1) > MIN_SPREAD", "scores_NG.amin(dim=1) > 0", "has_spread: rounding counts"),
        ("MIN_SPREAD = 1e-5", "MIN_SPREAD = 1e-4", "has_spread: bound"),
        ("scores_NG.shape[1] < 2", "scores_NG.shape[1] < 1", "has_spread: a group of one is let pass"),
        ("scores_NG.std(dim=1, correction=1, keepdim=True)", "scores_NG.std(dim=1, correction=0, keepdim=True)",
         "group_relative: biased deviation"),
        ("scores_NG.std(dim=1, correction=1, keepdim=True)", "scores_NG.std(correction=1)",
         "group_relative: deviation of the batch"),
        ("scores_NG.std(dim=1, correction=1, keepdim=True)", "scores_NG.var(dim=1, correction=1, keepdim=True)",
         "group_relative: by the variance"),
        ("scores_NG.std(dim=1, correction=1, keepdim=True)", "scores_NG.square().mean(dim=1, keepdim=True).sqrt()",
         "group_relative: deviation about zero"),
        ("keepdim=True) + epsilon)", "keepdim=True) + 0 * epsilon)", "group_relative: no epsilon"),
        ("keepdim=True) - scores_NG) / (", "keepdim=True) - 0) / (", "leave_one_out: its own score among the others"),
        ("(scores_NG.shape[1] - 1)", "scores_NG.shape[1]", "leave_one_out: number of the others"),
        ("scores_NG - others_NG", "others_NG - scores_NG", "leave_one_out: sign"),
        ("torch.where(differs_N1, scores_NG - others_NG, torch.zeros_like(scores_NG))", "scores_NG - others_NG",
         "leave_one_out: rounding of equal scores"),
        ("scores_NG - scores_NG.mean(dim=1, keepdim=True)", "scores_NG - scores_NG.mean()",
         "group_centred: mean of the batch"),
        ("scores_NG - scores_NG.mean(dim=1, keepdim=True)", "scores_NG.mean(dim=1, keepdim=True) - scores_NG",
         "group_centred: sign"),
        ("torch.where(differs_N1, centred_NG, torch.zeros_like(scores_NG))", "centred_NG",
         "group_centred: rounding of equal scores"),
        ("torch.where(ends_NM, steps_NM, 0.0)", "steps_NM", "process_advantages: mean over tokens that end nothing"),
        ("/ counts_N1.clamp(min=1)\n", "/ steps_NM.shape[1]\n", "process_advantages: mean over all tokens"),
        ("torch.where(ends_NM, steps_NM - mean_N1, torch.zeros_like(steps_NM))", "steps_NM - mean_N1",
         "process_advantages: tokens that end nothing are worth less than the mean"),
        ("steps_NM - mean_N1", "steps_NM + mean_N1", "process_advantages: sign of the mean"),
        ("(counts_N1 - 1).clamp(min=1)", "counts_N1.clamp(min=1)", "process_advantages: biased deviation"),
        ("clamp(min=1)).sqrt()", "clamp(min=1))", "process_advantages: by the variance"),
        ("spread_N1 > MIN_SPREAD", "spread_N1 > 0", "process_advantages: rounding counts"),
        ("(deviation_N1 + epsilon)", "(deviation_N1 + 9 * epsilon)", "process_advantages: epsilon"),
        (".flip(1).cumsum(dim=1).flip(1)", ".cumsum(dim=1)", "process_advantages: steps before it"),
        ('"leave_one_out": leave_one_out,\n    "group_centred": group_centred',
         '"leave_one_out": group_centred,\n    "group_centred": leave_one_out', "advantages exchanged by name"),
    ],
    "loss_weights.py": [
        ("torch.ones_like(lengths_B, dtype=torch.float32)", "lengths_B / lengths_B.float().mean()",
         "token_mean: by length"),
        ("num_tokens / (num_sequences * lengths_B).float()", "num_tokens / lengths_B.float()",
         "sequence_mean: number of answers"),
        ("num_tokens / (num_sequences * lengths_B).float()", "1 / (num_sequences * lengths_B).float()",
         "sequence_mean: not relative to the tokens"),
        ("num_tokens / (num_sequences * lengths_B).float()",
         "lengths_B.sum() / (len(lengths_B) * lengths_B).float()", "sequence_mean: mean of the micro-batch"),
        ("* num_tokens / (num_sequences * max_length)", "* num_tokens / (num_sequences * lengths_B.max())",
         "constant_length: longest answer of the micro-batch"),
        ("* num_tokens / (num_sequences * max_length)", "* num_tokens / max_length",
         "constant_length: number of answers"),
        ("* num_tokens / (num_sequences * max_length)", "* lengths_B.sum() / (num_sequences * max_length)",
         "constant_length: tokens of the micro-batch"),
        ('"token_mean": token_mean,\n    "sequence_mean": sequence_mean',
         '"token_mean": sequence_mean,\n    "sequence_mean": token_mean', "means exchanged by name"),
    ],
    "kl.py": [
        ("    return log_ratio\n", "    return -log_ratio\n", "k1: sign"),
        ("log_ratio.square() / 2", "log_ratio.square()", "k2: factor"),
        ("log_ratio.square() / 2", "-log_ratio.square() / 2", "k2: sign"),
        ("torch.exp((-log_ratio)", "torch.exp((log_ratio)", "k3: sign in the exponent"),
        ("- 1 + log_ratio", "- 1 - log_ratio", "k3: sign outside"),
        ("- 1 + log_ratio", "+ log_ratio", "k3: constant"),
        (".clamp(max=MAX_LOG_RATIO)", "", "k3: no clamp"),
        ("MAX_LOG_RATIO = 20.0", "MAX_LOG_RATIO = 10.0", "k3, ratio: bound"),
        ("log_ratio[mask].abs()", "log_ratio.abs()", "clamped_share: mask ignored"),
        ("log_ratio[mask].abs()", "log_ratio[mask]", "clamped_share: one side only"),
        ("> MAX_LOG_RATIO).float().mean()", "> MAX_LOG_RATIO).float().sum()", "clamped_share: normaliser"),
        ("log_p - log_q)", "log_q - log_p)", "exact_kl: sign"),
        ("log_p.exp() *", "log_q.exp() *", "exact_kl: the other direction's weights"),
        ("mean_kl / self.target - 1.0", "1.0 - mean_kl / self.target", "controller: sign"),
        ("-0.2), 0.2)", "-0.2), 0.4)", "controller: upper bound"),
        ("-0.2), 0.2)", "-0.4), 0.2)", "controller: lower bound"),
        ("error * num_responses / self.horizon", "error / self.horizon", "controller: batch size"),
        ("config.target if adaptive else None", "config.target", "controller: fixed one adapts"),
        ('"k2": k2, "k3": k3', '"k2": k3, "k3": k2', "estimators exchanged by name"),
    ],
    "logprobs.py": [
        ("return -nll.view", "return nll.view", "token_logprobs: sign"),
        ("wide.logsumexp(dim=-1) - (", "(", "entropy_of: normaliser"),
        ("wide.logsumexp(dim=-1) - (", "wide.logsumexp(dim=-1) + (", "entropy_of: sign"),
        ("-(log_p_MV.exp() * log_p_MV)", "(log_p_MV.exp() * log_p_MV)", "statistics_from_logits: sign of the entropy"),
        ("_widened(logits_MV, temperature).log_softmax(dim=-1)", "_widened(logits_MV, temperature)",
         "statistics_from_logits: normaliser"),
        ("return wide if temperature == 1.0 else wide / temperature",
         "return wide if temperature == 1.0 else wide * temperature", "temperature: multiplies"),
        ("return wide if temperature == 1.0 else wide / temperature", "return wide", "temperature: ignored"),
        ("else logits.float()", "else logits", "half precision: not widened"),
        ("if temperature <= 0:", "if temperature < 0:", "temperature 0: taken"),
        ("statistics_from_logits(head(hidden_mD), ids_m, temperature)",
         "statistics_from_logits(head(hidden_mD), ids_m)", "statistics_from_hidden: temperature lost"),
        ("token_logprobs(head(hidden_mD), ids_m, temperature=temperature)", "token_logprobs(head(hidden_mD), ids_m)",
         "logprobs_from_hidden: temperature lost"),
        ("MAX_LOGITS // vocab_size)", "MAX_LOGITS // vocab_size) + 1", "chunks: larger than the limit"),
        ("token_ids_M[start : start + size]\n            parts", "token_ids_M[:size]\n            parts",
         "chunks of a frozen head: tokens of the first"),
        ("token_ids_M[start : start + size]\n        found", "token_ids_M[:size]\n        found",
         "chunks: tokens of the first"),
        ("p_mV.div_(-temperature)", "p_mV.div_(-1)", "slope of the log-prob: temperature lost"),
        ("slopes_mV.new_full((len(ids_m), 1), 1 / temperature)", "slopes_mV.new_full((len(ids_m), 1), 1.0)",
         "slope of the log-prob: temperature lost at the token"),
        ("p_mV.div_(-temperature)", "p_mV.div_(temperature)", "slope of the log-prob: sign"),
        ("log_p_mV.add_(entropy_m.unsqueeze(-1))", "log_p_mV", "slope of the entropy: without the entropy"),
        (".mul_(p_mV).div_(-temperature)", ".mul_(p_mV).div_(temperature)", "slope of the entropy: sign"),
        ("entropy_m = -torch.linalg.vecdot(p_mV, log_p_mV)", "entropy_m = torch.linalg.vecdot(p_mV, log_p_mV)",
         "entropy of a frozen head: sign"),
        ("slopes_MD * grad_logprobs_M.unsqueeze(-1)", "slopes_MD * grad_logprobs_M.mean()",
         "frozen head: the rows' gradients are mixed"),
        ("return not head(hidden_MD[:1].detach()).requires_grad", "return True",
         "a head that trains is taken as frozen"),
        ("checkpoint(of_chunk, *chunk, use_reentrant=False) if torch.is_grad_enabled() else of_chunk(*chunk)",
         "of_chunk(*(part.detach() for part in chunk))", "chunks: no gradient to the hidden states"),
    ],
    "ppo_loss.py": [
        ("torch.maximum(-advantages_BR * ratio", "torch.minimum(-advantages_BR * ratio",
         "policy_loss: the optimistic branch"),
        ("-advantages_BR * ratio,", "advantages_BR * ratio,", "policy_loss: sign, free branch"),
        ("-advantages_BR * clipped)", "advantages_BR * clipped)", "policy_loss: sign, clipped branch"),
        ("torch.exp(log_ratio_BR.clamp", "torch.exp(-log_ratio_BR.clamp", "policy_loss: ratio turned"),
        ("clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)", "clamp(-2 * MAX_LOG_RATIO, 2 * MAX_LOG_RATIO)",
         "policy_loss: bound of the log-ratio"),
        ("ratio.clamp(1.0 - clip_low, 1.0 + clip_high)", "ratio.clamp(1.0 - clip_high, 1.0 + clip_low)",
         "policy_loss: bounds exchanged"),
        ("ratio.clamp(1.0 - clip_low, 1.0 + clip_high)", "ratio.clamp(max=1.0 + clip_high)",
         "policy_loss: no lower bound"),
        ("ratio.clamp(1.0 - clip_low, 1.0 + clip_high)", "ratio.clamp(min=1.0 - clip_low)",
         "policy_loss: no upper bound"),
        ("masked_sum(_weighed(per_token, weights_B1), mask_BR) / num_tokens",
         "_weighed(per_token, weights_B1).sum() / num_tokens", "policy_loss: mask ignored"),
        ("masked_sum(_weighed(per_token, weights_B1), mask_BR) / num_tokens",
         "masked_sum(_weighed(per_token, weights_B1), mask_BR) / mask_BR.numel()", "policy_loss: normaliser"),
        ("masked_sum(_weighed(per_token, weights_B1), mask_BR) / num_tokens",
         "_weighed(per_token, weights_B1)[mask_BR].mean()", "policy_loss: mean of the micro-batch"),
        ("_weighed(per_token, weights_B1)", "per_token", "policy_loss: weights ignored"),
        ("(ratio < 1.0 - clip_low) | (ratio", "(ratio < 1.0 - clip_low) & (ratio",
         "policy clip fraction: both bounds at once"),
        ("masked_sum(outside.float(), mask_BR)", "outside.float().sum()", "policy clip fraction: mask"),
        ("0.5 * masked_sum(error, mask_BR)", "masked_sum(error, mask_BR)", "value_loss, free: factor"),
        ("0.5 * masked_sum(error, mask_BR)", "0.5 * masked_sum(-error, mask_BR)", "value_loss, free: sign"),
        ("(values_BR - returns_BR).square()", "(values_BR + returns_BR).square()", "value_loss: sign of the return"),
        ("old_values_BR - clip_range)", "old_values_BR - 2 * clip_range)", "value_loss: lower bound"),
        ("old_values_BR + clip_range)", "old_values_BR + 2 * clip_range)", "value_loss: upper bound"),
        ("torch.maximum(error, clipped_error)", "torch.minimum(error, clipped_error)",
         "value_loss: takes the smaller error"),
        ("torch.maximum(error, clipped_error)", "clipped_error", "value_loss: clipped error alone"),
        ("0.5 * masked_sum(torch.maximum", "masked_sum(torch.maximum", "value_loss: factor"),
        ("clipped_error), mask_BR) / num_tokens, clip_fraction", "clipped_error), mask_BR), clip_fraction",
         "value_loss: normaliser"),
        ("clipped_error), mask_BR) / num_tokens", "clipped_error), mask_BR | True) / num_tokens",
         "value_loss: mask ignored"),
        ("(clipped_error > error)", "(clipped_error < error)", "value clip fraction: sign"),
        ("-masked_sum(_weighed(entropy_BR, weights_B1), mask_BR) / num_tokens",
         "masked_sum(_weighed(entropy_BR, weights_B1), mask_BR) / num_tokens",
         "entropy_loss: sign"),
        ("-masked_sum(_weighed(entropy_BR, weights_B1), mask_BR) / num_tokens", "-entropy_BR.sum() / num_tokens",
         "entropy_loss: mask ignored"),
        ("-masked_sum(_weighed(entropy_BR, weights_B1), mask_BR) / num_tokens",
         "-masked_sum(_weighed(entropy_BR, weights_B1), mask_BR)",
         "entropy_loss: normaliser"),
        ("_weighed(entropy_BR, weights_B1)", "entropy_BR", "entropy_loss: weights ignored"),
        ("masked_sum(_weighed(estimator(log_ratio_BR), weights_B1), mask_BR) / num_tokens",
         "-masked_sum(_weighed(estimator(log_ratio_BR), weights_B1), mask_BR) / num_tokens",
         "reference_kl_loss: sign"),
        ("_weighed(estimator(log_ratio_BR), weights_B1)", "_weighed(k3(log_ratio_BR), weights_B1)",
         "reference_kl_loss: estimator ignored"),
        ("_weighed(estimator(log_ratio_BR), weights_B1)", "_weighed(estimator(-log_ratio_BR), weights_B1)",
         "reference_kl_loss: the other direction"),
        ("_weighed(estimator(log_ratio_BR), weights_B1)", "estimator(log_ratio_BR)",
         "reference_kl_loss: weights ignored"),
        ("masked_sum(_weighed(estimator(log_ratio_BR), weights_B1), mask_BR) / num_tokens",
         "_weighed(estimator(log_ratio_BR), weights_B1).sum() / num_tokens", "reference_kl_loss: mask ignored"),
        ("_weighed(estimator(log_ratio_BR), weights_B1), mask_BR) / num_tokens",
         "_weighed(estimator(log_ratio_BR), weights_B1), mask_BR) / mask_BR.sum()",
         "reference_kl_loss: mean of the micro-batch"),
        ("per_token_BR * weights_B1", "per_token_BR / weights_B1", "weights: divided by"),
        ("k3(-log_ratio_BR)", "k3(log_ratio_BR)", "kl_from_old: the other direction"),
        ("masked_sum(k3(-log_ratio_BR), mask_BR) / num_tokens", "masked_sum(k3(-log_ratio_BR), mask_BR)",
         "kl_from_old: normaliser"),
        ("masked_sum(k3(-log_ratio_BR), mask_BR)", "k3(-log_ratio_BR).sum()", "kl_from_old: mask"),
    ],
    "preference_loss.py": [
        ("self.chosen_B - self.rejected_B", "self.rejected_B - self.chosen_B", "margin: sign"),
        ("return -logsigmoid(beta * ratios.margin_B)", "return logsigmoid(beta * ratios.margin_B)", "dpo_loss: sign"),
        ("return -logsigmoid(beta * ratios.margin_B)", "return -logsigmoid(ratios.margin_B)",
         "dpo_loss: beta ignored"),
        ("return -logsigmoid(beta * ratios.margin_B)", "return -logsigmoid(-beta * ratios.margin_B)",
         "dpo_loss: sides exchanged"),
        ("-(1 - label_smoothing) * logsigmoid(logits_B)", "-logsigmoid(logits_B)", "cdpo: weight of the label"),
        ("- label_smoothing * logsigmoid(-logits_B)", "+ label_smoothing * logsigmoid(-logits_B)",
         "cdpo: sign of the flipped label"),
        ("- label_smoothing * logsigmoid(-logits_B)", "- label_smoothing * logsigmoid(logits_B)",
         "cdpo: flipped label is the same"),
        ("((1 - label_smoothing) * kept - label_smoothing * flipped)",
         "((1 - label_smoothing) * kept + label_smoothing * flipped)", "robust: sign of the flipped label"),
        ("kept, flipped = -logsigmoid(logits_B), -logsigmoid(-logits_B)",
         "flipped, kept = -logsigmoid(logits_B), -logsigmoid(-logits_B)", "robust: labels exchanged"),
        (" / (1 - 2 * label_smoothing)", " / (1 - label_smoothing)", "robust: normaliser"),
        ("torch.relu(1 - beta * ratios.margin_B)", "(1 - beta * ratios.margin_B)", "hinge: no hinge"),
        ("torch.relu(1 - beta * ratios.margin_B)", "torch.relu(1 + beta * ratios.margin_B)", "hinge: sides exchanged"),
        ("torch.relu(1 - beta * ratios.margin_B)", "torch.relu(beta - ratios.margin_B)", "hinge: where beta stands"),
        ("(ratios.margin_B - 1 / (2 * beta))", "(ratios.margin_B - 1 / beta)", "ipo: half of the target"),
        ("(ratios.margin_B - 1 / (2 * beta))", "(ratios.margin_B + 1 / (2 * beta))", "ipo: sides exchanged"),
        ("(ratios.margin_B - 1 / (2 * beta)).square()", "(ratios.margin_B - 1 / (2 * beta)).abs()", "ipo: not squared"),
        ("beta * logprobs.margin_B - gamma", "beta * logprobs.margin_B + gamma", "simpo: sign of gamma"),
        ("beta * logprobs.margin_B - gamma", "beta * (logprobs.margin_B - gamma)", "simpo: gamma times beta"),
        ("return -logprobs.chosen_B - beta", "return logprobs.chosen_B - beta", "orpo: sign of the imitation"),
        ("return -logprobs.chosen_B - beta", "return -logprobs.rejected_B - beta", "orpo: imitates the worse answer"),
        ("- beta * odds_ratio_term(logprobs)", "+ beta * odds_ratio_term(logprobs)", "orpo: sign of the odds ratio"),
        ("_log_odds(logprobs.chosen_B) - _log_odds(logprobs.rejected_B)",
         "_log_odds(logprobs.rejected_B) - _log_odds(logprobs.chosen_B)", "orpo: sides exchanged"),
        ("held_B - torch.log(-torch.expm1(held_B))", "held_B + torch.log(-torch.expm1(held_B))", "log odds: sign"),
        ("mean_logprob_B.clamp(max=MAX_MEAN_LOGPROB)", "mean_logprob_B", "log odds: infinite at certainty"),
        ("with_: ipo_loss(pairs, with_.beta), per_token=True)", "with_: ipo_loss(pairs, with_.beta))",
         "names: ipo is summed"),
        ("        has_reference=False,\n        per_token=True,\n", "        per_token=True,\n",
         "names: simpo has a reference"),
        ("orpo_loss(pairs, with_.beta), has_reference=False, per_token=True)",
         "orpo_loss(pairs, with_.beta), has_reference=False)", "names: orpo of sums"),
    ],
    "kto_loss.py": [
        ("log_ratios_M.detach().mean()", "log_ratios_M.mean()", "kto_kl: takes a gradient"),
        (".mean().clamp(min=0)", ".mean()", "kto_kl: below zero"),
        (".mean().clamp(min=0)", ".clamp(min=0).mean()", "kto_kl: clamped one by one"),
        (".mean().clamp(min=0)", ".sum().clamp(min=0)", "kto_kl: normaliser"),
        ("log_ratios_M.numel() == 0", "log_ratios_M.numel() < 0", "kto_kl: mean of nothing"),
        ("beta * (log_ratios_B - kl)", "beta * (log_ratios_B + kl)", "kto: sign of the reference point"),
        ("beta * (log_ratios_B - kl)", "beta * log_ratios_B - kl", "kto: reference point not scaled"),
        ("desirable_weight * (1 - torch.sigmoid(gain_B))", "desirable_weight * torch.sigmoid(gain_B)",
         "kto: lowers the desirable"),
        ("1 - torch.sigmoid(-gain_B)", "1 - torch.sigmoid(gain_B)", "kto: raises the undesirable"),
        ("torch.where(desirable_B, desirable, undesirable)", "torch.where(desirable_B, undesirable, desirable)",
         "kto: labels exchanged"),
        ("undesirable = undesirable_weight * ", "undesirable = desirable_weight * ", "kto: one weight"),
        ("desirable_weight * num_desirable / (undesirable_weight", "num_desirable / (undesirable_weight",
         "kto_balance: weight ignored"),
        ("if not num_desirable or not num_undesirable", "if not num_desirable and not num_undesirable",
         "kto_balance: one kind alone"),
    ],
    "reward_loss.py": [
        ("difference = chosen_B - rejected_B", "difference = rejected_B - chosen_B",
         "bradley_terry_loss: sides exchanged"),
        ("return -logsigmoid(", "return logsigmoid(", "bradley_terry_loss: sign"),
        ("difference - margins_B", "difference + margins_B", "bradley_terry_loss: sign of the margin"),
        ("difference if margins_B is None else difference - margins_B", "difference",
         "bradley_terry_loss: margin ignored"),
        ("rejected_rewards, margins).mean()", "rejected_rewards, margins).sum()",
         "compute_preference_loss: normaliser"),
        ("rejected_rewards, margins).mean()", "rejected_rewards).mean()", "compute_preference_loss: margin lost"),
        ("difference = chosen_rewards - rejected_rewards", "difference = rejected_rewards - chosen_rewards",
         "preference metrics: sides exchanged"),
        ("+ 0.5 * (difference == 0).float()", "+ 0.0 * (difference == 0).float()", "preference accuracy: ties"),
    ],
    "best_of_n.py": [
        ("math.log(n) - (n - 1) / n", "math.log(n)", "best_of_n_kl: second term"),
        ("math.log(n) - (n - 1) / n", "math.log(n) + (n - 1) / n", "best_of_n_kl: sign"),
        ("if n < 1:", "if n < 0:", "best_of_n_kl: of no answer"),
        ("(below_KN + share_KN) ** n - below_KN**n", "(below_KN + share_KN) ** n", "kl_by_ties: what lies below"),
        ("(scores_KN.unsqueeze(2) > scores", "(scores_KN.unsqueeze(2) >= scores", "kl_by_ties: equal ones lie below"),
        ("chosen_KN / (share_KN * num)", "chosen_KN / share_KN", "kl_by_ties: a level counted for each answer"),
        ("(chosen_KN / share_KN).log()", "chosen_KN.log()", "kl_by_ties: reference"),
        ("(apart * num).log()).sum() - tied_K", "(apart * num).log()).sum() + tied_K", "kl_by_ties: sign"),
        ("math.comb(place, n - 1) /", "math.comb(place, n) /", "expected_best: drawn below"),
        ("/ math.comb(num, n)", "/ math.comb(num, n - 1)", "expected_best: number of draws"),
        ("scores_KN.argsort(dim=1, stable=True)", "scores_KN.argsort(dim=1, descending=True)",
         "expected_best: the worst"),
        ("scores_KN.argsort(dim=1, stable=True)", "worths_KN.argsort(dim=1, stable=True)",
         "expected_best: sorted by worth"),
        ("tied_KN.gather(1, order_KN)", "worths_KN.double().gather(1, order_KN)", "expected_best: order of ties"),
        ("/ same_KNN.sum(dim=2)", "", "expected_best: sum over ties"),
        ("1 <= n <= num", "1 <= n", "expected_best: more than there are"),
    ],
    "overoptimisation.py": [
        ("(distances_M, -(distances_M**2))", "(distances_M, distances_M**2)", "best of n: sign of beta"),
        ("-(distances_M**2)", "-distances_M", "best of n: not squared"),
        ("-torch.xlogy(distances_M, distances_M)", "torch.xlogy(distances_M, distances_M)", "RL: sign of beta"),
        ("torch.xlogy(distances_M, distances_M)", "distances_M.log()", "RL: d lost, and no value at 0"),
        ("(alpha / (2 * beta))", "(alpha / beta)", "best of n: peak twice as far"),
        (".clamp(min=0)", "", "best of n: a peak before the start"),
        ("(alpha / beta - 1).exp()", "(alpha / beta).exp()", "RL: peak e times as far"),
        ("(alpha / beta - 1).exp()", "(alpha / beta + 1).exp()", "RL: sign in the peak"),
        ("(beta < 0) | (alpha > 0)", "alpha > 0", "a curve that rises in the end has no peak"),
        ("(beta < 0) | (alpha > 0)", "beta < 0", "a straight rise has no peak"),
        ("torch.where(beta > 0, peak, never)", "torch.where(beta >= 0, peak, never)", "a straight line's peak"),
        ("/ scale_L).double()", ").double()", "least_squares: unit of the coefficients"),
        ("return solution_L / scale_L", "return solution_L", "least_squares: scale not undone"),
        ("(scale_L > 0).all()", "(scale_L >= 0).all()", "least_squares: terms that are 0"),
        ("terms_ML.shape[0] < terms_ML.shape[1]", "terms_ML.shape[0] < 0", "least_squares: too few points"),
        ("< terms_ML.shape[1]:\n        raise ValueError(\"the", "< 0:\n        raise ValueError(\"the",
         "least_squares: one distance only"),
    ],
    "reward_combination.py": [
        ("return scores_KB.mean(dim=0)", "return scores_KB.sum(dim=0)", "mean: a sum"),
        ("return scores_KB.amin(dim=0)", "return scores_KB.amax(dim=0)", "worst: the best"),
        (" - penalty * scores_KB.var", " + penalty * scores_KB.var", "penalised: sign"),
        ("penalty * scores_KB.var(dim=0, correction=0)", "penalty * scores_KB.std(dim=0, correction=0)",
         "penalised: deviation"),
        ("penalty * scores_KB.var(dim=0, correction=0)", "penalty * scores_KB.var(dim=0)", "penalised: corrected"),
        ("return scores_KB.std(dim=0, correction=0)", "return scores_KB.std(dim=0)", "disagreement: corrected"),
        ("return scores_KB.std(dim=0, correction=0)", "return scores_KB.var(dim=0, correction=0)",
         "disagreement: variance"),
        ("(weights_K.unsqueeze(1) * scores_KB).sum(dim=0)", "scores_KB.sum(dim=0)", "sum: weights ignored"),
        ("(weights_K.unsqueeze(1) * scores_KB).amin(dim=0)", "scores_KB.amin(dim=0)", "lowest: weights ignored"),
        ("(weights_K.unsqueeze(1) * scores_KB).amin(dim=0)", "(weights_K.unsqueeze(1) * scores_KB).amax(dim=0)",
         "lowest: the highest"),
        ("gate_scores_B < threshold", "gate_scores_B > threshold", "gate: turned round"),
        ("always_B | (gate", "always_B & (gate", "gate: both needed"),
        ("always_B | (gate", "(gate", "gate: never forced"),
        ("threshold), gate_scores_B, scores_B)", "threshold), scores_B, gate_scores_B)", "gate: scores exchanged"),
    ],
    "process_loss.py": [
        ("logits[mask], labels[mask], reduction", "logits.flatten(), labels.flatten(), reduction",
         "step_loss: mask ignored"),
        ("logits[mask], labels[mask], reduction", "logits[~mask], labels[~mask], reduction", "step_loss: mask turned"),
        ("logits[mask], labels[mask], reduction", "-logits[mask], labels[mask], reduction", "step_loss: sign"),
        ("logits[mask], labels[mask], reduction", "logits[mask], (labels[mask] > 0).double(), reduction",
         "step_loss: soft labels hardened"),
        ('reduction="sum") / num_steps', 'reduction="mean")', "step_loss: mean of what is at hand"),
        ("return num_right / num_sampled", "return num_right / (num_sampled + 1)", "soft: normaliser"),
        ("num_sampled) > 0)", "num_sampled) > 0.5)", "hard: majority"),
        ("num_sampled) > 0)", "num_sampled) >= 0)", "hard: always right"),
        ("num_sampled < 1", "num_sampled < 0", "estimates: of no sample"),
        ("not 0 <= num_right", "not -9 <= num_right", "estimates: of less than none"),
        ("masked_fill(~mask_BS, torch.inf)", "masked_fill(~mask_BS, 0.0)", "minimum: padding counts"),
        (".amin(dim=1)", ".amax(dim=1)", "minimum: the surest step"),
        (".amin(dim=1).sigmoid()", ".amin(dim=1)", "minimum: a logit"),
        ("logsigmoid(logits_BS).masked_fill(~mask_BS, 0.0)", "logsigmoid(logits_BS)", "product: padding counts"),
        ("logsigmoid(logits_BS).masked", "logits_BS.sigmoid().masked", "product: sum of probabilities"),
        (".sum(dim=1).exp()", ".mean(dim=1).exp()", "product: a mean"),
        ("argmax(dim=1, keepdim=True)", "argmin(dim=1, keepdim=True)", "last: the first"),
        ("mask_BS.long() * columns_S", "columns_S + 0 * mask_BS.long()", "last: of the padding"),
        ("mask_BS.any(dim=1).all()", "mask_BS.any()", "one row without steps: taken"),
        ("    return logits_S.sigmoid()\n", "    return logits_S\n", "step_probability: a logit"),
        ("return logsigmoid(logits_S)\n", "return -logsigmoid(logits_S)\n", "step_log_probability: sign"),
        ("probabilities_S - before_S", "probabilities_S + before_S", "step_change: sign"),
        ("torch.zeros_like(probabilities_S[:1]), probabilities_S[:-1]",
         "probabilities_S[1:], torch.zeros_like(probabilities_S[:1])", "step_change: from the step behind"),
        ('"log_probability": step_log_probability', '"log_probability": step_probability', "worths exchanged by name"),
        ('"soft": soft_estimate, "hard": hard_estimate', '"soft": hard_estimate, "hard": soft_estimate',
         "estimates exchanged by name"),
        ('"min": minimum, "product": product', '"min": product, "product": minimum', "aggregations exchanged by name"),
    ],
    "sft_loss.py": [
        ("-logprobs_M.sum()", "logprobs_M.sum()", "sft_loss: sign"),
        ("logprobs_M.sum() / num_tokens", "logprobs_M.mean()", "sft_loss: mean of the micro-batch"),
        ("logprobs_M.sum() / num_tokens", "logprobs_M.sum()", "sft_loss: normaliser"),
    ],
    "trainer.py": [
        ("clip_grad_norm_(part, self", "clip_grad_norm_(self.parameters.values(), self",
         "parts clipped apart: by the norm of all"),
        ("        if not self._clipped_apart:\n            nn.utils", "        if True:\n            nn.utils",
         "parts clipped apart: and all together before"),
        ("self.scaler.scale(output.loss).backward()", "self.scaler.scale(-output.loss).backward()",
         "step: sign of the loss"),
        ("total += next(values)", "total = next(values)", "step: loss of the last micro-batch"),
        ("metrics.get(name, 0.0) + next(values)", "next(values)", "step: metrics of the last micro-batch"),
        ("largest([maxima.get(name, value), value])", "value", "step: maxima of the last micro-batch"),
        ("(o.loss, *o.metrics.values(), *o.maxima.values())", "(o.loss, *o.maxima.values(), *o.metrics.values())",
         "step: maxima read as metrics"),
        ("self.optimizer.zero_grad(set_to_none=True)\n        outputs", "outputs",
         "step: gradients of the step before kept"),
        ("self.scaler.unscale_(self.optimizer)", "pass", "step: clipped before it is unscaled"),
        ("self.config.max_grad_norm, norm)", "2 * self.config.max_grad_norm, norm)", "clip: bound"),
        ("        if culprit is None:\n", "        if False:\n", "clip: never"),
        ("        if not math.isfinite(loss):\n", "        if False:\n", "guard: loss not looked at"),
        ("        if math.isfinite(grad_norm):\n", "        if True:\n", "guard: gradients not looked at"),
        ("        if skip:\n", "        if False:\n", "guard: never skips"),
        ("self.skipped_in_a_row = 0\n            for", "for", "guard: counts all skips as in a row"),
        (">= self.config.max_nonfinite_steps", "> self.config.max_nonfinite_steps", "guard: one step too many"),
        ("self.skipped_count += 1", "self.skipped_count = 1", "guard: skips not counted"),
        ("        if self.exhausted:\n            raise", "        if False:\n            raise",
         "guard: goes on when exhausted"),
        ("        if self.exhausted:\n            self", "        if False:\n            self",
         "restore: exhausted for ever"),
        ("self.config.learning_rate * self._rate_factor", "self._rate_factor", "schedule: peak rate ignored"),
        ("self._rate_factor(self.step_count)", "self._rate_factor(self.step_count + 1)", "schedule: one step early"),
        ('group["lr"] = learning_rate', "pass", "schedule: rate not set"),
        ("math.ceil(config.warmup_ratio * num_training_steps)", "0", "schedule: no warm-up"),
        ("        num_training_steps=num_training_steps,\n", "        num_training_steps=2 * num_training_steps,\n",
         "schedule: twice as long"),
        ("        learning_rate = self.learning_rate\n", "        learning_rate = self.config.learning_rate\n",
         "schedule: constant"),
        ('"weight_decay": 0.0}]', '"weight_decay": config.weight_decay}]', "optimizer: vectors decay"),
        ('"weight_decay": config.weight_decay}, {"params": vectors', '"weight_decay": 0.0}, {"params": vectors',
         "optimizer: nothing decays"),
        ("betas=(config.adam_beta1, config.adam_beta2)", "betas=(config.adam_beta2, config.adam_beta1)",
         "optimizer: betas exchanged"),
        ("eps=config.adam_epsilon", "eps=1e-8", "optimizer: epsilon ignored"),
        ("self.step_count += 1", "self.step_count += 2", "counter: steps"),
        ("restore_optimizer(self.optimizer, dict(tensors))", "pass", "restore: moments forgotten"),
        ('self.scaler.load_state_dict(plain["scaler"])', "pass", "restore: loss scale forgotten"),
        ("self.step_count, self.skipped_count, self.skipped_in_a_row = plain",
         "_, self.skipped_count, self.skipped_in_a_row = plain", "restore: place in the schedule forgotten"),
        ("sum(values) / len(values)", "sum(values)", "mean_reports: normaliser"),
        ("sum(values) / len(values)", "sum(values) / len(reports)",
         "mean_reports: steps without the metric counted"),
        ("    reports = taken(reports)\n", "", "mean_reports: skipped steps counted"),
        ("sum(report.loss for report in taken(reports)) / len(taken(reports))",
         "sum(report.loss for report in reports) / len(reports)", "mean_loss: skipped steps counted"),
        ("if not report.skipped] or reports", "if not report.skipped]", "taken: nothing where all were skipped"),
        ("math.nan if any(math.isnan(value) for value in values) else max(values)", "max(values)",
         "largest: NaN by chance"),
    ],
}
# fmt: on


def main(files: Sequence[str] = ()) -> int:
    """Try the mutants of these files, or of all of them."""
    _import_the_slow_parts()
    counts, started = Counter[str](), time.monotonic()
    for file, mutants in MUTANTS.items():
        if files and file not in files:
            continue
        source = (ALGO / file).read_text(encoding="utf-8")
        for old, new, what in [("", "", "as it is"), *mutants]:
            outcome = _outcome(file, source, old, new)
            counts[outcome] += 1
            print(f"{outcome:<9} {file:<19} {what}", flush=True)
    wrong = counts.total() - counts["sound"] - counts["caught"]
    print(f"{counts['caught']} caught, {wrong} to look at, in {time.monotonic() - started:.0f} s")
    return 1 if wrong else 0


def _outcome(file: str, source: str, old: str, new: str) -> str:
    """What became of a mutant; the unaltered source must be sound, or a failure would say nothing."""
    if not old:
        return "BROKEN" if _caught(file, source) else "sound"
    if source.count(old) != 1:
        return "OUTDATED"
    return "caught" if _caught(file, source.replace(old, new)) else "SURVIVED"


def _caught(file: str, source: str) -> bool:
    """Whether a test fails when `rlhf/algo/<file>` reads as `source`."""
    child = os.fork()
    if child == 0:
        # Whatever happens here, the child must leave here: it is a copy of the process that called.
        try:
            code = 2
            code = _run_tests(file, source)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 1):
        raise RuntimeError(f"the tests of {file} could not be run: exit code {code}")
    return code == 1


def _run_tests(file: str, source: str) -> int:
    import pytest

    module = f"rlhf.algo.{Path(file).stem}"
    with tempfile.TemporaryDirectory() as folder, _replaced(module, source, Path(folder) / file):
        arguments = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={TESTS.parent}"]
        paths = [str(TESTS / "unit" / name) for name in TESTS_OF.get(file, FORMULAS)]
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            code = pytest.main([*arguments, *paths])
    # 2 is an interrupted run: with -x also an error while a test file was imported, which is a mutant that was noticed.
    return 0 if code == 0 else 1


@contextmanager
def _replaced(module: str, source: str, place: Path) -> Iterator[None]:
    """Import `module` from this source, written to `place`."""
    place.write_text(source, encoding="utf-8")

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
            return importlib.util.spec_from_file_location(name, place) if name == module else None

    sys.meta_path.insert(0, Finder)  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.meta_path.remove(Finder)  # type: ignore[arg-type]


def _import_the_slow_parts() -> None:
    """Once for all children; nothing of `rlhf.algo` may be among it, or the mutants would not be imported."""
    sys.path[:0] = [str(TESTS.parent), str(TESTS / "unit")]
    import pytest  # noqa: F401
    import scipy.signal  # noqa: F401
    import torch

    importlib.import_module("rlhf")  # before transformers: it keeps a library's warning to itself
    import transformers

    assert transformers.GPT2LMHeadModel and transformers.Qwen2ForCausalLM and transformers.get_scheduler
    torch.set_num_threads(1)  # threads do not survive a fork
    assert not any(name.startswith("rlhf.algo") for name in sys.modules)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
