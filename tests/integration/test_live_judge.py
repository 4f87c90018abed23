"""An LLM judge behind a real OpenAI-compatible server: `transformers serve`, with the bundled model, on loopback.

As it comes, the bundled model answers a judge's question with prose. Trained for a few seconds on questions of the same
form it judges: of two answers it prefers the one that says yes. Between it and the judge stands a proxy that passes
requests on, counts them and spoils some.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_server import Answer, ChatServer, Request, serving
from command_line import rlhf
from transformers.utils.import_utils import is_serve_available

from rlhf.eval.judge_prompt import judge_messages
from rlhf.infra.config import load_config
from rlhf.models.backbone import BUNDLED_MODEL, resolve_model
from rlhf.recipes.sft import SFTConfig, run_sft

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_serve_available(), reason="needs pip install 'transformers[serving]'"),
]
INSTRUCTIONS = "Judge. [[A]] [[B]] [[C]]"
NOUNS = [
    "cat",
    "dog",
    "house",
    "tree",
    "sun",
    "moon",
    "water",
    "stone",
    "bread",
    "milk",
    "king",
    "queen",
    "road",
    "book",
    "song",
    "red",
    "green",
    "blue",
]
MAIN = "from transformers.cli.transformers import main; main()"
Row = dict[str, Any]


def pairs(num: int, seed: int) -> list[tuple[str, str, str]]:
    """(question, answer that says yes, answer that says no)."""
    rng = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(rng.choices(NOUNS, k=rng.randint(2, most)))

    return [(words(4), f"yes {words(5)}", f"no {words(5)}") for _ in range(num)]


class LiveServer:
    """A process of `transformers serve` that loads whichever folder a request names."""

    def __init__(self, log: Path, port: int | None = None) -> None:
        self.log, self.port = log, port or free_port()
        command = [sys.executable, "-c", MAIN, "serve", "--host", "127.0.0.1", "--port", str(self.port)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        with log.open("ab") as said:
            self.process = subprocess.Popen(
                [*command, "--device", "cpu"], env=environment, stdout=said, stderr=subprocess.STDOUT
            )
        until = time.monotonic() + 180
        while not self.is_up():
            if self.process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise AssertionError(f"no server: {log.read_text(encoding='utf-8', errors='replace')[-2000:]}")
            time.sleep(0.2)

    def is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def ask(self, body: Row) -> Answer:
        """What it says to one request, untouched; a closed connection where it is gone."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return Answer(body=reply.read().decode(), status=reply.status)
        except urllib.error.HTTPError as error:
            return Answer(body=error.read().decode(), status=error.code)
        except OSError:
            return Answer(hang_up=True)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained judge, its instructions, and answers to judge: of twelve, the first file's are better in eight."""
    folder = tmp_path_factory.mktemp("live")
    rng = random.Random(1)
    rows = []
    for question, yes, no in pairs(480, seed=1):
        verdict, one, two = ("[[A]]", yes, no) if rng.random() < 0.5 else ("[[B]]", no, yes)
        asked = judge_messages(question, one, two, instructions=INSTRUCTIONS)
        rows.append({"messages": [*asked, {"role": "assistant", "content": verdict}]})
    texts = [f"data.train_files={write(folder / 'sft.jsonl', rows)}", "data.validation_fraction=0", "model.train=full"]
    texts += ["training.max_steps=40", "training.per_device_train_batch_size=12", "optimizer.learning_rate=0.001"]
    run_sft(load_config(SFTConfig, overrides=[*texts, f"run.output_dir={folder}", "run.name=judge", "run.device=cpu"]))
    (folder / "instructions.txt").write_text(INSTRUCTIONS, encoding="utf-8")
    new = pairs(12, seed=2)
    sides = [[(yes, no), (no, yes)][number >= 8] for number, (_, yes, no) in enumerate(new)]
    for place, name in enumerate(("first", "second")):
        answers = [{"prompt": q, "response": side[place]} for (q, *_), side in zip(new, sides, strict=True)]
        write(folder / f"{name}.jsonl", answers)
    labelled = [
        {"input": q, "output_1": one, "output_2": two, "label": 1 if one.startswith("yes") else 2}
        for (q, *_), (one, two) in zip(new, sides, strict=True)
    ]
    write(folder / "labelled.jsonl", labelled)
    return folder


