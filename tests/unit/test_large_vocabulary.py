"""With 150,000 tokens in the vocabulary no (B, T, V) tensor exists: bytes alive at once, against the plain way.

The chunk is made small (14 rows of logits), so that a few hundred positions stand for the thousands of a real batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from live_bytes import LiveBytes
from tiny_backbones import add_trained_adapter, random_prompts, tiny_backbone, word_tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.algo import logprobs as logprobs_module
from rlhf.algo.sft_loss import sft_loss
from rlhf.data.chat import join
from rlhf.data.collate import Batch, collate_packed, pad_left, pad_right, pair_batch
from rlhf.data.preference_dataset import PreferenceExample
from rlhf.data.rows import PreferenceRow
from rlhf.models import decoding
from rlhf.models.backbone import Backbone
from rlhf.models.decoding import GenerationConfig, decode
from rlhf.models.policy import Policy, masked_logprobs, response_logprobs
from rlhf.models.reference import Reference
from rlhf.models.value_head import ValueHead
from rlhf.recipes.dpo import summed_logprobs

VOCABULARY, WIDTH = 150_000, 8
CHUNK = 14 * VOCABULARY  # logits
CHUNK_BYTES = 4 * CHUNK
# Logits, their softmax, a product of the two and slopes of each: what one chunk may need at once.
CHUNKS_AT_ONCE = 7
ANSWERS = [[3, 4, 5, 6, 7, 8, 9, 1]] * 12
ROWS = [join(prompt, answer) for prompt, answer in zip(random_prompts(12, longest=3), ANSWERS, strict=True)]
PAIRS = [
    PreferenceExample(prompt, answer, answer[::-1], None, PreferenceRow("p", "c", "r"))
    for prompt, answer in zip(random_prompts(6, longest=3), ANSWERS[:6], strict=True)
]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=1, max_position_embeddings=64, **shape)
    )
    found = Backbone(model, word_tokenizer(), "wide")
    add_trained_adapter(found, "policy")
    found.train_only(["policy"])
    return found


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs_module, "MAX_LOGITS", CHUNK)
    monkeypatch.setattr(decoding, "MAX_LOGITS", CHUNK)
    monkeypatch.setattr(decoding, "MAX_FLOAT64", CHUNK // 4)


def measured(work: Callable[[], object]) -> LiveBytes:
    with LiveBytes() as memory:
        work()
    return memory


def plain_loss(backbone: Backbone, batch: Batch) -> Tensor:
    """The plain way: logits of every position, a log-softmax of them all."""
    with backbone.using("policy"):
        logits_BTV = backbone.model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
    logprobs_BTV = logits_BTV[:, :-1].float().log_softmax(dim=-1)
    picked_BT = logprobs_BTV.gather(-1, batch.input_ids_BT[:, 1:].unsqueeze(-1)).squeeze(-1)
    return -(picked_BT * batch.loss_mask_BT[:, 1:]).sum()


def sft(backbone: Backbone, batch: Batch) -> Tensor:
    logprobs_BT = masked_logprobs(
        backbone, "policy", batch.input_ids_BT, batch.attention_mask_BT, batch.loss_mask_BT, batch.position_ids_BT
    )
    return sft_loss(logprobs_BT, 1)


def rollout(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The rows as a rollout has them: padded on the left, the last eight columns are the answer."""
    padded = pad_left([row.input_ids for row in ROWS], 0)
    return padded.input_ids_BP, padded.attention_mask_BP, torch.ones(len(ROWS), 8, dtype=torch.bool)


def ppo(backbone: Backbone, batch: Batch) -> Tensor:
    torch.manual_seed(0)
    head = ValueHead(backbone.width)
    nn.init.normal_(head.last.weight)
    found = Policy(backbone, "policy", head).response_statistics(*rollout(batch), 0.7)
    assert found.values_BR is not None
    return found.logprobs_BR.sum() + 0.1 * found.entropy_BR.sum() + found.values_BR.sum()


def dpo(backbone: Backbone, batch: Batch) -> Tensor:
    chosen, rejected = summed_logprobs(backbone, "policy", pair_batch(PAIRS, 0).batch).chunk(2)
    return -(chosen - rejected).sum()


LOSSES: dict[str, Callable[[Backbone, Batch], Tensor]] = {"sft": sft, "dpo": dpo, "ppo": ppo}


@pytest.fixture(scope="module")
def plain(backbone: Backbone) -> LiveBytes:
    return measured(lambda: plain_loss(backbone, pad_right(ROWS, 0)).backward())


