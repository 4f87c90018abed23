"""The report's page in a real browser: wide and narrow, light and dark, searched and filtered, nothing fetched."""

from __future__ import annotations

import dataclasses
import importlib.util
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from rlhf.eval.hacking import HackingConfig, Look, Mean, judge
from rlhf.eval.hacking_record import HackingRecord
from rlhf.eval.report import write_report
from rlhf.eval.report_data import ReportInput
from rlhf.eval.reward_accuracy import RewardPair
from rlhf.eval.samples import Cost, ModelResult, Sample
from rlhf.eval.stage_facts import StageFacts

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow

HOSTILE = "</article></script><script>alert(1)</script><img src=x onerror=\"document.title='ran'\"> \" ' &amp;"
FAMILIES = ("arithmetic", "sa\"fe'ty", "code <b>", "facts")
MODELS = ("base", "sft", "dpo", "p'p\"o")
ARGUMENTS = ["--no-sandbox", "--disable-quic", "--disable-background-networking"]
PATIENCE = 180_000  # milliseconds: a machine with much else to do opens the page late, and that is no failure
SHAPES = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]


def samples(name: str) -> tuple[Sample, ...]:
    rng, place = random.Random(name), MODELS.index(name)
    return tuple(
        Sample(
            prompt_id=f"{split}-{number}",
            prompt=f"Question {number} of {FAMILIES[number % 4]}? {'averyverylongword' * 12 if number == 3 else ''}",
            family=FAMILIES[number % 4],
            split=split,
            response=f"{name} says number{number}. {HOSTILE if number % 5 == 0 else 'plainly'}",
            num_tokens=20 + place + rng.randint(0, 5),
            finished=True,
            gold=rng.random() + 0.1 * place,
            gold_parts={"correct": rng.random()},
            reward=rng.random() + place,
            kl=2.0 * place + rng.random(),
            entropy=0.5,
            model=name,
        )
        for split, num in (("heldout", 48), ("ood", 24), ("harmful", 10), ("benign", 10))
        for number in range(num)
    )


def record() -> HackingRecord:
    looks = tuple(
        Look(step, {"length": Mean(20.0 + step, 0.5, 32), "kl": Mean(0.1 * step, 0.1, 32)}) for step in (1, 10, 20, 30)
    )
    return HackingRecord(MODELS[-1], looks, tuple(judge(looks, HackingConfig())), HackingConfig().model_dump())


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    source = ReportInput(
        models=[ModelResult(name, samples(name), Cost(12.0, 1000, 500.0, 10)) for name in MODELS],
        title='A report with <b>markup</b> and "quotes"',
        reward_pairs=[RewardPair(FAMILIES[i % 4], float(i % 3), 1.0, 10, 12, 0.8, 0.2) for i in range(60)],
        histories={MODELS[-1]: [{"step": step, "reward/mean": 0.1 * step, "kl/mean": 0.2 * step} for step in range(9)]},
        hacking=[record()],
        stages=[StageFacts("sft", "failed", error="OutOfMemory: </script> in " + "a/very/long/path" * 12)],
    )
    return write_report(tmp_path_factory.mktemp("page"), source).html.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed: pip install 'rlhf[dev]'")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium here: apt install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS, timeout=PATIENCE)
        yield browser
        browser.close()


@dataclass
class Heard:
    """What a page complained of and what it asked for."""

    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def opened(browser: Browser, address: str, width: int, scheme: Literal["light", "dark"]) -> tuple[Page, Heard]:
    page = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
    page.set_default_timeout(PATIENCE)
    heard = Heard()
    page.on("console", lambda said: heard.complaints.append(f"{said.type}: {said.text}"))
    page.on("pageerror", lambda error: heard.complaints.append(f"error: {error}"))
    page.on("request", lambda request: heard.requests.append(request.url))
    page.goto(address)
    return page, heard


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    page, heard = opened(browser, address, 1280, "light")
    yield page
    page.context.close()
    assert heard == Heard([], [address])


def luminance(page: Page, selector: str, what: str) -> float:
    """Relative luminance of a colour as WCAG defines it, 0 to 1."""
    colour = page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{what}")
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(page: Page, selector: str, behind: str) -> float:
    lights = sorted([luminance(page, selector, "color"), luminance(page, behind, "backgroundColor")])
    return (lights[1] + 0.05) / (lights[0] + 0.05)


@pytest.mark.parametrize(("width", "scheme"), SHAPES)
def test_the_page_is_quiet_fits_and_can_be_read(
    browser: Browser, address: str, width: int, scheme: Literal["light", "dark"]
) -> None:
    page, heard = opened(browser, address, width, scheme)
    assert page.title() == 'A report with <b>markup</b> and "quotes"'
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    behind = luminance(page, "body", "backgroundColor")
    assert behind > 0.8 if scheme == "light" else behind < 0.1
    for selector, panel in (
        ("body", "body"), ("td", "section"), (".caption", "section"), (".checks.failed li", ".checks.failed li"),
        (".bad", "section"), (".answer .text", ".answer"), (".answer h4 span", ".answer"), ("nav a", "body"),
    ):  # fmt: skip
        assert contrast(page, selector, panel) > 4.5, selector
    drawn = page.evaluate("[...document.querySelectorAll('.chart svg')].map(svg => svg.getBoundingClientRect().height)")
    assert len(drawn) > 15 and min(drawn) > 50
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    ink = page.evaluate("getComputedStyle(document.querySelector('.chart svg text')).fill")
    assert ink == page.evaluate("getComputedStyle(document.body).color")
    page.context.close()
    assert heard == Heard([], [address])


