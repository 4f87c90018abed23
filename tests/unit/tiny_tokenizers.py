"""Small tokenizers made on the spot, with the chat templates of the families people use."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is 2+2? The answer is 4.",
    "\n\nHuman: Hi, can you help me?\n\nAssistant: Yes, of course I can help you.",
    "You are a helpful assistant. Write one line of Python: print('hello world')",
] * 3

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# Earlier answers lose their reasoning and the last one gets an empty block, as in Qwen3.
REASONING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m['content'] + '<|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The generation prompt opens a thought that the finished turn does not show, as in DeepSeek-R1.
OPENED_THOUGHT = CHATML.replace(
    "'<|im_start|>assistant\n' }}{% endif %}", "'<|im_start|>assistant\n<think>\n' }}{% endif %}"
)

# name: (template, special tokens, bos, eos, the token that ends a turn)
FAMILIES = {
    "chatml": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|endoftext|>", "<|im_end|>"),
    "llama3": (
        LLAMA3,
        ["<|begin|>", "<|end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin|>",
        "<|end|>",
        "<|eot_id|>",
    ),
    "mistral": (MISTRAL, ["<s>", "</s>"], "<s>", "</s>", "</s>"),
    "zephyr": (ZEPHYR, ["<s>", "</s>"], None, "</s>", "</s>"),
    "no_end": (NO_END, ["</s>"], None, "</s>", "</s>"),
    "reasoning": (REASONING, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|endoftext|>", "<|im_end|>"),
    "opened_thought": (
        OPENED_THOUGHT,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        None,
        "<|endoftext|>",
        "<|im_end|>",
    ),
}


def byte_level(
    special: list[str],
    eos: str | None = None,
    bos: str | None = None,
    template: str | None = None,
    adds_bos: bool = False,
    vocab_size: int = 400,
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE (GPT-2, Llama 3, Qwen); `adds_bos` makes the tokenizer itself put BOS in front."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    return _wrapped(core, special, eos, bos, template, adds_bos)


def metaspace(
    special: list[str],
    eos: str | None = None,
    bos: str | None = None,
    template: str | None = None,
    adds_bos: bool = False,
) -> PreTrainedTokenizerFast:
    """Return a BPE that puts a space before a text's first word, as Llama 2 and other SentencePiece families do."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    core.decoder = decoders.Metaspace(prepend_scheme="always", split=True)
    letters = sorted(
        set("".join(CORPUS)) | set("[]/<>|_{}abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    )
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=letters, show_progress=False))
    return _wrapped(core, special, eos, bos, template, adds_bos)


def family(name: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with the special tokens and template of a family in FAMILIES."""
    template, special, bos, eos, _ = FAMILIES[name]
    return byte_level(special, eos, bos, template)


def _wrapped(
    core: Tokenizer, special: list[str], eos: str | None, bos: str | None, template: str | None, adds_bos: bool
) -> PreTrainedTokenizerFast:
    from tokenizers.processors import TemplateProcessing

    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    if adds_bos and bos is not None:
        core.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token=bos)
    tokenizer.chat_template = template
    return tokenizer