@pytest.fixture(scope="module")
def started(folder: Path) -> Iterator[list[LiveServer]]:
    """The servers that were started, the running one last."""
    servers = [LiveServer(folder / "server.log")]
    yield servers
    for server in servers:
        server.kill()


def write(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def command(verb: str, folder: Path, url: str, tmp_path: Path, name: str = "run", **changed: object) -> list[str]:
    """`rlhf judge compare` or `validate` with the trained judge."""
    judge = {"kind": "llm", "name": "judge", "base_url": url, "model": str(folder / "judge" / "policy")}
    judge |= {"instructions": str(folder / "instructions.txt"), "max_tokens": 8, "backoff_seconds": 0.05} | changed
    sources = [str(folder / "first.jsonl"), str(folder / "second.jsonl")]
    sources = sources if verb == "compare" else [f"labels={folder / 'labelled.jsonl'}"]
    place = [f"run.output_dir={tmp_path / 'runs'}", f"run.name={name}", "run.device=cpu", "run.overwrite=true"]
    return ["judge", verb, *sources, f"judges=[{json.dumps(judge)}]", *place]


def verdicts(tmp_path: Path, name: str = "run") -> list[Row]:
    """The judged pairs without what tells one run from another."""
    path = tmp_path / "runs" / name / "judgements.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def numbers(tmp_path: Path, name: str = "run") -> Row:
    found: Row = json.loads((tmp_path / "runs" / name / "judge.json").read_text(encoding="utf-8"))
    return found


def questions(requests: Sequence[Request]) -> Counter[str]:
    return Counter(request.prompt for request in requests)


@pytest.fixture(scope="module")
def undisturbed(folder: Path, started: list[LiveServer], tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """What the judge says when nothing goes wrong, asked without a proxy."""
    tmp_path = tmp_path_factory.mktemp("undisturbed")
    assert rlhf(*command("compare", folder, f"http://127.0.0.1:{started[-1].port}/v1", tmp_path)) == 0
    return verdicts(tmp_path)


def test_verdicts_are_those_of_the_model(folder: Path, started: list[LiveServer], undisturbed: list[Row]) -> None:
    """Each order asked again by hand, with the request that the documentation of such an API shows."""
    assert len(undisturbed) == 12
    for row in undisturbed:
        for (one, two), preference in [
            ((row["first"], row["second"]), row["in_front"]),
            ((row["second"], row["first"]), 1 - row["behind"]),
        ]:
            asked = judge_messages(row["prompt"], one, two, instructions=INSTRUCTIONS)
            body = {"model": str(folder / "judge" / "policy"), "messages": asked, "temperature": 0, "max_tokens": 8}
            reply = json.loads(started[-1].ask(body).body or "")["choices"][0]["message"]["content"]
            assert reply.strip() == f"[[{'A' if preference == 1 else 'B'}]]"


def test_win_rate_and_agreement_of_a_live_judge(
    folder: Path, started: list[LiveServer], undisturbed: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{started[-1].port}/v1"
    assert rlhf(*command("validate", folder, url, tmp_path)) == 0
    assert "Agreement with people" in capsys.readouterr().out
    figures = numbers(tmp_path)["agreement_with_people"][0]["figures"]
    right = [(row["preference"] == 1) == row["first"].startswith("yes") for row in undisturbed]
    assert figures["agreement"]["estimate"] == pytest.approx(sum(right) / 12)
    assert sum(right) >= 11  # the few seconds of training were enough to tell yes from no


def test_prose_is_no_verdict_and_is_paid_for_once(folder: Path, started: list[LiveServer], tmp_path: Path) -> None:
    """The bundled model as it comes, asked with the built-in instructions."""
    with serving(lambda request, number: started[-1].ask(request.body)) as proxy:
        plain = {"model": resolve_model(BUNDLED_MODEL), "instructions": None, "max_tokens": 12}
        for name in ("run", "again"):
            texts = command("compare", folder, proxy.url, tmp_path, name, **plain)
            assert rlhf(*texts, "max_pairs=3") == 0
        assert len(proxy.requests) == 12  # three pairs in both orders, each asked once more for its verdict
    for name in ("run", "again"):
        line = numbers(tmp_path, name)["lines"][0]
        assert (line["win"], line["behaviour"]["num_unparsable"]) == (None, 3)
        assert all(row["preference"] is None and all(row["replies"]) for row in verdicts(tmp_path, name))


def test_stalls_refusals_and_errors_change_no_verdict(
    folder: Path, started: list[LiveServer], undisturbed: list[Row], tmp_path: Path
) -> None:
    over = threading.Event()
    answered: list[Request] = []

    def behave(request: Request, number: int) -> Answer:
        if number == 0:
            over.wait(60)
            return Answer(hang_up=True)
        if number == 3:
            return Answer(status=429, headers={"Retry-After": "0.2"}, body='{"error": {"message": "slow down"}}')
        if number in (6, 15):
            return Answer(status=500, body="Internal Server Error")
        if number == 9:
            return Answer(body='{"choices": []}')
        if number == 12:
            return Answer(hang_up=True)
        answered.append(request)
        return started[-1].ask(request.body)

    with serving(behave) as proxy:
        try:
            # One at a time: on a busy machine the server's own answers must not run into the time limit as well.
            assert rlhf(*command("compare", folder, proxy.url, tmp_path, timeout_seconds=15, concurrency=1)) == 0
        finally:
            over.set()
        assert len(proxy.requests) == 24 + 6
        assert set(questions(answered).values()) == {1} and len(answered) == 24
        before = len(proxy.requests)
        assert rlhf(*command("compare", folder, proxy.url, tmp_path, "again")) == 0
        assert len(proxy.requests) == before
    assert verdicts(tmp_path) == verdicts(tmp_path, "again") == undisturbed


def test_a_server_killed_half_way_is_asked_only_what_it_had_not_answered(
    folder: Path,
    started: list[LiveServer],
    undisturbed: list[Row],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answered: list[Request] = []

    def behave(request: Request, number: int) -> Answer:
        if number == 10:
            started[-1].kill()
        answer = started[-1].ask(request.body)
        answered.extend([] if answer.hang_up else [request])
        return answer

    with serving(behave) as proxy:
        texts = command("compare", folder, proxy.url, tmp_path, max_retries=1, concurrency=2)
        assert rlhf(*texts) == 2
        told = capsys.readouterr().err
        assert "judge 'judge' stopped at" in told and "of 12 pairs" in told and "what was answered is kept" in told
        assert not (tmp_path / "runs" / "run" / "judge.json").exists()
        assert 9 <= len(answered) < 24
        started.append(LiveServer(folder / "server.log"))
        assert rlhf("resume", str(tmp_path / "runs" / "run")) == 0
    assert set(questions(answered).values()) == {1} and len(answered) == 24
    assert verdicts(tmp_path) == undisturbed


def test_a_judge_killed_half_way_asks_again_only_what_was_under_way(
    folder: Path, started: list[LiveServer], undisturbed: list[Row], tmp_path: Path
) -> None:
    """SIGKILL, which leaves no time to save anything."""
    judging: list[subprocess.Popen[bytes]] = []

    def behave(request: Request, number: int) -> Answer:
        if number == 12:
            judging[0].send_signal(signal.SIGKILL)
        return started[-1].ask(request.body)

    proxy = ChatServer(behave)
    try:
        texts = command("compare", folder, proxy.url, tmp_path, concurrency=2)
        judging.append(subprocess.Popen([sys.executable, "-c", "from rlhf.cli import main; main()", *texts]))
        assert judging[0].wait(timeout=240) == -signal.SIGKILL
        before = len(proxy.requests)
        assert 13 <= before <= 14
        assert rlhf(*texts) == 0
        twice = [question for question, times in questions(proxy.requests).items() if times > 1]
        assert len(twice) <= 2 and set(questions(proxy.requests).values()) <= {1, 2}
        assert len(questions(proxy.requests)) == 24
    finally:
        proxy.stop()
    assert verdicts(tmp_path) == undisturbed
