"""Padding, pairs, packing and batches by tokens; the epoch order."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from rlhf.data.chat import TokenExample
from rlhf.data.collate import batches_by_tokens, collate_packed, pack, pad_left, pad_right, pair_batch
from rlhf.data.formats import PreferenceRow
from rlhf.data.order import epoch_order
from rlhf.data.preference_dataset import PreferenceExample
from rlhf.infra.errors import UserError

PAD = 0
LONG = TokenExample([5, 6, 7, 8, 2], [False, False, True, True, True])
SHORT = TokenExample([9, 4, 2], [False, True, True])


def test_pad_right_by_hand() -> None:
    batch = pad_right([LONG, SHORT], PAD)
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, 8, 2], [9, 4, 2, 0, 0]]
    assert batch.attention_mask_BT is not None
    assert batch.attention_mask_BT.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert batch.loss_mask_BT.tolist() == [[False, False, True, True, True], [False, True, True, False, False]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert batch.num_loss_tokens == 5
    assert batch.loss_mask_BT.dtype == batch.attention_mask_BT.dtype == torch.bool
    assert batch.input_ids_BT.dtype == batch.position_ids_BT.dtype == torch.long


def test_T2_real_eos_stays_trained_when_eos_pads() -> None:
    eos = 2
    with_eos, with_pad = pad_right([LONG, SHORT], eos), pad_right([LONG, SHORT], PAD)
    trained_ends = (with_eos.input_ids_BT == eos) & with_eos.loss_mask_BT
    assert trained_ends.sum(dim=1).tolist() == [1, 1]
    assert torch.equal(with_eos.loss_mask_BT, with_pad.loss_mask_BT)
    assert torch.equal(with_eos.attention_mask_BT, with_pad.attention_mask_BT)  # type: ignore[arg-type]


def test_the_first_token_is_never_trained() -> None:
    everything = TokenExample([3, 4, 5], [True, True, True])
    assert pad_right([everything], PAD).loss_mask_BT.tolist() == [[False, True, True]]
    packed = collate_packed([[everything, everything]], PAD)
    assert packed.loss_mask_BT.tolist() == [[False, True, True, False, True, True]]


def test_pad_left_by_hand() -> None:
    batch = pad_left([[5, 6, 7], [9]], PAD)
    assert batch.input_ids_BP.tolist() == [[5, 6, 7], [0, 0, 9]]
    assert batch.attention_mask_BP.tolist() == [[True, True, True], [False, False, True]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]


def test_pairs_stand_chosen_first() -> None:
    row = PreferenceRow("p", "c", "r")
    examples = [
        PreferenceExample([1, 2], [3, 9], [4, 5, 9], 0.5, row),
        PreferenceExample([6], [7, 9], [8, 9], None, row),
    ]
    pairs = pair_batch(examples, PAD)
    assert pairs.batch.input_ids_BT.tolist() == [[1, 2, 3, 9, 0], [6, 7, 9, 0, 0], [1, 2, 4, 5, 9], [6, 8, 9, 0, 0]]
    assert pairs.batch.loss_mask_BT.sum(dim=1).tolist() == [2, 2, 3, 2]
    assert pairs.margins_B.tolist() == [0.5, 0.0]
    assert pairs.num_pairs == 2


def test_packing_by_hand() -> None:
    batch = collate_packed([[LONG, SHORT], [SHORT]], PAD)
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, 8, 2, 9, 4, 2], [9, 4, 2, 0, 0, 0, 0, 0]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 0, 0, 0, 0, 0]]
    assert batch.attention_mask_BT is None
    assert batch.num_loss_tokens == 7


def test_to_moves_every_tensor() -> None:
    meta = torch.device("meta")
    assert pad_right([LONG], PAD).to(meta).attention_mask_BT.device == meta  # type: ignore[union-attr]
    packed = collate_packed([[LONG]], PAD).to(meta)
    assert packed.attention_mask_BT is None
    assert {packed.input_ids_BT.device, packed.loss_mask_BT.device, packed.position_ids_BT.device} == {meta}
    assert pad_left([[1]], PAD).to(meta).input_ids_BP.device == meta
    pairs = pair_batch([PreferenceExample([1], [2], [3], None, PreferenceRow("p", "c", "r"))], PAD).to(meta)
    assert pairs.margins_B.device == pairs.batch.input_ids_BT.device == meta


def test_an_empty_batch_is_refused() -> None:
    for make in (pad_right, pad_left, pair_batch):
        with pytest.raises(UserError, match="no rows"):
            make([], PAD)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_packed_losses_equal_unpacked_ones(family: str, attention: str) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    examples = []
    for length in (12, 3, 7, 9, 1, 5):
        ids = torch.randint(3, 50, (length,), generator=generator).tolist()
        examples.append(TokenExample(ids, [index >= length // 2 for index in range(length)]))
    model = tiny_model(family, attention)
    groups = pack(examples, 16)
    assert len(groups) == 3  # 37 tokens do not fit into two rows of 16
    packed = collate_packed([[examples[i] for i in group] for group in groups], PAD)
    with torch.no_grad():
        packed_logits = model(
            input_ids=packed.input_ids_BT,
            attention_mask=packed.attention_mask_BT,
            position_ids=packed.position_ids_BT,
            use_cache=False,
        ).logits
        # Outside expectation: each example alone, without padding, masks or position ids.
        alone = [
            nll(model(torch.tensor([example.input_ids])).logits[0], example.input_ids, example.loss_mask)
            for example in examples
        ]
    packed_sum = nll(packed_logits, packed.input_ids_BT, packed.loss_mask_BT)
    assert torch.allclose(packed_sum, torch.stack(alone).sum(), atol=1e-4)
    # Padding on the right gives the same too.
    batch = pad_right(examples, PAD)
    with torch.no_grad():
        logits = model(
            input_ids=batch.input_ids_BT,
            attention_mask=batch.attention_mask_BT,
            position_ids=batch.position_ids_BT,
        ).logits
    assert torch.allclose(nll(logits, batch.input_ids_BT, batch.loss_mask_BT), torch.stack(alone).sum(), atol=1e-4)


def nll(logits: Tensor, ids: Tensor | list[int], mask: Tensor | list[bool]) -> Tensor:
    """Summed negative log-likelihood of the masked tokens, each predicted at the place before it."""
    ids, mask = torch.as_tensor(ids), torch.as_tensor(mask)
    losses = functional.cross_entropy(logits[..., :-1, :].flatten(0, -2), ids[..., 1:].flatten(), reduction="none")
    return (losses * mask[..., 1:].flatten()).sum()


def tiny_model(family: str, attention: str) -> PreTrainedModel:
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=2, attn_implementation=attention
        )
        return GPT2LMHeadModel(config).eval()
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            attn_implementation=attention,
        )
    ).eval()


def test_pack_keeps_every_example_once_within_the_length_and_wastes_little() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 300, (500,), generator=generator).tolist()
    examples = [TokenExample([1] * length, [True] * length) for length in lengths]
    groups = pack(examples, 512)
    assert sorted(index for group in groups for index in group) == list(range(500))
    assert max(sum(lengths[i] for i in group) for group in groups) <= 512
    assert len(groups) <= sum(lengths) / 512 * 1.05 + 1
    assert pack([], 512) == []


def test_pack_fills_a_gap_by_hand() -> None:
    examples = [TokenExample([1] * length, [True] * length) for length in (6, 5, 5, 4)]
    assert sorted(sorted(group) for group in pack(examples, 10)) == [[0, 3], [1, 2]]
    with pytest.raises(UserError, match="6 tokens"):
        pack(examples, 5)


def test_batches_by_tokens_by_hand() -> None:
    # A group costs 64 / 16 = 4: 3 x 12 + 4 is less than 10 + 11 + 12 + 12; 40 beside them would pad too much.
    assert batches_by_tokens([12, 10, 40, 11], 64) == [[1, 3, 0], [2]]
    assert batches_by_tokens([4, 4, 4], 8) in ([[0, 1], [2]], [[0], [1, 2]])
    assert batches_by_tokens([20], 8) == [[0]]
    assert batches_by_tokens([], 8) == []


@pytest.mark.parametrize("seed", range(8))
def test_batches_by_tokens_are_the_cheapest_cut_of_the_sorted_rows(seed: int) -> None:
    numbers = random.Random(seed)
    lengths, limit = [numbers.randint(1, 40) for _ in range(8)], numbers.choice([16, 48, 96])

    def cost(groups: list[list[int]]) -> float:
        sizes = [(len(group), max(lengths[i] for i in group)) for group in groups]
        if any(rows * longest > limit and rows > 1 for rows, longest in sizes):
            return math.inf
        return sum(rows * longest + limit / 16 for rows, longest in sizes)

    order = sorted(range(8), key=lambda i: lengths[i])
    cuts = itertools.product([False, True], repeat=7)
    every = []
    for cut in cuts:
        groups = [[order[0]]]
        for index, new in zip(order[1:], cut, strict=True):
            groups.append([index]) if new else groups[-1].append(index)
        every.append(cost(groups))
    found = batches_by_tokens(lengths, limit)
    assert sorted(i for group in found for i in group) == list(range(8))
    assert cost(found) == pytest.approx(min(every))


def test_epoch_order_is_a_permutation_that_depends_on_seed_and_epoch_only() -> None:
    orders = [epoch_order(100, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    code = "from rlhf.data.order import epoch_order; print(epoch_order(100, 1, 1))"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert elsewhere.stdout.strip() == str(orders[3])
