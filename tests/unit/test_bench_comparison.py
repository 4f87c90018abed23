"""Two configurations side by side: which recipe, what differs, what is made of logs, and how it is told."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rlhf.algo.logprobs import logprobs_from_hidden
from rlhf.infra.errors import UserError
from rlhf.infra.flop_counter import flop_counter
from rlhf.recipes.bench import Comparison, Measured, Spread, check_writable, combined, measured
from rlhf.recipes.bench_sides import differing_keys, read_sides, recipe_of
from rlhf.recipes.bench_table import table


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


ONLY_PPO = "ppo: {num_iterations: 3}\n"
SEVERAL = "training: {max_steps: 3}\n"


@pytest.mark.parametrize(
    ("name", "text", "recipe"),
    [
        ("a.yaml", ONLY_PPO, "ppo"),
        ("a.yaml", "architecture: {hidden_size: 24}\n", "pretrain"),
        ("sft_long.yaml", SEVERAL, "sft"),
        ("rm-2.yaml", SEVERAL, "reward"),
        ("dpo.yaml", SEVERAL, "dpo"),
    ],
)
def test_a_file_tells_its_recipe(tmp_path: Path, name: str, text: str, recipe: str) -> None:
    assert recipe_of(written(tmp_path, name, text), ()) == recipe


def test_files_that_do_not(tmp_path: Path) -> None:
    several = written(tmp_path, "a.yaml", SEVERAL)
    with pytest.raises(UserError, match=r"could be for pretrain or sft or .*; say which with --recipe"):
        recipe_of(several, ())
    assert recipe_of(several, ["beta=0.2", "loss=ipo"]) == "dpo"  # the overrides tell
    with pytest.raises(UserError, match=r"a config file of none of pretrain, sft, .*name the recipe"):
        recipe_of(written(tmp_path, "b.yaml", "nonsense: 1\n"), ())
    with pytest.raises(UserError, match="does not exist"):
        recipe_of(tmp_path / "absent.yaml", ())
    with pytest.raises(UserError, match=r"is for ppo and B \('.*sft.yaml'\) for sft; give two configurations of one"):
        paths = (written(tmp_path, "c.yaml", ONLY_PPO), written(tmp_path, "sft.yaml", SEVERAL))
        read_sides(paths, ((), ()))
    with pytest.raises(UserError, match="--recipe got 'eval', expected one that trains in steps: pretrain, sft"):
        read_sides((several, several), ((), ()), "eval")
    with pytest.raises(UserError, match="beta"):
        read_sides((several, several), (("beta=0.2",), ()), "sft")


def test_what_is_measured_has_a_line_for_every_step_and_nothing_beside(tmp_path: Path) -> None:
    text = SEVERAL + "run: {name: mine, overwrite: true, max_minutes: 1, profile: true, profile_steps: [1, 2]}\n"
    path = written(tmp_path, "sft.yaml", text)
    recipe, sides = read_sides((path, path), (("training.logging_steps=5",), ("run.dtype=bf16",)))
    assert recipe == "sft"
    for side in sides.values():
        assert (side.run.overwrite, side.run.max_minutes, side.run.profile) == (False, None, False)
        assert side.config.model_dump()["training"]["logging_steps"] == 1
    assert differing_keys(sides["A"].config, sides["B"].config) == {"run.dtype": ("fp32", "bf16")}


def finished(folder: Path, num_lines: int) -> Path:
    """A run of so many steps, of which step n took n seconds of work and 100 of validation, for 10 n tokens."""
    (folder / "logs").mkdir()
    lines = [
        {
            "step": n, "train/loss": 1 / n, "train/tokens": 5 * n * (n + 1), "time/update": 0.75 * n,
            "time/other": 0.25 * n, "time/validate": 100.0,
        }
        for n in range(1, num_lines + 1)
    ]  # fmt: skip
    written(folder, "logs/train.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    cost = {"optimizer_steps": num_lines, "tokens": lines[-1]["train/tokens"], "peak_memory_mb": 7.0}
    written(folder, "run.json", json.dumps({"cost": cost}))
    return folder


def test_warm_up_and_validation_are_left_out(tmp_path: Path) -> None:
    found = measured(finished(tmp_path, 4), num_warmup=2)
    assert found.per_step == 3.5 and found.tokens_per_step == 35  # of steps 3 and 4
    assert found.by_phase == {"update": 2.625, "other": 0.875, "validate": 100.0}
    assert (found.num_steps, found.num_tokens, found.peak_memory_mb) == (4, 100, 7.0)
    assert found.losses == (1, 1 / 2, 1 / 3, 1 / 4)


def test_a_run_no_longer_than_its_warm_up(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a run of 4 steps cannot be measured when the first 4 are left out"):
        measured(finished(tmp_path, 4), num_warmup=4)


def test_a_result_that_could_not_be_written_is_refused_first(tmp_path: Path) -> None:
    check_writable(tmp_path / "found.json")
    for path in (tmp_path, tmp_path / "absent" / "found.json"):
        with pytest.raises(UserError, match="cannot be written"):
            check_writable(path)


def test_a_spread_is_median_and_range() -> None:
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0)


def comparison() -> Comparison:
    """A takes 2 seconds and 10 GFLOP a step, B half the time on a machine of 20 GFLOP/s."""

    def run(seconds: float) -> Measured:
        return Measured(9, 900, seconds, {"update": seconds, "save": 1.0}, 100.0, (2.0, 1.0), 500.0)

    counted = Measured(9, 900, 1e10, {"update": 1e10, "save": 0.0}, 100.0, (2.0, 1.0), 500.0)
    runs = {"A": [run(2.0), run(2.0), run(4.0)], "B": [run(1.0), run(1.2), run(1.6)]}
    return combined(
        "sft",
        {"A": counted, "B": counted},
        runs,
        num_warmup=2,
        dtypes={"A": "fp32", "B": "fp32"},
        rates={"fp32": 20.0, "bf16": 50.0},
        keys={"run.num_threads": (1, 2)},
    )


def test_ratios_are_of_pairs() -> None:
    found = comparison()
    assert found.ratio == Spread(0.5, 0.4, 0.6) == found.per_token
    assert found.sides["A"].seconds_per_step == Spread(2.0, 2.0, 4.0)
    assert found.sides["A"].tokens_per_second == Spread(50.0, 25.0, 50.0)
    assert found.sides["A"].gflops_per_second == 5.0 and found.sides["A"].share == 0.25
    assert found.largest_loss_difference == 0


def test_a_comparison_as_text() -> None:
    lines = table(comparison()).splitlines()
    assert lines[0] == (
        "sft: 3 pairs of runs of 9 optimizer steps; of every run the first 2 steps are left out as warm-up, and "
        "everywhere the time of validate, save, profile"
    )
    assert lines[1].startswith("this machine multiplies matrices at fp32 20 GFLOP/s, bf16 50 GFLOP/s (")
    assert lines[2:4] == ["settings that differ:", "  run.num_threads: A 1, B 2"]
    cells = [tuple(re.split(r"  +", line.strip())) for line in lines]
    assert ("A", "B") in cells
    assert ("seconds per step", "2 (2 to 4)", "1.2 (1 to 1.6)") in cells
    assert ("share of the machine's rate", "25.0% of fp32", "41.7% of fp32") in cells
    assert ("save, s per step (left out)", "1", "1") in cells
    assert lines[-1] == (
        "B / A in seconds per step: 0.500 (0.400 to 0.600) over 3 pairs; the losses are equal, bit for bit"
    )


def test_fused_attention_and_products_in_place_are_counted() -> None:
    query, key, value = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    with flop_counter() as counter:
        out = scaled_dot_product_attention(query, key, value)
        forward = counter.get_total_flops()
        out.sum().backward()
    square = 2 * 3 * 5 * 5 * 8 * 2  # one product of queries and keys
    assert forward == 2 * square
    assert counter.get_total_flops() - forward in (4 * square, 5 * square)  # a fused kernel makes one of them again
    with flop_counter() as counter, torch.no_grad():
        torch.zeros(4, 7).addmm_(torch.ones(4, 3), torch.ones(3, 7))
    assert counter.get_total_flops() == 2 * 4 * 3 * 7


def test_a_frozen_head_whose_gradient_is_taken_with_its_logits_is_counted() -> None:
    """Inside `torch.autograd.grad`, where the counter's own hooks on modules would refuse to run."""
    head = torch.nn.Linear(6, 9, bias=False).requires_grad_(False)
    hidden_MD = torch.randn(5, 6, requires_grad=True)
    with flop_counter() as counter:
        logprobs_from_hidden(head, hidden_MD, torch.arange(5), vocab_size=9).sum().backward()
    probe = 2 * 6 * 9  # one row, to see whether the head trains
    assert counter.get_total_flops() == probe + 2 * (2 * 5 * 6 * 9)  # the logits, and back to the hidden states
