"""Prompts, answers and conversations as token ids: stop tokens, BOS, masks, on the templates people use."""

from __future__ import annotations

import pytest
from tiny_tokenizers import CHATML, FAMILIES, LLAMA3, NO_END, byte_level, family, metaspace

from rlhf.data.chat import ChatEncoder, prepare_tokenizer
from rlhf.infra.errors import UserError

USER = [{"role": "user", "content": "What is 2+2?"}]
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes, of course."},
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "The answer is 4."},
]
HH = "\n\nHuman: What is 2+2?\n\nAssistant:"


def text(encoder: ChatEncoder, ids: list[int]) -> str:
    return encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def runs(mask: list[bool]) -> list[tuple[bool, int]]:
    """Lengths of the stretches of equal values."""
    found: list[tuple[bool, int]] = []
    for value in mask:
        found.append((value, found.pop()[1] + 1) if found and found[-1][0] == value else (value, 1))
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_T3_the_last_trained_token_is_the_one_generation_stops_at(name: str) -> None:
    tokenizer = family(name)
    encoder = ChatEncoder(tokenizer)
    ids = encoder.response_ids(USER, "The answer is 4.")
    end = tokenizer.convert_tokens_to_ids(FAMILIES[name][4])
    assert ids[-1] == end
    assert ids.count(end) == 1
    assert end == encoder.stop_token_ids[0]
    assert tokenizer.eos_token_id in encoder.stop_token_ids
    assert len(encoder.stop_token_ids) == len({end, tokenizer.eos_token_id})
    assert encoder.decode(ids).endswith("The answer is 4.")


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        ("chatml", "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n", "4.<|im_end|>"),
        (
            "llama3",
            "<|begin|><|start_header_id|>user<|end_header_id|>\n\nWhat is 2+2?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "4.<|eot_id|>",
        ),
        ("mistral", "<s>[INST] What is 2+2? [/INST]", " 4.</s>"),
        ("zephyr", "<|user|>\nWhat is 2+2?</s>\n<|assistant|>\n", "4.</s>"),
        ("no_end", "user: What is 2+2?\nassistant: ", "4.</s>"),
        (
            "reasoning",
            "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
            "<think>\n\n</think>\n\n4.<|im_end|>",
        ),
        (
            "opened_thought",
            "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n",
            "4.<|im_end|>",
        ),
    ],
)
def test_prompt_and_answer_read_as_the_template_writes_them(name: str, prompt: str, answer: str) -> None:
    encoder = ChatEncoder(family(name))
    assert text(encoder, encoder.prompt_ids(USER)) == prompt
    assert encoder.render(USER) == prompt
    assert text(encoder, encoder.response_ids(USER, "4.")) == answer


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "zephyr"])
def test_T8_every_assistant_turn_is_trained_and_nothing_else(name: str) -> None:
    encoder = ChatEncoder(family(name))
    example = encoder.conversation(TALK, train_on="all")
    whole = encoder.tokenizer.apply_chat_template(TALK, tokenize=False)
    end = FAMILIES[name][4]
    assert text(encoder, example.input_ids) == whole.rstrip("\n")  # the newline behind the last turn stays out
    trained = [token for token, kept in zip(example.input_ids, example.loss_mask, strict=True) if kept]
    lead = " " if name == "mistral" else ""
    assert text(encoder, trained) == f"{lead}Yes, of course.{end}{lead}The answer is 4.{end}"
    assert [value for value, _ in runs(example.loss_mask)] == [False, True, False, True]
    assert example.loss_mask[-1]


def test_last_turn_only_and_one_turn_equal_prompt_plus_answer() -> None:
    encoder = ChatEncoder(family("chatml"))
    example = encoder.conversation(TALK, train_on="last")
    assert [value for value, _ in runs(example.loss_mask)] == [False, True]
    assert example.input_ids == encoder.prompt_ids(TALK[:3]) + encoder.response_ids(TALK[:3], "The answer is 4.")
    assert example.input_ids == encoder.conversation(TALK, train_on="all").input_ids
    both = encoder.conversation(TALK[:2])
    assert both.input_ids == encoder.prompt_ids(TALK[:1]) + encoder.response_ids(TALK[:1], "Yes, of course.")


def test_template_without_an_end_token_ends_the_last_turn_with_eos() -> None:
    encoder = ChatEncoder(family("no_end"))
    example = encoder.conversation(TALK)
    assert text(encoder, example.input_ids) == (
        "user: Hi\nassistant: Yes, of course.\nuser: What is 2+2?\nassistant: The answer is 4.</s>"
    )
    trained = [token for token, kept in zip(example.input_ids, example.loss_mask, strict=True) if kept]
    assert text(encoder, trained) == "Yes, of course.The answer is 4.</s>"


