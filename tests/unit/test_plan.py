"""`rlhf plan`: which recipe a file is for, what a stage starts from, what is predicted, and what advice is worth."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import rlhf
from torch import Tensor

from rlhf.algo.trainer import Trainer
from rlhf.data.chat import TokenExample
from rlhf.infra.config import Config, load_config
from rlhf.infra.errors import UserError
from rlhf.infra.memory_limit import GB, MemoryLimit
from rlhf.infra.shadow import Ledger, Shadow
from rlhf.models.backbone import Backbone, ModelConfig, resolve_model
from rlhf.models.ensemble import write_ensemble
from rlhf.models.hollow import hollow_backbone, packaged_shapes, read_shape
from rlhf.models.lora import LoRAConfig, get_lora_parameters
from rlhf.recipes.dpo import DPOConfig
from rlhf.recipes.evaluate_config import EvaluateConfig
from rlhf.recipes.grpo_config import GRPOConfig
from rlhf.recipes.kto import KTOConfig
from rlhf.recipes.language_model import language_model_method
from rlhf.recipes.pipeline import PipelineConfig
from rlhf.recipes.plan import read_plan_config
from rlhf.recipes.plan_advice import advise, knobs
from rlhf.recipes.plan_predict import Machine, StagePlan, plan_stage
from rlhf.recipes.plan_show import stage_lines
from rlhf.recipes.plan_sources import Stage, planned_stages
from rlhf.recipes.plan_trace import FRAMEWORK, Phase, Rows, Tracer, pair_examples, rows_within
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.pretrain import PretrainConfig
from rlhf.recipes.prm import ProcessRewardConfig
from rlhf.recipes.reward import RewardConfig
from rlhf.recipes.sft import SFTConfig

CONFIGS = Path(__file__).parents[2] / "configs"
TINYCHAT_PARAMETERS = 1_272_096
BLOCK_LAYERS = [(160, 160), (160, 32), (160, 32), (160, 160), (160, 448), (160, 448), (448, 160)]  # in, out
BLOCK_PARAMETERS = 277_024
SMALL_PARAMETERS = TINYCHAT_PARAMETERS - 3 * BLOCK_PARAMETERS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundled model's shape with one block instead of four; a plan asks for no weights."""
    folder = tmp_path_factory.mktemp("base")
    shape = json.loads((Path(resolve_model("tinychat")) / "config.json").read_text())
    shape |= {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    (folder / "config.json").write_text(json.dumps(shape))
    return str(folder)


def small_sft(base: str, **changes: object) -> SFTConfig:
    settings = {
        "model": {"name_or_path": base, "lora": {"r": 4}},
        "data": {"max_length": 64},
        "training": {"max_tokens_per_micro_batch": 256, "per_device_train_batch_size": 8},
    }
    return SFTConfig(**{**settings, **changes})


def traced(config: Config) -> Tracer:
    """The only stage of a config, traced as on a CPU."""
    (stage,) = planned_stages(config)
    return stage.trace(Tracer())


def adapter_size(rank: int) -> int:
    """Parameters of an adapter on every layer of one block."""
    return rank * sum(i + o for i, o in BLOCK_LAYERS)


def plan_of(stage: Stage, name: str, num_bytes: int) -> StagePlan:
    """What planning a stage gave, as far as advice looks at it."""
    return StagePlan(stage.name, "base", "somewhere", 1, 1, (Phase(name, {"activations": num_bytes}),))


# ---------------------------------------------------------------- which recipe


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("sft.yaml", "sft"),
        ("rm.yaml", "rm"),
        ("dpo.yaml", "dpo"),
        ("ppo.yaml", "ppo"),
        ("ppo_rules.yaml", "ppo"),
        ("hh_minilm.yaml", "rm"),
        ("prm.yaml", "prm"),
        ("kto.yaml", "kto"),
        ("eval.yaml", "eval"),
        ("pretrain_tiny.yaml", "pretrain"),
        ("demo.yaml", "pipeline"),
        ("hh_gpt2.yaml", "pipeline"),
        ("qwen2.5_7b.yaml", "pipeline"),
    ],
)
def test_a_file_tells_its_recipe(name: str, recipe: str) -> None:
    assert read_plan_config(str(CONFIGS / name), None, [])[0] == recipe


