"""Finding the answer in a response, and what found answers are worth."""

from __future__ import annotations

import pytest

from rlhf.eval.extractors import EXTRACTORS
from rlhf.eval.ranking import likelihood, likelihood_per_token
from rlhf.eval.scorers import SCORERS
from rlhf.eval.suite_items import Item

PLAIN = Item("x")


@pytest.mark.parametrize(
    ("name", "response", "found"),
    [
        ("whole", "  yes \n", "yes"),
        ("whole", " \n", None),
        ("last_number", "3 + 4 = 7\nAnswer: 7", "7"),
        ("last_number", "First 12, then 30. The answer is 42 apples, not 43.", "42"),
        ("last_number", "She has $1,250.00 left.", "1250"),
        ("last_number", "so #### 72", "72"),
        ("last_number", "The answer is -3.50 degrees", "-3.5"),
        ("last_number", "It is \u22125", "5"),
        ("last_number", r"Thus \boxed{18} in 3 steps", "18"),
        ("last_number", "He buys 5 and 6", "6"),
        ("last_number", "It takes .5 hours", "0.5"),
        ("last_number", "The answer is clear. There are 9.", "9"),
        ("last_number", "Answer: 12. Answer: 13", "13"),
        ("last_number", "v2 of x3", None),
        ("last_number", "none", None),
        ("last_number", "7.", "7"),
        ("last_number", "10 - 4 = 6", "6"),
        ("last_number", "Answer: 1,000,000", "1000000"),
        ("last_number", "Answer: 0.0", "0"),
        ("marked_number", "x = 5\n#### 1,024", "1024"),
        ("marked_number", "The answer is 5", None),
        ("choice_letter", "The answer is (B).", "B"),
        ("choice_letter", "**C** because", "C"),
        ("choice_letter", "I would say (d)", "D"),
        ("choice_letter", "A horse is fast. The answer: D", "D"),
        ("choice_letter", "Because of that", None),
        ("python", "Here:\n```python\ndef f(x):\n    return x\n```\nDone.", "def f(x):\n    return x\n"),
        ("python", "def f(x):\n    return x\n\nThis adds nothing.", "def f(x):\n    return x\n"),
        (
            "python",
            "Sure! import math\n\nimport math\ndef f(x): return math.pi\nThat was it.",
            "import math\ndef f(x): return math.pi\n",
        ),
        ("python", "```\nf = lambda x: x\n", "f = lambda x: x\n"),
        ("python", "I cannot do that.", None),
        ("python", "def f(x:\n", None),
    ],
)
def test_extractors(name: str, response: str, found: str | None) -> None:
    assert EXTRACTORS[name](response, PLAIN) == found


def test_of_several_blocks_those_with_the_function_count() -> None:
    item = Item("x", spec={"names": ["f"]})
    response = "```python\nprint(1)\n```\nand\n```python\ndef f(): return 1\n```"
    assert EXTRACTORS["python"](response, item) == "def f(): return 1\n"


START = "import math\n\ndef helper(x): return x\n\ndef f(x):\n    '''Doubles.'''\n"
COMPLETION = Item("x", spec={"start": START, "entry": "f", "names": ["helper", "f"]})


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("    return helper(x) * 2\n\nprint(f(3))", START + "    return helper(x) * 2\n"),
        ("    return 2\n\ndef g(): pass", START + "    return 2\n"),
        ("```python\n    return 2\n```", START + "    return 2\n"),
        (
            "```python\ndef f(x):\n    return 2 * x\n```",
            "import math\n\ndef helper(x): return x\n\ndef f(x):\n    return 2 * x\n",
        ),
        (
            "Here it is:\n\ndef f(x):\n    return 2 * x\n\nBye.",
            "import math\n\ndef helper(x): return x\n\ndef f(x):\n    return 2 * x\n",
        ),
        ("  \n", None),
    ],
)
def test_completions_of_a_function(response: str, found: str | None) -> None:
    assert EXTRACTORS["python_completion"](response, COMPLETION) == found


def values(scorer: str, *pairs: tuple[str | None, dict[str, object]]) -> list[float | None]:
    answers, items = [answer for answer, _ in pairs], [Item(str(i), spec=spec) for i, (_, spec) in enumerate(pairs)]
    return [score.value for score in SCORERS[scorer](answers, items)]


def test_scorers_of_short_answers() -> None:
    assert values("number", ("42", {"answer": "42.0"}), ("41", {"answer": 42}), (None, {"answer": "1"})) == [1, 0, 0]
    assert values("number", ("1000", {"answer": "1,000"}), ("x", {"answer": "1"})) == [1, 0]
    assert values("exact", (" Paris. ", {"answer": "paris"}), ("Paris, France", {"answer": ["Paris"]})) == [1, 0]
    assert values("exact", (None, {"answer": "a"}), ("b", {"answer": ["a", "b"]})) == [0, 1]
    found = values("contains", ("It is Paris.", {"answer": ["paris"]}), ("Parisian", {"answer": "Paris"}))
    assert found == [1, 0]
    assert values("unjudged", ("a", {}), (None, {})) == [None, None]


def test_scorer_of_refusals_wants_the_right_thing_of_each() -> None:
    refusing, helping = "I cannot help with that.", "Mix flour and water."
    wanted = {"expect": "refuse"}, {"expect": "answer"}
    assert values("refusal", *((refusing, one) for one in wanted)) == [1, 0]
    assert values("refusal", *((helping, one) for one in wanted)) == [0, 1]
    assert values("refusal", *((None, one) for one in wanted)) == [0, 0]
    (score,) = SCORERS["refusal"](["I cannot provide that. However, here are some tips."], [Item("x", spec=wanted[0])])
    assert score.parts == {"refused": 1.0, "refused_in_part": 1.0}


def test_scorer_of_instructions_gives_all_four_numbers() -> None:
    item = Item("x", spec={"instructions": ["punctuation:no_comma", "startend:quotation"], "arguments": [{}, {}]})
    (score,) = SCORERS["instructions"](['Yes\n"So it is."'], [item])
    assert score.value == 0.0
    assert score.parts == {"prompt_loose": 1.0, "instruction_strict": 0.5, "instruction_loose": 1.0}
    assert score.detail == "startend:quotation"


def test_ranks() -> None:
    assert likelihood([-3.0, -2.0, -2.0], [1, 4, 1]) == [1, 2]
    assert likelihood_per_token([-3.0, -2.0, -2.0], [3, 1, 1]) == [0]
    assert values("chosen", ("0", {"answer": 0}), ("1", {"answer": 0}), ("0,2", {"answer": 2})) == [1, 0, 0.5]


def test_scorer_of_code() -> None:
    spec = {"names": ["f"], "tests": ["assert f(1) == 2"]}
    assert values("python_tests", ("def f(x): return 2", spec), (None, spec), ("def f(x): return 1", spec)) == [1, 0, 0]
    assert values("python_tests", (None, spec)) == [0]
