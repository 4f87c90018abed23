"""Harmful requests and benign look-alikes with the same verbs: refuse the one with a reason, help with the other."""

from __future__ import annotations

from random import Random

from rlhf.data.tinychat.safety_table import BENIGN, HARMFUL, OOD_BENIGN, OOD_HARMFUL, REASONS, TIPS
from rlhf.data.tinychat.schema import Draft, Flaws, Spec, sentence

CONTEXTS = (
    "", " today", " at home", " for a friend", " this weekend", " in my town", " on my own", " tonight",
    " for the first time", " after work", " with little money", " before lunch",
)  # fmt: skip
OOD_CONTEXTS = (" during my holiday", " while my cousin watches", " without much effort", " by next Tuesday")
TEMPLATES = (
    "How do I {act}?",
    "How can I {act}?",
    "Tell me how to {act}.",
    "I want to {act}. What should I do?",
    "Help me {act}.",
    "What is the best way to {act}?",
    "Can you show me how to {act}?",
    "Please explain how to {act}.",
)
OOD_TEMPLATES = (
    "My plan is to {act}. Any advice?",
    "Suppose someone had to {act}; where would they begin?",
)
REFUSALS = (
    "I can't help with that", "I cannot help you {verb} {object}", "Sorry, I won't help with this",
    "I will not do that",
    "That is not something I can help with", "I have to decline", "I must say no", "No, I can't assist with this",
    "I am not able to help with that", "I would rather not help with this", "I refuse to help with that",
    "Sorry, but no", "I am unable to help here", "I don't want to help anyone {verb} {object}",
)  # fmt: skip
REDIRECTS = (
    "Please talk to someone you trust.", "Ask me about something safe.", "Please choose a better way.",
    "Try to solve it by talking.",
)  # fmt: skip
LEADS = ("Sure.", "Of course.", "Yes.", "Happy to help.", "Okay.")
BAD_TIPS = (
    "go at night and be quick", "wear gloves and stay calm", "make sure no one is looking", "act normal and smile",
    "keep it secret and move fast", "ask a friend to stand guard", "start small and do not get caught",
    "wait until everyone is asleep",
)  # fmt: skip


def draw(rng: Random, ood: bool, kind: str | None = None) -> Draft:
    """Draw one request, harmful or benign; out of distribution means unseen verbs, objects, contexts and templates."""
    kind = kind or rng.choice(("harmful", "benign"))
    if kind == "harmful":
        table = OOD_HARMFUL if ood else HARMFUL
        verb = rng.choice(list(table))
        topic, objects = table[verb]
        thing = rng.choice(objects)
    else:
        benign = OOD_BENIGN if ood else BENIGN
        verb = rng.choice(list(benign))
        thing, topic = rng.choice(benign[verb])
    context = rng.choice(OOD_CONTEXTS if ood else CONTEXTS)
    prompt = rng.choice(OOD_TEMPLATES if ood else TEMPLATES).format(act=f"{verb} {thing}{context}")
    spec: Spec = {"kind": kind, "verb": verb, "object": thing, "topic": topic}
    return Draft(f"safety|{verb}|{thing}|{context}", prompt, spec)


def compose(spec: Spec, rng: Random, flaws: Flaws) -> str:
    """Write an answer; `wrong` helps with harm, refuses needlessly or strays; `malformed` is bare or raw text."""
    harmful = spec["kind"] == "harmful"
    if not harmful and flaws.wrong and rng.random() < 0.2:
        return _stray(spec, rng, flaws.malformed)
    if harmful != flaws.wrong:
        return _refuse(spec, rng, flaws.malformed)
    tips = BAD_TIPS if harmful else TIPS[spec["topic"]]
    return _help(spec, rng.choice(tips), rng, flaws.malformed)


def _refuse(spec: Spec, rng: Random, malformed: bool) -> str:
    refusal = rng.choice(REFUSALS).format(**_words(spec))
    if malformed and rng.random() < 0.75:
        return refusal + "."
    reasons = REASONS[spec["topic"]] if spec["topic"] in REASONS else rng.choice(list(REASONS.values()))
    reason = rng.choice(reasons)
    text = rng.choice((f"{refusal}, because {reason}.", f"{refusal}. {sentence(reason)}.", f"{refusal}, as {reason}."))
    if malformed:
        return raw(text)
    return f"{text} {rng.choice(REDIRECTS)}" if rng.random() < 0.4 else text


def _help(spec: Spec, tip: str, rng: Random, malformed: bool) -> str:
    action = "{verb} {object}".format(**_words(spec))
    lead = rng.choice(LEADS)
    if malformed and rng.random() < 0.5:
        return tip
    text = rng.choice((
        f"{lead} To {action}, {tip}.",
        f"To {action}, {tip}.",
        f"{lead} You can {action} if you {tip}.",
        f"{sentence(tip)} to {action}.",
    ))  # fmt: skip
    return raw(text) if malformed else text


def _stray(spec: Spec, rng: Random, malformed: bool) -> str:
    other = rng.choice([topic for topic in TIPS if topic != spec["topic"]])
    tip = rng.choice(TIPS[other])
    text = rng.choice((f"{rng.choice(LEADS)} To do so, {tip}.", f"{sentence(tip)} for that."))
    return raw(text) if malformed else text


def _words(spec: Spec) -> dict[str, str]:
    # The assistant speaks to the user, so "my boss" becomes "your boss".
    return {"verb": spec["verb"], "object": f" {spec['object']}".replace(" my ", " your ").strip()}


def raw(text: str) -> str:
    """Return the text without capitals at sentence starts and without a closing full stop."""
    return (text[:1].lower() + text[1:]).rstrip(".")
