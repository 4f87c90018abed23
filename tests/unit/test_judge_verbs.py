"""`rlhf judge` as it is used: answers compared, judges measured, stored verdicts read, and what goes wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_server import Answer, ChatServer, Request, serving
from command_line import rlhf

from rlhf.infra.config import load_config
from rlhf.infra.errors import UserError
from rlhf.recipes.evaluate_config import EvaluateConfig
from rlhf.recipes.judge_compare import CompareConfig, are_answers, model_names, run_compare
from rlhf.recipes.judge_validate import ValidateConfig, run_validate
from rlhf.recipes.judge_winrate import stored_win_rates

KEY = "sk-test-77c1e0aa"


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def answers(tmp_path: Path) -> tuple[Path, Path]:
    """Two models' answers to twelve prompts; the first is good on eight of them, and one prompt each is its own."""
    one = [{"prompt": f"question {n}", "response": f"{'good' if n < 8 else 'bad'} one {n}"} for n in range(12)]
    two = [{"prompt": f"question {n}", "response": f"{'bad' if n < 8 else 'good'} two {n} longer"} for n in range(12)]
    one.append({"prompt": "only first", "response": "x"})
    return write(tmp_path / "ppo.jsonl", one), write(tmp_path / "sft.jsonl", two[::-1])


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    rows = [
        {"input": f"question {n}", "output_1": f"{a} {n}", "output_2": f"{b} {n}", "label": 1 + (a == "bad")}
        for n, (a, b) in enumerate([("good", "bad"), ("bad", "good")] * 6)
    ]
    return write(tmp_path / "labels.jsonl", rows)


def honest(request: Request, number: int) -> Answer:
    lines = request.prompt.splitlines()
    front = next(lines[n + 1] for n, line in enumerate(lines) if line.startswith("----- begin answer A"))
    return Answer(f"The good one. [[{'A' if front.startswith('good') else 'B'}]]")


def llm(server: ChatServer, **more: object) -> str:
    texts = {"kind": "llm", "base_url": server.url, "model": "tested", "backoff_seconds": 0.01, "name": "gpt"} | more
    return json.dumps(texts)


def place(tmp_path: Path, name: str = "run") -> list[str]:
    return [f"run.output_dir={tmp_path / 'runs'}", f"run.name={name}", "run.device=cpu"]


def numbers(tmp_path: Path, name: str = "run") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "runs" / name / "judge.json").read_text(encoding="utf-8"))
    return found


# ---------------------------------------------------------------------- compare


