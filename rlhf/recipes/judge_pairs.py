"""Several judges over the same pairs, with progress, and what each of them cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rlhf.eval.judge import Judge, Pair, Watch, distinct_names, panel
from rlhf.eval.judge_figures import Judged
from rlhf.eval.llm_judge import LLMJudge
from rlhf.infra.errors import UserError
from rlhf.infra.experiment import Run, RunConfig

# A run of judges writes no checkpoints: what is worth keeping is in the cache of replies.
IDLE_RUN_KEYS: Mapping[str, str] = dict.fromkeys(
    ["run.save_every_steps", "run.keep_checkpoints"], "judging keeps replies in the cache instead of checkpoints"
) | dict.fromkeys(["run.profile", "run.profile_steps"], "judging has no steps")


def judge_all(judges: Sequence[Judge], pairs: Sequence[Pair], run: Run, what: str = "") -> list[Judged]:
    """Every judge's verdicts on every pair, in order.

    Raises:
        UserError: a judge cannot judge; a judge behind an API keeps the replies it got.
        JudgingStopped: Ctrl-C, or the time is spent.
    """
    judged = []
    for judge in judges:
        with run.timer("judge"), run.logger.progress(f"{judge.name} judges {what}".strip(), len(pairs)) as advance:
            verdicts = judge(pairs, Watch(advance, run.should_stop))
        judged.append(Judged(judge.name, pairs, verdicts, judge.sees_order))
        for sentence in _costs(judge):
            run.logger.info(sentence)
    return judged


def check_panel(judges: Sequence[Judge], names: Sequence[str]) -> None:
    """Raise `UserError` where a panel's member is no judge, or it has fewer than two."""
    there = [judge.name for judge in judges]
    unknown = next((name for name in names if name not in there), None)
    if unknown is not None or len(set(names)) == 1:
        told = f"there is no judge '{unknown}'" if unknown is not None else "one judge alone is no panel"
        raise UserError(f"panel: {told}; name two or more of: {', '.join(there)}")


def with_panel(judged: Sequence[Judged], names: Sequence[str]) -> list[Judged]:
    """The judges, and after them those of these names as one; without names the judges alone."""
    members = [one for one in judged if one.judge in names]
    if not members:
        return list(judged)
    title = distinct_names([*(one.judge for one in judged), "panel"])[-1]
    joined = panel([one.judgements for one in members])
    return [*judged, Judged(title, judged[0].pairs, joined, any(one.sees_order for one in members))]


def tokens_of(judges: Sequence[Judge]) -> int:
    """Tokens that judges behind an API were sent and replied with in their last call."""
    return sum(j.usage.prompt_tokens + j.usage.completion_tokens for j in judges if isinstance(j, LLMJudge))


def cost_notes(judges: Sequence[Judge]) -> dict[str, str]:
    """For the foot of a report: how each judge behind an API was asked and what that took."""
    found = {}
    for judge in judges:
        if isinstance(judge, LLMJudge):
            config = judge.config
            asked = f"{config.model} at {config.base_url}, temperature {config.temperature}, {config.max_tokens} tokens"
            found[f"judge {judge.name}"] = "; ".join([asked, *_costs(judge)])
    return found


def settings_notes(config: RunConfig, run: Run) -> dict[str, str | int | float]:
    """Seed and versions."""
    versions = ", ".join(f"{name} {version}" for name, version in run.info["versions"].items())
    return {"seed": config.seed, "versions": versions}


def _costs(judge: Judge) -> Iterator[str]:
    if not isinstance(judge, LLMJudge):
        return
    usage, counts = judge.usage, judge.counts
    money = f", cost {usage.cost:.4g}" if usage.cost else ""
    yield (
        f"judge {judge.name}: {usage.requests} requests sent, {usage.cached} replies were there already, "
        f"{usage.prompt_tokens:,} tokens asked and {usage.completion_tokens:,} replied{money}"
    )
    if counts.unparsable:
        refused = f", {counts.refused} of them refused by the server ({counts.first_refusal})" if counts.refused else ""
        cut_off = f", {counts.cut_off} cut off at max_tokens={judge.config.max_tokens}" if counts.cut_off else ""
        yield (
            f"judge {judge.name}: {counts.unparsable} of {counts.asked} questions ended without a verdict"
            f"{refused}{cut_off}; these pairs are left out, not called ties"
        )
