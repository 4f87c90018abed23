"""The model card of an export: how to use it, what it was made from, and how far it is from what was trained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_METRICS_SHOWN = 40


def model_card(name: str, report: Mapping[str, Any]) -> str:
    """`README.md` in Markdown, with the front matter that model hubs read; `report` is the content of `export.json`."""
    is_policy = report["kind"] == "policy"
    sections = [
        _front_matter(report),
        f"# {name}",
        _summary(report),
        "## How to use it",
        _use_of_policy(report) if is_policy else _use_of_reward(report),
        "## How far it is from what was trained",
        _measured(report),
        *_stages(report["lineage"]),
        "## Written by",
        ", ".join(f"{package} {version}" for package, version in report["versions"].items()) + ".",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(report: Mapping[str, Any]) -> str:
    recipes = [stage["recipe"] for stage in report["lineage"]]
    is_policy, base = report["kind"] == "policy", report["base_model"]
    lines = ["---", "library_name: transformers"]
    lines.append(f"pipeline_tag: {'text-generation' if is_policy else 'text-classification'}")
    if base is not None and base.count("/") == 1 and not Path(base).exists():  # as hubs spell a model
        lines.append(f"base_model: {base}")
    lines += ["tags:", *(f"- {tag}" for tag in dict.fromkeys(["rlhf", *recipes]))]
    return "\n".join([*lines, "---"])


def _summary(report: Mapping[str, Any]) -> str:
    base, stages = report["base_model"], report["lineage"]
    made = " -> ".join(f"`{stage['recipe']}`" for stage in stages)
    what = "A policy" if report["kind"] == "policy" else "A reward model (a sequence classifier with one label)"
    sentences = [f"{what} trained with the Python package `rlhf`" + (f" by {made}." if made else ".")]
    merged = f"the adapter merged into `{_short(base)}`" if base is not None else "every weight as trained"
    sentences.append(f"Weights in {report['dtype']}: {merged}.")
    return " ".join(sentences)


# ---------------------------------------------------------------- how to use it


def _use_of_policy(report: Mapping[str, Any]) -> str:
    turns = [*_system(report), '{"role": "user", "content": "Tell me the capital of France."}']
    chat = [
        f"messages = [{', '.join(turns)}]",
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
    ]
    plain = ['inputs = tokenizer("Tell me the capital of France.", return_tensors="pt")']
    code = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")',
        *(chat if report["has_chat_template"] else plain),
        "output = model.generate(**inputs, max_new_tokens=128)",
        'answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)',
    ]
    stops = ", ".join(str(token) for token in report["stop_token_ids"])
    return (
        f"{_code(code)}\n\n`generation_config.json` stops at the token(s) {stops} and decodes greedily unless told "
        "otherwise: sampling defaults of the base model are left out, because the policy was not trained under them."
        + (" It was trained under the system prompt shown." if report["system_prompt"] else "")
    )


def _use_of_reward(report: Mapping[str, Any]) -> str:
    turns = [
        *_system(report),
        '{"role": "user", "content": "Tell me the capital of France."}',
        '{"role": "assistant", "content": "Paris."}',
    ]
    end = report["end_of_turn"]
    chat = [
        f"messages = [{', '.join(turns)}]",
        "text = tokenizer.apply_chat_template(messages, tokenize=False)",
        f"text = text[: text.rindex({end!r})] + {end + report['suffix']!r}",
        'inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")',
    ]
    plain = [
        f'inputs = tokenizer("Tell me the capital of France. Paris." + {end + report["suffix"]!r}, return_tensors="pt")'
    ]
    code = [
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        'model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto")',
        *(chat if report["has_chat_template"] else plain),
        "score = model(**inputs).logits[0, 0].item()",
    ]
    scale = report["score_scale"]
    suffix = f", followed by {report['suffix']!r}" if report["suffix"] else ""
    return (
        f"{_code(code)}\n\nThe score is read from the last token, which is the end of the answer ({end!r}){suffix}: "
        "text behind that (the line break that a template writes there, too) gives another score. Only differences of "
        f"scores mean anything. On held-out answers their mean was {scale['mean']:.4g} and their standard deviation "
        f"{scale['std']:.4g}. `rlhf` takes this folder as `reward_model=...` and heeds suffix and scale by itself."
    )


def _system(report: Mapping[str, Any]) -> list[str]:
    text = report["system_prompt"]
    return [] if not text else [f'{{"role": "system", "content": {text!r}}}']


def _code(lines: Sequence[str]) -> str:
    return "\n".join(["```python", 'folder = "..."  # this one', *lines, "```"])


# ---------------------------------------------------------------- what was measured


def _measured(report: Mapping[str, Any]) -> str:
    is_policy = report["kind"] == "policy"
    rows = [
        [words(report["kind"], name), f"{report['measured'][name]:.3g}", f"{bound:g}"]
        for name, bound in report["tolerance"].items()
    ]
    rows += [
        [words(report["kind"], name), f"{value:.3g}", ""]
        for name, value in report["measured"].items()
        if name not in report["tolerance"]
    ]
    against = "in fp32, adapter beside the base" if report["base_model"] is not None else "in fp32"
    text = (
        f"The folder was loaded again with plain transformers and held against the model as trained ({against}) on "
        f"{report['compared_on']}.\n\n{_table(['', 'measured', 'tolerance'], rows)}"
    )
    if report["measured_against_quantised"] is None:
        return text
    coding = ", ".join(f"{name}={value}" for name, value in report["trained_on_quantised_base"].items())
    quantised = [
        [words(report["kind"], name), f"{value:.3g}"] for name, value in report["measured_against_quantised"].items()
    ]
    return (
        f"{text}\n\n**The adapter was trained on a quantised base** ({coding}) **and is merged onto the original "
        "weights here**, which are closer to what the base model's authors trained, but are not what the adapter saw. "
        f"The same {'logits' if is_policy else 'scores'} against those of the quantised model it was trained on:\n\n"
        f"{_table(['', 'measured'], quantised)}"
    )


def words(kind: str, name: str) -> str:
    """What a measure is called, with its unit where it is not that of the logits."""
    in_deviations = kind == "reward_model" and name.endswith("_difference")
    return _WORDS[name] + (", standard deviations of the scores" if in_deviations else "")


_WORDS = {
    "max_abs_difference": "largest difference",
    "mean_kl": "mean KL, nats per token",
    "same_choice": "share of tokens with the same likeliest token",
    "num_tokens": "tokens",
    "mean_abs_difference": "mean difference",
    "num_answers": "answers",
}


# ---------------------------------------------------------------- what it was made from


def _stages(stages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not stages:
        return
    yield "## How it was made"
    rows = []
    for stage in stages:
        cost = stage["cost"]
        rows.append(
            [
                f"{stage['name']} (`{stage['recipe']}`)",
                ", ".join(f"{role} `{_short(source)}`" for role, source in stage["lineage"].items()),
                str(stage["seed"]),
                f"{cost['optimizer_steps']:,}" if cost else "",
                f"{cost['tokens']:,}" if cost else "",
                f"{cost['seconds']:,.0f} s" if cost else "",
                str(stage["started"])[:10],
                (stage["git"] or {}).get("commit", "")[:10],
            ]
        )
    yield _table(["stage", "from", "seed", "steps", "tokens", "time", "started", "commit"], rows)
    for stage in stages:
        yield from _one_stage(stage)


def _one_stage(stage: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {stage['name']}"
    settings = [f"- `{key}`: {_shown(value)}" for key, value in stage["settings"].items()]
    yield (
        "Settings that differ from the defaults:\n\n" + "\n".join(settings) if settings else "All settings at default."
    )
    if stage["fingerprints"]:
        rows = [[role, f"`{digest}`"] for role, digest in stage["fingerprints"].items()]
        yield "What it started from:\n\n" + _table(["", "checksum of the files"], rows)
    if stage["data"]:
        rows = [[_short(path), f"{one['bytes']:,}", f"`{one['sha256']}`"] for path, one in stage["data"].items()]
        yield "Data:\n\n" + _table(["file", "bytes", "SHA-256"], rows)
    measures = [[f"`{name}`", _shown(value)] for name, value in stage["last_measures"].items()][:_METRICS_SHOWN]
    if measures:
        yield "Last line of its log:\n\n" + _table(["", ""], measures)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        value = _short(value) if Path(value).is_absolute() else value
    elif isinstance(value, list):
        value = [_short(one) if isinstance(one, str) and Path(one).is_absolute() else one for one in value]
    return f"{value:.6g}" if isinstance(value, float) else f"`{json.dumps(value, ensure_ascii=False)}`"


def _short(path: str) -> str:
    """A local path without the folders above it, which are nobody's business; a hub name as it is."""
    place = Path(path)
    if not place.is_absolute() and len(place.parts) <= 2:
        return path
    return f"{place.parent.name}/{place.name}" if place.name in ("policy", "reward_model") else place.name


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
