"""A closed world of facts, asked openly or with four choices."""

from __future__ import annotations

from functools import cache
from random import Random

from rlhf.data.tinychat.facts_table import RELATIONS, RESERVED
from rlhf.data.tinychat.schema import Draft, Flaws, Spec, sentence

LETTERS = "ABCD"
TEMPLATES = (
    "What is {np}?",
    "Tell me {np}.",
    "Name {np}.",
    "Do you know {np}?",
    "I want to know {np}.",
    "Please tell me {np}.",
    "Can you say what {np} is?",
    "Quick question: what is {np}?",
)
OOD_TEMPLATES = (
    "My quiz asks for {np}. What should I write?",
    "Could someone remind me of {np}?",
    "Fill in the blank: {np} is ...",
)


@cache
def known_facts(ood: bool) -> tuple[tuple[str, str, str], ...]:
    """Return (relation, subject, answer) of the facts that may be asked; the reserved ones out of distribution only."""
    return tuple(
        (relation, subject, answer)
        for relation, (_, table) in RELATIONS.items()
        for subject, answer in table.items()
        if ((relation, subject) in RESERVED) == ood
    )


@cache
def answers_of(relation: str) -> tuple[str, ...]:
    """Return every distinct answer of a relation, in table order: the rivals of a right answer."""
    return tuple(dict.fromkeys(RELATIONS[relation][1].values()))


def noun_phrase(relation: str, subject: str) -> str:
    """Return what is asked for, such as "the capital of France"."""
    return RELATIONS[relation][0].format(subject)


def draw(rng: Random, ood: bool) -> Draft:
    """Draw one question about a fact; out of distribution means reserved facts and unseen templates."""
    relation, subject, answer = rng.choice(known_facts(ood))
    index = rng.randrange(len(OOD_TEMPLATES if ood else TEMPLATES))
    question = (OOD_TEMPLATES if ood else TEMPLATES)[index].format(np=noun_phrase(relation, subject))
    spec: Spec = {"kind": "open", "relation": relation, "subject": subject, "answer": answer}
    if rng.random() < 0.5:
        return Draft(f"facts|{relation}|{subject}|{index}", question, spec)
    rivals = [rival for rival in answers_of(relation) if rival != answer]
    options = [answer, *rng.sample(rivals, 3)]
    rng.shuffle(options)
    spec = {**spec, "kind": "choice", "options": options, "letter": LETTERS[options.index(answer)]}
    listed = " ".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))
    return Draft(f"facts|{relation}|{subject}|{options}", f"{question} {listed}", spec)


def statement(relation: str, subject: str, answer: str, rng: Random) -> str:
    """Write one declarative sentence of a fact, in one of its phrasings."""
    phrase = noun_phrase(relation, subject)
    return rng.choice((f"{sentence(phrase)} is {answer}.", f"{sentence(answer)} is {phrase}."))


def compose(spec: Spec, rng: Random, flaws: Flaws) -> str:
    """Write an answer; `wrong` names a rival, `malformed` drops capital and full stop, or the letter, or the text."""
    choice = spec["kind"] == "choice"
    answer = _rival(spec, rng) if flaws.wrong else spec["answer"]
    if choice:
        named = f"{LETTERS[spec['options'].index(answer)]}) {answer}"
        if flaws.malformed:
            return rng.choice((f"{sentence(answer)}.", named[0], answer))
        return _phrase(spec, named, rng)
    if flaws.malformed:
        return rng.choice((answer.lower(), f"it is {answer}"))
    return _phrase(spec, answer, rng)


def _phrase(spec: Spec, named: str, rng: Random) -> str:
    phrase = noun_phrase(spec["relation"], spec["subject"])
    return rng.choice((
        f"{sentence(named)} is {phrase}.",
        f"{sentence(phrase)} is {named}.",
        f"It is {named}.",
        f"The answer is {named}.",
        f"{sentence(named)}.",
        f"That is {named}.",
    ))  # fmt: skip


def _rival(spec: Spec, rng: Random) -> str:
    pool = spec["options"] if spec["kind"] == "choice" else answers_of(spec["relation"])
    return str(rng.choice([option for option in pool if option != spec["answer"]]))