def test_a_file_that_several_recipes_take_is_asked_about(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("training: {num_train_epochs: 1}\n")
    with pytest.raises(UserError, match=r"could be a config of .*sft, rm, prm, dpo.*say which: rlhf plan"):
        read_plan_config(str(tmp_path / "mine.yaml"), None, [])
    assert read_plan_config("sft", tmp_path / "mine.yaml", ["data.max_length=99"])[1].data.max_length == 99


def test_what_is_no_config_is_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no recipe .*, no config file .* and no folder of a run"):
        read_plan_config("nothing", None, [])
    (tmp_path / "x.yaml").write_text("no_such_key: 1\n")
    with pytest.raises(UserError, match="no_such_key"):
        read_plan_config(str(tmp_path / "x.yaml"), None, [])
    with pytest.raises(UserError, match="leave --config away"):
        read_plan_config(str(CONFIGS / "sft.yaml"), CONFIGS / "sft.yaml", [])


def test_a_fault_in_a_file_is_told_as_the_recipe_it_is_named_after_would(tmp_path: Path) -> None:
    (tmp_path / "sft_mine.yaml").write_text("training: {max_stepz: 3}\n")
    with pytest.raises(UserError, match=r"max_stepz.*max_steps"):
        read_plan_config(str(tmp_path / "sft_mine.yaml"), None, [])


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
        ("mistralai/Mistral-7B-v0.3", 7_248_023_552),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100_048_384),
        ("openai-community/gpt2", 124_439_808),
    ],
)
def test_packaged_shapes_have_the_published_number_of_parameters(name: str, num_parameters: int) -> None:
    shape = read_shape(name)
    assert shape.num_parameters == num_parameters
    assert shape.origin in ("rlhf's own list of shapes", "the hub's cache")


def test_every_packaged_shape_is_checked() -> None:
    assert len(packaged_shapes()) == 5


def test_a_shape_is_read_from_a_folder_and_from_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_shape("tinychat").num_parameters == TINYCHAT_PARAMETERS
    file = packaged_shapes()["openai-community/gpt2"]
    stood_in = read_shape("nobody/at-home", file)
    assert stood_in.num_parameters == 124_439_808 and str(file) in stood_in.origin
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read from"):
        read_shape("nobody/at-home", tmp_path / "config.json")


