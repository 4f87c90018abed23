"""The lm-evaluation-harness itself on tasks of a folder: our side against its own model class, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import rlhf

from rlhf.data.chat import ChatEncoder
from rlhf.eval.benchmarks import HarnessConfig, load_benchmark
from rlhf.eval.suite_items import Item
from rlhf.eval.suite_library import load_suite
from rlhf.infra.errors import UserError
from rlhf.recipes.evaluate_config import EvaluateConfig
from rlhf.recipes.ranked import measured_answers
from rlhf.recipes.stages import LoadedPolicy, load_policy
from rlhf.recipes.suites import write_turns

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
pytestmark = pytest.mark.slow

NUM = 24
CHOICES = """
task: facts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: [A, B, C, D]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3}}
"""
WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{asked}}}}"
doc_to_target: wanted
generation_kwargs: {{until: ["."], max_gen_toks: 24}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
PERPLEXITY = """
task: perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks over the built-in world's questions in MMLU's form."""
    place = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "text": f"{item.spec['header']}{''.join(item.shots)}{item.prompt}",
            "answer": item.spec["answer"],
            "asked": "Tell me the capital of France.",
            "wanted": "Paris",
        }
        for item in load_suite("tinychat_mmlu").items[:NUM]
    ]
    file = place / "facts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, text in (("facts", CHOICES), ("written", WRITTEN), ("perplexity", PERPLEXITY)):
        (place / f"{name}.yaml").write_text(text.format(file=file), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def loaded() -> LoadedPolicy:
    return load_policy("tinychat", EvaluateConfig().model, Path("runs"), torch.device("cpu"))


def test_equals_the_harness_with_its_own_model_class(folder: Path, loaded: LoadedPolicy) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    config = EvaluateConfig(tax=("lm-eval:facts",), harness={"folder": folder})
    suite = load_benchmark("lm-eval:facts", config.harness)
    encoder = ChatEncoder(loaded.backbone.tokenizer)
    ours = measured_answers(suite, loaded, encoder, config)
    theirs = simple_evaluate(
        model=HFLM(pretrained=loaded.backbone.model, tokenizer=loaded.backbone.tokenizer, batch_size=8),
        tasks=["facts"],
        task_manager=TaskManager(include_path=str(folder)),
        bootstrap_iters=0,
    )
    rows: list[dict[str, Any]] = theirs["samples"]["facts"]
    assert len(ours) == len(rows) == NUM
    for mine, row in zip(ours, rows, strict=True):
        assert mine.score == row["acc"]
        likelihoods = [pair[0] for pair in json.loads(str(mine.extracted))]
        assert likelihoods == pytest.approx([float(pair[0]) for pair in row["filtered_resps"]], abs=1e-3)


def test_equals_our_own_reading_of_the_same_questions(folder: Path, loaded: LoadedPolicy) -> None:
    config = EvaluateConfig(tax=("lm-eval:facts",), harness={"folder": folder})
    suite = load_benchmark("lm-eval:facts", config.harness)
    encoder = ChatEncoder(loaded.backbone.tokenizer)
    theirs = measured_answers(suite, loaded, encoder, config)
    own = measured_answers(load_suite("tinychat_mmlu"), loaded, encoder, config)[:NUM]
    assert [one.score for one in theirs] == [one.score for one in own]
    assert suite.version == "3" and len(suite.sha256) == 64


def test_a_draw_is_the_same_for_everybody_and_part_of_the_version(folder: Path) -> None:
    config = HarnessConfig(folder=folder)
    first, again = (load_benchmark("lm-eval:facts", config, 5) for _ in range(2))
    assert first.asked == again.asked and len(first.asked["facts"]) == 5
    assert first.sha256 == again.sha256 != load_benchmark("lm-eval:facts", config, 6).sha256
    chat = HarnessConfig(folder=folder, chat_template=True)
    assert load_benchmark("lm-eval:facts", chat, 5).sha256 != first.sha256


@pytest.mark.parametrize(
    ("name", "said"), [("lm-eval:nothing_like_it", "has no task"), ("lm-eval:perplexity", "perplexity, which is no")]
)
def test_what_cannot_be_measured_is_one_sentence(folder: Path, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_benchmark(name, HarnessConfig(folder=folder))


def test_from_the_command_line(
    folder: Path, loaded: LoadedPolicy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"run.output_dir={tmp_path}", f"harness.folder={folder}", "run.device=cpu", "run.num_threads=1"]
    models = "models={sft: tinychat, ppo: tinychat}"
    suites = "suites=[lm-eval:facts, lm-eval:written]"
    assert rlhf("eval", "run.name=a", suites, models, "max_items=6", "harness.chat_template=true", *given) == 0
    content = json.loads((tmp_path / "a" / "suites.json").read_text(encoding="utf-8"))
    assert [(row["model"], row["suite"], row["num"]) for row in content["results"]] == [
        ("sft", "lm-eval:facts", 6), ("sft", "lm-eval:written", 6), ("ppo", "lm-eval:facts", 6),
        ("ppo", "lm-eval:written", 6),
    ]  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "a" / "answers.jsonl").read_text().splitlines()]
    written = [line for line in lines if line["suite"] == "lm-eval:written"]
    # As the model writes it when it is asked by ourselves.
    encoder = ChatEncoder(loaded.backbone.tokenizer)
    config = EvaluateConfig(suites=("regression",), generation={"max_new_tokens": 24, "stop": ["."]}, use_cache=False)
    own = write_turns([Item("a", ("Tell me the capital of France.",))], loaded, encoder, config)[0][0].text
    assert own and {line["response"].strip() for line in written} == {own}
    small = ["suite.num_heldout=8", "suite.num_ood=0", "suite.num_probes=2", "generation.max_new_tokens=8"]
    assert (
        rlhf("eval", "run.name=b", "tax=lm-eval:facts", "num_tax_items=6", "greedy=false", models, *small, *given) == 0
    )
    assert "Alignment tax" in (tmp_path / "b" / "EVAL_REPORT.md").read_text(encoding="utf-8")
    capsys.readouterr()
