"""One method of each family, ten seconds of training, on the bundled model and its world: gold rises for certain."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from toy_runs import settings

from rlhf.data.tinychat import preference_pairs, prompt_rows
from rlhf.eval.ablation_report import Outcome
from rlhf.infra.config import load_config
from rlhf.recipes.ablation import run_ablation
from rlhf.recipes.ablation_config import AblationConfig

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[2] / "configs" / "ablate.yaml"
GOLD = "rewards: [{name: 'rlhf.data.tinychat:gold_reward'}]"
FAMILIES: Mapping[str, tuple[int, str]] = {
    "ppo": (6, f"{{{GOLD}, ppo: {{rollout_batch_size: 96, target_kl: 0.05}}, optimizer: {{learning_rate: 0.006}}}}"),
    "rloo": (8, f"{{{GOLD}, optimizer: {{learning_rate: 0.006}}}}"),
    "dpo": (24, "{beta: 0.3, data: {max_samples: 768}}"),
    "kto": (12, "{data: {max_samples: 768}}"),
    "online_dpo": (2, f"{{{GOLD}}}"),
    "best_of_n": (150, f"{{{GOLD}, best_of_n: {{num_answers: 8}}}}"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("gold")
    rows = {"pairs": preference_pairs("train", 800, 0), "prompts": prompt_rows("train", 800, 0)}
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    lengths = ", ".join(f"{name}: {length}" for name, (length, _) in FAMILIES.items())
    own = [f"settings.{name}={changes}" for name, (_, changes) in FAMILIES.items()]
    data = [f"pairs.train_files=[{folder / 'pairs.jsonl'}]", "pairs.validation_files=[]", "pairs.validation_fraction=0"]
    data += ["pairs.max_validation_samples=null", f"prompts.train_files=[{folder / 'prompts.jsonl'}]"]
    shared = ["policy=tinychat", "reward_model=null", "seeds=[0]", "evaluate.suite.num_heldout=200", *data]
    given = settings(folder, "gold", *shared, f"methods=[{', '.join(FAMILIES)}]", f"lengths={{{lengths}}}", *own)
    _, found = run_ablation(load_config(AblationConfig, CONFIG, overrides=given))
    assert found is not None
    return {one.method: one for one in found.outcomes}


@pytest.mark.parametrize("method", FAMILIES)
def test_gold_rises_over_the_policy_it_started_from(outcomes: dict[str, Outcome], method: str) -> None:
    """The whole 95 % interval, paired by prompt, of 200 held-out prompts."""
    found = outcomes[method]
    assert found.measure == "gold"
    assert found.gain.low > 0, found
    assert 0 < found.kl < 10
