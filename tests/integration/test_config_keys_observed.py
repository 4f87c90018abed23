"""Changing a key changes what a run leaves behind: every key of every recipe, by runs of a fraction of a second (C9).

What is compared is what a user sees: the log, the sentences, weights, files, answers, reports, or the error. Left out
is what merely repeats the configuration (config.yaml and the same in run.json), and the clock.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from chat_server import TellTale, serving
from config_keys import CASES, SUITES, Case, Changes, Fails, Refused, keys_of, overrides, stage_keys
from tiny_backbones import END, PAD, UNKNOWN, WORDS, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf.data.tinychat.labeller import LabellerConfig
from rlhf.infra.config import Config, load_config
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run
from rlhf.recipes.ablation import run_ablation
from rlhf.recipes.best_of_n import run_best_of_n
from rlhf.recipes.dpo import run_dpo
from rlhf.recipes.grpo import run_grpo
from rlhf.recipes.judge_compare import run_compare
from rlhf.recipes.judge_validate import run_validate
from rlhf.recipes.judging import REPLIES
from rlhf.recipes.kto import run_kto
from rlhf.recipes.online_dpo import run_online_dpo
from rlhf.recipes.overoptimize import run_overoptimize
from rlhf.recipes.pairs import run_pairs
from rlhf.recipes.pipeline import PipelineConfig, WorldConfig, write_world
from rlhf.recipes.ppo import run_ppo
from rlhf.recipes.pretrain import run_pretrain
from rlhf.recipes.prm import run_prm
from rlhf.recipes.prm_label import run_prm_label
from rlhf.recipes.resume import CONFIGS
from rlhf.recipes.reward import run_reward
from rlhf.recipes.reward_report import run_reward_report
from rlhf.recipes.sft import run_sft
from rlhf.recipes.suites import run_eval

RUNNERS: dict[str, Callable[..., Any]] = {
    "pretrain": run_pretrain,
    "sft": run_sft,
    "reward": run_reward,
    "rm-report": run_reward_report,
    "prm": run_prm,
    "prm_label": run_prm_label,
    "dpo": run_dpo,
    "kto": run_kto,
    "ppo": run_ppo,
    "grpo": run_grpo,
    "best_of_n": run_best_of_n,
    "pairs": run_pairs,
    "online_dpo": run_online_dpo,
    "eval": run_eval,
    "judge_compare": run_compare,
    "judge_validate": run_validate,
    "ablate": run_ablation,
    "overoptimize": run_overoptimize,
}
TEMPLATE = (
    "{% for m in messages %}{{ 'a ' if m['role'] == 'assistant' else 'the ' }}{{ m['content'] }}{{ ' <end> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"
)
FUNCTIONS = """
def one(prompts, completions, **columns):
    return [len(text) for text in completions]
def two(prompts, completions, **columns):
    return [-len(text) for text in completions]
def front(prompts, firsts, seconds, **columns):
    return [1.0] * len(prompts)
def leaning(prompts, firsts, seconds, **columns):
    return [1.0 if len(text) % 2 else 0.5 for text in firsts]