@pytest.mark.parametrize("name", LOSSES)
def test_training_holds_a_few_chunks_of_logits(backbone: Backbone, plain: LiveBytes, name: str) -> None:
    memory = measured(lambda: LOSSES[name](backbone, pad_right(ROWS, 0)).backward())
    assert memory.largest <= CHUNK_BYTES
    assert memory.peak < CHUNKS_AT_ONCE * CHUNK_BYTES
    assert plain.largest > 8 * CHUNK_BYTES and plain.peak > 3 * 8 * CHUNK_BYTES


def test_what_it_costs_does_not_grow_with_the_batch(backbone: Backbone) -> None:
    """Twice the rows add their hidden states, a hundredth of the logits' bytes."""
    peaks = [measured(lambda rows=rows: sft(backbone, pad_right(rows, 0)).backward()).peak for rows in (ROWS, 2 * ROWS)]
    assert peaks[1] - peaks[0] < 0.02 * CHUNK_BYTES


def test_packed_rows_too(backbone: Backbone) -> None:
    memory = measured(lambda: sft(backbone, collate_packed([ROWS[:6], ROWS[6:]], 0)).backward())
    assert memory.largest <= CHUNK_BYTES and memory.peak < CHUNKS_AT_ONCE * CHUNK_BYTES


def test_the_loss_is_that_of_the_plain_way(backbone: Backbone) -> None:
    batch = pad_right(ROWS, 0)
    losses = [sft(backbone, batch), plain_loss(backbone, batch)]
    gradients = []
    for loss in losses:
        backbone.model.zero_grad()
        loss.backward()
        gradients.append([p.grad.clone() for p in backbone.parameters() if p.grad is not None])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_the_reference_holds_a_few_chunks(backbone: Backbone) -> None:
    ids, mask, response = rollout(pad_right(ROWS, 0))
    for work in (
        lambda: Reference(backbone, None).logprobs(ids, mask, response, 1.0),
        lambda: response_logprobs(backbone, "policy", ids, mask, response, 0.5),
    ):
        with torch.no_grad():
            memory = measured(work)
        assert memory.largest <= CHUNK_BYTES and memory.peak < CHUNKS_AT_ONCE * CHUNK_BYTES


DRAWS: list[tuple[dict[str, float], int, int]] = [({}, 40, 2), ({"temperature": 0.0}, 40, 2), ({"top_p": 0.9}, 15, 1)]


@pytest.mark.parametrize(("settings", "rows", "width"), DRAWS, ids=str)
def test_decoding_looks_at_the_last_position_of_a_chunk_of_rows(
    backbone: Backbone, settings: dict[str, float], rows: int, width: int
) -> None:
    config = GenerationConfig.model_validate({"max_new_tokens": width, "merge_adapter": False, **settings})
    uniforms = torch.rand(rows, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    peaks = []
    for prompt_width in (2, 20):
        ids = torch.randint(3, 26, (rows, prompt_width), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids, dtype=torch.bool)
        memory = measured(partial(decode, backbone, "policy", ids, mask, uniforms, config, [1]))
        assert memory.largest <= CHUNK_BYTES
        assert memory.peak < CHUNKS_AT_ONCE * CHUNK_BYTES
        peaks.append(memory.peak)
    assert peaks[1] - peaks[0] < 0.1 * CHUNK_BYTES  # eighteen more positions of the rows have no logits


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_p": 0.5, "top_k": 4}], ids=str)
def test_chunks_draw_what_the_whole_would(settings: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    small = tiny_backbone("llama")
    config = GenerationConfig.model_validate({"max_new_tokens": 6, **settings})
    uniforms = torch.rand(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prompts = pad_left(random_prompts(9), 0)
    found = []
    for logits, doubles in [(10**6, 10**6), (4 * small.vocab_size, small.vocab_size)]:
        monkeypatch.setattr(decoding, "MAX_LOGITS", logits)
        monkeypatch.setattr(decoding, "MAX_FLOAT64", doubles)
        found.append(
            decode(small, None, prompts.input_ids_BP, prompts.attention_mask_BP, uniforms, config, [1], ValueHead(32))
        )
    whole, chunks = found
    assert torch.equal(whole.response_ids_NR, chunks.response_ids_NR)
    assert torch.equal(whole.response_mask_NR, chunks.response_mask_NR)
    torch.testing.assert_close(whole.logprobs_NR, chunks.logprobs_NR, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.entropy_NR, chunks.entropy_NR, atol=1e-5, rtol=0)
    assert whole.truncated_mass == pytest.approx(chunks.truncated_mass, abs=1e-6)


def test_a_chunk_is_64_mebibytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 4 * logprobs_module.MAX_LOGITS == 64 * 2**20
