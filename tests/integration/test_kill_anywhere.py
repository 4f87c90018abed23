"""A run that is killed by SIGKILL, wherever it is, goes on as if nothing had happened (checklist C1, C2, C3, C8)."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
from fast_some import fast_some
from killed_runs import (
    Workshop,
    assert_same_run,
    assert_same_tree,
    chosen,
    command,
    log_lines,
    newest_checkpoint,
    status,
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGKILL and fork exist on Unix only")

RECIPES = ["ppo", "grpo", "sft", "rm", "dpo", "kto"]
ONLINE = ["ppo", "grpo"]
BY_PARTS = ["best-of-n", "online-dpo"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("killed"))


def goes_on(workshop: Workshop, recipe: str, moment: int) -> None:
    """Kill a run at a moment, take it up again, and compare it with the one that was left alone."""
    straight, ended = workshop.uninterrupted(recipe)
    folder = workshop.killed(recipe, moment)
    if not (folder / "run.json").is_file():  # it had not begun, and nothing it left is in the way of a new start
        again = command(workshop.folder / f"{folder.name}-made", recipe, *workshop.settings(recipe, folder.name))
        assert again.code == 0, (ended.moments[moment], again.output)
    elif status(folder) != "finished":  # it is when the last of all syncs was the place
        again = workshop.resumed(folder)
        assert again.code == 0, (ended.moments[moment], again.output)
    assert status(folder) == "finished"
    (assert_same_tree if recipe in BY_PARTS else assert_same_run)(folder, straight)
    shutil.rmtree(folder)


def within(moments: list[str], first: str, last: str) -> list[int]:
    """Numbers of the moments from one name up to another."""
    return list(range(moments.index(first), moments.index(last)))


@pytest.mark.parametrize("recipe", fast_some(["sft", "rm", "dpo", "kto"], "sft", "rm"))
def test_c1_a_killed_run_goes_on_bit_for_bit(workshop: Workshop, recipe: str) -> None:
    (moment,) = chosen(workshop.uninterrupted(recipe)[1].moments, "gradients 3")
    goes_on(workshop, recipe, moment)


@pytest.mark.parametrize("recipe", fast_some(ONLINE, "ppo"))
def test_c1_killed_inside_an_inner_epoch_it_goes_on_bit_for_bit(workshop: Workshop, recipe: str) -> None:
    straight, ended = workshop.uninterrupted(recipe)
    # The third of the four updates of the second iteration, with its gradients there and its weights not yet moved.
    (moment,) = chosen(ended.moments, "gradients 6")
    folder = workshop.killed(recipe, moment, f"{recipe}-inside")
    assert newest_checkpoint(folder).name == "step_000001.002"
    assert len(log_lines(folder)) == 1
    again = workshop.resumed(folder)
    assert again.code == 0 and "resuming from the checkpoint of step 1 and 2 part(s) of the next" in again.output
    # What it was learning from was not sampled again, nor was an update made twice.
    assert [name for name in again.moments if name.startswith("step")] == [f"step {n}" for n in range(6, 12)]
    assert json.loads((folder / "run.json").read_text())["resumed"][0] | {"at": ""} == {"at": "", "step": 1, "part": 2}
    assert_same_run(folder, straight)


def test_c2_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(workshop: Workshop) -> None:
    _, ended = workshop.uninterrupted("sft")
    (moment,) = chosen(ended.moments, ".step_000003.partial/weights.safetensors")
    folder = workshop.killed("sft", moment, "saving")
    assert newest_checkpoint(folder).name == "step_000002"
    assert (folder / "checkpoints" / ".step_000003.partial").is_dir()
    again = workshop.resumed(folder)
    assert again.code == 0 and "resuming from the checkpoint of step 2" in again.output
    assert_same_run(folder, workshop.uninterrupted("sft")[0])


def test_a_run_killed_before_it_was_recorded_can_be_started_again(workshop: Workshop) -> None:
    _, ended = workshop.uninterrupted("sft")
    (moment,) = chosen(ended.moments, "sft/.run.json.partial")[:1]
    folder = workshop.killed("sft", moment, "unborn")
    assert not (folder / "run.json").exists() and (folder / "config.yaml").is_file()
    assert "has no run.json" in workshop.resumed(folder).output
    again = command(workshop.folder / "again", "sft", *workshop.settings("sft", "unborn"), "training.max_steps=1")
    assert again.code == 0, again.output


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_c1_killed_at_each_step(workshop: Workshop, recipe: str) -> None:
    """Before each step, and in each between its gradients and its weights; PPO, GRPO inside their inner epochs too."""
    _, ended = workshop.uninterrupted(recipe)
    moments = chosen(ended.moments, "step ", "gradients ")
    assert len(moments) == 2 * (12 if recipe in ONLINE else 6)
    for moment in moments:
        goes_on(workshop, recipe, moment)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_c2_killed_at_each_sync_and_rename(workshop: Workshop, recipe: str) -> None:
    """At the start, while it saves (PPO, GRPO: inside an iteration and at its end), after the last checkpoint."""
    moments = workshop.uninterrupted(recipe)[1].moments
    window = within(moments, "step 6", "step 8") if recipe in ONLINE else within(moments, "step 1", "step 2")
    last = [n for n in chosen(moments, "rename to") if "/checkpoints/" in moments[n]][-1]
    for moment in [*range(moments.index("step 0")), *window, *range(last, len(moments))]:
        goes_on(workshop, recipe, moment)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stride", [14, 23])
def test_c1_killed_again_and_again(workshop: Workshop, recipe: str, stride: int) -> None:
    """Each process dies a little later than its predecessor; together they make the run that nobody interrupts."""
    straight, _ = workshop.uninterrupted(recipe)
    folder = workshop.killed(recipe, stride, f"{recipe}-again-{stride}")
    for lives in range(1, 100):
        ended = workshop.resumed(folder, kill_at=stride + 4 * lives)
        if ended.code == 0 or status(folder) == "finished":  # the last sync of all comes after that was written
            break
        assert ended.code == -signal.SIGKILL, ended.output
    assert lives > 3 and status(folder) == "finished"
    assert_same_run(folder, straight)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", BY_PARTS)
def test_c1_answers_and_rounds_killed_all_along(workshop: Workshop, recipe: str) -> None:
    """Between portions of answers, rounds and their runs, while any of these saves, and before the very end."""
    moments = workshop.uninterrupted(recipe)[1].moments
    stride = max(1, len(moments) // 12)
    for moment in [*range(1, len(moments), stride), len(moments) - 1]:
        goes_on(workshop, recipe, moment)
