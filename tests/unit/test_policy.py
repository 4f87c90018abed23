"""The backbone, the policy on it and its decoding: padding, caches and batches must not change what is computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tiny_backbones import END, Family, add_trained_adapter, random_prompts, tiny_backbone
from torch import Tensor, nn

from rlhf.algo import logprobs as logprobs_module
from rlhf.data.collate import PromptBatch, pad_left
from rlhf.models import decoding
from rlhf.models.adapter_files import save_adapter
from rlhf.models.backbone import Backbone, positions_from_mask
from rlhf.models.decoding import Decoded, GenerationConfig, choose_tokens, decode
from rlhf.models.lora import LoRAConfig, get_lora_parameters
from rlhf.models.policy import Policy, masked_logprobs
from rlhf.models.reference import Reference
from rlhf.models.value_head import ValueHead
from rlhf.rollout.sampler import Sampler
from rlhf.rollout.trajectory import Trajectory

PROMPTS = random_prompts(9)


@pytest.fixture(scope="module")
def backbones() -> dict[str, Backbone]:
    """One per family; tests may add adapters under names of their own but never train these."""
    return {"gpt2": tiny_backbone("gpt2", separate_pad=False), "qwen2": tiny_backbone("qwen2")}


@pytest.fixture(params=["gpt2", "qwen2"])
def backbone(request: pytest.FixtureRequest, backbones: dict[str, Backbone]) -> Backbone:
    return backbones[request.param]


def with_critic(backbone: Backbone, kind: str = "mlp") -> Policy:
    """A policy under a trained adapter with a value head whose values are not zero."""
    if "policy" not in backbone.adapter_names:
        add_trained_adapter(backbone, "policy", seed=3)
    torch.manual_seed(1)
    head = ValueHead(backbone.width, "mlp" if kind == "mlp" else "linear")
    nn.init.normal_(head.last.weight)
    return Policy(backbone, "policy", head)


def prompt_batch(backbone: Backbone, prompts: list[list[int]]) -> PromptBatch:
    return pad_left(prompts, backbone.tokenizer.pad_token_id)


def uniforms(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stops(backbone: Backbone) -> list[int]:
    return [backbone.tokenizer.eos_token_id]


def sampled(policy: Policy, config: GenerationConfig, prompts: list[list[int]] = PROMPTS, seed: int = 0) -> Trajectory:
    return Sampler(policy, config, stops(policy.backbone)).sample(prompts, seed)


def assert_same_answers(one: Trajectory, other: Trajectory) -> None:
    assert one.responses() == other.responses()
    assert torch.equal(one.finished_B, other.finished_B)
    torch.testing.assert_close(one.logprobs_BR, other.logprobs_BR, atol=2e-5, rtol=0)
    torch.testing.assert_close(one.entropy_BR, other.entropy_BR, atol=2e-5, rtol=0)


# ---------------------------------------------------------------- forward passes


def test_T1_a_row_alone_equals_the_row_in_a_padded_batch(backbone: Backbone) -> None:
    batch = prompt_batch(backbone, PROMPTS)
    left = backbone.hidden(batch.input_ids_BP, batch.attention_mask_BP)
    right_ids, right_mask = batch.input_ids_BP.flip(1), batch.attention_mask_BP.flip(1)
    for row, prompt in enumerate(PROMPTS):
        alone = backbone.hidden(torch.tensor([prompt]))
        torch.testing.assert_close(left[row, -len(prompt) :], alone[0], atol=1e-5, rtol=0)
        right_ids[row, : len(prompt)] = torch.tensor(prompt)
    right = backbone.hidden(right_ids, right_mask)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(right[row, : len(prompt)], left[row, -len(prompt) :], atol=1e-5, rtol=0)


def test_hidden_states_and_head_are_the_models_own(backbone: Backbone) -> None:
    ids = torch.tensor([PROMPTS[0] + PROMPTS[1]])
    with torch.no_grad():
        expected = backbone.model(ids).logits
        torch.testing.assert_close(backbone.logits(backbone.hidden(ids)), expected)


def test_T1_logprobs_of_a_row_do_not_depend_on_its_neighbours(backbone: Backbone) -> None:
    policy = with_critic(backbone)
    long_rows = [prompt for prompt in PROMPTS if len(prompt) > 1]
    batch = prompt_batch(backbone, long_rows)
    actions = batch.attention_mask_BP & (positions_from_mask(batch.attention_mask_BP) >= 1)
    together = policy.logprobs(batch.input_ids_BP, batch.attention_mask_BP, actions)
    assert not together[~actions].any()
    for row, prompt in enumerate(long_rows):
        with torch.no_grad(), backbone.using("policy"):
            expected = backbone.model(torch.tensor([prompt])).logits.log_softmax(-1)
        for place in range(1, len(prompt)):
            value = float(together[row, place - len(prompt)])
            assert value == pytest.approx(float(expected[0, place - 1, prompt[place]]), abs=1e-5)


def test_the_first_token_cannot_be_an_action(backbone: Backbone) -> None:
    ids = torch.tensor([PROMPTS[0]])
    with pytest.raises(ValueError, match="the first token of a row cannot be an action"):
        masked_logprobs(backbone, None, ids, None, torch.ones_like(ids, dtype=torch.bool))


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_P2_dropout_in_the_configuration_never_acts(family: Family) -> None:
    backbone = tiny_backbone(family, dropout=0.5)
    backbone.train()
    ids = torch.tensor([PROMPTS[0]])
    assert torch.equal(backbone.hidden(ids), backbone.hidden(ids))
    assert not any(module.training for module in backbone.model.modules())


def test_adapter_dropout_acts_inside_its_block_only() -> None:
    backbone, ids = tiny_backbone(), torch.tensor([[5, 6, 7]])
    backbone.add_adapter("sft", LoRAConfig(r=4, lora_dropout=0.5))
    nn.init.normal_(get_lora_parameters(backbone.model, "sft")[1])
    plain = backbone.hidden(ids, adapter="sft")
    torch.manual_seed(0)
    with backbone.adapter_dropout(0.5):
        assert not torch.equal(backbone.hidden(ids, adapter="sft"), plain)
    assert torch.equal(backbone.hidden(ids, adapter="sft"), plain)


# ---------------------------------------------------------------- adapters on one base


def test_none_is_the_bare_base_also_right_after_an_adapter_was_loaded(tmp_path: Path) -> None:
    source, backbone = tiny_backbone(), tiny_backbone()
    add_trained_adapter(source, "sft")
    save_adapter(source.model, "sft", tmp_path, "tiny-qwen2")
    ids = torch.tensor([[5, 6, 7]])
    before = backbone.hidden(ids)
    backbone.load_adapter(tmp_path, "sft")
    assert torch.equal(backbone.hidden(ids), before)
    assert torch.equal(backbone.hidden(ids, adapter="sft"), source.hidden(ids, adapter="sft"))
    assert torch.equal(backbone.hidden(ids), before)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_an_adapter_on_the_head_is_heard_everywhere(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    # In both families the embedding shares its weight with the head and must not move with it.
    backbone, ids = tiny_backbone(family), torch.tensor([[5, 6, 7]])
    backbone.add_adapter("sft", LoRAConfig(r=4, target_modules=["lm_head"]))
    nn.init.normal_(get_lora_parameters(backbone.model, "sft")[1])
    backbone.train_only(["sft"])
    policy, config = Policy(backbone, "sft"), GenerationConfig(max_new_tokens=5)
    trajectory = sampled(policy, config)
    assert_same_answers(sampled(policy, config.model_copy(update={"merge_adapter": False})), trajectory)
    asked = (trajectory.input_ids_BT, trajectory.attention_mask_BT, trajectory.response_mask_BR, 1.0)
    gradients = []
    for limit in (10**6, 2 * backbone.vocab_size):  # all at once, and in chunks that are computed again
        monkeypatch.setattr(logprobs_module, "MAX_LOGITS", limit)
        again = policy.response_statistics(*asked).logprobs_BR
        torch.testing.assert_close(again.detach(), trajectory.logprobs_BR, atol=1e-4, rtol=0)
        gradients.append(torch.autograd.grad(again.sum(), get_lora_parameters(backbone.model, "sft")))
    for whole, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, whole, atol=1e-4, rtol=1e-4)
    with torch.no_grad(), backbone.using("sft"):
        expected = backbone.model(ids).logits.log_softmax(-1)
    actions = torch.tensor([[False, True, True]])
    found = policy.logprobs(ids, torch.ones_like(actions), actions)[0]
    assert found.tolist() == pytest.approx([0.0, float(expected[0, 0, 6]), float(expected[0, 1, 7])], abs=1e-5)
    assert not torch.allclose(Reference(backbone, None).logprobs(*asked), trajectory.logprobs_BR, atol=0.1)


def test_a_block_returns_to_the_adapter_before_it_even_after_an_error() -> None:
    backbone, ids = tiny_backbone(), torch.tensor([[5, 6, 7]])
    for seed, name in enumerate(("sft", "policy")):
        add_trained_adapter(backbone, name, seed)
    bare, sft = backbone.hidden(ids), backbone.hidden(ids, adapter="sft")
    with backbone.using("sft"):
        with pytest.raises(KeyError), backbone.using("policy"):
            raise KeyError
        assert torch.equal(backbone.model.base_model(input_ids=ids).last_hidden_state, sft)
    assert torch.equal(backbone.hidden(ids), bare)


def test_merged_weights_give_the_same_and_are_put_back_bit_for_bit() -> None:
    backbone, ids = tiny_backbone(), torch.tensor([[5, 6, 7]])
    add_trained_adapter(backbone, "sft")
    bare, sft = backbone.hidden(ids), backbone.hidden(ids, adapter="sft")
    weights = {name: p.clone() for name, p in backbone.model.named_parameters()}
    with pytest.raises(KeyError), backbone.merged("sft"):
        torch.testing.assert_close(backbone.hidden(ids, adapter="sft"), sft, atol=1e-5, rtol=0)
        raise KeyError
    assert all(torch.equal(p, weights[name]) for name, p in backbone.model.named_parameters())
    assert torch.equal(backbone.hidden(ids), bare)


def test_P8_kl_to_the_reference_is_exactly_zero_before_training(backbone: Backbone) -> None:
    if "sft" not in backbone.adapter_names:
        add_trained_adapter(backbone, "sft", seed=8)
        backbone.copy_adapter("sft", "start")
        backbone.add_adapter("fresh", LoRAConfig(r=4))
    trajectory = sampled(Policy(backbone, "start"), GenerationConfig(max_new_tokens=6, temperature=0.7))
    asked = (trajectory.input_ids_BT, trajectory.attention_mask_BT, trajectory.response_mask_BR, 0.7)
    for policy, reference in (("start", "sft"), ("fresh", None)):
        now = Policy(backbone, policy).response_statistics(*asked).logprobs_BR
        assert torch.equal(now, Reference(backbone, reference).logprobs(*asked))
    sft = Reference(backbone, "sft").logprobs(*asked)
    torch.testing.assert_close(sft, trajectory.logprobs_BR, atol=1e-4, rtol=0)


def test_training_the_policy_moves_no_other_adapter() -> None:
    backbone = tiny_backbone()
    for seed, name in enumerate(("sft", "reward")):
        add_trained_adapter(backbone, name, seed)
    backbone.copy_adapter("sft", "policy")
    ids = torch.tensor([PROMPTS[0] + [5]])
    before = {name: backbone.hidden(ids, adapter=name) for name in (None, "sft", "reward", "policy")}
    backbone.train_only(["policy"])
    policy = Policy(backbone, "policy")
    optimizer = torch.optim.AdamW(policy.trainable_parameters().values(), lr=0.1)
    actions = torch.ones_like(ids, dtype=torch.bool)
    actions[:, 0] = False
    (-policy.logprobs(ids, torch.ones_like(actions), actions).sum()).backward()
    optimizer.step()
    assert all(p.grad is None for name, p in backbone.named_parameters() if ".policy" not in name)
    for name in (None, "sft", "reward"):
        assert torch.equal(backbone.hidden(ids, adapter=name), before[name])
    assert not torch.allclose(backbone.hidden(ids, adapter="policy"), before["policy"])


# ---------------------------------------------------------------- what generation keeps


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_P1_P3_kept_logprobs_and_values_equal_a_forward_pass(backbone: Backbone, temperature: float, head: str) -> None:
    policy = with_critic(backbone, head)
    trajectory = sampled(policy, GenerationConfig(max_new_tokens=10, temperature=temperature, batch_size=4))
    with torch.no_grad():
        again = policy.response_statistics(
            trajectory.input_ids_BT, trajectory.attention_mask_BT, trajectory.response_mask_BR, temperature
        )
    assert trajectory.values_BR is not None and again.values_BR is not None
    for kept, computed in (
        (trajectory.logprobs_BR, again.logprobs_BR),
        (trajectory.entropy_BR, again.entropy_BR),
        (trajectory.values_BR, again.values_BR),
    ):
        torch.testing.assert_close(kept, computed, atol=1e-4, rtol=0)
        assert not kept[~trajectory.response_mask_BR].any()
    # The same once more, without any of our code between the ids and the numbers.
    row, length = trajectory.responses()[0], len(PROMPTS[0])
    with torch.no_grad(), backbone.using("policy"):
        logits = backbone.model(torch.tensor([PROMPTS[0] + row])).logits[0, length - 1 : -1] / temperature
    expected = logits.log_softmax(-1)[torch.arange(len(row)), torch.tensor(row)]
    torch.testing.assert_close(trajectory.logprobs_BR[0, : len(row)], expected, atol=1e-4, rtol=0)


def test_a_critic_with_its_own_adapter_gives_its_own_values() -> None:
    backbone = tiny_backbone()
    shared = with_critic(backbone)
    add_trained_adapter(backbone, "value", seed=9)
    own = Policy(backbone, "policy", shared.value_head, "value")
    trajectory = sampled(own, GenerationConfig(max_new_tokens=5))
    assert trajectory.values_BR is None
    asked = (trajectory.input_ids_BT, trajectory.attention_mask_BT, trajectory.response_mask_BR, 1.0)
    statistics, twin = own.response_statistics(*asked), Policy(backbone, "value", shared.value_head)
    expected = twin.response_statistics(*asked).values_BR
    assert statistics.values_BR is not None and expected is not None
    torch.testing.assert_close(statistics.values_BR, expected)
    torch.testing.assert_close(statistics.logprobs_BR, shared.response_statistics(*asked).logprobs_BR)


def test_the_head_in_chunks_changes_nothing(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = with_critic(backbone)
    trajectory = sampled(policy, GenerationConfig(max_new_tokens=5))
    asked = (trajectory.input_ids_BT, trajectory.attention_mask_BT, trajectory.response_mask_BR, 1.0)
    whole = policy.response_statistics(*asked)
    monkeypatch.setattr(logprobs_module, "MAX_LOGITS", 4 * backbone.vocab_size)
    chunked = policy.response_statistics(*asked)
    torch.testing.assert_close(chunked.logprobs_BR, whole.logprobs_BR, atol=1e-6, rtol=0)
    torch.testing.assert_close(chunked.entropy_BR, whole.entropy_BR, atol=1e-6, rtol=0)


# ---------------------------------------------------------------- batches


def test_samples_do_not_depend_on_the_batch_size_or_on_merging(backbone: Backbone) -> None:
    policy = with_critic(backbone)
    config = GenerationConfig(max_new_tokens=8)
    whole = sampled(policy, config)
    for other in ({"batch_size": 1}, {"batch_size": 4}, {"merge_adapter": False}):
        assert_same_answers(sampled(policy, config.model_copy(update=other)), whole)


def test_samples_do_not_depend_on_rows_leaving_the_batch(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, config = with_critic(backbone), GenerationConfig(max_new_tokens=12, temperature=1.5)
    prompts = random_prompts(24, seed=4)
    leaving = sampled(policy, config, prompts)
    lengths = set(leaving.lengths_B.tolist())
    assert len(lengths) > 3, "the test needs rows that end at different times"
    monkeypatch.setattr(decoding, "LEAVE_SHARE", 2.0)
    staying = sampled(policy, config, prompts)
    assert_same_answers(leaving, staying)
    assert leaving.values_BR is not None and staying.values_BR is not None
    torch.testing.assert_close(leaving.values_BR, staying.values_BR, atol=1e-5, rtol=0)


def test_greedy_equals_transformers_generate(backbone: Backbone) -> None:
    batch = prompt_batch(backbone, PROMPTS)
    ours = sampled(Policy(backbone, None), GenerationConfig(max_new_tokens=8, temperature=0))
    theirs = backbone.model.generate(
        input_ids=batch.input_ids_BP,
        attention_mask=batch.attention_mask_BP.long(),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=backbone.tokenizer.pad_token_id,
        eos_token_id=backbone.tokenizer.eos_token_id,
    )[:, batch.input_ids_BP.shape[1] :]
    for row, answer in enumerate(ours.responses()):
        assert answer == theirs[row, : len(answer)].tolist()
        assert set(theirs[row, len(answer) :].tolist()) <= {backbone.tokenizer.pad_token_id}


# ---------------------------------------------------------------- where answers end


def scripted(backbone: Backbone, answers: list[list[int]], width: int, config: GenerationConfig) -> Decoded:
    """Decode with a head that wants the given tokens, whatever the trunk computes."""
    vocab_size, calls = backbone.vocab_size, iter(range(width))

    class Scripted(Backbone):
        def logits(self, hidden: Tensor, *, adapter: str | None = None) -> Tensor:
            t = next(calls)
            wanted = torch.tensor([answer[min(t, len(answer) - 1)] for answer in answers])
            return 50.0 * nn.functional.one_hot(wanted, vocab_size).float()

    twin = Scripted(backbone.model, backbone.tokenizer, backbone.name)
    batch = prompt_batch(backbone, [[5]] * len(answers))
    return decode(
        twin, None, batch.input_ids_BP, batch.attention_mask_BP, uniforms(len(answers), width), config, stops(backbone)
    )


def ids_of(backbone: Backbone, text: str) -> list[int]:
    return list(backbone.tokenizer(text)["input_ids"])


def test_T5_masks_end_with_the_stop_token_and_a_cut_off_answer_is_unfinished(
    backbones: dict[str, Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "LEAVE_SHARE", 2.0)
    backbone = backbones["qwen2"]
    answers = [ids_of(backbone, text) for text in (f"red cat {END} dog dog", "a a a a a a", END)]
    found = scripted(backbone, answers, 4, GenerationConfig(max_new_tokens=4))
    assert found.response_mask_NR.tolist() == [[True] * 3 + [False], [True] * 4, [True] + [False] * 3]
    assert found.finished_N.tolist() == [True, False, True]
    pad = backbone.tokenizer.pad_token_id
    assert found.response_ids_NR.tolist() == [[*answers[0][:3], pad], answers[1][:4], [*answers[2], pad, pad, pad]]
    assert not found.logprobs_NR[~found.response_mask_NR].any()


def test_an_answer_that_ends_on_the_last_token_is_finished(backbones: dict[str, Backbone]) -> None:
    answer = ids_of(backbones["qwen2"], f"red cat {END}")
    assert scripted(backbones["qwen2"], [answer], 3, GenerationConfig(max_new_tokens=3)).finished_N.tolist() == [True]


def test_T4_stop_tokens_inside_the_prompt_end_nothing(backbone: Backbone) -> None:
    end = backbone.tokenizer.eos_token_id
    prompts = [[end, 5, end], [7, end], [end]]
    policy = with_critic(backbone)
    trajectory = sampled(policy, GenerationConfig(max_new_tokens=6), prompts)
    assert trajectory.prompts() == prompts
    for mask, ids, finished in zip(
        trajectory.response_mask_BR.tolist(), trajectory.responses(), trajectory.finished_B.tolist(), strict=True
    ):
        assert mask == sorted(mask, reverse=True) and sum(mask) >= 1
        assert end not in ids[:-1]
        assert finished == (ids[-1] == end)


def test_stop_strings_end_an_answer_and_are_cut_from_its_text(
    backbones: dict[str, Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "LEAVE_SHARE", 2.0)
    backbone = backbones["qwen2"]
    answers = [ids_of(backbone, "the red cat is big"), ids_of(backbone, "one two three four five")]
    config = GenerationConfig(max_new_tokens=5, stop=["red cat", "six"])
    found = scripted(backbone, answers, 5, config)
    assert found.response_mask_NR.sum(dim=1).tolist() == [3, 5]
    assert found.finished_N.tolist() == [True, False]
    texts = backbone.tokenizer.batch_decode(found.response_ids_NR, skip_special_tokens=True)
    assert [decoding.text_before_stop(text, config.stop) for text in texts] == ["the", "one two three four five"]


def test_text_is_cut_at_the_first_stop_string() -> None:
    assert decoding.text_before_stop("a STOP b\n\nHuman: c", ["\n\nHuman:", "STOP"]) == "a"
    assert decoding.text_before_stop("nothing here ", ["STOP"]) == "nothing here "
    assert decoding.text_before_stop("nothing here", []) == "nothing here"


def test_a_stop_string_of_many_bytes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    # One token per byte: the text of the last tokens must reach back far enough for a string of long characters.
    backbone, stop = tiny_backbone(), "終わりです"
    data = f"x{stop}".encode()
    monkeypatch.setattr(
        type(backbone.tokenizer),
        "batch_decode",
        lambda _, rows: [bytes(r.tolist()).decode(errors="replace") for r in rows],
    )
    record = decoding._Record(1, len(data), 0, torch.device("cpu"), with_values=False)
    record.ids[0] = torch.tensor(list(data))
    assert record.ends_with_stop(torch.tensor([0]), len(data) - 1, backbone, [stop]).tolist() == [True]
    assert record.ends_with_stop(torch.tensor([0]), len(data) - 2, backbone, [stop]).tolist() == [False]


# ---------------------------------------------------------------- which token is drawn


def kept_by_hand(p: list[float], top_p: float, top_k: int) -> set[int]:
    order = sorted(range(len(p)), key=lambda token: -p[token])
    kept, mass = set(), 0.0
    for rank, token in enumerate(order):
        if mass >= top_p or (top_k and rank >= top_k):
            break
        kept.add(token)
        mass += p[token]
    return kept


@pytest.mark.parametrize(("top_p", "top_k"), [(0.6, 0), (0.95, 0), (1.0, 1), (1.0, 4), (0.8, 3), (0.01, 0)])
def test_top_p_and_top_k_against_a_loop(top_p: float, top_k: int) -> None:
    logits = 2 * torch.randn(6, 17, generator=torch.Generator().manual_seed(0))
    log_p, config = logits.log_softmax(-1), GenerationConfig(top_p=top_p, top_k=top_k)
    grid = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    for row in range(6):
        p = logits[row].double().softmax(-1).tolist()
        kept = kept_by_hand(p, top_p, top_k)
        tokens, lost = choose_tokens(log_p[row].expand(400, -1), grid, config)
        mass = sum(p[token] for token in kept)
        assert float(lost[0]) == pytest.approx(1 - mass, abs=1e-6)
        counts = torch.bincount(tokens, minlength=17)
        assert set(counts.nonzero().flatten().tolist()) <= kept
        for token in kept:  # an even grid of uniforms hits each token in proportion to its renormalised probability
            assert abs(int(counts[token]) - 400 * p[token] / mass) <= 1


def test_P4_truncated_mass_is_the_mean_over_sampled_tokens(backbones: dict[str, Backbone]) -> None:
    policy = with_critic(backbones["qwen2"])
    assert sampled(policy, GenerationConfig(max_new_tokens=5)).truncated_mass == pytest.approx(0, abs=1e-6)
    trajectory = sampled(policy, GenerationConfig(max_new_tokens=5, top_k=2, batch_size=4))
    with torch.no_grad(), policy.backbone.using("policy"):
        lost = []
        for prompt, answer in zip(PROMPTS, trajectory.responses(), strict=True):
            p = policy.backbone.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].softmax(-1)
            lost += (1 - p.topk(2).values.sum(-1)).tolist()
    assert trajectory.truncated_mass == pytest.approx(sum(lost) / len(lost), abs=1e-5)


def test_frequencies_match_the_probabilities(backbones: dict[str, Backbone]) -> None:
    backbone, count = backbones["qwen2"], 4000
    config = GenerationConfig(max_new_tokens=1, temperature=1.3, batch_size=count)
    first = sampled(Policy(backbone, None), config, [[5, 9]] * count, seed=5)
    with torch.no_grad():
        p = (backbone.model(torch.tensor([[5, 9]])).logits[0, -1] / 1.3).double().softmax(-1).numpy()
    counts = np.bincount(first.response_ids_BR[:, 0].numpy(), minlength=len(p))
    rare = p * count < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(p[~rare], p[rare].sum()) * count
    assert rare.sum() < len(p) / 2
    assert chisquare(observed, expected).pvalue > 0.01


def test_temperature_zero_takes_the_likeliest_and_scores_it_at_temperature_one(backbone: Backbone) -> None:
    policy = with_critic(backbone)
    greedy = sampled(policy, GenerationConfig(max_new_tokens=4, temperature=0))
    assert_same_answers(greedy, sampled(policy, GenerationConfig(max_new_tokens=4, temperature=0), seed=9))
    with torch.no_grad():
        again = policy.response_statistics(
            greedy.input_ids_BT, greedy.attention_mask_BT, greedy.response_mask_BR, greedy.temperature
        )
    torch.testing.assert_close(greedy.logprobs_BR, again.logprobs_BR, atol=1e-4, rtol=0)


def test_a_trajectory_says_at_which_temperature_and_weights_it_was_drawn(backbones: dict[str, Backbone]) -> None:
    sampler = Sampler(Policy(backbones["qwen2"], None), GenerationConfig(max_new_tokens=2, temperature=0.5), [1])
    sampler.weights_version = 7
    drawn = sampler.sample(PROMPTS, 0)
    assert (drawn.temperature, drawn.weights_version) == (0.5, 7)
    assert drawn.prompts() == PROMPTS
    assert replace(drawn, weights_version=8).weights_version == 8
