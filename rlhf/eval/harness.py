"""The lm-evaluation-harness (EleutherAI, tested with 0.4.13): its tasks, and our models in the form it asks for.

The only file that imports it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from rlhf.data.chat import ChatEncoder
from rlhf.eval.benchmarks import PREFIX, Benchmark, HarnessConfig, hash_of_questions
from rlhf.infra.errors import UserError
from rlhf.models.backbone import Backbone
from rlhf.models.choices import choice_likelihoods
from rlhf.models.decoding import GenerationConfig, text_before_stop
from rlhf.models.policy import Policy
from rlhf.rollout.sampler import Sampler

# Draws the examples before a question, as the harness's own command line does.
_SHOT_SEED = 1_234
_PERPLEXITY = "loglikelihood_rolling"


def load_tasks(name: str, config: HarnessConfig, max_items: int | None) -> Benchmark:
    """See `load_benchmark`."""
    wanted = name.removeprefix(PREFIX)
    if config.folder is not None and not config.folder.expanduser().is_dir():
        raise UserError(f"harness.folder is '{config.folder}', which is no folder; name one with YAML files of tasks")
    manager = _manager(None if config.folder is None else str(config.folder.expanduser()))
    if wanted not in manager.all_tasks:
        near = [task for task in manager.all_tasks if wanted and wanted in task][:5]
        raise UserError(
            f"the lm-evaluation-harness has no task '{wanted}'"
            + (f"; near are {', '.join(near)}" if near else "; put its YAML file into harness.folder=PATH")
        )
    try:
        tasks: dict[str, Task] = manager.load([wanted])["tasks"]
    except Exception as error:  # a dozen kinds: no network, a data set that is gone, a task file with a fault
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the data of the task '{wanted}' cannot be had: {type(error).__name__}: {said}") from None
    for task_name, task in tasks.items():
        _prepare(task_name, task, config)
    asked = draw_items({task_name: len(task.eval_docs) for task_name, task in tasks.items()}, max_items)
    tasks = {task_name: tasks[task_name] for task_name in asked}
    versions = dict.fromkeys(_version(task) for task in tasks.values())
    return Benchmark(
        name=name,
        version="/".join(versions),
        sha256=hash_of_questions([_settings(config), *_questions(tasks, asked)]),
        items=(),
        extractor="lm-eval",
        scorer="its first measure",
        ranked=True,
        description=f"{sum(map(len, asked.values())):,} items of the lm-evaluation-harness",
        tasks=tasks,
        asked=asked,
    )


def run_tasks(benchmark: Benchmark, model: HarnessModel, config: HarnessConfig) -> dict[str, list[Mapping[str, Any]]]:
    """Ask and score; the harness's log of every item by task."""
    found = evaluate(
        lm=model,
        task_dict={"tasks": dict(benchmark.tasks), "groups": {}, "group_map": {}},
        samples={name: list(numbers) for name, numbers in benchmark.asked.items()},
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=config.chat_template,
        fewshot_as_multiturn=config.chat_template,
        system_instruction=model.encoder.system_prompt,
    )
    assert found is not None
    samples: dict[str, list[Mapping[str, Any]]] = found["samples"]
    return samples


def draw_items(sizes: Mapping[str, int], max_items: int | None) -> dict[str, list[int]]:
    """Which items of each task are asked: all, or a draw over all tasks together that is the same for everybody."""
    every = [(name, number) for name, size in sizes.items() for number in range(size)]
    if max_items is not None and max_items < len(every):
        every = sorted(random.Random(",".join(sizes)).sample(every, max_items))
    found: dict[str, list[int]] = {}
    for name, number in every:
        found.setdefault(name, []).append(number)
    return found


@cache
def _manager(folder: str | None) -> TaskManager:
    """Reading the names of the harness's thousands of tasks takes seconds."""
    return TaskManager(include_path=folder)


def _version(task: Task) -> str:
    return str((task.get_config("metadata") or {}).get("version", "0"))


def _prepare(name: str, task: Task, config: HarnessConfig) -> None:
    """What the harness's own command does to a task before it is asked."""
    if task.OUTPUT_TYPE == _PERPLEXITY:
        raise UserError(f"the task '{name}' measures perplexity, which is no share of items; name one with an accuracy")
    if task.get_config("unsafe_code"):
        raise UserError(
            f"the task '{name}' runs code that models wrote, in this process and unguarded; use the suites code, "
            "humaneval:FILE or mbpp:FILE, which run it in a sandbox"
        )
    there = task.get_config("num_fewshot")
    if there != 0 and config.num_shots is not None:
        task.set_config("num_fewshot", config.num_shots)
    elif there is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(_SHOT_SEED)


def _settings(config: HarnessConfig) -> dict[str, Any]:
    return {"chat_template": config.chat_template, "shot_seed": _SHOT_SEED}


