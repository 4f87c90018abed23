"""The doctor's checks: each is green on a sound part and turns colour on a planted fault."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_backbones import Family, add_trained_adapter, random_prompts, tiny_backbone
from tiny_tokenizers import CHATML, FAMILIES, byte_level, family
from torch import Tensor, nn

from rlhf.algo.trainer import OptimizerConfig
from rlhf.data.chat import ChatEncoder, TokenExample, join
from rlhf.data.collate import Batch, pad_right
from rlhf.data.rows import Prompt
from rlhf.data.token_dataset import FilterReport
from rlhf.eval.doctor import model_checks, reward_checks, row_checks, token_checks
from rlhf.eval.doctor.finding import Finding, Gap, worst
from rlhf.eval.doctor.show import show
from rlhf.models.backbone import Backbone
from rlhf.models.decoding import GenerationConfig
from rlhf.models.policy import Policy, masked_logprobs
from rlhf.models.reward_model import RewardModel
from rlhf.models.scoring import HEAD_FILE
from rlhf.recipes.doctor import Diagnosis, StageFinding
from rlhf.rollout.sampler import Sampler
from rlhf.rollout.trajectory import Trajectory

HIDING = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'assistant' %}")
QUESTION = [{"role": "user", "content": "What is 2+2?"}]
PAIRS: list[tuple[Prompt, str]] = [(QUESTION, "The answer is 4."), (QUESTION, "Yes, of course I can help you.")]


# ---------------------------------------------------------------------- tokens


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    """ChatML, with `<|im_end|>` behind a turn and `<|endoftext|>` as EOS and to pad."""
    tokenizer = family("chatml")
    tokenizer.pad_token = tokenizer.eos_token
    return ChatEncoder(tokenizer)


def encoded(encoder: ChatEncoder) -> token_checks.Encode:
    return lambda prompt, answer: join(encoder.prompt_ids(prompt), encoder.response_ids(prompt, answer))


def examples_of(encoder: ChatEncoder) -> list[TokenExample]:
    return [encoded(encoder)(prompt, answer) for prompt, answer in PAIRS]


def masked_by(example: TokenExample, keep: Callable[[int], bool]) -> TokenExample:
    """The example with every token untrained that `keep` refuses."""
    mask = [trained and keep(token) for token, trained in zip(example.input_ids, example.loss_mask, strict=True)]
    return TokenExample(example.input_ids, mask)


def test_T2_masks_made_from_lengths_are_green_and_those_from_the_pad_token_red() -> None:
    encoder = ChatEncoder(family("zephyr"))  # a template that ends turns with EOS
    rows, eos = examples_of(encoder), encoder.tokenizer.eos_token_id

    def sound(pad: int) -> Batch:
        return pad_right(rows, pad)

    def attention_from_pad(pad: int) -> Batch:
        batch = pad_right(rows, pad)
        return replace(batch, attention_mask_BT=batch.input_ids_BT != pad)

    def loss_from_pad(pad: int) -> Batch:
        batch = pad_right(rows, pad)
        return replace(batch, loss_mask_BT=batch.loss_mask_BT & (batch.input_ids_BT != pad))

    def check(collate: Callable[[int], Batch], rows: Sequence[TokenExample] = rows) -> str:
        return token_checks.masks_survive_padding(rows, collate, encoder.stop_token_ids, eos).level

    assert check(sound) == "green"
    assert check(attention_from_pad) == "red"
    assert check(loss_from_pad) == "red"
    # The encoder itself builds its mask from the pad token: the batch keeps what it was given, and the end is gone.
    lossy = [masked_by(row, lambda token: token != eos) for row in rows]
    assert check(lambda pad: pad_right(lossy, pad), lossy) == "red"


def test_T3_an_answer_must_end_in_a_stop_token(encoder: ChatEncoder) -> None:
    tokenizer, stops, rows = encoder.tokenizer, encoder.stop_token_ids, examples_of(encoder)
    check = token_checks.answers_end_at_a_stop
    assert check(rows, stops, tokenizer, chat=True).level == "green"
    endless = [masked_by(row, lambda token: token not in stops) for row in rows]
    assert check([rows[0], endless[1]], stops, tokenizer, chat=True).level == "red"
    ended_inside = TokenExample([5, 6, stops[0], 7, stops[0]], [False, True, True, True, True])
    assert check([*rows, ended_inside], stops, tokenizer, chat=True).level == "yellow"


def test_T3_turns_of_one_conversation_each_have_their_own_end(encoder: ChatEncoder) -> None:
    turns = [*QUESTION, {"role": "assistant", "content": "4."}, *QUESTION, {"role": "assistant", "content": "4."}]
    example = encoder.conversation(turns)
    found = token_checks.answers_end_at_a_stop([example], encoder.stop_token_ids, encoder.tokenizer, chat=True)
    assert found.level == "green"


def test_T3_a_template_without_end_of_turn_is_a_risk() -> None:
    encoder = ChatEncoder(family("no_end"))
    check = token_checks.answers_end_at_a_stop
    found = check(examples_of(encoder), encoder.stop_token_ids, encoder.tokenizer, chat=True)
    assert found.level == "yellow"
    assert "'</s>'" in found.seen
    # Rows of raw text never meet the template.
    assert check(examples_of(encoder), encoder.stop_token_ids, encoder.tokenizer, chat=False).level == "green"


def test_T4_an_end_in_the_prompt_must_not_end_the_mask(encoder: ChatEncoder) -> None:
    eos = encoder.tokenizer.eos_token_id

    def stops_at_first_end(prompt: Prompt, answer: str) -> TokenExample:
        whole = encoded(encoder)(prompt, answer)
        end = whole.input_ids.index(eos) if eos in whole.input_ids else len(whole.input_ids)
        return TokenExample(whole.input_ids, [t and at <= end for at, t in enumerate(whole.loss_mask)])

    check = token_checks.end_in_prompt_changes_no_mask
    assert check(encoded(encoder), PAIRS, "<|endoftext|>").level == "green"
    assert check(stops_at_first_end, PAIRS, "<|endoftext|>").level == "red"
    raw: list[tuple[Prompt, str]] = [("Human: Hi\n\nAssistant:", "Yes.")]
    assert check(encoded(encoder), raw, "<|endoftext|>").level == "green"
    assert check(stops_at_first_end, raw, "<|endoftext|>").level == "red"


@pytest.mark.parametrize(
    ("rows", "retokenised", "level"),
    [
        ([[1, 5, 6], [1, 7]], [[1, 5]], "green"),
        ([[1, 1, 5], [1, 7]], [], "red"),
        ([[1, 5, 1, 6]], [], "red"),
        ([[1, 5]], [[1, 1, 5]], "yellow"),
    ],
)
def test_T6_bos_is_counted_on_every_path(rows: list[list[int]], retokenised: list[list[int]], level: str) -> None:
    paths = {"rollout": [[1, 4]], "SFT": rows}
    assert row_checks.one_bos_at_most(paths, retokenised, 1, [2]).level == level


def test_T6_where_bos_ends_answers_too_only_the_start_counts() -> None:
    rows = {"SFT": [[2, 5, 6, 2]]}
    assert row_checks.one_bos_at_most(rows, [], 2, [2]).level == "green"
    assert row_checks.one_bos_at_most({"SFT": [[2, 2, 5]]}, [], 2, [2]).level == "red"
    assert row_checks.one_bos_at_most(rows, [], None, [2]).level == "green"


def test_T8_a_template_that_hides_answers_is_seen_before_anything_is_encoded() -> None:
    found = row_checks.template_shows_answers(byte_level(["<|im_end|>"], "<|im_end|>", template=HIDING))
    assert found.level == "red"
    refusing = "{{ raise_exception('no chats here') }}"
    assert row_checks.template_shows_answers(byte_level(["</s>"], "</s>", template=refusing)).level == "red"
    for name in FAMILIES:
        assert row_checks.template_shows_answers(family(name)).level == "green"
    assert row_checks.template_shows_answers(byte_level(["</s>"], "</s>")).level == "green"


def test_T8_an_empty_mask_is_red_and_another_text_a_risk(encoder: ChatEncoder) -> None:
    def check(encode: token_checks.Encode) -> str:
        return row_checks.answers_are_trained(encode, PAIRS, encoder.tokenizer, encoder.stop_token_ids).level

    def only_the_end(prompt: Prompt, answer: str) -> TokenExample:
        return masked_by(encoded(encoder)(prompt, answer), lambda token: token in encoder.stop_token_ids)

    def only_half(prompt: Prompt, answer: str) -> TokenExample:
        return encoded(encoder)(prompt, answer[: len(answer) // 2])

    assert check(encoded(encoder)) == "green"
    assert check(only_the_end) == "red"
    assert check(only_half) == "yellow"


@pytest.mark.parametrize(
    ("dropped", "notes", "longest", "level"),
    [
        ({}, {}, 40, "red"),  # two rows are over the limit and nobody says so
        ({"too_long": 2}, {}, 40, "yellow"),
        ({"prompt_too_long": 2}, {}, 40, "yellow"),
        ({}, {"prompt_shortened": 2}, 50, "green"),
        ({"too_long": 2}, {}, 65, "red"),  # the model has 64 positions
    ],
)
def test_T10_long_rows(dropped: dict[str, int], notes: dict[str, int], longest: int, level: str) -> None:
    report = FilterReport(10, 8, dropped=dropped, notes=notes)
    lengths = [10, 20, 30, 40, 10, 20, 30, 40, 60, 70]
    found = row_checks.long_rows_are_counted(lengths, report, 50, longest, 64, "data.max_length")
    assert found.level == level


def test_T10_a_few_lost_rows_are_a_number_and_no_warning() -> None:
    report = FilterReport(200, 199, dropped={"too_long": 1})
    found = row_checks.long_rows_are_counted([10] * 199 + [90], report, 50, 10, None, "data.max_length")
    assert (found.level, found.seen[:28]) == ("green", "1 of 200 rows (0.5%) are lon")
    assert row_checks.no_row_is_left("none", [90, 95], 50, "data.max_length").level == "red"


# ---------------------------------------------------------------------- rollouts


def rollout(seed: int = 0, width: int = 12) -> tuple[Policy, Trajectory]:
    backbone = tiny_backbone("gpt2")
    policy = Policy(backbone, None)
    sampler = Sampler(policy, GenerationConfig(max_new_tokens=width), [backbone.tokenizer.eos_token_id])
    return policy, sampler.sample(random_prompts(8), seed)


def scored(policy: Policy, trajectory: Trajectory) -> Tensor:
    """Log-probs (B, R) of the samples under a policy."""
    ids, attended, mask = trajectory.input_ids_BT, trajectory.attention_mask_BT, trajectory.response_mask_BR
    return policy.response_statistics(ids, attended, mask, trajectory.temperature).logprobs_BR


def test_T3_samples_end_at_a_stop_and_a_policy_that_never_stops_is_a_risk() -> None:
    policy, trajectory = rollout(width=40)
    end = policy.backbone.tokenizer.eos_token_id
    assert 0 < int(trajectory.finished_B.sum()) < len(trajectory)
    check = token_checks.samples_end_at_a_stop
    assert check(trajectory, [end], 0.01, 27).level == "green"
    # Sampling that does not know the stop token: it stands inside, and the answer goes on.
    deaf = Sampler(policy, GenerationConfig(max_new_tokens=40), [27]).sample(random_prompts(8), 0)
    assert check(deaf, [end], 0.01, 27).level == "red"
    unstoppable = replace(trajectory, response_ids_BR=torch.full_like(trajectory.response_ids_BR, 5))
    unstoppable = replace(unstoppable, finished_B=torch.zeros_like(trajectory.finished_B))
    assert check(unstoppable, [end], 1e-6, 27).level == "yellow"
    # As likely as any other token: with longer answers it would come.
    assert check(unstoppable, [end], 1 / 27, 27).level == "green"


def test_T3_samples_behind_a_template_without_end_of_turn() -> None:
    policy, trajectory = rollout(width=40)
    stops = [policy.backbone.tokenizer.eos_token_id]
    encoder = ChatEncoder(family("no_end"))
    check = token_checks.samples_end_at_a_stop
    # The template is asked in the terms of its own tokenizer, whose stop token no sample holds here.
    assert check(trajectory, encoder.stop_token_ids, 1.0, 27, encoder.tokenizer).level == "yellow"
    assert check(trajectory, stops, 1.0, 27, None).level == "green"


def test_T3_the_probability_of_stopping_is_that_behind_the_last_tokens() -> None:
    policy, trajectory = rollout(width=40)
    place, end = int(trajectory.lengths_B.argmax()), policy.backbone.tokenizer.eos_token_id
    row = [*trajectory.prompts()[place], *trajectory.responses()[place]]
    with torch.no_grad():
        logits = policy.backbone.model(torch.tensor([row])).logits[0, -1]
    longest = trajectory.select(torch.tensor([place]))
    assert model_checks.stop_probability(policy, longest, [end, 5]) == pytest.approx(
        float(logits.softmax(-1)[[end, 5]].sum()), rel=1e-4
    )


def test_T4_a_rollout_behind_an_end_in_the_prompt() -> None:
    policy, _ = rollout()
    end = policy.backbone.tokenizer.eos_token_id
    sampler = Sampler(policy, GenerationConfig(max_new_tokens=6), [end])

    def sound(prompts: Sequence[Sequence[int]]) -> Trajectory:
        return sampler.sample(prompts, 0)

    def ends_at_first_end(prompts: Sequence[Sequence[int]]) -> Trajectory:
        drawn = sampler.sample(prompts, 0)
        ended_B = (drawn.prompt_ids_BP == end).any(dim=1)
        return replace(drawn, response_mask_BR=drawn.response_mask_BR & ~ended_B.unsqueeze(1))

    check = token_checks.end_in_prompt_changes_no_rollout
    assert check(sound, random_prompts(4), [end]).level == "green"
    assert check(ends_at_first_end, random_prompts(4), [end]).level == "red"


# ---------------------------------------------------------------------- forward passes


class NoPositions(Backbone):
    """Left padding pushes every position, as where no position ids are given."""

    def hidden(self, input_ids_BT: Tensor, *args: object, **kwargs: object) -> Tensor:  # type: ignore[override]
        mask = args[0] if args else None
        counted = torch.arange(input_ids_BT.shape[1]).expand(input_ids_BT.shape)
        return super().hidden(input_ids_BT, mask, counted, adapter=kwargs.get("adapter"))  # type: ignore[arg-type]


class NoMask(Backbone):
    """Padding is attended to."""

    def hidden(self, input_ids_BT: Tensor, *args: object, **kwargs: object) -> Tensor:  # type: ignore[override]
        return super().hidden(input_ids_BT, torch.ones_like(input_ids_BT), adapter=kwargs.get("adapter"))  # type: ignore[arg-type]


def answers(backbone: Backbone) -> list[TokenExample]:
    end = backbone.tokenizer.eos_token_id
    return [join(prompt, [4, 5, 6, end]) for prompt in random_prompts(5)]


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_T1_left_padding(kind: Family) -> None:
    sound = tiny_backbone(kind)
    rows = answers(sound)
    check = model_checks.left_padding_changes_nothing
    assert check(sound, None, rows).level == "green"
    assert check(NoMask(sound.model, sound.tokenizer, "x"), None, rows).level == "red"
    # Rotary positions count distances only: there a common shift is no fault.
    shifted = check(NoPositions(sound.model, sound.tokenizer, "x"), None, rows).level
    assert shifted == ("red" if kind == "gpt2" else "green")


def test_T1_rows_of_one_length_are_padded_too() -> None:
    sound = tiny_backbone("gpt2", spread=0.02)  # as weak as untrained weights are
    rows = [join([5, 6, 7], [8, 9]), join([9, 8, 7], [6, 5])]
    assert model_checks.left_padding_changes_nothing(sound, None, rows).level == "green"
    broken = NoPositions(sound.model, sound.tokenizer, "x")
    assert model_checks.left_padding_changes_nothing(broken, None, rows).level == "red"


def test_P2_dropout() -> None:
    backbone = tiny_backbone("gpt2", dropout=0.5)
    batch = pad_right(answers(backbone), 0)

    def forward() -> Tensor:
        return masked_logprobs(backbone, None, batch.input_ids_BT, batch.attention_mask_BT, batch.loss_mask_BT)

    assert model_checks.no_dropout(forward, backbone).level == "green"
    backbone.model.train()
    found = model_checks.no_dropout(forward, backbone)
    assert found.level == "red"
    assert "model.transformer.drop" in found.seen


def test_P1_the_first_ratio() -> None:
    policy, trajectory = rollout()
    check = model_checks.ratio_starts_at_one
    assert check(policy, trajectory, recomputes=False).level == "green"
    colder = replace(trajectory, temperature=0.7)  # sampled at 1, scored at 0.7
    assert check(policy, colder, recomputes=False).level == "red"
    assert check(policy, colder, recomputes=True).level == "green"
    slightly = replace(trajectory, logprobs_BR=trajectory.logprobs_BR + 5e-4)
    assert check(policy, slightly, recomputes=False).level == "yellow"


def test_P1_half_precision_is_bounded_by_the_mean() -> None:
    policy, trajectory = rollout()
    policy.backbone.dtype_name = "bf16"
    with torch.no_grad():
        exact = replace(trajectory, logprobs_BR=scored(policy, trajectory))
    noise = torch.zeros_like(exact.logprobs_BR)
    noise[0, 0] = 0.2  # one rare token, rounded badly
    check = model_checks.ratio_starts_at_one
    assert check(policy, replace(exact, logprobs_BR=exact.logprobs_BR + noise), recomputes=False).level == "green"
    assert check(policy, replace(exact, logprobs_BR=exact.logprobs_BR + 0.02), recomputes=False).level == "yellow"
    assert check(policy, replace(exact, logprobs_BR=exact.logprobs_BR + 0.05), recomputes=False).level == "red"


def test_P1_a_nan_is_red() -> None:
    policy, trajectory = rollout()
    broken = replace(trajectory, logprobs_BR=trajectory.logprobs_BR * float("nan"))
    assert model_checks.ratio_starts_at_one(policy, broken, recomputes=False).level == "red"


def test_P8_the_reference_is_what_the_policy_starts_from() -> None:
    backbone = tiny_backbone()
    add_trained_adapter(backbone, "sft")
    backbone.copy_adapter("sft", "policy")
    policy = Policy(backbone, "policy")
    trajectory = Sampler(policy, GenerationConfig(max_new_tokens=6), [1]).sample(random_prompts(4), 0)

    def under(adapter: str | None) -> Callable[[Trajectory], Tensor]:
        return lambda t: scored(Policy(backbone, adapter), t)

    check = model_checks.rollout_starts_at_reference
    assert check(policy, under("sft"), trajectory).level == "green"
    assert check(policy, under(None), trajectory).level == "red"  # anchored to the bare base
    pairs = model_checks.pairs_start_at_reference
    assert pairs(lambda: torch.tensor([-3.0, -4.0]), lambda: torch.tensor([-3.0, -4.0])).level == "green"
    assert pairs(lambda: torch.tensor([-3.0, -4.0]), lambda: torch.tensor([-3.0, -4.1])).level == "red"


@pytest.mark.parametrize(
    ("dtype", "rate", "compute", "num_steps", "level"),
    [
        (torch.float32, 1e-6, "fp32", 100, "green"),
        (torch.bfloat16, 1e-3, "bf16", 100, "green"),
        (torch.bfloat16, 1e-6, "bf16", 100, "red"),  # half a unit in the last place of 0.02 is 3e-5
        (torch.float32, 1e-12, "fp32", 100, "red"),
        (torch.float32, 1e-7, "bf16", 10, "yellow"),  # moves in fp32, and is gone once it is saved as bf16
        (torch.float32, 1e-7, "bf16", 100_000, "green"),
    ],
)
def test_O12_a_learning_rate_that_the_weights_swallow(
    dtype: torch.dtype, rate: float, compute: str, num_steps: int, level: str
) -> None:
    torch.manual_seed(0)
    weights = {
        "w": nn.Parameter((0.02 * torch.randn(64, 64)).to(dtype)),
        "bias": nn.Parameter(torch.zeros(64, dtype=dtype)),
    }
    before = weights["w"].detach().clone()
    config = OptimizerConfig(learning_rate=rate, warmup_ratio=0.5)
    found = model_checks.learning_rate_moves_weights(weights, config, num_steps, compute)  # type: ignore[arg-type]
    assert found.level == level
    assert torch.equal(weights["w"], before)  # tried on copies
    assert weights["w"].grad is None


# ---------------------------------------------------------------------- reward models


class LastColumn(RewardModel):
    """Reads the score at the last column, whatever is there."""

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
        return super().forward(input_ids_BT, torch.ones_like(input_ids_BT, dtype=torch.bool))


class BeforeTheEnd(RewardModel):
    """Takes EOS for padding and reads the score before it."""

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
        assert attention_mask_BT is not None
        return super().forward(input_ids_BT, attention_mask_BT & (input_ids_BT != self.tokenizer.eos_token_id))


class NoHeadInFile(RewardModel):
    """Saves a head that is not the trained one."""

    def save(self, folder: Path) -> None:
        trained, self.head = self.head, nn.Linear(self.backbone.width, 1, bias=False)
        super().save(folder)
        self.head = trained


class NoAdapterInFile(RewardModel):
    """Saves the adapter as it was at its start."""

    def save(self, folder: Path) -> None:
        self.backbone.add_adapter("fresh", self.backbone_lora())
        trained, self.adapter = self.adapter, "fresh"
        super().save(folder)
        self.adapter = trained

    def backbone_lora(self) -> object:
        from rlhf.models.lora import LoRAConfig

        return LoRAConfig()


def scored_rows(backbone: Backbone) -> list[list[int]]:
    return [row.input_ids for row in answers(backbone)]


@pytest.mark.parametrize(("kind", "level"), [(RewardModel, "green"), (LastColumn, "red"), (BeforeTheEnd, "yellow")])
def test_V8_a_score_belongs_to_its_answer_alone(kind: type[RewardModel], level: str) -> None:
    torch.manual_seed(0)
    backbone = tiny_backbone("gpt2")
    assert reward_checks.scores_ignore_the_batch(kind(backbone), scored_rows(backbone), "fp32").level == level


@pytest.mark.parametrize(("kind", "level"), [(RewardModel, "green"), (NoHeadInFile, "red"), (NoAdapterInFile, "red")])
def test_V9_head_and_adapter_come_back_from_disk(kind: type[RewardModel], level: str) -> None:
    torch.manual_seed(0)
    backbone = tiny_backbone()
    model = kind(backbone)
    parameters = model.trainable_parameters()
    before = {name: p.detach().clone() for name, p in parameters.items()}

    def load(folder: Path) -> RewardModel:
        return RewardModel.load(folder, backbone, "again")

    assert reward_checks.head_survives_saving(model, scored_rows(backbone), load, "fp32").level == level
    assert all(torch.equal(parameters[name], tensor) for name, tensor in before.items())


def test_V9_a_folder_without_its_head_file_is_red() -> None:
    backbone = tiny_backbone()
    model = RewardModel(backbone)

    def load(folder: Path) -> RewardModel:
        (folder / HEAD_FILE).unlink()
        return RewardModel.load(folder, backbone, "again")

    found = reward_checks.head_survives_saving(model, scored_rows(backbone), load, "fp32")
    assert found.level == "red"
    assert HEAD_FILE in found.seen


def test_V9_a_head_that_is_made_up_while_loading_differs_from_time_to_time() -> None:
    backbone, rows = tiny_backbone(), [[5, 6, 7], [8, 9]]
    kept = RewardModel(backbone, "one")

    def scores(model: reward_checks.AnyReward) -> Tensor:
        return torch.cat([model(torch.tensor([row])) for row in rows])

    made = iter(["two", "three"])
    assert reward_checks.head_survives_loading(lambda: kept, scores).level == "green"
    assert reward_checks.head_survives_loading(lambda: RewardModel(backbone, next(made)), scores).level == "red"


# ---------------------------------------------------------------------- findings


def test_gap_and_worst() -> None:
    one, other = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 2.5], [3.0, 9.0]])
    assert Gap.between(one, other) == Gap(5.0, 1.375)
    assert Gap.between(one, other, torch.tensor([[True, True], [True, False]])) == Gap(0.5, pytest.approx(1 / 6))
    assert Gap.between(torch.zeros(0), torch.zeros(0)) == Gap(0.0, 0.0)
    red, yellow = row_checks.BOS.red("a", "b"), row_checks.BOS.yellow("a", "b")
    assert (worst([]), worst([yellow]), worst([yellow, red, yellow])) == ("green", "yellow", "red")


def test_a_finding_is_one_line_with_what_it_breaks_and_its_fix() -> None:
    console = Console(width=60, soft_wrap=True, record=True, file=io.StringIO())
    show(console, row_checks.BOS.green("none [seen]"))
    show(console, Finding("T6", "title", "red", "two seen.", "the opening", "take one out."), "sft")
    assert console.export_text().splitlines() == [
        "green   T6     at most one beginning-of-sequence: none [seen]",
        "sft       red     T6     title: two seen. It would break: the opening. Fix: take one out",
    ]
    assert Diagnosis("sft", [StageFinding("sft", row_checks.BOS.red("a", "b"))], 1.0).level == "red"
