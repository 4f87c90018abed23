"""Labels by sampling: against a slow account of the same, resumed bit for bit, remembered, and beside the truth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fast_some import fast_some
from toy_runs import WriteRows, interrupt_after, log_lines, prompts, settings

from rlhf.data.loading import load_rows
from rlhf.eval.label_agreement import LabelledSolution, label_agreement
from rlhf.infra.config import load_config
from rlhf.infra.determinism import derive_seed
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run
from rlhf.infra.interrupt import Stopped
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.models.decoding import GenerationConfig
from rlhf.models.policy import Policy
from rlhf.recipes.prm_label import run_prm_label
from rlhf.recipes.prm_label_config import StepLabelConfig
from rlhf.recipes.resume import resume_run
from rlhf.rollout.sampler import Sampler


def label(tmp_path: Path, base: Path, data: Path, name: str, *more: str) -> Run:
    shared = settings(
        tmp_path, name, f"policy={base}", f"data.train_files={data}", "data.validation_fraction=0",
        "rewards=[{name: target_string, arguments: {text: red}}]", "generation.max_new_tokens=10",
        "sampling.split=' the | a | is | not '", "sampling.num_solutions=3", "sampling.num_completions=4",
        "sampling.questions_at_once=4",
    )  # fmt: skip
    return run_prm_label(load_config(StepLabelConfig, overrides=[*shared, *more]))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def questions(write_rows: WriteRows) -> Path:
    return write_rows([{"prompt": prompt, "id": number} for number, prompt in enumerate(prompts(10))])


def test_labels_are_the_counts_of_a_slow_account(tmp_path: Path, base: Path, questions: Path) -> None:
    run = label(tmp_path, base, questions, "labels")
    rows = rows_of(run.folder)
    backbone = Backbone.load(ModelConfig(name_or_path=str(base)))
    sampler = Sampler(Policy(backbone, None), GenerationConfig(max_new_tokens=10), [backbone.tokenizer.eos_token_id])

    def draw(ids: list[int], number: int) -> list[int]:
        return sampler.sample([ids], derive_seed(0, "completion", number)).responses()[0]

    def words(ids: list[int]) -> list[tuple[int, str]]:
        """The words with their places among the tokens; special tokens are no words."""
        found = enumerate(backbone.tokenizer.convert_ids_to_tokens(ids))
        return [(place, word) for place, word in found if not word.startswith("<")]

    def names_red(ids: list[int]) -> bool:
        return any(word == "red" for _, word in words(ids))

    expected = []
    for number, prompt in enumerate(prompts(10)):
        ids, seen = backbone.tokenizer(prompt)["input_ids"], []
        for solution in range(3):
            answer = draw(ids, solution)
            said, finished = words(answer), answer[-1] == backbone.tokenizer.eos_token_id
            # A step ends before a word that separates; the next one begins with the word behind that.
            steps: list[list[str]] = [[]]
            starts = []
            for (_, word), following in zip(said, [*said[1:], None], strict=True):
                if word in ("the", "a", "is", "not") and steps[-1] and following is not None:
                    steps.append([])
                    starts.append(following[0])
                else:
                    steps[-1].append(word)
            texts = [" ".join(step) for step in steps]
            if not said or (texts, finished) in seen:
                continue
            seen.append((texts, finished))
            beginnings = [answer[:start] for start in starts] + ([] if finished else [answer])
            counts = [sum(names_red([*b, *draw([*ids, *b], k)]) for k in range(4)) for b in beginnings]
            labels = [count / 4 for count in counts] + ([float(names_red(answer))] if finished else [])
            expected.append((number, texts, labels))
    assert len(expected) > 20 and any(0 < value < 1 for _, _, labels in expected for value in labels)
    assert [(row["id"], row["completions"], row["labels"]) for row in rows] == expected
    # The file is data for the process reward model as it is.
    loaded = load_rows(load_config(StepLabelConfig).data, [str(run.folder / "steps.jsonl")], "train")
    assert loaded.num_malformed == 0 and len(loaded.rows) == len(rows)


def test_hard_labels_and_another_bound(tmp_path: Path, base: Path, questions: Path) -> None:
    soft = rows_of(label(tmp_path, base, questions, "soft").folder)
    hard = rows_of(label(tmp_path, base, questions, "hard", "sampling.estimate=hard").folder)
    assert [row["num_right"] for row in hard] == [row["num_right"] for row in soft]
    assert [[float(value > 0) for value in row["labels"]] for row in soft] == [row["labels"] for row in hard]
    never = rows_of(label(tmp_path, base, questions, "never", "sampling.right_from=2").folder)
    assert all(value == 0 for row in never for value in row["labels"])


@pytest.mark.parametrize("cache", fast_some(["true", "false"], "true"))
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, base: Path, questions: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = label(tmp_path / "one", base, questions, "straight", f"use_cache={cache}")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "should_stop", interrupt_after(2))
        with pytest.raises(Stopped, match="rlhf resume"):
            label(tmp_path / "two", base, questions, "stopped", f"use_cache={cache}")
    folder = tmp_path / "two" / "stopped"
    assert not (folder / "steps.jsonl").exists()
    partial = folder / "steps.jsonl.partial"
    with partial.open("a", encoding="utf-8") as file:  # killed while it wrote the next portion
        file.write('{"prompt": "half')
    resume_run(folder, lambda *_: None)
    for name in ("steps.jsonl", "label_report.json"):
        assert (folder / name).read_bytes() == (straight.folder / name).read_bytes()
    assert log_lines(folder) == log_lines(straight.folder)
    assert not partial.exists()


def test_lost_labels_are_not_passed_over(
    tmp_path: Path, base: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Run, "should_stop", interrupt_after(2))
        with pytest.raises(Stopped):
            label(tmp_path, base, questions, "stopped")
    (tmp_path / "stopped" / "steps.jsonl.partial").write_text("")
    with pytest.raises(UserError, match=r"holds less than the \d+ bytes that were written to it"):
        resume_run(tmp_path / "stopped", lambda *_: None)


def test_what_was_sampled_is_not_sampled_again(
    tmp_path: Path, base: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = label(tmp_path, base, questions, "first")

    def no_sampling(*_: object) -> None:
        raise AssertionError("everything is in the cache")

    monkeypatch.setattr(Sampler, "sample", no_sampling)
    again = label(tmp_path, base, questions, "again", "rewards=[{name: target_string, arguments: {text: blue}}]")
    assert [row["completions"] for row in rows_of(again.folder)] == [
        row["completions"] for row in rows_of(first.folder)
    ]
    assert [row["labels"] for row in rows_of(again.folder)] != [row["labels"] for row in rows_of(first.folder)]


@pytest.mark.slow
def test_words_of_the_built_in_world_are_compared_with_the_truth(tmp_path: Path) -> None:
    overrides = settings(
        tmp_path, "labels", "data.max_samples=24", "data.validation_fraction=0", "sampling.num_solutions=2",
        "sampling.num_completions=3", r"sampling.split='\. |, |\n'", "generation.max_new_tokens=48",
    )  # fmt: skip
    run = run_prm_label(load_config(StepLabelConfig, overrides=overrides))
    report = json.loads((run.folder / "label_report.json").read_text(encoding="utf-8"))
    assert report["agreement"]["num_steps"] > 20
    assert report["agreement"]["auc"]["estimate"] > 0.6
    assert 0.3 < report["solutions_right"] < 0.9


def test_agreement_by_hand() -> None:
    found = label_agreement(
        [
            LabelledSolution("a", [1.0, 0.25, 0.0], [True, True, True]),
            LabelledSolution("b", [0.5, 0.0], [False, False]),
        ]
    )
    assert (found.num_questions, found.num_solutions, found.num_steps, found.share_right) == (2, 2, 5, 0.6)
    assert found.hard_accuracy.estimate == pytest.approx(3 / 5)
    assert found.majority_accuracy.estimate == pytest.approx(2 / 5)
    assert found.missed_right.estimate == pytest.approx(1 / 3) and found.saved_wrong.estimate == 0.5
    assert found.hard_balanced.estimate == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found.auc.estimate == pytest.approx((2 + 1 + 0.5) / 6)
    with pytest.raises(UserError, match="got none"):
        label_agreement([])