def test_template_that_rewrites_earlier_turns_still_marks_them() -> None:
    encoder = ChatEncoder(family("reasoning"))
    example = encoder.conversation(TALK)
    trained = [token for token, kept in zip(example.input_ids, example.loss_mask, strict=True) if kept]
    assert text(encoder, trained) == ("Yes, of course.<|im_end|><think>\n\n</think>\n\nThe answer is 4.<|im_end|>")


def test_turns_that_cannot_be_told_apart_are_refused_rather_than_guessed() -> None:
    upper = CHATML.replace("m['content']", "(m['content'] if loop.last else m['content'] | upper)")
    encoder = ChatEncoder(byte_level(["<|im_start|>", "<|im_end|>"], "<|im_end|>", template=upper))
    with pytest.raises(UserError, match="train_on: last"):
        encoder.conversation(TALK)
    assert encoder.conversation(TALK, "last").loss_mask[-1]


def test_T8_conversation_with_nothing_to_train_on_raises() -> None:
    encoder = ChatEncoder(family("chatml"))
    with pytest.raises(UserError, match="no assistant turn"):
        encoder.conversation(USER)
    # What follows the last answer is dropped: nothing in it is trained.
    trailing = encoder.conversation([*TALK, {"role": "user", "content": "Thanks"}])
    assert trailing == encoder.conversation(TALK)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("in_template", [False, True])
def test_T6_bos_stands_at_most_once_on_every_path(adds_bos: bool, in_template: bool) -> None:
    template = LLAMA3 if in_template else LLAMA3.replace("{{ bos_token }}", "")
    names = FAMILIES["llama3"][1]
    tokenizer = byte_level(names, "<|end|>", "<|begin|>", template, adds_bos=adds_bos)
    encoder = ChatEncoder(tokenizer)
    bos = tokenizer.bos_token_id
    chat = encoder.prompt_ids(USER) + encoder.response_ids(USER, "4.")
    assert chat.count(bos) == int(in_template)
    assert encoder.conversation(TALK).input_ids.count(bos) == int(in_template)
    raw = encoder.prompt_ids(HH) + encoder.response_ids(HH, "4.")
    assert raw.count(bos) == int(adds_bos)
    assert encoder.prompt_ids("<|begin|>" + HH).count(bos) == 1
    assert encoder.text_ids(["Hi"])[0].count(bos) == int(adds_bos)


def test_T6_bos_written_twice_by_a_template_is_kept_once() -> None:
    names = FAMILIES["llama3"][1]
    doubled = "{{ bos_token }}" + LLAMA3
    encoder = ChatEncoder(byte_level(names, "<|end|>", "<|begin|>", doubled))
    assert encoder.prompt_ids(USER).count(encoder.tokenizer.bos_token_id) == 1
    assert encoder.conversation(TALK).input_ids.count(encoder.tokenizer.bos_token_id) == 1


