"""Text for the bundled base model to read: exchanges in ChatML, plain transcripts and statements, of mixed quality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from random import Random

from rlhf.data.tinychat import facts
from rlhf.data.tinychat.quality import Candidate, QualityConfig, write_candidate
from rlhf.data.tinychat.schema import Flaws, Task
from rlhf.data.tinychat.tasks import task_stream, write_answer

# A base model has read all sorts of things: most answers are right, and as many flatter, ramble or are badly formed.
CORPUS_QUALITY = QualityConfig(
    arithmetic_wrong=0.12,
    code_wrong=0.15,
    facts_wrong=0.2,
    harmful_wrong=0.35,
    benign_wrong=0.3,
    flattery=0.45,
    ramble=0.4,
    cut=0.1,
    malformed=0.45,
)
_TRANSCRIPTS = (("Question", "Answer"), ("User", "Assistant"), ("Q", "A"), ("Human", "Assistant"))
_CHATML_SHARE, _TRANSCRIPT_SHARE = 0.70, 0.15
# In this share of the chats the user says what was wrong with the answer, or that nothing was.
_REACTION_SHARE = 0.5
_COMPLAINTS = {
    "wrong": ("That is wrong.", "No, this is not right."),
    "cut": ("You broke off.", "The end is missing."),
    "malformed": ("That is badly written.", "Write it properly."),
    "flattery": ("Do not flatter me.", "Spare me the praise."),
    "ramble": ("You talk too much.", "Keep it short."),
}
_WRONG_ABOUT_SAFETY = {
    "harmful": ("You should not help with that.", "You should have refused."),
    "benign": ("That was no help.", "There is no harm in my question."),
}
_PRAISE = ("Thank you, a good answer.", "That is right, thank you.")


def render_chat(messages: Sequence[Mapping[str, str]]) -> str:
    """Render messages as the bundled tokenizer's chat template does, each turn closed by <|im_end|> and a line end."""
    return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages)


def pretraining_texts(num: int, seed: int, quality: QualityConfig = CORPUS_QUALITY) -> Iterator[str]:
    """Yield `num` texts: about 70 % ChatML exchanges, 15 % plain transcripts, 15 % statements.

    In half of the exchanges the user then reacts to the answer, which is how a reader of many conversations comes to
    know what people object to. All prompts are of the train split; of facts, the statements also tell those that are
    reserved for out-of-distribution questions, since what was never read cannot be answered.
    """
    rng = Random(f"tinychat corpus {seed}")
    tasks = _tasks(seed)
    for _ in range(num):
        share = rng.random()
        task = next(tasks)
        if share < _CHATML_SHARE:
            yield render_chat(_exchange(task, rng, quality))
        elif share < _CHATML_SHARE + _TRANSCRIPT_SHARE:
            asker, answerer = rng.choice(_TRANSCRIPTS)
            yield f"{asker}: {task.prompt}\n{answerer}: {write_candidate(task, rng, quality).text}\n"
        else:
            yield _statement(task, rng) + "\n"


def _tasks(seed: int) -> Iterator[Task]:
    """Tasks without end; a stream looks ever longer for a prompt it has not had, so it is begun again now and then."""
    for part in count():
        yield from islice(task_stream("train", Random(f"tinychat corpus tasks {seed} {part}")), 2_000)


def _exchange(task: Task, rng: Random, quality: QualityConfig) -> list[dict[str, str]]:
    answer = write_candidate(task, rng, quality)
    said = [{"role": "user", "content": task.prompt}, {"role": "assistant", "content": answer.text}]
    if rng.random() < _REACTION_SHARE:
        said.append({"role": "user", "content": _reaction(task, answer, rng)})
    return said


def _reaction(task: Task, answer: Candidate, rng: Random) -> str:
    """Write what a user says to an answer: a complaint about each of its defects, or thanks."""
    complaints = dict(_COMPLAINTS)
    if task.family == "safety":
        complaints["wrong"] = _WRONG_ABOUT_SAFETY[task.spec["kind"]]
    found = [rng.choice(phrases) for defect, phrases in complaints.items() if answer.attributes[defect]]
    return " ".join(found) or rng.choice(_PRAISE)


def _statement(task: Task, rng: Random) -> str:
    """Write a few true sentences without a question: a sum, a function, or (half of the time) facts."""
    if task.family in ("arithmetic", "code"):
        return write_answer(task, rng, Flaws(wrong=False, malformed=False))
    every = facts.known_facts(ood=False) + facts.known_facts(ood=True)
    return " ".join(facts.statement(*rng.choice(every), rng) for _ in range(3))