def _questions(tasks: Mapping[str, Task], asked: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    rows = []
    for name, numbers in asked.items():
        task, chosen = tasks[name], set(numbers)
        head = {
            "task": name,
            "version": _version(task),
            "description": task.get_config("description"),
            "shots": task.get_config("num_fewshot"),
        }
        rows.append(head)
        rows += [
            {"text": task.doc_to_text(doc), "target": task.doc_to_target(doc)}
            for number, doc in enumerate(task.eval_docs)
            if number in chosen
        ]
    return rows


class HarnessModel(LM):  # type: ignore[misc]  # the harness ships no types
    """A backbone under one adapter, as the harness asks models.

    Text is tokenised by our rules: the context once, the continuation by itself behind it. Of a context that is too
    long the end is read.
    """

    def __init__(
        self, backbone: Backbone, adapter: str | None, encoder: ChatEncoder, generation: GenerationConfig
    ) -> None:
        super().__init__()
        self.backbone, self.adapter, self.encoder, self.generation = backbone, adapter, encoder, generation
        # The harness puts a system prompt in front by itself, and a chat template writes BOS where it is wanted.
        self._plain = ChatEncoder(encoder.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches."""
        return str(self.encoder.tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text."""
        tokenizer = self.encoder.tokenizer
        if not tokenizer.chat_template:
            raise UserError(
                f"harness.chat_template is true, but the tokenizer '{tokenizer.name_or_path}' has no chat template"
            )
        text: str = tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood (nats) of each continuation behind its context, and whether greedy decoding writes it."""
        places: dict[str, list[int]] = {}
        pairs = [_without_end_space(*request.args) for request in requests]
        for index, (context, _) in enumerate(pairs):
            places.setdefault(context, []).append(index)
        contexts = self._context_ids(list(places))
        choices = [
            self.encoder.continuation_ids_batch([pairs[index][1] for index in indices]) for indices in places.values()
        ]
        prompts = [
            self._shortened(ids, max(map(len, of_prompt))) for ids, of_prompt in zip(contexts, choices, strict=True)
        ]
        found = choice_likelihoods(self.backbone, self.adapter, prompts, choices)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for indices, of_prompt in zip(places.values(), found, strict=True):
            for index, one in zip(indices, of_prompt, strict=True):
                results[index] = (one.logprob, one.greedy)
        return results

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Texts written behind each context, up to the first of its stop strings."""
        results = [""] * len(requests)
        by_settings: dict[str, list[int]] = {}
        settings: dict[str, GenerationConfig] = {}
        for index, request in enumerate(requests):
            made = self._generation(request.args[1])
            settings[made.model_dump_json()] = made
            by_settings.setdefault(made.model_dump_json(), []).append(index)
        for key, indices in by_settings.items():
            config = settings[key]
            ids = [
                self._shortened(prompt, config.max_new_tokens)
                for prompt in self._context_ids([requests[index].args[0] for index in indices])
            ]
            sampler = Sampler(Policy(self.backbone, self.adapter), config, self.encoder.stop_token_ids)
            drawn = sampler.sample(ids, _SHOT_SEED)
            rows = [row[mask].tolist() for row, mask in zip(drawn.response_ids_BR, drawn.response_mask_BR, strict=True)]
            texts = [self._decoded(row) for row in rows]
            for index, text in zip(indices, texts, strict=True):
                results[index] = text_before_stop(text, config.stop)
        return results

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Never asked: tasks that need it are refused when they are loaded."""
        raise UserError("perplexity is no share of items")

    def _generation(self, given: Mapping[str, Any]) -> GenerationConfig:
        stops = given.get("until") or []
        sampled = bool(given.get("do_sample", False)) and float(given.get("temperature", 1.0)) > 0
        return self.generation.model_copy(
            update={
                "stop": [stops] if isinstance(stops, str) else list(stops),
                "max_new_tokens": int(given.get("max_gen_toks", self.generation.max_new_tokens)),
                "temperature": float(given.get("temperature", 1.0)) if sampled else 0.0,
                "top_p": float(given.get("top_p", 1.0)) if sampled else 1.0,
                "top_k": int(given.get("top_k", 0)) if sampled else 0,
            }
        )

    def _context_ids(self, contexts: Sequence[str]) -> list[list[int]]:
        """Ids of the contexts; an empty one is the token that begins (or, for want of one, ends) a text."""
        tokenizer = self.encoder.tokenizer
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [ids or [int(start)] for ids in self._plain.prompt_ids_batch(list(contexts))]

    def _shortened(self, ids: list[int], room_for: int) -> list[int]:
        context = self.backbone.context
        if context is None:
            return ids
        if room_for >= context:
            raise UserError(
                f"an answer of {room_for} tokens does not fit '{self.backbone.name}', which reads {context} at once; "
                "name another task or a model with a longer context"
            )
        return self._plain.shorten_prompt(ids, context - room_for)

    def _decoded(self, ids: Sequence[int]) -> str:
        # White space at the ends may be what a task looks at, so it stays.
        stops = set(self.encoder.stop_token_ids)
        kept = [token for token in ids if token not in stops]
        text: str = self.encoder.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _without_end_space(context: str, continuation: str) -> tuple[str, str]:
    """White space between the two belongs to the continuation, as tokenizers put it there."""
    bare = context.rstrip()
    return (bare, context[len(bare) :] + continuation) if bare else (context, continuation)
