"""`rlhf eval suites=[...]` as a user runs it: results, what fails loudly, baselines, models of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import rlhf
from tiny_models import make_gpt2
from tiny_tokenizers import byte_level
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.data.chat import ChatEncoder
from rlhf.eval.suite_items import Item
from rlhf.infra.experiment import Run
from rlhf.models.backbone import resolve_model
from rlhf.recipes.evaluate_config import EvaluateConfig
from rlhf.recipes.stages import load_policy
from rlhf.recipes.suites import write_turns

SMALL = ["generation.max_new_tokens=24", "max_items=6", "run.num_threads=1", "run.device=cpu"]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model after something went badly wrong with it."""
    folder = tmp_path_factory.mktemp("broken")
    model = AutoModelForCausalLM.from_pretrained(resolve_model("tinychat"), dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_model("tinychat")).save_pretrained(folder)
    return folder


def results(folder: Path) -> dict[tuple[str, str], Any]:
    content = json.loads((folder / "suites.json").read_text(encoding="utf-8"))
    return {(row["model"], row["suite"]): row for row in content["results"]}


@pytest.mark.slow
def test_two_equal_models_are_equal_and_everything_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = "suites=[tinychat_regression, tinychat_choices, tinychat_mmlu, reasoning, harmlessness]"
    models = "models={sft: tinychat, ppo: tinychat}"
    code = rlhf("eval", "run.name=a", f"run.output_dir={tmp_path}", names, models, *SMALL)
    shown = capsys.readouterr()
    assert code == 0, shown.err
    folder = tmp_path / "a"
    found = results(folder)
    assert len(found) == 10
    for suite in ("tinychat_regression", "tinychat_choices", "tinychat_mmlu", "reasoning", "harmlessness"):
        before, after = found["sft", suite], found["ppo", suite]
        assert before["num"] == 6 and before["score"] == after["score"] and before["scores"] == after["scores"]
        assert len(before["sha256"]) == 64 and before["version"] == "1"
    assert found["sft", "tinychat_choices"]["score"]["estimate"] > 0.5
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 60 and {line["model"] for line in lines} == {"sft", "ppo"}
    report = (folder / "SUITES.md").read_text(encoding="utf-8")
    assert "tinychat\\_regression: ppo is worse than sft on 0 of 6 prompts." in report
    assert "tinychat_choices" in shown.out and "cut off; raise generation.max_new_tokens" in shown.out


