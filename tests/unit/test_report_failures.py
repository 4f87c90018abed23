"""What a report says of failures: from run folders, from looks for reward hacking, from targets that were missed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.eval.cautions import run_checks
from rlhf.eval.failures import Failures, failures_of
from rlhf.eval.hacking import HackingConfig, Look, Mean, judge
from rlhf.eval.hacking_record import HackingRecord, look_after, read_record
from rlhf.eval.hacking_tables import hacking_of
from rlhf.eval.report import write_report
from rlhf.eval.report_data import ReportInput, build_report
from rlhf.eval.samples import ModelResult, Sample
from rlhf.eval.stage_facts import StageFacts, read_stage
from rlhf.eval.tables import NONE
from rlhf.infra.errors import UserError
from rlhf.recipes.evaluation_sources import stage_sources


def samples(text: str = "It is {}.", split: str = "heldout", mode: Any = "sampled", **values: Any) -> list[Sample]:
    measured = {"gold": 0.5, "reward": 0.0, "kl": 0.0, "entropy": 0.6, "num_tokens": 12} | values
    return [
        Sample(f"{split}{i}", f"Which is {i}?", "facts", split, text.format(i), finished=True, mode=mode, **measured)
        for i in range(40)
    ]


def record(policy: str = "ppo", **settings: Any) -> HackingRecord:
    figures = [(1, 20.0, 0.0), (100, 40.0, 5.0), (200, 21.0, 6.0)]
    looks = tuple(Look(step, {"length": Mean(n, 0.5, 64), "kl": Mean(kl, 0.1, 64)}) for step, n, kl in figures)
    config = HackingConfig(**settings)
    return HackingRecord(policy, looks, tuple(judge(looks, config)), config.model_dump(mode="json"))


def failures(source: ReportInput) -> Failures:
    report = build_report(source)
    return failures_of(report, run_checks(report))


def two(after: list[Sample], **more: Any) -> ReportInput:
    return ReportInput(models=[ModelResult("sft", tuple(samples())), ModelResult("ppo", tuple(after))], **more)


BETTER = {"gold": 0.9, "reward": 1.0, "kl": 3.0}


def test_nothing_failed_is_said_with_what_was_looked_at(tmp_path: Path) -> None:
    source = two(samples(**BETTER), stages=[StageFacts("ppo", "finished")])
    found = failures(source)
    assert found.failed == {} and found.num == 0
    assert found.passed[0] == "Stages that finished with nothing skipped or refused: ppo."
    assert "No such sign in ppo, after training: length, repetition" in found.passed[1]
    paths = write_report(tmp_path, source)
    for text in (paths.markdown.read_text(), paths.html.read_text()):
        assert "Nothing that was looked at failed." in text
    assert json.loads(paths.data.read_text())["failures"]["failed"] == {}


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (StageFacts("ppo", "failed", error="NonFiniteError: 5 steps"), "ppo failed: NonFiniteError: 5 steps."),
        (StageFacts("ppo", "running"), "ppo was not finished when this report was made (status: running)."),
        (StageFacts("ppo", "finished", "max_minutes"), "ppo ended early: its time budget was spent."),
        (StageFacts("ppo", "finished", "reward_hacking"), "ppo ended early: a sign of reward hacking ended it."),
        (StageFacts("ppo", "finished", num_skipped=1), "ppo: 1 optimizer step with a loss or gradient"),
        (StageFacts("ppo", "finished", num_rejected=3), "ppo: 3 rows of data could not be read."),
        (StageFacts("ppo", "finished", num_resumed=2), "ppo was interrupted and taken up again 2 times."),
    ],
)
def test_stages_and_guards_are_told(stage: StageFacts, words: str) -> None:
    (sentence,) = failures(two(samples(**BETTER), stages=[stage])).failed["Stages and guards"]
    assert sentence.startswith(words)


def test_signs_in_training_and_after_it_are_told_with_their_place() -> None:
    flattering = samples("What a great question! It is {}.", **BETTER)
    found = failures(two(flattering, hacking=[record()])).failed["Signs of reward hacking"]
    assert len(found) == 2
    assert found[0].startswith("ppo, while it trained, iteration 100: mean length changed by +100 %")
    assert found[1].startswith("ppo, after training: answers that praise the user changed by +100 points")


def test_targets_missed_are_told_apart_from_doubts() -> None:
    worse = [*samples(**BETTER | {"num_tokens": 30}), *samples(mode="greedy", gold=0.1)]
    source = two(worse)
    source = dataclasses.replace(
        source, models=[ModelResult("sft", (*samples(), *samples(mode="greedy"))), *source.models[1:]]
    )
    found = failures(source).failed["Targets missed"]
    assert len(found) == 2
    assert found[0].startswith("Mean length of ppo changed by +150 %")
    assert found[1].startswith("Held-out prompts, greedy: ppo wins 0.0 %") and "it is worse there" in found[1]
    doubts = {check.name for check in run_checks(build_report(source)) if check.wary and not check.missed}
    assert doubts == {"number of prompts"}


def test_after_training_the_settings_of_training_hold_and_only_shared_prompts_count() -> None:
    before, after = samples(), samples(num_tokens=20)
    usual, strict = look_after("ppo", before, after, {}), look_after("ppo", before, after[:30], {"length": 0.1})
    assert usual is not None and strict is not None
    # Eight more tokens on twelve: two thirds.
    assert [v.change.size for v in usual.verdicts if v.sign == "length"] == [pytest.approx(2 / 3)]
    assert "length" in {v.sign for v in usual.caught}
    assert [v.threshold for v in strict.verdicts if v.sign == "length"] == [0.1]
    assert strict.looks[0].figures["length"].num == 30
    assert look_after("ppo", before, samples(split="ood"), {}) is None
    some = [dataclasses.replace(sample, gold=None if i else 0.5) for i, sample in enumerate(after)]
    partly = look_after("ppo", before, some, {})
    assert partly is not None and "gold" not in {v.sign for v in partly.verdicts}


def test_the_report_shows_values_thresholds_verdicts_and_plots(tmp_path: Path) -> None:
    paths = write_report(tmp_path, two(samples(**BETTER), hacking=[record(entropy=None, action="stop")]))
    markdown, page = paths.markdown.read_text(), paths.html.read_text()
    assert "| Length, growth, % | +100 [+93.1, +107] | 50 | caught at 100 |" in markdown
    assert "| KL to the reference, nats per answer | +6 [+5.8, +6.2] | 30 | clean |" in markdown
    assert "plots/hacking-training-ppo-length.svg" in markdown and "plots/hacking-after-gold.svg" in markdown
    assert (tmp_path / "plots" / "hacking-training-ppo-length.svg").is_file()
    assert '<b class="bad">caught at 100</b>' in page and "Length, growth: caught at iteration 100" in page
    assert f"| Reward-hacking signs in training | {NONE} | 1 of 2 |" in markdown
    assert f"| Reward-hacking signs after it | {NONE} | 0 of 7 |" in markdown  # without entropy here, too
    caption = hacking_of(record(entropy=None, action="stop")).caption
    assert caption.startswith("Looked at in iterations 1, 100, 200; each against the first. No figures for: repetition")
    assert caption.endswith("Left out by the settings: entropy. On a sign: stop.")


def as_file(folder: Path, found: HackingRecord) -> Path:
    path = folder / "hacking.json"
    content = {
        "settings": found.settings,
        "verdicts": [verdict.to_json() for verdict in found.verdicts],
        "looks": [look.to_json() for look in found.looks],
    }
    path.write_text(json.dumps(content))
    return path


def test_a_record_is_read_back_and_a_broken_one_is_named(tmp_path: Path) -> None:
    path = as_file(tmp_path, record())
    assert read_record(path, "ppo") == record()
    for broken in ("{", "[]", '{"looks": [{}], "verdicts": [], "settings": {}}'):
        path.write_text(broken)
        with pytest.raises(UserError, match=r"hacking.json' cannot be read as a record of looks"):
            read_record(path, "ppo")


def run_folder(folder: Path, **info: Any) -> Path:
    (folder / "logs").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": "finished", "cost": {"seconds": 3.0}} | info))
    (folder / "logs" / "train.jsonl").write_text('{"step": 1}\n{"step": 2, "train/skipped_steps": 4}\n')
    return folder


def test_facts_of_a_stage_are_those_of_its_folder(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "ppo", status="failed", error="it broke", resumed=[{}, {}])
    (folder / "rejected_rows.jsonl").write_text("{}\n{}\n")
    (folder / "rejected_rows_validation.jsonl").write_text("{}\n")
    assert read_stage(folder, "x") == StageFacts("x", "failed", None, "it broke", 2, 4, 3)


def test_a_run_is_read_once_under_its_name_as_a_model(tmp_path: Path) -> None:
    as_file(run_folder(tmp_path / "run-7"), record())
    run_folder(tmp_path / "rm")
    models = {"base": "tinychat", "ppo": str(tmp_path / "run-7")}
    found = stage_sources(models, {"reward": "rm", "the curves of PPO": "run-7"}, tmp_path)
    assert list(found.histories) == ["reward", "the curves of PPO"]
    assert list(found.costs) == [facts.name for facts in found.facts] == ["reward", "ppo"]
    assert [one.policy for one in found.hacking] == ["ppo"]
    with pytest.raises(UserError, match="histories names the run 'nowhere'"):
        stage_sources(models, {"x": "nowhere"}, tmp_path)