def shown(page: Page) -> list[str]:
    return page.locator(".example:visible").evaluate_all("found => found.map(one => one.innerText)")


def test_words_are_searched_in_prompts_and_answers_and_all_must_be_there(page: Page) -> None:
    total = page.locator(".example").count()
    assert len(shown(page)) == total == 40
    page.get_by_label("Search prompts and answers").fill("NUMBER7 says")
    found = shown(page)
    assert len(found) in (0, 1) and all("number7" in text for text in found)
    page.get_by_label("Search prompts and answers").fill("arithmetic")
    found = shown(page)
    assert 0 < len(found) < total and all("arithmetic" in text for text in found)
    assert page.locator("#count").inner_text() == f"{len(found)} of {total} examples shown"


def test_filters_narrow_together_and_clear_brings_all_back(page: Page) -> None:
    page.get_by_label("Category").select_option(FAMILIES[1])
    of_family = shown(page)
    assert len(of_family) == 10 and all(FAMILIES[1] in text for text in of_family)
    won = page.get_by_label("Who won, against sft")
    won.select_option("win")
    better = shown(page)
    assert 0 < len(better) < 10 and all(f"{MODELS[-1]} better than sft" in text for text in better)
    won.select_option("loss")
    worse = shown(page)
    assert all(f"sft better than {MODELS[-1]}" in text for text in worse)
    assert len(better) + len(worse) == 10
    page.get_by_role("button", name="Clear").click()
    page.locator("#count", has_text="40 of 40").wait_for()
    assert len(shown(page)) == 40
    assert page.get_by_role("button", name="Clear").is_disabled()
    assert page.evaluate("document.activeElement.id") == "search"


def test_a_policy_is_shown_beside_the_reference_and_judged_itself(page: Page) -> None:
    page.get_by_label("Policy").select_option("dpo")
    heads = page.locator(".example:visible .answer:visible h4").evaluate_all("h => h.map(x => x.firstChild.data)")
    assert set(heads) == {"sft", "dpo"} and len(heads) == 80
    page.get_by_label("Who won, against sft").select_option("win")
    found = shown(page)
    assert 0 < len(found) < 40
    assert all("dpo better than sft" in text and MODELS[-1] not in text for text in found)
    page.get_by_label("Search prompts and answers").fill("base says")
    assert shown(page) == []


def test_nothing_found_is_said(page: Page) -> None:
    assert not page.locator("#no-match").is_visible()
    page.get_by_label("Search prompts and answers").fill("no such words anywhere")
    assert shown(page) == []
    assert page.locator("#no-match").is_visible()
    assert page.locator("#count").inner_text() == "0 of 40 examples shown"


def test_the_keyboard_is_enough(page: Page) -> None:
    page.get_by_label("Search prompts and answers").focus()
    page.keyboard.type("facts")
    page.keyboard.press("Enter")  # submits nothing
    few = len(shown(page))
    assert 0 < few < 40
    for name in ("family", "policy", "outcome", "clear"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == name
    page.keyboard.press("Space")
    page.locator("#count", has_text="40 of 40").wait_for()
    assert len(shown(page)) == 40
    # Every control has a name that a screen reader says.
    for name in ("search", "family", "policy", "outcome"):
        assert page.locator(f"label[for={name}]").inner_text().strip()


def test_hostile_answers_are_text(page: Page) -> None:
    assert page.title().startswith("A report")
    assert page.locator("script").count() == 1 and page.locator("img").count() == 0
    assert HOSTILE in page.locator("#example-list").inner_text()
    page.get_by_label("Search prompts and answers").fill("onerror=")
    assert 0 < len(shown(page)) < 40


def test_without_a_script_everything_is_there(browser: Browser, address: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    plain = context.new_page()
    plain.set_default_timeout(PATIENCE)
    plain.goto(address)
    assert plain.locator(".example:visible").count() == 40
    assert not plain.locator("#controls").is_visible()
    context.close()


def test_one_model_has_no_policy_to_choose_and_nobody_who_won(browser: Browser, tmp_path: Path) -> None:
    alone = [dataclasses.replace(sample, gold=None, reward=None) for sample in samples("sft")]
    written = write_report(tmp_path, ReportInput(models=[ModelResult("sft", tuple(alone))]))
    page, heard = opened(browser, written.html.as_uri(), 1280, "light")
    page.get_by_label("Search prompts and answers").fill("number1.")
    assert len(shown(page)) <= 1
    assert page.locator("#policy").count() == page.locator("#outcome").count() == 0
    assert page.locator("#count").inner_text().endswith("of 40 examples shown")
    page.context.close()
    assert heard.complaints == []