@pytest.mark.parametrize("double_quant", [True, False])
def test_four_bits_take_codes_and_scales_and_the_head_stays(double_quant: bool) -> None:
    shape, shadow = read_shape("TinyLlama/TinyLlama-1.1B-Chat-v1.0"), Shadow()
    held = ModelConfig(load_in_4bit=True, bnb_4bit_use_double_quant=double_quant)
    backbone = hollow_backbone(shape, held, "bf16", shadow, on_cpu=False)
    assert backbone.is_quantised
    width, inner, keys, layers, words = 2048, 5632, 256, 22, 32_000
    coded = layers * (2 * width * width + 2 * width * keys + 3 * width * inner)
    plain = 2 * words * width + layers * 2 * width + width
    scales = coded // 64 + coded // 64 // 256 * 4 if double_quant else coded // 64 * 4
    rotary = 2 * 2 * (64 // 2) * 4  # in each of two places, frequencies and their copy, in fp32
    assert abs(shadow.num_bytes - (coded // 2 + scales + 2 * plain)) <= rotary + layers * 7 * 4


@pytest.mark.parametrize(
    ("file", "per_block", "layers"),
    [
        # In and out of q, k, v, o, gate, up, down: rank times their sum is what a block's adapters hold.
        ("qwen2.5_7b", 2 * 7168 + 2 * (3584 + 512) + 3 * (3584 + 18944), 28),
        ("llama3_8b", 2 * 8192 + 2 * (4096 + 1024) + 3 * (4096 + 14336), 32),
        ("mistral_7b", 2 * 8192 + 2 * (4096 + 1024) + 3 * (4096 + 14336), 32),
        ("tinyllama_1b", 2 * 4096 + 2 * (2048 + 256) + 3 * (2048 + 5632), 22),
    ],
)
def test_recipes_for_large_models_build_at_their_true_shapes_with_adapters(
    file: str, per_block: int, layers: int
) -> None:
    config = load_config(PipelineConfig, CONFIGS / f"{file}.yaml")
    model = config.sft.model
    shape, shadow = read_shape(model.name_or_path), Shadow()
    backbone = hollow_backbone(shape, model, config.run.dtype, shadow, on_cpu=False)
    with shadow:
        backbone.add_adapter("sft", model.lora)
    assert sum(p.numel() for p in get_lora_parameters(backbone.model, "sft")) == 16 * per_block * layers
    assert backbone.is_quantised == model.load_in_4bit
    assert bool(backbone._recomputed) == model.gradient_checkpointing


# ---------------------------------------------------------------- what is predicted


def test_rows_fill_a_pass() -> None:
    assert rows_within(4096, 512, 100) == Rows(8, 512, True)
    assert rows_within(4096, 512, 8) == Rows(8, 512, False)
    assert rows_within(4096, 512, 3) == Rows(3, 512, False)
    assert rows_within(2048, 1500, 9) == Rows(2, 1024, True)  # two shorter rows are more tokens than one of 1,500
    assert rows_within(100, 512, 9) == Rows(1, 512, True)  # a row longer than the limit still passes
    (pair,) = pair_examples(Rows(1, 100, False))
    assert len(pair.prompt_ids) + len(pair.chosen_ids) == 50


def test_parts_of_a_small_stage_are_what_they_should_be(base: str) -> None:
    (stage,) = planned_stages(small_sft(base))
    planned = plan_stage(stage, Machine("cpu", None, framework=1000))
    validate, update = planned.phases
    assert (validate.name, update.name, planned.peak.name) == ("validate", "update", "update")
    assert planned.num_parameters == SMALL_PARAMETERS
    trained = planned.num_trained
    assert trained == adapter_size(4)
    assert update.parts["adapters"] == update.parts["best weights"] == 4 * trained
    assert 8 * trained <= update.parts["optimizer"] < 8 * trained + 1000  # two moments and the counts of steps
    # A step leaves its gradients until the next begins.
    assert validate.parts["gradients"] == 4 * trained and update.parts["gradients"] <= 4 * trained
    assert 0 <= update.parts["base"] - 4 * SMALL_PARAMETERS < 1000
    assert update.parts[FRAMEWORK] == 1000
    assert update.num_bytes == sum(update.parts.values())


@pytest.mark.slow
def test_while_weights_change_format_their_file_is_resident_but_not_needed(base: str) -> None:
    (stage,) = planned_stages(small_sft(base, training={"max_tokens_per_micro_batch": 10}, data={"max_length": 10}))
    planned = plan_stage(stage, Machine("cpu", None, 0))
    load = planned.phases[0]
    assert load.name == "load" and load.parts["file"] == 2 * SMALL_PARAMETERS  # stored in bf16, held in fp32
    assert load.needed_bytes == load.parts["base"] < planned.peak.needed_bytes
    assert "file, mapped" in "\n".join(stage_lines(planned, Machine("cpu", None, 0)))
    on_gpu = plan_stage(stage, Machine("cuda", None, 0))
    assert [phase.name for phase in on_gpu.phases] == ["validate", "update"]


@pytest.mark.slow
def test_a_planned_step_takes_the_bytes_of_a_real_one() -> None:
    config = small_sft("tinychat")
    update = traced(config).phases[-1]
    backbone = Backbone.load(config.model)
    backbone.add_adapter("sft", config.model.lora)
    backbone.train_only(["sft"])
    ledger = Ledger()
    ledger.relabel([*backbone.model.parameters(), *backbone.model.buffers()], "base")
    with ledger:
        trained = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
        best = [p.detach().clone() for p in trained.values()]
        lengths = [64] * 7 + [63]
        examples = [TokenExample([5] * n, [False] + [True] * (n - 1)) for n in lengths]
        method = language_model_method(backbone, "sft", examples, [], config.training)
        trainer = Trainer(trained, config.optimizer, 2)
        for _ in range(2):
            with ledger.phase() as peak:
                trainer.step(method.micro_batches(range(8)), method.loss(range(8)))
    assert best
    assert abs(update.num_bytes / peak.num_bytes - 1) < 0.01


def settings_of_ppo(base: str, **changes: object) -> PPOConfig:
    settings = {
        "policy": base,
        "data": {"max_prompt_length": 8},
        "generation": {"max_new_tokens": 200},
        "ppo": {"rollout_batch_size": 16, "max_tokens_per_micro_batch": 256},
        "rewards": [{"name": "target_string", "arguments": {"text": "red"}}],
    }
    return PPOConfig(**{**settings, **changes})


def test_answers_to_one_prompt_are_planned_as_they_are_read(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    hidden = Backbone.hidden

    def noted(backbone: Backbone, input_ids_BT: Tensor, *more: Any, **named: Any) -> Tensor:
        shapes.append(tuple(input_ids_BT.shape))
        return hidden(backbone, input_ids_BT, *more, **named)

    monkeypatch.setattr(Backbone, "hidden", noted)
    settings = {
        "policy": base,
        "data": {"max_prompt_length": 40},
        "generation": {"max_new_tokens": 10},
        "grpo": {"num_prompts": 8, "num_generations": 4, "max_tokens_per_micro_batch": 400},
        "rewards": [{"name": "target_string", "arguments": {"text": "red"}}],
    }
    phases = [phase.name for phase in traced(GRPOConfig(**settings)).phases]
    assert phases == ["generate", "reference", "update"]
    shapes = shapes[2:]  # without those of the trial whether answers can share a row
    # All prompts that differ, of which the first are a token shorter than the others.
    assert shapes[0] == (8, 40)
    # The prompt's last token begins each of four branches, so a row has 39 + 4 * (1 + 10) positions.
    assert shapes[-1] == (400 // 83, 83)
    assert (8, 83) in shapes  # the reference passes twice as many tokens at once, all there are


def phases_of(config: Config) -> dict[str, dict[str, int]]:
    return {phase.name: dict(phase.parts) for phase in traced(config).phases}


@pytest.mark.slow
def test_ppo_has_its_phases_and_what_each_holds(base: str) -> None:
    with_model = phases_of(settings_of_ppo(base, rewards=[{"name": "model"}]))
    assert list(with_model) == ["generate", "score", "reference", "update"]
    # Rows, positions, keys and values of one head of 32 in fp32.
    assert with_model["generate"]["KV cache"] == 16 * (8 + 200) * 2 * 32 * 4
    # Policy, reference and the reward model are adapters of rank 16; there are two heads.
    assert with_model["score"]["adapters"] == 4 * (2 * adapter_size(16) + 160 + 1 + 160)
    assert "merged" in with_model["generate"] and "optimizer" in with_model["update"]


@pytest.mark.slow
def test_without_a_reward_model_nothing_is_scored(base: str) -> None:
    with_model, rules = phases_of(settings_of_ppo(base, rewards=[{"name": "model"}])), phases_of(settings_of_ppo(base))
    assert list(rules) == ["generate", "reference", "update"]
    assert with_model["update"]["adapters"] - rules["update"]["adapters"] == 4 * (
        adapter_size(16) + 160
    )  # its head too


@pytest.mark.slow
def test_every_member_of_an_ensemble_has_an_adapter_and_a_head(tmp_path: Path, base: str) -> None:
    def member(folder: Path) -> None:
        folder.mkdir(parents=True)
        lora = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "up_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(lora))
        described = {"train": "lora", "has_adapter": True, "base_model_name_or_path": base}
        (folder / "reward_config.json").write_text(json.dumps(described))

    member(tmp_path / "single")
    for k in range(3):
        member(tmp_path / "several" / f"member_{k}")
    write_ensemble(tmp_path / "several", 3, "mean", 0.5)
    terms = [{"name": "model"}, {"name": "process", "model": str(tmp_path / "single")}]

    def scored(**settings: object) -> dict[str, int]:
        return phases_of(settings_of_ppo(base, **settings))["score"]

    one = scored(rewards=terms[:1], reward_model=str(tmp_path / "single"))
    three = scored(rewards=terms[:1], reward_model=str(tmp_path / "several"))
    four = scored(rewards=terms, reward_model=str(tmp_path / "several"))
    assert one["base"] == three["base"] == four["base"]
    member_size = 4 * (16 * (160 + 160 + 160 + 448) + 160)
    assert three["adapters"] - one["adapters"] == 2 * member_size
    assert four["adapters"] - one["adapters"] == 3 * member_size


@pytest.mark.slow
def test_a_critic_of_its_own_and_full_training_hold_more(base: str) -> None:
    plain = phases_of(settings_of_ppo(base))["update"]
    own_critic = {"rollout_batch_size": 16, "max_tokens_per_micro_batch": 256, "value_adapter": True}
    own = phases_of(settings_of_ppo(base, ppo=own_critic))["update"]
    assert own["adapters"] > 1.9 * plain["adapters"]
    assert own["activations"] > 1.5 * plain["activations"]
    full = phases_of(settings_of_ppo(base, model={"train": "full"}))["update"]
    # Policy and reference are two models, and every weight has a gradient and two moments.
    assert full["base"] >= 2 * 4 * SMALL_PARAMETERS
    assert full["gradients"] >= 4 * SMALL_PARAMETERS and full["optimizer"] >= 8 * SMALL_PARAMETERS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "num_trained", "phases"),
    [
        (PretrainConfig(), 1_772_480, ["validate", "update"]),
        (RewardConfig(reward={"train": "frozen"}), 160, ["validate", "update"]),
        (RewardConfig(), 4 * adapter_size(16) + 160, ["validate", "update"]),
        (RewardConfig(reward={"ensemble": {"members": 3}}), 3 * (4 * adapter_size(16) + 160), ["validate", "update"]),
        (ProcessRewardConfig(), 4 * adapter_size(16) + 161, ["validate", "update"]),
        (ProcessRewardConfig(prm={"train": "full"}), TINYCHAT_PARAMETERS + 161, ["validate", "update"]),
        (DPOConfig(), 4 * adapter_size(16), ["reference", "validate", "update"]),
        (DPOConfig(loss="simpo"), 4 * adapter_size(16), ["validate", "update"]),
        (KTOConfig(), 4 * adapter_size(16), ["reference", "validate", "update"]),
        (GRPOConfig(), 4 * adapter_size(16), ["generate", "score", "reference", "update"]),
        (EvaluateConfig(models={"base": "tinychat"}), 0, ["generate", "reference"]),
    ],
    ids=["pretrain", "frozen_rm", "rm", "ensemble", "prm", "full_prm", "dpo", "simpo", "kto", "grpo", "eval"],
)
def test_every_recipe_has_its_phases(config: Config, num_trained: int, phases: list[str]) -> None:
    tracer = traced(config)
    assert [phase.name for phase in tracer.phases] == phases
    assert tracer.num_trained == num_trained
    assert all(phase.parts["base"] > 0 and phase.parts["activations"] > 0 for phase in tracer.phases)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["gradient_checkpointing", "load_in_4bit"])
def test_settings_that_save_memory_save_it(key: str) -> None:
    wide = {"data": {"max_length": 64}, "training": {"max_tokens_per_micro_batch": 1024}}
    (stage,) = planned_stages(SFTConfig(**wide, run={"dtype": "bf16"}))
    plain = stage.trace(Tracer()).phases[-1].parts
    saving = stage.changed(f"model.{key}", True).trace(Tracer()).phases[-1].parts
    part = "activations" if key == "gradient_checkpointing" else "base"
    assert saving[part] < 0.75 * plain[part]


@pytest.mark.slow
def test_rows_short_enough_to_be_attended_plainly_are_tried_where_they_take_more(base: str) -> None:
    wide = {"data": {"max_length": 1024}, "training": {"max_tokens_per_micro_batch": 2048}}
    (stage,) = planned_stages(small_sft(base, **wide))
    phases, _ = stage.phases(on_cpu=True)
    long, short = stage.trace(Tracer()), stage.trace(Tracer(longest_row=512))
    assert phases[-1].num_bytes == short.phases[-1].num_bytes > 1.5 * long.phases[-1].num_bytes
    assert stage.phases(on_cpu=False)[0][-1].num_bytes < phases[-1].num_bytes


# ---------------------------------------------------------------- stages of a pipeline


def test_stages_of_a_pipeline_start_from_one_another() -> None:
    stages = planned_stages(load_config(PipelineConfig, CONFIGS / "hh_gpt2.yaml"))
    assert [stage.name for stage in stages] == ["sft", "reward", "dpo", "ppo", "evaluate"]
    sft, reward, dpo, ppo, evaluate = stages
    adapter = LoRAConfig(r=8, target_modules=["c_attn", "c_proj"])
    assert sft.start.adapter is None and {one.start.shape.name for one in stages} == {"openai-community/gpt2"}
    assert reward.start.adapter == dpo.start.adapter == ppo.start.adapter == adapter
    assert [one.has_own_base for one in ppo.rewards] == [False]
    assert evaluate.start.adapter is None and [one.adapter for one in evaluate.others] == 3 * [adapter]
    own = load_config(PipelineConfig, CONFIGS / "demo.yaml", ["reward.backbone=tinychat", "ppo.model.train=full"])
    *_, ppo, evaluate = planned_stages(own)
    assert [(one.has_own_base, one.start.adapter is None) for one in ppo.rewards] == [(True, False)]
    assert [one.adapter is None for one in evaluate.others] == [False, False, True]
    assert [one.shape.name for one in evaluate.others] == ["tinychat", "tinychat", "tinychat after ppo"]


def test_pretraining_makes_the_base_of_the_others() -> None:
    stages = planned_stages(load_config(PipelineConfig, CONFIGS / "hh_cpu.yaml"))
    assert [stage.name for stage in stages] == ["pretrain", "sft", "reward", "dpo", "ppo", "evaluate"]
    assert {stage.start.shape.num_parameters for stage in stages} == {3_148_736}


# ---------------------------------------------------------------- verdict and advice


@pytest.mark.parametrize(
    ("num_bytes", "verdict"), [(8 * GB, "fits"), (9 * GB, "tight"), (10 * GB, "tight"), (10 * GB + 1, "does not fit")]
)
def test_a_verdict_allows_for_the_error_of_the_prediction(num_bytes: int, verdict: str) -> None:
    (stage,) = planned_stages(SFTConfig())
    planned = plan_of(stage, "update", num_bytes)
    assert planned.verdict(MemoryLimit(10 * GB, "here")) == verdict
    assert planned.verdict(None) == "no limit known"


def linear(tokens_per_byte: float, constant: int = 0) -> Callable[[Stage, Machine], StagePlan]:
    """A planner of a made-up world: so many bytes per token of a micro-batch, half of them when recomputed."""

    def plan(stage: Stage, machine: Machine) -> StagePlan:
        share = 0.5 if stage.setting("model.gradient_checkpointing") else 1.0
        tokens = stage.setting("training.max_tokens_per_micro_batch")
        return plan_of(stage, "update", constant + int(share * tokens * tokens_per_byte))

    return plan


def test_single_changes_that_are_enough_come_with_their_mildest_values() -> None:
    (stage,) = planned_stages(SFTConfig(training={"max_tokens_per_micro_batch": 16_384}))
    machine, plan = Machine("cpu", MemoryLimit(6_000, "here"), 0), linear(1.0)
    advice = advise(stage, plan(stage, machine), machine, plan)
    assert [(one.settings, one.num_bytes, one.is_enough) for one in advice] == [
        (("training.max_tokens_per_micro_batch=4096",), 4096, True)
    ]
    machine = replace(machine, limit=MemoryLimit(9_000, "here"))
    advice = advise(stage, plan(stage, machine), machine, plan)
    assert [one.settings[0] for one in advice] == [
        "training.max_tokens_per_micro_batch=8192",
        "model.gradient_checkpointing=true",
    ]


def test_where_no_single_change_is_enough_several_go_together() -> None:
    (stage,) = planned_stages(SFTConfig(training={"max_tokens_per_micro_batch": 16_384}))
    machine, plan = Machine("cpu", MemoryLimit(400, "here"), 0), linear(1.0)
    (advice,) = advise(stage, plan(stage, machine), machine, plan)
    assert advice.settings == ("training.max_tokens_per_micro_batch=512", "model.gradient_checkpointing=true")
    assert advice.is_enough and advice.num_bytes == 256
    plan = linear(1.0, constant=1000)
    (advice,) = advise(stage, plan(stage, machine), machine, plan)
    assert not advice.is_enough and advice.num_bytes == 1256


def test_a_base_held_otherwise_is_not_shared_with_a_reward_model() -> None:
    (stage,) = planned_stages(PPOConfig())
    assert [one.has_own_base for one in stage.rewards] == [False]
    assert [one.has_own_base for one in stage.changed("model.load_in_4bit", True).rewards] == [True]
    assert [one.has_own_base for one in stage.changed("run.dtype", "bf16").rewards] == [False]


def test_advice_names_keys_of_the_pipeline_and_only_what_matters_in_the_phase() -> None:
    *_, ppo, _ = planned_stages(load_config(PipelineConfig, CONFIGS / "qwen2.5_7b.yaml"))
    assert next(knob.key for knob in knobs(ppo, "generate")) == "generation.batch_size"
    assert "model.load_in_4bit" not in {knob.key for knob in knobs(ppo, "update")}  # it is on already
    machine = Machine("cuda", MemoryLimit(10, "here"), 0)

    def plan(stage: Stage, machine: Machine) -> StagePlan:
        return plan_of(stage, "generate", stage.setting("generation.batch_size"))

    advice = advise(ppo, plan(ppo, machine), machine, plan)
    assert advice[0].settings == ("ppo.generation.batch_size=8",)


@pytest.mark.slow
def test_advice_taken_is_a_config_that_fits(base: str) -> None:
    config = small_sft(base, training={"max_tokens_per_micro_batch": 4096})
    (stage,) = planned_stages(config)
    machine = Machine("cpu", None, 0)
    before = plan_stage(stage, machine).peak.needed_bytes
    machine = replace(machine, limit=MemoryLimit(int(0.6 * before), "here"))
    first = advise(stage, plan_stage(stage, machine), machine)[0]
    settings = [f"model.name_or_path={base}", "model.lora.r=4", "data.max_length=64", *first.settings]
    (again,) = planned_stages(load_config(SFTConfig, None, settings))
    assert plan_stage(again, machine).peak.needed_bytes == first.num_bytes <= 0.6 * before


# ---------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_says_what_it_takes_and_what_to_change(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = [f"model.name_or_path={base}", "data.max_length=64", "training.max_tokens_per_micro_batch=2048"]
    assert rlhf("plan", str(CONFIGS / "sft.yaml"), *small, "--device", "cpu") == 0
    told = capsys.readouterr().out
    assert f"{SMALL_PARAMETERS:,} parameters" in told and ": fits" in told and "  update" in told
    assert "change:" not in told
    assert rlhf("plan", "sft", *small, "--device", "cpu", "--memory-gb", "0.1") == 1
    told = capsys.readouterr().out
    assert ": does not fit" in told and "take a smaller base, or more memory" in told


def test_the_command_as_json_and_for_a_device_that_is_not_here(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = [f"model.name_or_path={base}", "data.max_length=64", "training.max_tokens_per_micro_batch=256"]
    arguments = ["--device", "cuda", "--memory-gb", "24", "--json"]
    assert rlhf("plan", "sft", *small, *arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["machine"]["limit"]["num_bytes"] == 24 * GB and plan["recipe"] == "sft"
    (stage,) = plan["stages"]
    assert stage["verdict"] == "fits" and stage["phases"][-1]["parts"]["framework"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
@pytest.mark.slow
def test_an_absent_device_has_no_limit(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = [f"model.name_or_path={base}", "data.max_length=64", "training.max_tokens_per_micro_batch=256"]
    assert rlhf("plan", "sft", *small, "--device", "cuda") == 0
    assert "no cuda device: say how much it has with --memory-gb" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "no recipe"),
        (["sft", "--device", "tpu"], "device must be"),
        (["sft", "data.max_lenght=3"], "max_length"),
        (["dpo", "policy=absent"], "there is no run 'absent'"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert rlhf("plan", *arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("file", ["qwen2.5_7b", "llama3_8b", "mistral_7b", "tinyllama_1b"])
def test_recipes_for_large_models_fit_their_gpu(file: str) -> None:
    config = load_config(PipelineConfig, CONFIGS / f"{file}.yaml")
    limit = MemoryLimit((16 if file == "tinyllama_1b" else 24) * GB, "the card that the file names")
    machine = Machine.of("cuda", limit.num_bytes / GB)
    for stage in planned_stages(config):
        planned = plan_stage(stage, machine)
        assert planned.verdict(limit) in ("fits", "tight"), (stage.name, planned.peak)