"""
SUBSETS = ("even", "odd")
REFUSAL = "I cannot help with that."
Observed = dict[str, Any]
# What the harness's settings do is seen in test_harness.py, where the harness is installed.
ELSEWHERE = "harness."
KEYS = [
    (recipe, key, case)
    for recipe, key, found in stage_keys()
    for case in found
    if not isinstance(case, Refused) and not key.startswith(ELSEWHERE)
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """Files, models and runs that the cases name."""
    folder = tmp_path_factory.mktemp("places")
    found: dict[str, object] = write_data(folder)
    other_words = [*WORDS[1:], WORDS[0]]
    for name, words, spread in [("base", WORDS, 0.3), ("other", WORDS, 0.5), ("tokenizer", other_words, 0.3)]:
        found[name] = write_model(folder / name, words, spread)
    found["refuser"] = write_model(folder / "refuser", [REFUSAL, *WORDS[:6]], 0.1)
    found["absent_device"] = "mps" if torch.cuda.is_available() else "cuda"
    made = {"runs": folder, **found}
    for name, recipe, *more in [
        ("policy", "sft"),
        ("reward", "reward"),
        ("other_reward", "reward", "run.seed=1"),
        ("ensemble", "reward", "reward.ensemble.members=3"),
        ("process", "prm"),
        ("other_process", "prm", "run.seed=1"),
    ]:
        texts = [*overrides(recipe, Changes(""), made), f"run.name={name}", *more]
        RUNNERS[recipe](load_config(CONFIGS[recipe], overrides=texts))
        found[name] = folder / name
    made = {"runs": folder, **found}
    texts = [
        *overrides("eval", Changes("", SUITES), made),
        "run.name=measured",
        "models={base: " + str(found["base"]) + "}",
    ]
    RUNNERS["eval"](load_config(CONFIGS["eval"], overrides=texts))
    found["measured"] = folder / "measured"
    with serving(TellTale()) as server, pytest.MonkeyPatch.context() as patch:
        patch.delenv("OPENAI_API_KEY", raising=False)
        patch.setenv("RLHF_TEST_KEY", "sk-of-the-tests")
        yield found | {"server": server.url, "key_variable": "RLHF_TEST_KEY"}


def write_data(folder: Path) -> dict[str, object]:
    """Rows of every shape that some key is about."""
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    def pair(question: str = "prompt") -> dict[str, Any]:
        prompt, answer = words(rng.randint(2, 6)), words(rng.randint(1, 4))
        sides = {"chosen": f"{answer} good", "rejected": f"bad {answer}", "margin": rng.random()}
        return {question: prompt, **sides, "subset": SUBSETS[len(prompt) % 2]}

    def chat() -> dict[str, Any]:
        turns = [(role, words(2)) for role in ("user", "assistant", "user", "assistant")]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    def transcript() -> dict[str, str]:
        start = f"\n\nHuman: {words(3)}\n\nAssistant: {words(2)}\n\nHuman: {words(3)}\n\nAssistant: "
        return {"chosen": f"{start}{words(2)} good", "rejected": f"{start}{words(2)} bad"}

    def solution(question: str = "prompt", prompt: str | None = None) -> dict[str, Any]:
        # A file that holds -1 has neutral steps, too.
        labels = [1, rng.choice([0, -1, 0.25]), rng.choice([1, -1])]
        steps = [words(rng.randint(1, 3)) for _ in labels]
        prompt = prompt or words(rng.randint(2, 6))
        return {question: prompt, "completions": steps, "labels": labels, "subset": SUBSETS[len(prompt) % 2]}

    def answer(number: int, prompt: str) -> dict[str, Any]:
        said = {"prompt": prompt, "response": words(rng.randint(1, 4)), "kind": ("even", "odd")[number % 2]}
        return {**said, "finished": bool(rng.getrandbits(1)), "refused": bool(rng.getrandbits(1))}

    def labelled() -> dict[str, Any]:
        answers = {"output_1": words(rng.randint(1, 4)), "output_2": words(rng.randint(1, 4))}
        return {"input": words(3), **answers, "label": rng.choice([1, 2]), "finished": True}

    rows = {
        "steps": [solution() for _ in range(24)],
        "more_steps": [solution() for _ in range(24)],
        "renamed_steps": [solution("question") for _ in range(24)],
        "hh_steps": [
            solution(prompt=f"\n\nHuman: {words(3)}\n\nAssistant: {words(2)}\n\nHuman: {words(3)}\n\nAssistant:")
            for _ in range(24)
        ],
        "pairs": [pair() for _ in range(24)],
        "more": [pair() for _ in range(24)],
        "renamed": [pair("question") for _ in range(24)],
        "chats": [chat() for _ in range(24)],
        "hh": [transcript() for _ in range(24)],
    }
    files = {name: write_rows(folder / f"{name}.jsonl", lines) for name, lines in rows.items()}
    for split in ("train", "validation", "test"):
        write_rows(folder / "splits" / f"{split}.jsonl", [pair() for _ in range(24)])
        write_rows(folder / "step_splits" / f"{split}.jsonl", [solution() for _ in range(24)])
    # Drawn last, so that what is above stays as it is.
    asked = [words(3) for _ in range(8)]
    judged = {
        "answers": [answer(*one) for one in enumerate(asked)],
        "other_answers": [answer(*one) for one in enumerate(asked)],
        "labelled": [labelled() for _ in range(8)],
        "more_labelled": [labelled() for _ in range(8)],
    }
    files |= {name: write_rows(folder / f"{name}.jsonl", lines) for name, lines in judged.items()}
    (folder / "mine.py").write_text(FUNCTIONS, encoding="utf-8")
    (folder / "instructions.txt").write_text("Say [[A]], [[B]] or [[C]].", encoding="utf-8")
    files |= {"functions": folder / "mine.py", "instructions": folder / "instructions.txt"}
    for name, bend in (("points", 0.1), ("more_points", 0.2)):
        lines = [[kl, kl**0.5 - bend * kl, kl**0.5] for kl in (0, 0.2, 0.5, 1.1, 1.8, 2.7, 4)]
        table = [[*line, 2 * line[0], 3 * line[1], 1 - line[2] ** 3] for line in lines]
        text = "kl,gold,proxy,nats,truth,score\n" + "".join(",".join(map(str, line)) + "\n" for line in table)
        (folder / f"{name}.csv").write_text(text, encoding="utf-8")
        files[name] = folder / f"{name}.csv"
    return {**files, "splits": folder / "splits", "step_splits": folder / "step_splits"}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_model(folder: Path, words: Sequence[str], spread: float) -> Path:
    vocabulary = {word: index for index, word in enumerate([PAD, END, UNKNOWN, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=PAD, unk_token=UNKNOWN)
    tokenizer.chat_template = TEMPLATE
    tiny_model("llama", len(tokenizer), spread=spread).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def without() -> dict[tuple[str, tuple[str, ...]], Observed]:
    """What runs without a key leave behind, by recipe and the settings around it: many cases share one."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "key", "case"), KEYS, ids=[f"{r}-{key}={c.value}" for r, key, c in KEYS])