@pytest.mark.slow
def test_what_got_worse_fails_loudly(tmp_path: Path, broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = f"models={{before: tinychat, after: {broken}}}"
    given = ["run.name=a", f"run.output_dir={tmp_path}", "suites=tinychat_regression", models, *SMALL]
    assert rlhf("eval", *given) == 1
    shown = capsys.readouterr()
    assert "tinychat_regression: after is worse than before on" in shown.err
    assert "must not get worse" in shown.err
    assert "| before | after | answer before | answer after |" in (tmp_path / "a" / "SUITES.md").read_text()
    # In the other order it is a gain, and what came before the reference is no worsening of it.
    models = f"models={{before: {broken}, sft: tinychat}}"
    assert rlhf("eval", "run.name=b", *given[1:3], models, *SMALL) == 0


@pytest.mark.slow
def test_an_earlier_run_is_a_baseline(tmp_path: Path, broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, guard = f"run.output_dir={tmp_path}", "suites=tinychat_regression"
    assert rlhf("eval", "run.name=before", place, guard, "models={base: tinychat}", *SMALL) == 0
    again = ["run.name=after", place, guard, f"models={{new: {broken}}}", "baseline=before", *SMALL]
    assert rlhf("eval", *again) == 1
    assert "new is worse than base" in capsys.readouterr().err
    assert rlhf("eval", "run.name=x", place, "suites=reasoning", "baseline=before", *SMALL) == 2
    assert "has none of the suites reasoning" in capsys.readouterr().err
    assert rlhf("eval", "run.name=x", place, guard, "baseline=nobody", *SMALL) == 2
    assert "there is none" in capsys.readouterr().err
    stored = tmp_path / "before" / "suites.json"
    stored.write_text(stored.read_text().replace('"sha256": "', '"sha256": "0'))
    assert rlhf("eval", "run.name=y", *again[1:]) == 2
    assert "measure both with one version" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["suites=[resoning]"], "no suite 'resoning'"),
        (["suites=[reasoning, reasoning]"], "named twice"),
        (["suites=[reasoning]", "suite.num_heldout=5"], "`suites` names what is asked"),
        (["suites=[reasoning]", "generation.temperature=0.5"], "answered greedily"),
        (["max_items=3"], "`suites` is empty"),
        (["suites=[reasoning]", "max_items=0"], "max_items"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    assert rlhf("eval", f"run.output_dir={tmp_path}", "run.name=a", *given) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
@pytest.mark.parametrize("num_looks", [1, 2, 4])
def test_an_interrupted_evaluation_is_taken_up_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, num_looks: int
) -> None:
    place = f"run.output_dir={tmp_path}"
    given = ["suites=[tinychat_regression, tinychat_choices]", "models={sft: tinychat, ppo: tinychat}", *SMALL]
    assert rlhf("eval", "run.name=whole", place, *given) == 0
    looks = iter(range(1, 99))

    def asked(run: Run) -> bool:
        run.stop_reason = "interrupted" if next(looks) >= num_looks else None
        return run.stop_reason is not None

    with monkeypatch.context() as patch:
        patch.setattr(Run, "should_stop", asked)
        assert rlhf("eval", "run.name=a", place, *given) == 130
    assert "go on with: rlhf resume" in capsys.readouterr().err
    assert not (tmp_path / "a" / "suites.json").exists()
    assert rlhf("resume", str(tmp_path / "a")) == 0
    assert results(tmp_path / "a") == results(tmp_path / "whole")


def test_later_turns_stand_behind_the_models_own_answers() -> None:
    loaded = load_policy("tinychat", EvaluateConfig().model, Path("runs"), torch.device("cpu"))
    encoder = ChatEncoder(loaded.backbone.tokenizer)
    config = EvaluateConfig(generation={"max_new_tokens": 12}, use_cache=False)
    items = [Item("a", ("Tell me the capital of France.", "And of Spain?")), Item("b", ("Name the opposite of hot.",))]
    written, lengths, finished = write_turns(items, loaded, encoder, config)
    first = write_turns([Item("a", items[0].turns[:1])], loaded, encoder, config)
    roles = [message["role"] for message in written[0].prompt]  # type: ignore[index]
    assert roles == ["user", "assistant", "user"]
    assert written[0].prompt[1]["content"] == first[0][0].text  # type: ignore[index]
    assert written[0].answer.prompt_ids == encoder.prompt_ids(written[0].prompt)
    assert lengths[0] > first[1][0] and len(finished) == 2
    assert [message["content"] for message in written[1].prompt] == ["Name the opposite of hot."]  # type: ignore[index]


@pytest.fixture
def raw_model(tmp_path: Path) -> Path:
    """A base model as many are on the hub: no chat template, another tokenizer."""
    tokenizer = byte_level(["<|endoftext|>"], eos="<|endoftext|>", template=None)
    folder = tmp_path / "raw"
    make_gpt2(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_model_without_a_template_is_asked_in_plain_text(
    tmp_path: Path, raw_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"run.output_dir={tmp_path}"
    models = f"models={{raw: {raw_model}}}"
    suites = "suites=[tinychat_choices, tinychat_mmlu, regression]"
    assert rlhf("eval", place, "run.name=a", models, suites, *SMALL[1:], "generation.max_new_tokens=4") == 0
    assert results(tmp_path / "a")["raw", "regression"]["num"] == 6
    capsys.readouterr()


@pytest.mark.slow
def test_the_full_report_takes_models_of_different_tokenizers(
    tmp_path: Path, raw_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of one model's ids is read with the other's vocabulary: no KL between them, and no crash."""
    small = ["suite.num_heldout=8", "suite.num_ood=0", "suite.num_probes=2", "generation.max_new_tokens=4"]
    models = f"models={{base: tinychat, raw: {raw_model}}}"
    assert rlhf("eval", f"run.output_dir={tmp_path}", "run.name=a", models, "greedy=false", *small, *SMALL[2:]) == 0
    capsys.readouterr()
    rows = [json.loads(line) for line in (tmp_path / "a" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    kinds = {("kl" in row and row["kl"] is not None, row["entropy"] is not None) for row in rows[:12]}
    assert kinds == {(True, True)}
    assert {row["kl"] for row in rows[12:]} == {None}