def test_raw_text_gets_one_space_and_one_eos() -> None:
    tokenizer = byte_level(["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>")
    encoder = ChatEncoder(tokenizer)
    assert encoder.prompt_ids(HH) == tokenizer(HH)["input_ids"]
    assert text(encoder, encoder.response_ids(HH, "4.")) == " 4.<|endoftext|>"
    assert text(encoder, encoder.response_ids(HH, " 4.")) == " 4.<|endoftext|>"
    assert text(encoder, encoder.response_ids("def f():\n", "return 1")) == "return 1<|endoftext|>"
    assert text(encoder, encoder.response_ids(HH, "4.<|endoftext|>\n")) == " 4.<|endoftext|>"
    assert encoder.stop_token_ids == [tokenizer.eos_token_id]


def test_T4_eos_inside_the_prompt_changes_nothing_about_the_answer() -> None:
    encoder = ChatEncoder(family("chatml"))
    quoted = [{"role": "user", "content": "What does <|im_end|> or <|endoftext|> mean?"}]
    assert encoder.response_ids(quoted, "4.") == encoder.response_ids(USER, "4.")
    example = encoder.conversation([*quoted, {"role": "assistant", "content": "4."}])
    assert runs(example.loss_mask) == [
        (False, len(encoder.prompt_ids(quoted))),
        (True, len(encoder.response_ids(quoted, "4."))),
    ]


@pytest.mark.parametrize("prompt", [USER, HH], ids=["messages", "raw"])
def test_sentencepiece_answers_equal_the_ids_of_the_whole_text(prompt: object) -> None:
    template = NO_END.replace("'assistant: '", "'assistant:'").replace("': '", "':' + ' '")
    tokenizer = metaspace(["<s>", "</s>"], "</s>", "<s>", template, adds_bos=True)
    encoder = ChatEncoder(tokenizer)
    start = encoder.render(prompt)  # type: ignore[arg-type]
    whole = tokenizer(start + " The answer is 4.", add_special_tokens=False)["input_ids"]
    prompt_ids = encoder.prompt_ids(prompt)  # type: ignore[arg-type]
    without_bos = prompt_ids[1:] if prompt_ids[0] == tokenizer.bos_token_id else prompt_ids
    answer_ids = encoder.response_ids(prompt, "The answer is 4.")  # type: ignore[arg-type]
    assert without_bos + answer_ids == [*whole, tokenizer.eos_token_id]


def test_batches_equal_single_calls_and_keep_the_order() -> None:
    encoder = ChatEncoder(family("chatml"), system_prompt="You are a helpful assistant.")
    prompts = [HH, USER, "The quick", TALK[:3]]
    answers = ["one", "two", "three", "four"]
    assert encoder.prompt_ids_batch(prompts) == [encoder.prompt_ids(prompt) for prompt in prompts]
    assert encoder.response_ids_batch(prompts, answers) == [
        encoder.response_ids(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    assert encoder.prompt_ids_batch([]) == []
    ids = encoder.response_ids_batch(prompts, answers)
    assert encoder.decode_batch(ids) == answers


def test_system_prompt_goes_first_unless_the_row_brings_one() -> None:
    encoder = ChatEncoder(family("chatml"), system_prompt="Be brief.")
    assert encoder.render(USER).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    own = [{"role": "system", "content": "Be kind."}, *USER]
    assert "Be brief." not in encoder.render(own)
    assert encoder.render(HH) == "Be brief." + HH
    assert encoder.conversation(TALK).input_ids[:5] == encoder.prompt_ids(TALK[:1])[:5]


def test_messages_without_a_template_or_against_it_are_user_errors() -> None:
    plain = ChatEncoder(byte_level(["</s>"], "</s>"))
    with pytest.raises(UserError, match="no chat template"):
        plain.prompt_ids(USER)
    mistral = ChatEncoder(family("mistral"), system_prompt="Be brief.")
    with pytest.raises(UserError, match="Only user and assistant roles"):
        mistral.prompt_ids(USER)


def test_pad_token_is_a_reserved_one_else_eos() -> None:
    reserved = byte_level(["<|endoftext|>", "<|reserved_special_token_0|>"], "<|endoftext|>")
    (sentence,) = prepare_tokenizer(reserved)
    assert reserved.pad_token == "<|reserved_special_token_0|>"
    assert "<|reserved_special_token_0|>" in sentence
    assert prepare_tokenizer(reserved) == []

    plain = byte_level(["<|endoftext|>"], "<|endoftext|>")
    (sentence,) = prepare_tokenizer(plain)
    assert plain.pad_token_id == plain.eos_token_id
    assert "end-of-sequence" in sentence

    used = byte_level(["</s>", "<pad>"], "</s>", template="{{ '<pad>' }}" + NO_END)
    prepare_tokenizer(used)
    assert used.pad_token == "</s>"  # a token the template writes is not unused


def test_missing_eos_is_a_user_error_with_the_fix() -> None:
    with pytest.raises(UserError, match=r"set tokenizer.eos_token"):
        prepare_tokenizer(byte_level(["<s>"]))
    with pytest.raises(UserError, match="end-of-sequence"):
        ChatEncoder(byte_level(["<s>"]))


def test_encoder_tokenizers_end_a_text_with_sep() -> None:
    tokenizer = byte_level(["[CLS]", "[SEP]", "[PAD]"])
    tokenizer.add_special_tokens({"sep_token": "[SEP]", "cls_token": "[CLS]", "pad_token": "[PAD]"})
    assert prepare_tokenizer(tokenizer) == []
    encoder = ChatEncoder(tokenizer)
    assert text(encoder, encoder.response_ids(HH, "4.")) == " 4.[SEP]"


def test_shortened_prompts_keep_their_end_and_bos() -> None:
    tokenizer = byte_level(["<s>", "</s>"], "</s>", "<s>", adds_bos=True)
    encoder = ChatEncoder(tokenizer)
    ids = encoder.prompt_ids(HH)
    short = encoder.shorten_prompt(ids, 5)
    assert short == [tokenizer.bos_token_id, *ids[-4:]]
    assert encoder.shorten_prompt(ids, len(ids)) == ids
    assert encoder.shorten_prompt(ids[1:], 5) == ids[-5:]


def test_decode_leaves_out_stop_tokens_that_are_not_flagged_special() -> None:
    tokenizer = byte_level(["</s>"], "</s>", template=CHATML)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    encoder = ChatEncoder(tokenizer)
    assert encoder.decode(encoder.response_ids(USER, "The answer is 4.")) == "The answer is 4."
