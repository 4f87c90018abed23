"""Decoding with fixed shapes draws what the product's own loop draws; what differs stops the script for a GPU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_backbones import add_trained_adapter, random_prompts, tiny_backbone

from rlhf.models.decoding import GenerationConfig
from rlhf.models.policy import Policy
from rlhf.models.value_head import ValueHead
from rlhf.rollout.sampler import Sampler

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.slow
def test_fixed_shapes_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of many lengths: rows that have finished stay in the batch, and nothing of them is kept."""
    monkeypatch.syspath_prepend(BENCH)
    from static_decode import StaticPolicy

    backbone = tiny_backbone("llama")
    add_trained_adapter(backbone, "policy")
    head = ValueHead(backbone.width)
    torch.nn.init.normal_(next(head.parameters()))
    config, prompts = GenerationConfig(max_new_tokens=20, top_p=0.9), random_prompts(10, seed=1)
    plain = Sampler(Policy(backbone, "policy", head), config, [1, 5]).sample(prompts, 0)
    fixed = Sampler(StaticPolicy(backbone, "policy", head, backend="eager"), config, [1, 5]).sample(prompts, 0)
    assert len(set(plain.lengths_B.tolist())) > 4 and plain.finished_B.any() and not plain.finished_B.all()
    for name in ("response_ids_BR", "response_mask_BR", "finished_B"):
        assert torch.equal(vars(plain)[name], vars(fixed)[name]), name
    for name in ("logprobs_BR", "entropy_BR", "values_BR"):
        torch.testing.assert_close(vars(plain)[name], vars(fixed)[name], atol=3e-5, rtol=1e-5, msg=name)
    assert fixed.truncated_mass == pytest.approx(plain.truncated_mass, abs=1e-6) and plain.truncated_mass > 0
    assert fixed.num_through > plain.num_through


@pytest.mark.slow
def test_a_difference_stops_the_script_and_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    import gpu

    monkeypatch.setattr(gpu, "measure_matmul_rate", lambda *_: 1.0)
    found_in = tmp_path / "found.json"
    bench = gpu.GPUBench(gpu.parse(["--small", "--folder", str(tmp_path), "--json", str(found_in)]))
    bench.hold("near enough", 0.01, 0.1)
    for apart in (0.2, math.nan):
        with pytest.raises(SystemExit, match="nothing is timed before this is mended"):
            bench.hold("too far", apart, 0.1)
    assert [check["name"] for check in json.loads(found_in.read_text())["checks"]] == ["near enough", *2 * ["too far"]]

    def out_of_memory(*_: object, **__: object) -> None:
        raise SystemExit("CUDA out of memory")

    monkeypatch.setattr(bench, "measure", out_of_memory)
    bench.large()
    large = json.loads(found_in.read_text())["large"]
    assert len(large) == 6 and {row["failed"] for row in large} == {"CUDA out of memory"}
    assert bench.table().row_count == 6
    one = {"responses": [[3, 4, 5], [6, 7]], "logprobs": [[-1.0, -2.0, -3.0], [-1.0, -1.0]]}
    other = {"responses": [[3, 9, 5], [6, 7]], "logprobs": [[-1.1, -2.5, -9.0], [-1.0, -1.3]]}
    assert gpu.answers_apart(one, other) == (pytest.approx(3 / 5), pytest.approx(0.3))
    assert gpu.answers_apart(one, one) == (1.0, 0.0)
    with pytest.raises(SystemExit):
        gpu.parse(["--parts", "check,nonsense"])