def test_C9_changing_a_key_changes_what_is_seen(
    tmp_path: Path,
    places: dict[str, object],
    without: dict[tuple[str, tuple[str, ...]], Observed],
    recipe: str,
    key: str,
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", hub)
    shared = (recipe, case.around)
    if shared not in without:
        without[shared] = observed(recipe, case, places, tmp_path / "without")
    changed = observed(recipe, case, places, tmp_path / "with", key)
    if isinstance(case, Fails):
        words = case.words.format_map(places)
        assert words in changed["error"]
        assert words not in without[shared].get("error", "")
    else:
        assert "error" not in changed, changed["error"]
        assert changed != without[shared]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RUNNERS)
def test_C9_the_same_settings_leave_the_same_behind(tmp_path: Path, places: dict[str, object], recipe: str) -> None:
    """Without which a difference would mean nothing."""
    first, again = (observed(recipe, Changes(""), places, tmp_path / name) for name in ("first", "again"))
    assert "error" not in first
    assert first == again


def hub(name: str, split: str, data_dir: str | None) -> list[dict[str, Any]]:
    """A hub with a data set of pairs and one of steps, whose answers tell which folder was read."""
    said = "big" if data_dir else "small"
    if name == "toy/steps":
        return [{"prompt": f"{said} {word}", "completions": [said, "red"], "labels": [1, 0]} for word in WORDS]
    if name != "toy/hub":
        raise OSError(f"no data set {name}")
    return [{"prompt": f"{said} {word}", "chosen": f"{said} good", "rejected": "bad"} for word in WORDS]