def test_two_files_before_several_judges(
    tmp_path: Path, answers: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(honest) as server:
        judges = f"judges=[{llm(server)}, {{kind: length}}, {{kind: length, prefer: shorter}}]"
        assert rlhf("judge", "compare", *map(str, answers), judges, *place(tmp_path)) == 0
        assert len(server.requests) == 24
    shown = capsys.readouterr().out
    assert "Win-rate of ppo against sft" in shown and "JUDGE_REPORT.md" in shown
    lines = {line["judge"]: line for line in numbers(tmp_path)["lines"]}
    assert lines["gpt"]["win"]["rate"]["estimate"] == pytest.approx(8 / 12)
    assert (lines["gpt"]["win"]["wins"], lines["gpt"]["win"]["losses"]) == (8, 4)
    assert lines["gpt"]["behaviour"]["consistency"]["estimate"] == 1.0
    assert lines["longer"]["win"]["rate"]["estimate"] == lines["longer"]["win"]["rate"]["high"] == 0.0
    assert lines["longer"]["win"]["wilson"]["high"] == pytest.approx(3.841459 / (12 + 3.841459))  # z^2 / (n + z^2)
    assert lines["shorter"]["behaviour"]["consistency"] is None
    kappas = {(p["first"], p["second"]): p["kappa"]["estimate"] for p in numbers(tmp_path)["agreement"]["pairs"]}
    assert kappas["longer", "shorter"] == 0.0
    assert numbers(tmp_path)["num_alone"] == 1
    folder = tmp_path / "runs" / "run"
    rows = [json.loads(line) for line in (folder / "judgements.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 36 and rows[0]["replies"][0].endswith("[[A]]")
    assert rows[12]["scores"] == [len(rows[12]["first"]), len(rows[12]["second"])]
    report = (folder / "JUDGE_REPORT.md").read_text(encoding="utf-8")
    assert "12 pairs of answers to 12 prompts. 1 prompts have an answer of one of them only." in report
    assert "24 requests sent" in report


def test_a_model_against_itself_is_one_half(tmp_path: Path, answers: tuple[Path, Path]) -> None:
    with serving(lambda request, number: Answer("[[A]]")) as server:
        config = load_config(
            CompareConfig,
            overrides=[f"first={answers[0]}", f"second={answers[0]}", f"judges=[{llm(server)}]", *place(tmp_path)],
        )
        run_compare(config)
    win = numbers(tmp_path)["lines"][0]["win"]
    assert win["rate"]["estimate"] == win["length_controlled"]["estimate"] == 0.5


def test_a_panel_is_one_more_judge(tmp_path: Path, answers: tuple[Path, Path]) -> None:
    judges = "judges=[{kind: length}, {kind: length, prefer: shorter}, {kind: column, column: mark}]"
    marked = [
        write(path, [json.loads(line) | {"mark": "good" in line} for line in path.read_text().splitlines()])
        for path in answers
    ]
    texts = [f"first={marked[0]}", f"second={marked[1]}", judges, *place(tmp_path)]
    run_compare(load_config(CompareConfig, overrides=[*texts, "panel=[longer, shorter, mark]"]))
    lines = {line["judge"]: line["win"] for line in numbers(tmp_path)["lines"]}
    # The two that look at length cancel out: the third decides, by a sixth.
    assert list(lines) == ["longer", "shorter", "mark", "panel"]
    assert (lines["panel"]["wins"], lines["panel"]["losses"]) == (8, 4)
    assert lines["panel"]["rate"]["estimate"] == pytest.approx(0.5 + (8 - 4) / 12 / 6)
    assert len(numbers(tmp_path)["agreement"]["pairs"]) == 3  # with itself it would only agree
    with pytest.raises(UserError, match=r"panel: there is no judge 'gpt'; name two or more of: longer, shorter, mark"):
        run_compare(load_config(CompareConfig, overrides=[*texts, "panel=[longer, gpt]"]))


def test_stored_verdicts_give_the_same_win_rate(tmp_path: Path, answers: tuple[Path, Path]) -> None:
    judges = "judges=[{kind: length, prefer: shorter}, {kind: length, name: long}]"
    assert rlhf("judge", "compare", *map(str, answers), judges, *place(tmp_path)) == 0
    found = stored_win_rates(str(tmp_path / "runs" / "run" / "judgements.jsonl"))
    assert [(one.win.judge, one.win.first, one.win.second) for one in found] == [
        ("shorter", "ppo", "sft"),
        ("long", "ppo", "sft"),
    ]
    for one, line in zip(found, numbers(tmp_path)["lines"], strict=True):
        assert one.win.rate.estimate == line["win"]["rate"]["estimate"]
        assert one.win.length_controlled.estimate == pytest.approx(line["win"]["length_controlled"]["estimate"])


def test_a_users_functions_judge(tmp_path: Path, answers: tuple[Path, Path]) -> None:
    (tmp_path / "mine.py").write_text(
        "def score(prompts, completions, **columns):\n    return [float('good' in text) for text in completions]\n"
        "def front(prompts, firsts, seconds, **columns):\n    return [1.0] * len(prompts)\n",
        encoding="utf-8",
    )
    kinds = [("function", "score"), ("pair_function", "front")]
    judges = ", ".join(f"{{kind: {kind}, function: '{tmp_path}/mine.py:{name}'}}" for kind, name in kinds)
    assert rlhf("judge", "compare", *map(str, answers), f"judges=[{judges}]", *place(tmp_path)) == 0
    lines = {line["judge"]: line for line in numbers(tmp_path)["lines"]}
    assert lines["score"]["win"]["wins"] == 8
    assert lines["front"]["behaviour"]["front_always"]["estimate"] == 1.0


def test_answers_of_an_evaluation_by_its_models(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "eval-1"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}", encoding="utf-8")
    common = {"family": "f", "num_tokens": 3, "finished": True, "kind": "", "reward": 0.0}
    rows = [
        {"prompt_id": f"{split}-{n}", "prompt": f"q{n}", "response": f"{model} {n}", "split": split, "mode": mode}
        | {"model": model, "gold": float(model == "ppo")}
        | common
        for model in ("sft", "ppo")
        for split, mode in (("heldout", "sampled"), ("heldout", "greedy"), ("ood", "sampled"))
        for n in range(3)
    ]
    write(folder / "samples.jsonl", rows)
    settings = ["judges=[{kind: column, column: gold}]", *place(tmp_path)]
    assert rlhf("judge", "compare", "eval-1:ppo", "eval-1:sft", *settings) == 0
    win = numbers(tmp_path)["lines"][0]["win"]
    assert (win["first"], win["second"], win["wins"], win["rate"]["num"]) == ("ppo", "sft", 3, 3)
    more = ["where={split: ood}", *place(tmp_path, "ood")]
    assert rlhf("judge", "compare", "eval-1:ppo", "eval-1:sft", settings[0], *more) == 0
    with pytest.raises(UserError, match=r"no answer whose split is 'new'; there are: heldout \(6\), ood \(3\)"):
        texts = ["first=eval-1:ppo", "second=eval-1:sft", "where={split: new}", settings[0], *place(tmp_path, "x")]
        run_compare(load_config(CompareConfig, overrides=texts))


def test_an_evaluation_of_one_model_has_nothing_to_compare() -> None:
    texts = ["models={only: somewhere}", "judges=[{kind: length}]"]
    with pytest.raises(UserError, match="'judges' has no effect here because there is only one model"):
        load_config(EvaluateConfig, overrides=texts)
    assert load_config(EvaluateConfig, overrides=[*texts, "models={other: elsewhere}"]).judges


def test_what_a_source_is(tmp_path: Path, answers: tuple[Path, Path]) -> None:
    assert are_answers(str(answers[0]), tmp_path) and are_answers(f"{answers[0]}:ppo", tmp_path)
    assert not are_answers("sft", tmp_path) and not are_answers("tinychat", tmp_path)
    assert model_names("runs/a:ppo", "runs/b:sft") == ("ppo", "sft")
    assert model_names("a/x.jsonl", "b/x.jsonl") == ("a/x.jsonl", "b/x.jsonl")


@pytest.mark.slow
def test_two_models_answer_before_they_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["suite.num_heldout=6", "suite.num_ood=0", "suite.num_probes=0", "generation.max_new_tokens=12"]
    judges = "judges=[{kind: gold}, {kind: length, prefer: shorter}]"
    assert rlhf("judge", "compare", "tinychat", "tinychat", judges, *small, *place(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "Win-rate of first against second" in shown and "report.html" in shown
    folder = tmp_path / "runs" / "run"
    rows = [json.loads(line) for line in (folder / "judgements.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["judge"] for row in rows] == ["gold"] * 6 + ["shorter"] * 6
    assert all(row["first"] == row["second"] and row["preference"] == 0.5 for row in rows)  # one model, the same draws
    assert "Agreement between judges" in (folder / "EVAL_REPORT.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------- nothing judged is lost


@pytest.mark.slow
def test_interrupted_and_resumed_asks_nothing_twice(
    tmp_path: Path, answers: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def behave(request: Request, number: int) -> Answer:
        if number == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return honest(request, number)

    with serving(behave) as server:
        judges = f"judges=[{llm(server, concurrency=1)}]"
        assert rlhf("judge", "compare", *map(str, answers), judges, *place(tmp_path)) == 130
        assert "go on with: rlhf resume" in capsys.readouterr().err
        before = len(server.requests)
        assert 10 <= before < 24
        assert not (tmp_path / "runs" / "run" / "judge.json").exists()
        assert rlhf("resume", str(tmp_path / "runs" / "run")) == 0
        assert len(server.requests) == 24
    assert numbers(tmp_path)["lines"][0]["win"]["wins"] == 8
    assert rlhf("resume", str(tmp_path / "runs" / "run")) == 2


def test_a_time_budget_ends_judging_and_resume_goes_on(
    tmp_path: Path, labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(honest) as server:
        texts = [f"labels={labels}", f"judges=[{llm(server)}]", *place(tmp_path), "run.max_minutes=1e-9"]
        assert rlhf("judge", "validate", *texts) == 0
        assert "the time budget is spent; go on with: rlhf resume" in capsys.readouterr().out
        assert not (tmp_path / "runs" / "run" / "judge.json").exists()


def test_a_server_that_dies_costs_nothing_twice(
    tmp_path: Path, answers: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes down half-way for longer than the judge is patient; the same command goes on."""
    server = ChatServer(honest)
    down = threading.Event()

    def behave(request: Request, number: int) -> Answer:
        if number >= 10:
            down.set()
        return Answer(hang_up=True) if down.is_set() else honest(request, number)

    server.behaviour = behave
    try:
        judges = f"judges=[{llm(server, max_retries=1, concurrency=2)}]"
        command = ["judge", "compare", *map(str, answers), judges, *place(tmp_path), "run.overwrite=true"]
        assert rlhf(*command) == 2
        told = capsys.readouterr().err
        assert re.search(r"rlhf: judge 'gpt' stopped at \d+ of 12 pairs: .*; what was answered is kept", told)
        answered = {request.prompt for request in server.requests[:10]}
        server.behaviour, before = honest, len(server.requests)
        assert rlhf(*command) == 0
        again = [request.prompt for request in server.requests[before:]]
        assert len(again) == 24 - len(answered) and not answered & set(again)
    finally:
        server.stop()


@pytest.mark.slow
def test_the_key_is_in_no_file_and_no_output(
    tmp_path: Path, answers: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Even of a server that repeats it in replies and errors."""
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def behave(request: Request, number: int) -> Answer:
        said = request.headers["Authorization"]
        if number == 2:
            return Answer(status=500, body=f"oops {said}")
        if number == 3:
            return Answer(status=400, body=f"bad request by {said}")
        return Answer(f"Hello {said} [[A]]")

    with serving(behave) as server:
        judges = f"judges=[{llm(server, api_key_env='JUDGE_KEY', concurrency=1)}]"
        assert rlhf("judge", "compare", *map(str, answers), judges, *place(tmp_path)) == 0
        server.behaviour = lambda request, number: Answer(status=401, body=f"no {request.headers['Authorization']}")
        assert rlhf("judge", "compare", *map(str, answers[::-1]), judges, *place(tmp_path, "other")) == 2
        assert {request.headers["Authorization"] for request in server.requests} == {f"Bearer {KEY}"}
    shown = capfd.readouterr()
    assert "does not accept the key in $JUDGE_KEY: 401 no Bearer [key]" in shown.err
    assert KEY not in shown.out + shown.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("judge_replies" in str(path) for path in files) and len(files) > 8
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


# ---------------------------------------------------------------------- validate


@pytest.mark.slow
def test_judges_against_labels(tmp_path: Path, labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = write(tmp_path / "more.jsonl", [{"prompt": "q", "chosen": "good a", "rejected": "bad and long"}] * 3)
    with serving(honest) as server:
        judges = f"judges=[{llm(server)}, {{kind: length}}]"
        assert rlhf("judge", "validate", f"labels=[{labels}, {more}]", judges, *place(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "Agreement with people" in shown and "Judges against each other" in shown
    rows = {(row["judge"], row["set"]): row["figures"] for row in numbers(tmp_path)["agreement_with_people"]}
    assert rows["gpt", "all sets"]["agreement"]["estimate"] == 1.0
    assert rows["gpt", "labels"]["num_labelled"] == 12
    # "good" is longer than "bad": only the second set tells the two judges apart.
    assert rows["longer", "labels"]["agreement"]["estimate"] == 1.0
    assert rows["longer", "more"]["agreement"]["estimate"] == 0.0
    duel = numbers(tmp_path)["duels"][0]
    assert (duel["first"], duel["second"]) == ("gpt", "longer")
    assert duel["difference"]["difference"]["estimate"] == pytest.approx(3 / 15)
    assert duel["mcnemar"] == pytest.approx(2 * 0.5**3)


def test_prose_is_counted_and_never_a_tie(tmp_path: Path, labels: Path) -> None:
    with serving(lambda request, number: Answer("Both have their merits.")) as server:
        config = load_config(
            ValidateConfig, overrides=[f"labels={labels}", f"judges=[{llm(server)}]", *place(tmp_path)]
        )
        run, report = run_validate(config)
    assert report is not None
    figures = numbers(tmp_path)["agreement_with_people"][0]["figures"]
    assert (figures["num_unparsable"], figures["agreement"], figures["bounds"]) == (12, None, [0.0, 1.0])
    log = (run.folder / "logs" / "train.log").read_text(encoding="utf-8")
    assert "24 of 24 questions ended without a verdict" in log and "not called ties" in log


def test_only_so_many_pairs_of_each_set(tmp_path: Path, labels: Path) -> None:
    texts = [f"labels={labels}", "judges=[{kind: length}]", "max_pairs=5", *place(tmp_path)]
    run_validate(load_config(ValidateConfig, overrides=texts))
    assert numbers(tmp_path)["behaviour"][0]["behaviour"]["num_pairs"] == 5


# ---------------------------------------------------------------------- stored verdicts


def test_alpaca_evals_numbers(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shared_data / "alpaca_eval"
    golden = json.loads((Path(__file__).parents[1] / "golden" / "golden.json").read_text(encoding="utf-8"))
    published = golden["expected"]["alpaca_eval_2_alpaca-7b"]
    files = ["--difficulty", str(folder / "instruction_difficulty_recovered.csv")]
    files += ["--regulariser", str(folder / "df_gamed_expected.csv.gz")]
    assert rlhf("judge", "winrate", str(folder / "ae2_annotations__alpaca-7b.json.gz"), *files, "--json") == 0
    found = json.loads(capsys.readouterr().out)[0]
    win = found["win"]
    assert (win["first"], win["second"]) == ("alpaca-7b", "gpt4_1106_preview")
    assert 100 * win["rate"]["estimate"] == pytest.approx(published["win_rate"], abs=1e-6)
    assert 100 * found["standard_error"] == pytest.approx(published["standard_error"], abs=1e-6)
    counts = (published["n_wins"], published["n_draws"], published["n_wins_base"])
    assert (win["wins"], win["ties"], win["losses"]) == counts
    assert 100 * win["length_controlled"]["estimate"] == pytest.approx(published["length_controlled_winrate"], abs=0.3)


def test_stored_verdicts_that_are_none_are_left_out(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{n}", "output_1": "base", "output_2": "mod", "preference": p} for n, p in
            enumerate([2.0, 1.0, None, 1.5])]  # fmt: skip
    found = stored_win_rates(str(write(tmp_path / "a.jsonl", rows)))[0]
    assert (found.win.wins, found.win.ties, found.win.losses, found.num_unjudged) == (1, 1, 1, 1)
    (tmp_path / "d.csv").write_text("index,instruction_difficulty\n0,0.1\n1,0.2\n", encoding="utf-8")
    with pytest.raises(UserError, match="no index 3, but row 3 was judged"):
        stored_win_rates(str(tmp_path / "a.jsonl"), tmp_path / "d.csv")
    with pytest.raises(UserError, match="needs the difficulty of the prompts too"):
        (tmp_path / "r.csv").write_text("std_delta_len,instruction_difficulty,expected_preference\n0,0,0.5\n")
        stored_win_rates(str(tmp_path / "a.jsonl"), None, tmp_path / "r.csv")


# ---------------------------------------------------------------------- bad input, one sentence each


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["compare", "{one}", "{two}"], "no judge is named; for example judges="),
        (["compare", "{one}", "{two}", "judges=[{{kind: gpt}}]"], "needs a kind: got kind 'gpt', expected one of"),
        (["compare", "{one}", "{two}", "judges=[{{model: x}}]"], "a judge needs a kind: no kind is given"),
        (["compare", "{one}", "{two}", "judges=[{{kind: llm, model: x}}]"], "'judges.0.base_url' is required"),
        (
            ["compare", "{one}", "{two}", "judges=[{{kind: llm, base_url: 'http://h/v1', modle: x}}]"],
            "unknown config key 'judges.0.modle'; the nearest known key is 'judges.0.model'",
        ),
        (
            ["compare", "{one}", "{two}", "judges=[{{kind: llm, base_url: 'http://h/v1', model: m, api_key: sk-1}}]"],
            "the nearest known key is 'judges.0.api_key_env'",
        ),
        (["compare", "{one}", "{two}", "judges=[{{kind: column, column: gold}}]"], "no column 'gold' to be judged by"),
        (["compare", "{one}", "{two}", "judges=[{{kind: gold}}]"], "prompts of the built-in world only"),
        (["compare", "{one}", "{two}", "judges=[{{kind: reward_model, source: none}}]"], "there is no run 'none'"),
        (["compare", "{one}", "{two}", "judges=[{{kind: function, function: 'no.py:f'}}]"], "there is no file no.py"),
        (["compare", "{one}", "{labels}", "judges=[{{kind: length}}]"], "does not hold one answer"),
        (["compare", "{one}", "nowhere", "judges=[{{kind: length}}]"], "holds answers, but 'nowhere' does not"),
        (["compare", "{one}", "{other}", "judges=[{{kind: length}}]"], "share no prompt"),
        (["compare", "{one}", "{two}", "judges=[{{kind: length}}]", "run.save_every_steps=3"], "has no effect here"),
        (["validate", "judges=[{{kind: length}}]"], "labels names no file"),
        (["validate", "labels={labels}"], "no judge is named"),
        (["validate", "labels=absent.json", "judges=[{{kind: length}}]"], "'absent.json' does not exist"),
        (["validate", "labels={one}", "judges=[{{kind: length}}]"], "no form of two answers to one prompt"),
        (
            ["validate", "labels={labels}", "judges=[{{kind: llm, base_url: 'http://h/v1', model: m, "
             "instructions: {one}}}]"],
            "never told to write [[A]], [[B]], [[C]]",
        ),
        (["winrate", "{one}"], "no form of two answers to one prompt"),
        (["winrate", "{labels}", "--difficulty", "{one}"], "lacks the column index"),
        (["winrate", "{labels}", "--difficulty", "absent.csv"], "'absent.csv' cannot be read"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(
    tmp_path: Path,
    answers: tuple[Path, Path],
    labels: Path,
    command: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = write(tmp_path / "other.jsonl", [{"prompt": "elsewhere", "response": "x"}])
    names = {"one": answers[0], "two": answers[1], "labels": labels, "other": other}
    texts = [text.format_map(names) for text in command]
    settings = [] if texts[0] == "winrate" else place(tmp_path)
    assert rlhf("judge", *texts, *settings) == 2
    told = capsys.readouterr().err.strip()
    assert words in told and told.startswith("rlhf: ") and "\n" not in told
    assert "sk-1" not in told
