"""The report on made-up samples: its numbers, its warnings, its three files, and what happens when parts are absent."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fast_some import fast_some
from rich.console import Console

from rlhf.eval.cautions import run_checks
from rlhf.eval.panels import panels_of, read_history
from rlhf.eval.plots import diagnostics_png
from rlhf.eval.report import report_numbers, summary_table, write_report
from rlhf.eval.report_data import Report, ReportInput, build_report
from rlhf.eval.reward_accuracy import RewardPair
from rlhf.eval.samples import Cost, ModelResult, Sample
from rlhf.infra.errors import UserError

NASTY = "</article><script>alert('x')</script><img src=x onerror=alert(1)> ```$a_b$ & | "
FAMILIES = ("arithmetic", "safety", "code", "facts")


def responses(quality: float, length: int = 30, kl: float = 0.0, **fixed: object) -> list[Sample]:
    rng = random.Random(quality)
    samples = []
    for split, num in (("heldout", 40), ("ood", 20), ("harmful", 30), ("benign", 30)):
        for number in range(num):
            right = float(rng.random() < quality)
            values: dict[str, object] = {
                "gold": 0.8 * right + 0.2 * rng.random(),
                "gold_parts": {"correct": right, "no_flattery": 1.0},
                "refused": split == "harmful",
                "reward": 2 * right + rng.random(),
                "kl": kl + rng.random(),
                "entropy": 0.6,
            }
            samples.append(
                Sample(
                    prompt_id=f"{split}-{number}",
                    prompt=f"Prompt {number} {NASTY}",
                    family=FAMILIES[number % 4] if split in ("heldout", "ood") else "safety",
                    split=split,
                    kind="",
                    response=f"answer {number} is {rng.randint(0, 99)} {NASTY}",
                    num_tokens=length + rng.randint(0, 4),
                    finished=True,
                    **(values | fixed),  # type: ignore[arg-type]
                )
            )
    return samples


def model(name: str, samples: Sequence[Sample], greedy: bool = False) -> ModelResult:
    both = [*samples, *(dataclasses.replace(s, mode="greedy") for s in samples if greedy)]
    return ModelResult(name, tuple(both), Cost(12.5, 4000, 800.0, 30))


def history(steps: int = 12) -> list[dict[str, float]]:
    return [
        {"step": step, "reward/mean": step / 10, "kl/mean": step / 5, "entropy/mean": 0.6 - step / 100, "odd/one": 1.0}
        for step in range(1, steps + 1)
    ]


def full_input() -> ReportInput:
    rng = random.Random(0)
    pairs = [
        RewardPair(FAMILIES[i % 4], rng.gauss(1, 1), rng.gauss(0, 1), rng.randint(5, 40), rng.randint(5, 40), 0.8, 0.2)
        for i in range(80)
    ]
    return ReportInput(
        models=[
            model("base", responses(0.2, kl=2.0)),
            model("sft", responses(0.4), greedy=True),
            model("dpo", responses(0.6, kl=3.0)),
            model("ppo", responses(0.9, kl=6.0), greedy=True),
        ],
        title="Report <of> a test",
        reward_pairs=pairs,
        reward_ms_per_sample=1.25,
        histories={"sft": [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.0}], "ppo": history()},
        costs={"reward model": Cost(3.0, 1000, 700.0, 10)},
        notes={"seed": 0, "threads": 2},
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, str, str, dict[str, object]]:
    paths = write_report(tmp_path_factory.mktemp("report") / "new", full_input())
    return (
        paths.report,
        paths.html.read_text(encoding="utf-8"),
        paths.markdown.read_text(encoding="utf-8"),
        json.loads(paths.data.read_text(encoding="utf-8")),
    )


class PageReader(HTMLParser):
    """Collects tags, ids and everything a browser could fetch."""

    VOID = ("meta", "link", "input", "br", "img")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.scripts = 0
        self.fetched: list[str] = []
        self.handlers: list[str] = []
        self.balanced = True
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.scripts += tag == "script"
        self.handlers += [name for name in found if name.startswith("on")]
        self.fetched += [found[name] or "" for name in ("src", "href", "xlink:href", "data", "srcset") if name in found]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        self.balanced &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: str) -> PageReader:
    reader = PageReader()
    reader.feed(page)
    return reader


def test_page_is_whole_and_loads_nothing(written: tuple[Report, str, str, dict[str, object]]) -> None:
    reader = read(written[1])
    assert reader.balanced and reader.open == []
    assert len(reader.ids) == len(set(reader.ids))
    assert all(link.startswith("#") or link == "data:," for link in reader.fetched)
    assert not re.search(r"url\((?!#)", written[1])
    assert "@import" not in written[1]
    assert len(written[1]) < 3_000_000


def test_model_output_cannot_become_markup(written: tuple[Report, str, str, dict[str, object]]) -> None:
    _, page, markdown, _ = written
    reader = read(page)
    assert reader.scripts == 1 and reader.handlers == []
    assert "<img" not in page and "<script>alert" not in page
    assert "Report &lt;of&gt; a test" in page
    assert "alert('x')" in "".join(reader.text)
    # A run of backticks in an answer must not end the block that holds it.
    assert all(line == "````" or line == "````text" for line in markdown.splitlines() if line.startswith("```"))
    policy = re.search(r"script-src '(sha256-[^']+)'", page)
    assert policy is not None


def test_page_shows_every_section_and_links_to_it(written: tuple[Report, str, str, dict[str, object]]) -> None:
    page = written[1]
    for name in (
        "summary", "comparison", "failed", "wary", "hacking", "families", "win-rates", "refusals", "reward-model",
        "training", "cost", "examples", "method",
    ):  # fmt: skip
        assert f'<section id="{name}"' in page
        assert f'href="#{name}"' in page
    assert page.count('<article class="example') == 40
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    svgs = re.findall(r"<svg [^>]*>", page)
    assert len(svgs) >= 10
    assert all('role="img"' in svg and "aria-label=" in svg for svg in svgs)
    assert "var(--ink" in page


def test_markdown_holds_the_same_numbers(written: tuple[Report, str, str, dict[str, object]]) -> None:
    report, page, markdown, _ = written
    win = report.main_view.against("ppo", "sft")
    assert win is not None
    shown = f"{100 * win.rate.estimate:.1f}"
    assert shown in page and shown in markdown
    assert "| Win-rate against sft, % |" in markdown
    assert "(plots/win-rates.svg)" in markdown


def test_json_holds_every_number(written: tuple[Report, str, str, dict[str, object]]) -> None:
    report, _, _, data = written
    assert data["models"] == ["base", "sft", "dpo", "ppo"]
    assert (data["reference"], data["candidate"], data["judge"]) == ("sft", "ppo", "gold")
    views = data["views"]
    assert isinstance(views, list)
    assert [view["title"] for view in views] == [view.title for view in report.views]
    gold = report.main_view.metrics["ppo"].gold
    assert gold is not None and views[0]["metrics"]["ppo"]["gold"]["estimate"] == gold.estimate
    assert "samples" not in data and "histories" not in data
    assert data["costs"]["reward model"]["seconds"] == 3.0  # type: ignore[index, call-overload]
    assert data["checks"]


def test_numbers_are_those_of_the_samples() -> None:
    source = full_input()
    report = build_report(source)
    assert [view.title for view in report.views] == [
        "Held-out prompts, sampled",
        "Held-out prompts, greedy",
        "Out-of-distribution prompts, sampled",
        "Out-of-distribution prompts, greedy",
    ]
    heldout = {m.name: list(m.select("sampled", "heldout")) for m in source.models}
    mean = sum(s.gold or 0 for s in heldout["ppo"]) / 40
    gold = report.main_view.metrics["ppo"].gold
    assert gold is not None and gold.estimate == pytest.approx(mean)
    wins = sum((a.gold or 0) > (b.gold or 0) for a, b in zip(heldout["ppo"], heldout["sft"], strict=True))
    found = report.main_view.against("ppo", "sft")
    assert found is not None and found.wins == wins
    assert report.main_view.against("ppo", "dpo") is not None
    # Refusal rates of the held-out view come from the prompt sets made for them.
    harmful = report.main_view.metrics["sft"].refusal_harmful
    assert harmful is not None and (harmful.estimate, harmful.num) == (1.0, 30)
    assert list(report.costs) == ["reward model", "base", "sft", "dpo", "ppo"]


def test_examples_are_drawn_evenly_and_by_seed() -> None:
    source = full_input()
    report = build_report(source)
    families = [example.family for example in report.examples]
    assert {family: families.count(family) for family in set(families)} == dict.fromkeys(FAMILIES, 10)
    assert report.examples == build_report(source).examples
    assert report.examples != build_report(dataclasses.replace(source, seed=1)).examples
    for example in report.examples:
        assert list(example.outcomes) == ["base", "dpo", "ppo"]
        for name, outcome in example.outcomes.items():
            gap = (example.answers[name].gold or 0) - (example.answers["sft"].gold or 0)
            assert outcome == ("win" if gap > 0 else "loss" if gap < 0 else "tie")


def wary(source: ReportInput) -> set[str]:
    return {check.name for check in run_checks(build_report(source)) if check.wary}


def sft_and_ppo(after: Sequence[Sample]) -> ReportInput:
    """200 held-out and 150 prompts of each intent, so that their number is no reason for caution."""
    many = [
        [dataclasses.replace(s, prompt_id=f"{s.prompt_id}-{copy}") for s in samples for copy in range(5)]
        for samples in (responses(0.4), after)
    ]
    return ReportInput(models=[model("sft", many[0]), model("ppo", many[1])])


def test_a_good_model_gives_no_reason_for_caution() -> None:
    assert wary(sft_and_ppo(responses(0.95, kl=6.0))) == set()


CHANGES: dict[str, dict[str, object]] = {
    "ppo: length": {"num_tokens": 60},
    "ppo: KL": {"kl": 20.0},
    "ppo: entropy": {"entropy": 0.1},
    "ppo: unfinished responses": {"finished": False},
    "ppo: repetition": {"response": "so very good " * 30},
    "ppo: diversity": {"response": "Yes, it is."},
    "ppo: win-rate": {"gold": 0.0, "reward": 0.0},
    "ppo: reward against gold": {"gold": 0.3, "reward": 9.0},
    "ppo: refusals, harmful, sampled": {"refused": False},
    "ppo: refusals, benign, sampled": {"refused": True},
}


@pytest.mark.parametrize(
    "name", fast_some(CHANGES, "ppo: KL", "ppo: reward against gold", "ppo: refusals, benign, sampled")
)
def test_each_bad_sign_is_told(name: str) -> None:
    changed = [dataclasses.replace(s, **CHANGES[name]) for s in responses(0.95, kl=6.0)]  # type: ignore[arg-type]
    assert name in wary(sft_and_ppo(changed))


def test_few_prompts_and_a_diverged_log_are_told() -> None:
    source = full_input()
    assert "number of prompts" in wary(source)
    bad = [*history(), {"step": 13, "reward/mean": float("nan"), "entropy/mean": 0.1}]
    found = wary(dataclasses.replace(source, histories={"ppo": bad}))
    assert {"ppo: numbers in the log", "ppo: entropy over training"} <= found


def test_without_gold_the_reward_model_judges_and_the_page_says_so(tmp_path: Path) -> None:
    without = [
        model(name, [dataclasses.replace(s, gold=None, gold_parts={}) for s in responses(q)])
        for name, q in (("sft", 0.4), ("ppo", 0.9))
    ]
    paths = write_report(tmp_path, ReportInput(models=without))
    assert paths.report.judge == "reward"
    page = paths.html.read_text(encoding="utf-8")
    assert "no gold scorer for these prompts, so the reward model is the judge" in page
    assert "Gold score" not in page
    assert "judge" in wary(ReportInput(models=without))


def test_one_model_without_scores_or_logs_still_gives_a_report(tmp_path: Path) -> None:
    plain = [
        dataclasses.replace(s, gold=None, gold_parts={}, reward=None, kl=None, entropy=None) for s in responses(0.4)
    ]
    paths = write_report(tmp_path, ReportInput(models=[ModelResult("base", tuple(plain))], num_examples=3))
    assert (paths.report.judge, paths.report.reference, paths.report.candidate) == (None, None, None)
    page = paths.html.read_text(encoding="utf-8")
    assert read(page).balanced
    assert page.count('<article class="example') == 3
    for absent in ("win-rates", "reward-model", "training", "cost"):
        assert f'id="{absent}"' not in page
    assert "Win-rate" not in paths.markdown.read_text(encoding="utf-8")


def test_a_model_that_was_not_run_on_a_prompt_set_is_left_out_there() -> None:
    report = build_report(full_input())
    greedy = report.views[1]
    assert list(greedy.metrics) == ["sft", "ppo"]
    assert [(win.first, win.second) for win in greedy.win_rates] == [("ppo", "sft")]


def test_bad_requests_are_told_in_a_sentence(tmp_path: Path) -> None:
    sft = model("sft", responses(0.4))
    with pytest.raises(UserError, match="at least one model with samples"):
        build_report(ReportInput(models=[]))
    with pytest.raises(UserError, match="reference model 'ref' is not among the models: sft"):
        build_report(ReportInput(models=[sft], reference="ref"))
    with pytest.raises(UserError, match="distinct model names"):
        build_report(ReportInput(models=[sft, sft]))
    no_gold = model("x", [dataclasses.replace(s, gold=None) for s in responses(0.4)])
    with pytest.raises(UserError, match="judge 'gold' was asked for"):
        build_report(ReportInput(models=[no_gold], judge="gold"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the report"):
        write_report(tmp_path / "file", ReportInput(models=[sft], num_examples=1))


def test_names_with_markup_or_mathematics_are_only_names(tmp_path: Path) -> None:
    odd = [dataclasses.replace(s, family="a$b_{c$ <i>") for s in responses(0.4)]
    paths = write_report(
        tmp_path,
        ReportInput(
            models=[model("m$^<b>", odd), model("n|$", odd)],
            histories={"p<p>": [{"step": 1, "kl/$x^": 1.0, "kl/<u>": 2.0}]},
            reward_pairs=[RewardPair("f$_", 1.0, 0.0, 1, 2), RewardPair("f$_", 1.0, 2.0, 1, 2)],
        ),
    )
    reader = read(paths.html.read_text(encoding="utf-8"))
    assert reader.balanced
    assert not {"i", "u"} & set(re.findall(r"<(\w+)", paths.html.read_text(encoding="utf-8")))
    assert any("m$^<b>" in text for text in reader.text)


def test_console_table_has_the_summary() -> None:
    console = Console(width=80, force_terminal=False)
    with console.capture() as captured:
        console.print(summary_table(build_report(full_input()), intervals_below=True))
    text = captured.get()
    for word in ("Gold score", "Win-rate", "base", "ppo", "Refuses"):
        assert word in text


@pytest.mark.slow
def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    source = dataclasses.replace(full_input(), num_examples=2, histories={"ppo": history()}, reward_pairs=())
    one, two = write_report(tmp_path / "one", source), write_report(tmp_path / "two", source)
    assert one.html.read_bytes() == two.html.read_bytes()
    assert one.data.read_bytes() == two.data.read_bytes()
    assert report_numbers(one.report)["format"] == 1


def test_training_log_is_read_with_its_non_finite_values(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"step": 1, "train/loss": "NaN", "note": "text"}\n\n{"step": 2, "train/loss": 0.5}\n')
    rows = read_history(path)
    assert [set(row) for row in rows] == [{"step", "train/loss"}] * 2
    assert rows[0]["train/loss"] != rows[0]["train/loss"]
    path.write_text('{"step": 1}\nnot json\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_history(path)
    with pytest.raises(UserError, match="no training log"):
        read_history(tmp_path / "absent.jsonl")


def test_every_logged_metric_gets_a_panel() -> None:
    keys = {
        "reward/mean": "Reward",
        "reward/length_penalty": "Reward",
        "kl/mean": "KL to the reference",
        "kl/p95": "KL to the reference",
        "kl/coefficient": "KL coefficient",
        "policy/approx_kl": "KL of the update",
        "entropy/mean": "Entropy",
        "policy/clip_fraction": "Clip fraction",
        "loss/policy": "Policy loss",
        "value/loss": "Value loss",
        "advantage/std": "Advantages",
        "value/mean": "Values and returns",
        "value/explained_variance": "Explained variance",
        "length/mean": "Length",
        "length/drift": "Length change",
        "refusal/rate": "Refusals",
        "repetition/rate": "Repetition",
        "lr/policy": "Learning rate",
        "train/grad_norm": "Gradient norm",
        "rate/generation_tokens": "Tokens per second",
        "memory/peak_mb": "Memory",
        "time/generate": "Seconds",
        "train/loss": "Loss",
        "custom/a": "custom/a",
    }
    panels = panels_of([{"step": 1.0} | dict.fromkeys(keys, 0.0)])
    assert {key: panel.title for panel in panels for key in panel.keys} == keys


def test_diagnostics_as_one_png(tmp_path: Path) -> None:
    path = tmp_path / "diagnostics.png"
    diagnostics_png(history(), path, "two thousand steps")
    assert path.read_bytes().startswith(b"\x89PNG")
