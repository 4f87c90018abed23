"""Word problems of one to three steps, answered with worked steps and a closing `Answer:` line."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from rlhf.data.tinychat.schema import Draft, Flaws, Spec

NAMES = (
    "Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Max", "Emma", "Leo", "Zoe", "Jack", "Ella",
    "Noah", "Ruth", "Omar", "Nina", "Paul", "Sara", "Ivan", "Lucy", "Adam", "Rosa", "Eric", "Maya",
)  # fmt: skip
UNITS = (
    "apples", "books", "coins", "cards", "pens", "stamps", "shells", "cups", "eggs", "plums",
    "toys", "stones", "keys", "balls", "nuts", "hats", "rings", "cakes", "pears", "beads",
)  # fmt: skip
OOD_NAMES = ("Hugo", "Priya", "Kenji", "Olga", "Tariq", "Freya", "Mateo", "Yuki", "Ngozi", "Selma")
OOD_UNITS = ("lanterns", "tickets", "buttons", "kites", "candles", "ribbons", "melons", "wheels")

# Each kind is the list of its operations; "*" only opens a story and "/" only closes one.
KINDS = ("+", "-", "*", "/", "+-", "-+", "++", "--", "*+", "*-", "+/", "*/", "+-+", "*+-", "++-", "+-/", "-+-")


@dataclass(frozen=True)
class Story:
    """The sentences of one way to tell a problem; every story names the person and the unit in its first sentence."""

    start: str
    packs: str
    add: tuple[str, ...]
    take: tuple[str, ...]
    share: str
    ask: str
    ask_share: str


STORIES = (
    Story("{name} has {a} {unit}.", "{name} has {a} bags with {b} {unit} each.",
          ("{name} finds {n} more.", "{name} gets {n} more."), ("{name} gives away {n}.", "{name} loses {n}."),
          "{n} friends share them evenly.", "How many {unit} does {name} have now?", "How many does each friend get?"),
    Story("{name} has a box with {a} {unit}.", "{name} fills {a} boxes with {b} {unit} each.",
          ("{name} puts in {n} more.", "{n} more go in."), ("{name} takes out {n}.", "{n} fall out."),
          "They are put into {n} equal piles.", "How many {unit} are there now?", "How many are in each pile?"),
    Story("{name} has a shop with {a} {unit}.", "{name} has a shop with {a} packs of {b} {unit}.",
          ("{n} more come in.", "{name} buys {n} more."), ("{n} are sold.", "{name} sells {n}."),
          "The rest goes to {n} people in equal parts.", "How many {unit} are in the shop?", "What does one get?"),
    Story("{name} starts with {a} {unit},", "{name} starts with {a} rows of {b} {unit},",
          ("then gets {n} more,", "then adds {n},"), ("then drops {n},", "then gives {n} to a friend,"),
          "then makes {n} equal parts.", "and counts them. What is the count?", "How big is one part?"),
    Story("Today {name} sees {a} {unit} on a table.", "Today {name} sees {a} plates with {b} {unit} on each.",
          ("Someone brings {n} more.", "Then {n} are added."), ("Someone takes {n}.", "Then {n} are gone."),
          "{n} children split them evenly.", "How many {unit} are on the table?", "How many for each child?"),
    Story("If {name} owns {a} {unit},", "If {name} owns {a} sets of {b} {unit},",
          ("wins {n} more,", "is given {n},"), ("breaks {n},", "sells {n},"),
          "and splits them into {n} equal groups,", "how many {unit} does {name} own?", "how many are in a group?"),
    Story("Help {name} count: {a} {unit},", "Help {name} count: {a} times {b} {unit},",
          ("plus {n} more,", "and {n} more,"), ("less {n},", "take away {n},"),
          "shared by {n}.", "what is left?", "What is one share?"),
)  # fmt: skip
OOD_STORIES = (
    Story("A ship of captain {name} carries {a} {unit}.", "A ship of captain {name} carries {a} crates of {b} {unit}.",
          ("In port {n} more are loaded.",), ("A storm washes {n} overboard.",),
          "The cargo is divided equally among {n} sailors.", "What is the cargo now?", "What does each sailor get?"),
    Story("In the museum {name} looks after {a} {unit}.", "In the museum {name} looks after {a} cases of {b} {unit}.",
          ("A donor sends {n}.",), ("{n} are lent out.",),
          "They go into {n} rooms, the same number in each.", "How many {unit} remain?", "How many are in one room?"),
)  # fmt: skip


def draw(rng: Random, ood: bool) -> Draft:
    """Draw one word problem; out of distribution means unseen stories, names, objects and larger numbers."""
    story = rng.choice(OOD_STORIES if ood else STORIES)
    name = rng.choice(OOD_NAMES if ood else NAMES)
    unit = rng.choice(OOD_UNITS if ood else UNITS)
    kind = rng.choice(KINDS)
    numbers = _draw_numbers(kind, rng, ood)
    spec: Spec = {"kind": kind, "numbers": numbers, "unit": unit, "answer": _results(kind, numbers)[-1]}
    key = f"arithmetic|{kind}|{numbers}|{name}|{unit}"
    return Draft(key, _tell(story, kind, numbers, name, unit, rng), spec)


def compose(spec: Spec, rng: Random, flaws: Flaws) -> str:
    """Write an answer; `wrong` slips in a step (later ones follow it), `malformed` leaves out steps or `Answer:`."""
    steps, result = _work(spec, rng, flaws.wrong)
    closing = rng.choice((f"Answer: {result}", f"Answer: {result}.", f"Answer: {result} {spec['unit']}."))
    if flaws.malformed:
        if rng.random() < 0.75:
            return rng.choice((f"Answer: {result}", f"{result}", f"{result} {spec['unit']}", f"It is {result}."))
        return ". ".join(steps) + "."
    return f"{_join(steps, rng)}. {closing}"


def compose_steps(spec: Spec, rng: Random, wrong: bool) -> list[str]:
    """Write the steps of an answer one by one, the last of them `Answer: n`; `wrong` slips in one of the equations."""
    steps, result = _work(spec, rng, wrong)
    return [*steps, f"Answer: {result}"]


def results(spec: Spec) -> list[int]:
    """The number after each operation of a problem; the last one is the answer."""
    return _results(spec["kind"], spec["numbers"])


def _join(steps: list[str], rng: Random) -> str:
    style = rng.randrange(5)
    if style == 0 or (len(steps) == 1 and style == 1):
        return ". ".join(steps)
    if style == 1:
        return ", then ".join(steps)
    if style == 2:
        return "First " + ". Then ".join(steps)
    if style == 3:
        return "We see " + " and ".join(steps)
    return "So " + ", so ".join(steps)


def _draw_numbers(kind: str, rng: Random, ood: bool) -> list[int]:
    low, high, top = (13, 60, 400) if ood else (1, 12, 99)
    while True:
        numbers = [rng.randint(max(low, 2), high) if kind[0] == "*" else rng.randint(low, high)]
        total = numbers[0]
        for operation in kind:
            if operation == "*":
                factor = rng.randint(2, 9) if ood else rng.randint(2, 6)
                numbers.append(factor)
            elif operation == "/":
                shares = [n for n in range(2, 13 if ood else 7) if total % n == 0 and total > n]
                if not shares:
                    break
                numbers.append(rng.choice(shares))
            else:
                numbers.append(rng.randint(low, high))
            total = _apply(operation, total, numbers[-1])
            if not 0 <= total <= top:
                break
        else:
            return numbers


def _apply(operation: str, left: int, right: int) -> int:
    if operation == "+":
        return left + right
    if operation == "-":
        return left - right
    return left * right if operation == "*" else left // right


def _results(kind: str, numbers: list[int]) -> list[int]:
    results = [numbers[0]]
    for operation, number in zip(kind, numbers[1:], strict=True):
        results.append(_apply(operation, results[-1], number))
    return results[1:]


def _tell(story: Story, kind: str, numbers: list[int], name: str, unit: str, rng: Random) -> str:
    opening = story.packs if kind[0] == "*" else story.start
    parts = [opening.format(name=name, unit=unit, a=numbers[0], b=numbers[1])]
    for operation, number in zip(kind, numbers[1:], strict=True):
        if operation == "+":
            parts.append(rng.choice(story.add).format(name=name, n=number))
        elif operation == "-":
            parts.append(rng.choice(story.take).format(name=name, n=number))
        elif operation == "/":
            parts.append(story.share.format(name=name, n=number))
    question = story.ask_share if kind[-1] == "/" else story.ask
    parts.append(question.format(name=name, unit=unit))
    return " ".join(parts)


def _work(spec: Spec, rng: Random, wrong: bool) -> tuple[list[str], int]:
    kind, numbers = spec["kind"], spec["numbers"]
    slip_at = rng.randrange(len(kind)) if wrong else -1
    steps, total = [], numbers[0]
    for index, (operation, number) in enumerate(zip(kind, numbers[1:], strict=True)):
        result = _apply(operation, total, number)
        if index == slip_at:
            result += rng.choice((-10, -2, -1, 1, 2, 3, 10)) if result >= 10 else rng.choice((1, 2, 3, 10))
        steps.append(f"{total} {operation} {number} = {result}")
        total = result
    # A slip before a rounded-down share can vanish again; the last result must still be wrong.
    if wrong and total == spec["answer"]:
        total += 1
        steps[-1] = steps[-1].rsplit(" ", 1)[0] + f" {total}"
    return steps, total
