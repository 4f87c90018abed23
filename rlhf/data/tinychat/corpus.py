"""Text for the bundled base model to read: exchanges in ChatML, plain transcripts and statements, of mixed quality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from random import Random

from rlhf.data.tinychat import facts
from rlhf.data.tinychat.quality import QualityConfig, write_candidate
from rlhf.data.tinychat.schema import Flaws, Task
from rlhf.data.tinychat.tasks import task_stream, write_answer

# Somewhat worse than preference candidates: a base model has read all sorts of things.
CORPUS_QUALITY = QualityConfig(
    arithmetic_wrong=0.2,
    code_wrong=0.25,
    facts_wrong=0.35,
    harmful_wrong=0.5,
    benign_wrong=0.5,
    flattery=0.5,
    ramble=0.4,
    cut=0.1,
    malformed=0.5,
)
# The second pass: fewer answers are wrong, as many are flattering, rambling or badly formed.
LATE_CORPUS_QUALITY = QualityConfig(
    arithmetic_wrong=0.1,
    code_wrong=0.12,
    facts_wrong=0.12,
    harmful_wrong=0.25,
    benign_wrong=0.15,
    flattery=0.45,
    ramble=0.4,
    malformed=0.45,
)
_TRANSCRIPTS = (("Question", "Answer"), ("User", "Assistant"), ("Q", "A"), ("Human", "Assistant"))
_CHATML_SHARE, _TRANSCRIPT_SHARE = 0.65, 0.20


def render_chat(messages: Sequence[Mapping[str, str]]) -> str:
    """Render messages as the bundled tokenizer's chat template does, each turn closed by <|im_end|> and a line end."""
    return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages)


def pretraining_texts(num: int, seed: int, quality: QualityConfig = CORPUS_QUALITY) -> Iterator[str]:
    """Yield `num` texts: about 65 % single ChatML exchanges, 20 % plain transcripts, 15 % statements.

    All prompts are of the train split; of facts, the statements also tell those that are reserved for
    out-of-distribution questions, since what was never read cannot be answered.
    """
    rng = Random(f"tinychat corpus {seed}")
    tasks = task_stream("train", Random(f"tinychat corpus tasks {seed}"))
    for _ in range(num):
        share = rng.random()
        task = next(tasks)
        if share < _CHATML_SHARE:
            answer = write_candidate(task, rng, quality).text
            yield render_chat(({"role": "user", "content": task.prompt}, {"role": "assistant", "content": answer}))
        elif share < _CHATML_SHARE + _TRANSCRIPT_SHARE:
            asker, answerer = rng.choice(_TRANSCRIPTS)
            yield f"{asker}: {task.prompt}\n{answerer}: {write_candidate(task, rng, quality).text}\n"
        else:
            yield _statement(task, rng) + "\n"


def _statement(task: Task, rng: Random) -> str:
    """Write a few true sentences without a question: a sum, a function, or (half of the time) facts."""
    if task.family in ("arithmetic", "code"):
        return write_answer(task, rng, Flaws(wrong=False, malformed=False))
    every = facts.known_facts(ood=False) + facts.known_facts(ood=True)
    return " ".join(facts.statement(*rng.choice(every), rng) for _ in range(3))
