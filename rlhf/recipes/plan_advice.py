"""What to change in a config whose stage does not fit: keys and values, each tried in a plan of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rlhf.recipes.plan_predict import Machine, StagePlan, plan_stage
from rlhf.recipes.plan_sources import Stage

Value = int | bool | str
Planner = Callable[[Stage, Machine], StagePlan]
_FEWEST_TOKENS, _FEWEST_ROWS = 512, 4
# A change that takes away less than this share of the peak is not worth telling.
_WORTH = 0.01


@dataclass(frozen=True)
class Knob:
    """A setting that holds less memory at other values, from the mildest to the strongest; `price` is what it costs."""

    key: str
    values: tuple[Value, ...]
    price: str


@dataclass(frozen=True)
class Advice:
    """Settings, as they are written, that go together; the peak under them in bytes; whether that fits."""

    settings: tuple[str, ...]
    prices: tuple[str, ...]
    num_bytes: int
    is_enough: bool


def advise(stage: Stage, planned: StagePlan, machine: Machine, plan: Planner = plan_stage) -> list[Advice]:
    """Every single setting that is enough by itself; where none is, several together, or what all of them come to.

    Each was planned with the change made, so its peak is as good a prediction as the first.
    """
    assert machine.limit is not None
    limit = machine.limit.num_bytes

    def peak_of(changed: Stage) -> int:
        return plan(changed, machine).peak.needed_bytes

    alone = []
    for knob in knobs(stage, planned.peak.name):
        found = _mildest(stage, knob, limit, peak_of)
        if found is not None:
            value, num_bytes = found
            alone.append(Advice((_written(stage, knob.key, value),), (knob.price,), num_bytes, is_enough=True))
    return alone or _together(stage, planned, machine, plan)


def _mildest(stage: Stage, knob: Knob, limit: int, peak_of: Callable[[Stage], int]) -> tuple[Value, int] | None:
    """The mildest value under which the stage fits, with the peak; None where the strongest is not enough."""
    first, last = 0, len(knob.values) - 1
    best = peak_of(stage.changed(knob.key, knob.values[last]))
    if best > limit:
        return None
    while first < last:  # the peak falls from value to value
        middle = (first + last) // 2
        peak = peak_of(stage.changed(knob.key, knob.values[middle]))
        if peak <= limit:
            last, best = middle, peak
        else:
            first = middle + 1
    return knob.values[last], best


def _together(stage: Stage, planned: StagePlan, machine: Machine, plan: Planner) -> list[Advice]:
    """Settings at their strongest, the cheapest first and always one that lowers the worst phase, until they fit."""
    assert machine.limit is not None
    limit, made = machine.limit.num_bytes, dict[str, tuple[Knob, Value]]()
    while planned.peak.needed_bytes > limit:
        for knob in knobs(stage, planned.peak.name):
            after = stage.changed(knob.key, knob.values[-1])
            found = plan(after, machine)
            if found.peak.needed_bytes < (1 - _WORTH) * planned.peak.needed_bytes:
                stage, planned, made[knob.key] = after, found, (knob, knob.values[-1])
                break
        else:
            break
    num_bytes, fits = planned.peak.needed_bytes, planned.peak.needed_bytes <= limit
    if fits:
        # The last number need not be as low as it goes.
        key, (knob, _) = list(made.items())[-1]
        milder = _mildest(stage, knob, limit, lambda changed: plan(changed, machine).peak.needed_bytes)
        if milder is not None:
            made[key], num_bytes = (knob, milder[0]), milder[1]
    settings = tuple(_written(stage, key, value) for key, (_, value) in made.items())
    prices = tuple(knob.price for knob, _ in made.values())
    return [Advice(settings, prices, num_bytes, fits)] if made else []


def knobs(stage: Stage, phase: str) -> Iterator[Knob]:
    """The settings that lower the peak of such a phase, the cheapest first."""
    if phase == "generate":
        rows = _halves(stage, "generation.batch_size", _FEWEST_ROWS, most=stage.setting("ppo.rollout_batch_size"))
        yield from _knob("generation.batch_size", rows, "the same answers, in more passes")
        if stage.setting("generation.merge_adapter") and stage.setting("run.dtype") == "fp32":
            yield Knob("generation.merge_adapter", (False,), "slower sampling")
    elif phase != "score":
        for key in (
            "training.max_tokens_per_micro_batch",
            "ppo.max_tokens_per_micro_batch",
            "grpo.max_tokens_per_micro_batch",
        ):
            tokens = _halves(stage, key, _FEWEST_TOKENS)
            yield from _knob(key, tokens, "the same gradient, in more passes")
    if phase == "update" and stage.setting("model.gradient_checkpointing") is False:
        yield Knob("model.gradient_checkpointing", (True,), "a second forward pass in every update")
    if stage.setting("run.dtype") == "fp32":
        yield Knob("run.dtype", ("bf16",), "matrix products in bf16")
    trains_all = "full" in (stage.setting("model.train"), stage.setting("reward.train"))
    if not trains_all and stage.setting("model.load_in_4bit") is False:
        yield Knob("model.load_in_4bit", (True,), "the base rounded to 4 bits")
    if trains_all:
        key = "model.train" if stage.setting("reward.train") is None else "reward.train"
        yield Knob(key, ("lora",), "an adapter trains instead of every weight")
    if phase == "generate":
        yield from _knob(
            "generation.max_new_tokens", _halves(stage, "generation.max_new_tokens", 32), "shorter answers"
        )
    for key in ("data.max_length", "data.max_prompt_length"):
        yield from _knob(key, _halves(stage, key, 64), "longer rows are left out")


def _knob(key: str, values: tuple[int, ...], price: str) -> Iterator[Knob]:
    if values:
        yield Knob(key, values, price)


def _halves(stage: Stage, key: str, least: int, most: int | None = None) -> tuple[int, ...]:
    """The value of a setting (no more than `most`) halved again and again, down to `least`; none where it is absent."""
    value = stage.setting(key)
    halves: list[int] = []
    while value is not None and (value := min(value, most or value) // 2) >= least:
        halves.append(value)
    return tuple(halves)


def _written(stage: Stage, key: str, value: Value) -> str:
    """As on the command line, with the section of a pipeline before it; `run` is one for all of its stages."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"{'' if key.startswith('run.') else stage.prefix}{key}={text}"