def observed(recipe: str, case: Case, places: Mapping[str, object], folder: Path, key: str | None = None) -> Observed:
    """What a run leaves behind, or the sentence with which it is refused."""
    made = dict(places) | {"runs": folder / "runs", "elsewhere": folder / "elsewhere"}
    taken = folder / "runs" / "taken"
    taken.mkdir(parents=True)
    (taken / "run.json").write_text(json.dumps({"recipe": recipe, "status": "finished"}), encoding="utf-8")
    threads = torch.get_num_threads()
    try:
        result = RUNNERS[recipe](load_config(CONFIGS[recipe], overrides=overrides(recipe, case, made, key)))
    except UserError as error:
        return {"error": str(error).replace(str(folder), "")}
    finally:
        torch.set_num_threads(threads)
    run: Run = result[0] if isinstance(result, tuple) else result
    files = {str(path.relative_to(folder)): seen(path, folder) for path in sorted(folder.rglob("*")) if path.is_file()}
    return {path: content for path, content in files.items() if content is not None} | {"run": run.folder.name}


def seen(path: Path, folder: Path) -> Any:
    """The content of a file as far as it is no repetition of the configuration, and not the clock's."""
    if path.name in ("config.yaml", ".lock") or path.parent.name == "tb" or "manifest" in path.name:
        return None
    if path.name == "train.jsonl":
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [{k: v for k, v in line.items() if not k.startswith(("time/", "rate/", "memory/"))} for line in lines]
    if path.name == "run.json" and path.parent.name != "taken":
        # Runs inside a run name the data that others inside it made, by their whole paths.
        info = json.loads(path.read_text(encoding="utf-8").replace(str(folder), ""))
        cost = info.get("cost", {})
        names = ("status", "stop_reason", "device", "num_threads", "data")
        return {n: info[n] for n in names} | {n: cost.get(n) for n in ("optimizer_steps", "tokens")}
    if path.name == "train.log":
        lines = [re.sub(r"^\S+ \S+ ", "", line) for line in timeless(path, folder).splitlines()]
        return [line for line in lines if "| where the time went" not in line]
    if path.parent.name == "profile":  # a trace is all clock and machine
        return "is there"
    if path.name == "ablation.json":
        numbers = json.loads(path.read_text(encoding="utf-8"))  # sentences tell seconds
        return numbers | {"said": [], "outcomes": [one | {"spent": 0} for one in numbers["outcomes"]]}
    if path.name == "ablation.md":
        return "is there"
    if path.suffix == ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if path.parent.name == REPLIES:
        return sorted(path.read_text(encoding="utf-8").splitlines())  # in the order in which they came
    if path.name in ("state.json", "tokenizer.json") or path.suffix in (".html", ".png"):
        return "is there"
    return timeless(path, folder)


def timeless(path: Path, folder: Path) -> str:
    """Text without the folder's name and without what was measured in time or memory."""
    text = path.read_text(encoding="utf-8", errors="replace").replace(str(folder), "")
    text = re.sub(r'"(seconds|ms_per_sample|milliseconds\w*|peak_memory_mb|\w*_ms_\w*)": [0-9.e+-]+', r'"\1": 0', text)
    text = re.sub(r"(Time per sample, ms \|) [0-9.]+", r"\1 0", text)
    return re.sub(r"[0-9.]+ (ms|s|MB|MiB)\b", r"0 \1", text)


@pytest.mark.slow
@pytest.mark.parametrize(("section", "cls"), [("world", WorldConfig), ("world.labeller", LabellerConfig)])
def test_C9_the_built_in_world_is_as_its_section_says(tmp_path: Path, section: str, cls: type[Config]) -> None:
    """Of the pipeline's own keys these act in the files that its stages read."""
    small = ["world.num_pairs=40", "world.num_validation_pairs=10", "world.num_prompts=10"]

    def written(name: str, *texts: str) -> list[str]:
        folder = tmp_path / name
        folder.mkdir()
        write_world(load_config(PipelineConfig, overrides=[*small, *texts]), folder)
        return [path.read_text(encoding="utf-8") for path in sorted((folder / "data").glob("*.jsonl"))]

    before = written("before")
    assert before == written("again")
    for _, owner, name in keys_of(cls):
        if owner is cls:
            assert before != written(name, f"{section}.{name}={CASES[cls][name][0].value}"), name
