"""What is to happen when a configuration key is changed, for every key there is (checklist C9).

The keys come from the classes; `cases` looks each of them up here, and a key that is missing fails the tests. A value
is what stands on the command line. Names in braces stand for files and models that the tests make, and settings that
begin with a dot belong to the section of the key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from pydantic import BaseModel

from rlhf.algo.kl import KLConfig
from rlhf.algo.preference_loss import PREFERENCE_LOSSES
from rlhf.algo.trainer import OptimizerConfig
from rlhf.data.data_config import DataConfig, InstructionDataConfig, PromptDataConfig, SourceConfig, StepDataConfig
from rlhf.data.tinychat.labeller import LabellerConfig
from rlhf.eval.benchmarks import HarnessConfig
from rlhf.eval.hacking import HackingConfig
from rlhf.eval.suites import SuiteConfig
from rlhf.infra.chat_api import ChatApiConfig
from rlhf.infra.chat_budget import BudgetConfig
from rlhf.infra.config_errors import sections_in
from rlhf.infra.experiment import RunConfig
from rlhf.models.backbone import ModelConfig
from rlhf.models.decoding import GenerationConfig
from rlhf.models.ensemble import EnsembleConfig
from rlhf.models.lora import LoRAConfig
from rlhf.models.process_reward_model import ProcessRewardModelConfig
from rlhf.models.reward_model import RewardModelConfig
from rlhf.recipes.ablation_config import AblationConfig
from rlhf.recipes.best_of_n_config import BestOfNConfig, SelectionSettings
from rlhf.recipes.dpo import DPOConfig, PreferenceLossConfig
from rlhf.recipes.evaluate_config import EvaluateConfig
from rlhf.recipes.grpo_config import GRPOKLConfig, GRPOSettings, GRPOShapingConfig
from rlhf.recipes.judge_compare import CompareConfig
from rlhf.recipes.judge_validate import ValidateConfig
from rlhf.recipes.judging import (
    ColumnJudgeConfig,
    FunctionJudgeConfig,
    LengthJudgeConfig,
    LLMJudgeConfig,
    NamedJudge,
    PairFunctionJudgeConfig,
    RewardModelJudgeConfig,
)
from rlhf.recipes.kto import KTOConfig
from rlhf.recipes.online_config import SamplingConfig
from rlhf.recipes.online_dpo_config import OnlineDPOConfig, RefreshConfig, RoundSettings
from rlhf.recipes.overoptimize import CurveConfig, OveroptimizeConfig
from rlhf.recipes.pairs_config import ComparisonSettings, PairsConfig, PairSettings
from rlhf.recipes.pipeline import WorldConfig
from rlhf.recipes.ppo_config import PPOSettings
from rlhf.recipes.pretrain import ArchitectureConfig, PretrainConfig, PretrainDataConfig
from rlhf.recipes.prm import ProcessRewardConfig
from rlhf.recipes.prm_label_config import SamplingSettings, StepLabelConfig
from rlhf.recipes.resume import CONFIGS
from rlhf.recipes.reward import RewardConfig
from rlhf.recipes.reward_report import RewardReportConfig
from rlhf.recipes.sft import SFTConfig
from rlhf.recipes.supervised import TrainingConfig
from rlhf.rewards.combination import CombinationConfig
from rlhf.rewards.protocol import RewardTermConfig
from rlhf.rewards.shaping import ShapingConfig


@dataclass(frozen=True)
class Changes:
    """A run with the key at this value leaves something else behind than one without, both with the settings around."""

    value: str
    around: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refused:
    """Setting the key to this value is an error whose text holds the words."""

    value: str
    words: str
    around: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fails:
    """A run with the key at this value is refused when it starts, where the machine or the data are known."""

    value: str
    words: str
    around: tuple[str, ...] = ()


Case = Changes | Refused | Fails
IDLE = "has no effect here because"
# A run of well under a second of each recipe, on which the cases build.
BASE = {
    "pretrain": ["data.min_length=1", "training.per_device_train_batch_size=6", "optimizer.learning_rate=0.01",
                 "architecture.hidden_size=24", "architecture.num_hidden_layers=1", "architecture.vocab_size=300",
                 "architecture.num_key_value_heads=2"],
    "sft": ["model.name_or_path={base}", "data.min_length=1", "training.per_device_train_batch_size=6",
            "optimizer.learning_rate=0.01"],
    "reward": ["backbone={base}", "data.min_length=1", "training.per_device_train_batch_size=6",
               "optimizer.learning_rate=0.01"],
    "rm-report": ["reward_model={reward}", "data.min_length=1", "num_pairs=20", "num_planted=6"],
    "prm": ["backbone={base}", "data.train_files={steps}", "data.separator=is",
            "training.per_device_train_batch_size=6", "optimizer.learning_rate=0.01"],
    "prm_label": ["policy={base}", "rewards=[{{name: target_string, arguments: {{text: red}}}}]",
                  "generation.max_new_tokens=6", "sampling.split=' the | a '", "sampling.num_solutions=2",
                  "sampling.num_completions=2", "sampling.questions_at_once=5"],
    "dpo": ["policy={base}", "data.min_length=1", "training.per_device_train_batch_size=6",
            "optimizer.learning_rate=0.01"],
    "kto": ["policy={base}", "data.min_length=1", "training.per_device_train_batch_size=12",
            "optimizer.learning_rate=0.01"],
    "ppo": ["policy={base}", "rewards=[{{name: target_string, arguments: {{text: red}}}}]", "ppo.num_iterations=2",
            "ppo.rollout_batch_size=8", "ppo.num_ppo_epochs=2", "generation.max_new_tokens=6",
            "optimizer.learning_rate=0.01"],
    "grpo": ["policy={base}", "rewards=[{{name: target_string, arguments: {{text: red}}}}]", "grpo.num_iterations=2",
             "grpo.num_prompts=4", "grpo.num_generations=4", "grpo.num_epochs=2", "generation.max_new_tokens=6",
             "optimizer.learning_rate=0.01"],
    "best_of_n": ["policy={base}", "rewards=[{{name: target_string, arguments: {{text: red}}}}]",
                  "generation.max_new_tokens=6", "best_of_n.num_answers=4", "best_of_n.prompts_at_once=8"],
    "pairs": ["policy={base}", "rewards=[{{name: target_string, arguments: {{text: red}}}}]", "pairs.num_prompts=6",
              "generation.max_new_tokens=6", "generation.batch_size=8"],
    "online_dpo": ["policy={base}", "rewards=[{{name: target_string, arguments: {{text: red}}}}]",
                   "rounds.num_rounds=2", "rounds.num_prompts=18", "generation.max_new_tokens=6",
                   "training.num_train_epochs=2", "training.per_device_train_batch_size=4",
                   "optimizer.learning_rate=0.01"],
    "eval": ["models={{base: {base}, tuned: {policy}}}", "generation.max_new_tokens=6", "suite.num_heldout=8"],
    "judge_compare": ["first={answers}", "second={other_answers}", "judges=[{{kind: length}}]"],
    "judge_validate": ["labels={labelled}", "judges=[{{kind: length}}]"],
    "ablate": ["policy={base}", "reward_model={reward}", "methods=[dpo]", "seeds=[0]", "lengths={{dpo: 1}}",
               "pairs.train_files={pairs}", "pairs.min_length=1", "generation.max_new_tokens=6",
               "evaluate.data.train_files={pairs}", "evaluate.suite.num_heldout=8"],
    "overoptimize": ["curves=[{{sources: '{points}', law: rl}}]", "num_resamples=200"],
}  # fmt: skip
SHARED = ["run.name=run", "run.output_dir={runs}", "run.device=cpu", "run.num_threads=1", "data.train_files={pairs}"]
FULL, ALL_TOKENS = ("model.train=full",), ("data.train_on=every_token",)
GREEDY = (".temperature=0", "sampling.num_solutions=1", "sampling.num_completions=1")
STEP_SPLITS = ("data.train_files={step_splits}",)
TWO_SPLITS, TINYCHAT = ("data.train_files={splits}",), ("data.train_files=[]",)
UNPACKED, PACKED = ("packing=false",), ("packing=true", "data.max_length=24")
UNVALIDATED = ("data.validation_fraction=0",)
TARGET = "{{name: target_string, arguments: {{text: red}}}}"
LENGTH = "{{name: length_penalty, arguments: {{target_words: 2}}}}"
RULES_ONLY, TWO_RULES = (f"rewards=[{TARGET}]",), (f"rewards=[{TARGET}, {LENGTH}]",)
SMALL_WORLD = (*TINYCHAT, "suite.num_ood=1", "suite.num_probes=1")
# Suites bring their questions along: what the other cases say of data and prompts is taken back.
SUITES = ("data.train_files=null", "suite.num_heldout=null", "suites=[preferences:{more}]")
HARNESS = ("tax=[lm-eval:nothing]",)
MODEL_REWARD = ("rewards=[{{name: model}}]", "reward_model={reward}")
GATED = (".rule=gate", ".gate=target_string")
ENSEMBLE_REWARD = ("rewards=[{{name: model}}]", "reward_model={ensemble}")
PENALISED = ("rewards=[{{name: model, rule: penalised}}]", "reward_model={ensemble}")
RULES_WITHOUT_ARGUMENTS = ("rewards=[{{name: keyword_sentiment}}]",)
READS_NO_ROWS = ("judge_compare", "judge_validate", "ablate", "overoptimize")  # of the `data` section in SHARED
LENGTH_JUDGE, COLUMN_JUDGE = ("judges=[{{kind: length}}]",), ("judges=[{{kind: column, column: finished}}]",)
TWO_JUDGES = ("judges=[{{kind: length}}, {{kind: length, prefer: shorter}}]",)
REWARD_JUDGE = ("judges=[{{kind: reward_model, source: {reward}}}]",)
FUNCTION_JUDGE = ("judges=[{{kind: function, function: '{functions}:one'}}]",)
PAIR_JUDGE = ("judges=[{{kind: pair_function, function: '{functions}:leaning'}}]",)


def llm_judge(model: str = "plain", more: str = "") -> tuple[str, ...]:
    """A judge behind the tests' server, whose model name says what it does (`chat_server.TellTale`)."""
    return (f"judges=[{{{{kind: llm, base_url: '{{server}}', model: {model}, backoff_seconds: 0.01{more}}}}}]",)


PRICES = "budget: {{price_per_million_prompt_tokens: 3, price_per_million_completion_tokens: 9}}"
PRICED = llm_judge(more=f", {PRICES}")
PROCESS_REWARD = ("rewards=[{{name: process}}]", "process_model={process}")
MEASURED = (f"measured_by=[{TARGET}]",)
KL_MEASURED = ("policy={policy}", "reference={base}")
IDLE_REWARDS = "'rewards' has no effect here because `judges` say which answer is better"
NEIGHBOURS = ("rewards=null", "pairs.choose=neighbours", "pairs.cut_off=as_it_is")
NEIGHBOURS_OF_ROUNDS = ("rewards=null", "rounds.choose=neighbours", "rounds.cut_off=as_it_is")
# A section that is not there by itself, and what makes it.
REFRESHED = (
    "rewards=null",
    *LENGTH_JUDGE,
    "rounds.num_rounds=1",
    "rounds.cut_off=as_it_is",
    "refresh.num_prompts=8",
    "refresh.training.per_device_train_batch_size=6",
    "refresh.optimizer.learning_rate=0.01",
)
AROUND = {("online_dpo", "refresh."): REFRESHED}
# The same judges, made of the same classes by the same function: their own keys are tried in `judge_compare`.
ONLY_IN_JUDGE_COMPARE = {("pairs", "judges.0."), ("online_dpo", "judges.0.")}
# Sections that an ablation hands on as they are; `test_ablation.py` sees them arrive.
OF_AN_ABLATIONS_PARTS = ("run.", "model.", "generation.", "pairs.", "prompts.", "evaluate.")
ONE_UPDATE = ("ppo.num_ppo_epochs=1", "ppo.num_mini_batches=1")
ONE_UPDATE_OF_GROUPS = ("grpo.num_epochs=1", "grpo.num_mini_batches=1")

CASES: dict[type[BaseModel], dict[str, list[Case]]] = {
    RunConfig: {
        "name": [Changes("another")],
        "output_dir": [Changes("{elsewhere}")],
        "seed": [Changes("1")],
        "device": [Fails("{absent_device}", "{absent_device}")],
        "dtype": [Changes("bf16")],
        "num_threads": [Changes("2")],
        "max_minutes": [Changes("1e-9")],
        "save_every_steps": [Changes("1")],
        "keep_checkpoints": [Changes("1", (".save_every_steps=1",))],
        "wandb": [Fails("true", "wandb")],
        "overwrite": [Changes("true", (".name=taken",)), Refused("true", IDLE, (".name=null",))],
        "profile": [Changes("true", (".profile_steps=[1, 1]",))],
        "profile_steps": [Changes("[1, 1]", (".profile=true",)), Refused("[2, 2]", IDLE)],
    },
    ModelConfig: {
        "name_or_path": [Refused("{other}", IDLE)],
        "tokenizer": [Changes("{tokenizer}")],
        "random_init": [Refused("true", "train it first")],
        "train": [Changes("full")],
        "attn_implementation": [Changes("sdpa")],
        "load_in_4bit": [Changes("true"), Refused("true", "4-bit codes", FULL)],
        "bnb_4bit_quant_type": [Changes("fp4", (".load_in_4bit=true",)), Refused("fp4", IDLE)],
        "bnb_4bit_use_double_quant": [Changes("false", (".load_in_4bit=true",)), Refused("false", IDLE)],
        "gradient_checkpointing": [Changes("true")],
    },
    LoRAConfig: {
        "r": [Changes("3"), Refused("3", IDLE, FULL)],
        "lora_alpha": [Changes("5"), Refused("5", IDLE, FULL)],
        "lora_dropout": [Changes("0.5"), Refused("0.5", IDLE, FULL)],
        "target_modules": [Changes("[q_proj]"), Refused("[q_proj]", IDLE, FULL)],
        "use_rslora": [Changes("true"), Refused("true", IDLE, FULL)],
    },
    SourceConfig: {
        "name": [
            Changes("toy/hub", (*TINYCHAT, ".max_samples=8")),
            Fails("no/where", "no/where", TINYCHAT),
            Refused("no/where", IDLE),
        ],
        "train_files": [Changes("{more}")],
        "validation_files": [Changes("{more}")],
        "split": [Changes("test", TWO_SPLITS), Refused("test", IDLE), Refused("test", IDLE, TINYCHAT)],
        "validation_split": [
            Changes("test", TWO_SPLITS),
            Refused("test", IDLE, (".validation_files={more}",)),
            Refused("test", IDLE, TINYCHAT),
        ],
        "data_dir": [Changes("part", (".train_files=toy/hub",)), Refused("part", IDLE)],
        "columns": [Changes("{{prompt: question}}", (".train_files={renamed}",)), Refused("{{a: b}}", IDLE, TINYCHAT)],
        "where": [
            Changes("{{subset: [even, other]}}"),
            Fails("{{subset: none}}", "asks for subset in ['none']"),
            Fails("{{absent: 1}}", "has no value at all"),
        ],
        "validation_fraction": [
            Changes("0.5"),
            Refused("0.5", IDLE, (".validation_files={more}",)),
            Refused("0.5", IDLE, (*TWO_SPLITS, ".validation_split=test")),
            Refused("0.5", IDLE, TINYCHAT),
        ],
        "split_seed": [Changes("1"), Refused("1", IDLE, (".validation_files={more}",))],
        "max_samples": [Changes("5")],
        "max_validation_samples": [Changes("1", (".validation_fraction=0.5",)), Refused("1", IDLE, UNVALIDATED)],
        "system_prompt": [Changes("big")],
        "hh_as_messages": [Changes("true", (".train_files={hh}",)), Refused("true", IDLE, TINYCHAT)],
    },
    DataConfig: {
        "min_length": [Changes("9"), Refused("600", "no row is kept")],
        "max_length": [Changes("10", UNVALIDATED)],
        "overlong": [Changes("truncate_prompt", (".max_length=10", *UNVALIDATED))],
    },
    StepDataConfig: {
        "max_length": [Changes("8", UNVALIDATED)],
        "overlong": [Changes("drop", (".max_length=13", *UNVALIDATED))],
        "separator": [Changes("good"), Fails('"\\n"', "makes no token of the separator")],
        "neutral": [Changes("wrong"), Changes("ignore"), Refused("wrong", IDLE, TINYCHAT)],
        "soft_labels": [Changes("harden"), Refused("harden", IDLE, TINYCHAT)],
    },
    InstructionDataConfig: {"train_on": [Changes("every_token"), Changes("last", (".train_files={chats}",))]},
    PretrainDataConfig: {"train_on": [Refused("last", "every_token")]},
    PromptDataConfig: {
        "max_prompt_length": [Changes("3", UNVALIDATED)],
        "families": [Changes("[facts]", (*TINYCHAT, ".max_samples=8")), Refused("[facts]", IDLE)],
    },
    SelectionSettings: {
        "num_answers": [Changes("3"), Refused("1", "greater than or equal to 2")],
        "keep": [Changes("2"), Refused("4", "no choice; keep fewer")],
        "selection": [Changes("overall")],
        "min_score": [Changes("0.5")],
        "keep_unfinished": [Changes("true")],
        "min_gap": [Changes("1")],
        "prompts_at_once": [Changes("3")],
    },
    SamplingSettings: {
        "num_solutions": [Changes("3")],
        "num_completions": [Changes("3")],
        "split": [Changes("red"), Fails("(", "no regular expression")],
        "right_from": [Changes("-1")],
        "estimate": [Changes("hard")],
        "questions_at_once": [Changes("3")],
    },
    TrainingConfig: {
        "num_train_epochs": [Changes("2")],
        "max_steps": [Changes("2")],
        "per_device_train_batch_size": [Changes("5")],
        "gradient_accumulation_steps": [Changes("2")],
        "max_tokens_per_micro_batch": [
            Changes("20", UNPACKED),
            Changes("48", PACKED),
            Refused("20", IDLE, PACKED),
        ],
        "eval_steps": [Changes("1"), Refused("1", IDLE, UNVALIDATED)],
        "early_stopping_patience": [
            Changes("1", (".eval_steps=1", "optimizer.learning_rate=1e-30")),
            Refused("1", IDLE, UNVALIDATED),
        ],
        "logging_steps": [Changes("2")],
    },
    OptimizerConfig: {
        "learning_rate": [Changes("0.003")],
        "adam_beta1": [Changes("0.5")],
        "adam_beta2": [Changes("0.9")],
        "adam_epsilon": [Changes("0.01")],
        "weight_decay": [Changes("0.5")],
        "max_grad_norm": [Changes("0.0001")],
        "lr_scheduler_type": [Changes("cosine")],
        "warmup_ratio": [Changes("0.5"), Refused("0.5", IDLE, (".lr_scheduler_type=constant",))],
        "max_nonfinite_steps": [Fails("1", "1 optimizer steps in a row", (".learning_rate=1e30",))],
    },
    GenerationConfig: {
        "max_new_tokens": [Changes("3")],
        "temperature": [Changes("0.7")],
        "top_p": [Changes("0.5"), Refused("0.5", IDLE, (".temperature=0",))],
        "top_k": [Changes("3"), Refused("3", IDLE, (".temperature=0",))],
        "stop": [Changes("[cat, dog, red, one, two]")],
        "merge_adapter": [
            Changes("false"),
            Refused("false", IDLE, ("run.dtype=bf16",)),
            Refused("false", IDLE, ("model.load_in_4bit=true",)),
        ],
        "batch_size": [Changes("3")],
    },
    KLConfig: {
        "coefficient": [Changes("0.5")],
        "estimator": [Changes("k3"), Refused("k3", IDLE, (".coefficient=0",))],
        "controller": [Changes("adaptive"), Refused("adaptive", IDLE, (".coefficient=0",))],
        "target": [Changes("1e-9", (".controller=adaptive",)), Refused("1", IDLE)],
        "horizon": [Changes("100", (".controller=adaptive",)), Refused("100", IDLE)],
    },
    ShapingConfig: {
        "normalise": [Changes("false")],
        "clip": [Changes("0.1")],
        "missing_eos_penalty": [Changes("0.5")],
        "length_budget": [
            Changes("2"),
            Refused("2", IDLE, (".length_penalty=0",)),
            Refused("6", IDLE, ("generation.max_new_tokens=6",)),
        ],
        "length_penalty": [Changes("0.5", (".length_budget=2",)), Refused("0.5", IDLE)],
        "overlong_buffer": [
            Changes("2"),
            Refused("2", IDLE, (".overlong_penalty=0",)),
            Refused("9", "no answer is longer than", ("generation.max_new_tokens=6",)),
        ],
        "overlong_penalty": [Changes("0.5", (".overlong_buffer=2",)), Refused("0.5", IDLE)],
        "repetition_penalty": [Changes("5", ("generation.temperature=0.001", "generation.max_new_tokens=12"))],
        "refusal_penalty": [Changes("5", ("policy={refuser}",))],
    },
    HackingConfig: {
        "every": [Changes("1"), Changes("null")],
        "action": [Changes("rollback"), Refused("stop", IDLE, (".every=null",))],
        "num_held_out": [Changes("1", ("data.validation_fraction=0.5",)), Refused("8", IDLE, (".every=null",))],
        "length": [Changes("0.1"), Changes("null"), Refused("0.1", IDLE, (".every=null",))],
        "repetition": [Changes("0.3"), Refused("0.3", IDLE, (".every=null",))],
        "formatting": [Changes("2"), Refused("2", IDLE, (".every=null",))],
        "flattery": [Changes("0.3"), Refused("0.3", IDLE, (".every=null",))],
        "refusal": [Changes("0.3"), Refused("0.3", IDLE, (".every=null",))],
        "entropy": [Changes("0.5"), Refused("0.5", IDLE, (".every=null",))],
        "kl": [Changes("5"), Refused("5", IDLE, (".every=null",))],
        "held_out_gap": [Changes("1"), Refused("1", IDLE, (".every=null",))],
        "disagreement": [Changes("2"), Refused("2", IDLE, (".every=null",))],
        "gold": [Changes("0.1"), Refused("0.1", IDLE, (".every=null",))],
    },
    GRPOShapingConfig: {"normalise": [Changes("true")]},
    GRPOKLConfig: {
        "estimator": [
            Changes("k2"),
            Changes("k2", (".place=reward",)),
            Refused("k1", "zero on average"),
            Refused("k2", IDLE, (".coefficient=0",)),
        ],
        "place": [Changes("reward"), Refused("reward", IDLE, (".coefficient=0",))],
    },
    CombinationConfig: {
        "rule": [
            Changes("lowest", TWO_RULES),
            Refused("lowest", "needs several rewards", RULES_ONLY),
            Refused("gate", "needs combination.gate", TWO_RULES),
        ],
        "gate": [
            Changes("length_penalty", (*TWO_RULES, ".rule=gate", ".gate=target_string", ".threshold=0.5")),
            Refused("harmless", "are called target_string, length_penalty", (*TWO_RULES, *GATED)),
            Refused("target_string", IDLE),
        ],
        "threshold": [Changes("0.5", (*TWO_RULES, *GATED)), Refused("0.5", IDLE)],
        "always": [
            Changes("{{subset: even}}", (*TWO_RULES, *GATED)),
            Fails("{{absent: 1}}", "the column 'absent'", (*TWO_RULES, *GATED)),
            Refused("{{subset: even}}", IDLE),
        ],
    },
    RewardTermConfig: {
        "name": [
            Changes("keyword_sentiment", ("rewards=[{{name: phrase_endings}}]",)),
            Refused("a:b", "takes no arguments"),
        ],
        "weight": [Changes("3", TWO_RULES)],
        "arguments": [
            Changes("{{text: green}}", RULES_ONLY),
            Refused("{{text: red}}", "takes no arguments", MODEL_REWARD),
        ],
        "model": [
            Changes("{other_reward}", ("rewards=[{{name: helpful, model: {reward}}}]",)),
            Refused("{other_reward}", "no term of `rewards` is called model", MODEL_REWARD),
            Refused("{reward}", "names another", ("rewards=[{{name: 'math:sqrt'}}]",)),
            Fails("{reward}", "is a rule", RULES_WITHOUT_ARGUMENTS),
        ],
        "rule": [
            Changes("worst", ENSEMBLE_REWARD),
            Fails("worst", "is a single reward model", MODEL_REWARD),
            Refused("worst", "has no members"),
        ],
        "penalty": [
            Changes("9", PENALISED),
            Fails("9", "is mean", ENSEMBLE_REWARD),
            Refused("9", "its rule is worst", ("rewards=[{{name: model, rule: worst}}]",)),
            Refused("9", "has no members"),
        ],
    },
    PPOSettings: {
        "num_iterations": [Changes("3")],
        "rollout_batch_size": [Changes("6")],
        "num_ppo_epochs": [Changes("3")],
        "num_mini_batches": [Changes("2"), Refused("9", "a rollout has only 8 rows")],
        "max_tokens_per_micro_batch": [Changes("30")],
        "clip_range": [Changes("0.001"), Refused("0.1", IDLE, ONE_UPDATE)],
        "clip_range_high": [Changes("0.001"), Refused("0.1", IDLE, ONE_UPDATE)],
        "clip_range_value": [
            Changes("0.001"),
            Refused("0.1", IDLE, (".vf_coef=0",)),
            Refused("0.1", IDLE, ONE_UPDATE),
        ],
        "vf_coef": [Changes("1")],
        "entropy_coef": [Changes("0.1")],
        "gamma": [Changes("0.5")],
        "lam": [Changes("0.5")],
        "whiten_advantages": [Changes("false")],
        "whiten_rewards": [Changes("true")],
        "target_kl": [Changes("1e-9", (".num_ppo_epochs=3",)), Refused("0.1", IDLE, ONE_UPDATE)],
        "bootstrap_truncated": [Changes("true"), Refused("true", IDLE, (".vf_coef=0",))],
        "recompute_logprobs": [Changes("true")],
        "value_head": [Changes("mlp"), Refused("mlp", IDLE, (".vf_coef=0",))],
        "value_adapter": [Changes("true"), Refused("true", IDLE, (".vf_coef=0",)), Refused("true", IDLE, FULL)],
        "save_every_updates": [Changes("1", ("run.keep_checkpoints=9",)), Refused("2", IDLE)],
    },
    ProcessRewardModelConfig: {"train": [Changes("full"), Changes("frozen")]},
    GRPOSettings: {
        "num_iterations": [Changes("3")],
        "num_prompts": [Changes("3")],
        "num_generations": [Changes("3"), Refused("1", "use at least 2")],
        "num_epochs": [Changes("3")],
        "num_mini_batches": [Changes("2"), Refused("17", "a rollout has only 16 rows")],
        "max_tokens_per_micro_batch": [Changes("30")],
        "advantage": [Changes("leave_one_out"), Changes("group_centred")],
        "loss_mean": [Changes("token_mean"), Changes("constant_length")],
        "max_sampling_rounds": [Changes("3")],
        "clip_range": [Changes("0.001"), Refused("0.1", IDLE, ONE_UPDATE_OF_GROUPS)],
        "clip_range_high": [Changes("0.001"), Refused("0.1", IDLE, ONE_UPDATE_OF_GROUPS)],
        "entropy_coef": [Changes("0.1")],
        "target_kl": [Changes("1e-9"), Refused("0.1", IDLE, ONE_UPDATE_OF_GROUPS)],
        "recompute_logprobs": [Changes("true")],
        "save_every_updates": [Changes("1", ("run.keep_checkpoints=9",)), Refused("2", IDLE)],
    },
    RewardModelConfig: {
        "pooling": [Changes("mean")],
        "suffix": [Changes("big")],
        "train": [Changes("full"), Changes("frozen")],
    },
    EnsembleConfig: {
        "members": [
            Changes("3"),
            Changes("2", ("reward.train=frozen",)),
            Refused("2", "a base of its own", ("reward.train=full",)),
        ],
        "rule": [Changes("worst", (".members=2",)), Refused("worst", IDLE)],
        "penalty": [
            Changes("9", (".members=2", ".rule=penalised")),
            Refused("9", IDLE, (".members=2",)),
            Refused("9", IDLE),
        ],
    },
    ArchitectureConfig: {
        "hidden_size": [Changes("48"), Refused("25", "must be a multiple")],
        "num_hidden_layers": [Changes("2")],
        "num_attention_heads": [Changes("2")],
        "num_key_value_heads": [Changes("1")],
        "intermediate_size": [Changes("32")],
        "max_position_embeddings": [Changes("1024"), Refused("16", "more than the context")],
        "vocab_size": [Changes("301"), Refused("301", IDLE, (".vocab_size=null", ".tokenizer={base}"))],
        "tokenizer": [Changes("{base}", (".vocab_size=null",))],
        "attn_implementation": [Changes("eager")],
    },
    SuiteConfig: {
        "num_heldout": [Changes("4", ("data.validation_fraction=0.5",))],
        "num_ood": [Changes("2", SMALL_WORLD), Refused("2", IDLE)],
        "num_probes": [Changes("2", SMALL_WORLD), Refused("2", IDLE)],
        "seed": [Changes("1", SMALL_WORLD), Refused("1", IDLE)],
    },
    LabellerConfig: {
        "temperature": [Changes("5")],
        "label_noise": [Changes("0.45")],
        "longer_bonus": [Changes("1")],
        "flattery_bonus": [Changes("1")],
        "min_gap": [Changes("0.5")],
    },
    WorldConfig: {
        "num_pairs": [Changes("41")],
        "num_validation_pairs": [Changes("11")],
        "num_prompts": [Changes("11")],
    },
    PretrainConfig: {"packing": [Changes("false")]},
    SFTConfig: {"packing": [Changes("true", ("data.max_length=24",))]},
    RewardConfig: {
        "backbone": [Changes("{other}")],
        "use_margin": [Changes("false"), Refused("false", IDLE, TINYCHAT)],
    },
    StepLabelConfig: {
        "policy": [Changes("{other}")],
        "rewards": [Changes("[{{name: length_penalty, arguments: {{target_words: 2}}}}]")],
        "use_cache": [Changes("false")],
    },
    BestOfNConfig: {
        "policy": [Changes("{other}")],
        "reward_model": [Changes("{other_reward}", MODEL_REWARD), Refused("{reward}", IDLE)],
        "process_model": [Changes("{other_process}", PROCESS_REWARD), Refused("{process}", IDLE)],
        "rewards": [Changes("[{{name: length_penalty, arguments: {{target_words: 2}}}}]")],
        "measured_by": [Changes("[{{name: length_penalty, arguments: {{target_words: 2}}}}]")],
        "use_cache": [Changes("false")],
    },
    ProcessRewardConfig: {"backbone": [Changes("{other}")]},
    DPOConfig: {
        "policy": [Changes("{other}")],
        "reference": [Changes("{other}"), Refused("{other}", IDLE, ("loss=orpo",))],
    },
    PreferenceLossConfig: {
        "loss": [
            *(Changes(name) for name in PREFERENCE_LOSSES if name != "sigmoid"),
            Refused("dpo", "sigmoid is DPO"),
            Refused("kto", "a recipe of its own, `rlhf kto`"),
        ],
        "beta": [Changes("0.5"), *(Changes("0.5", (f"loss={name}",)) for name in PREFERENCE_LOSSES)],
        "label_smoothing": [
            Changes("0.3", ("loss=cdpo",)),
            Changes("0.3", ("loss=robust",)),
            Refused("0.3", IDLE),
            Refused("0.3", IDLE, ("loss=ipo",)),
            Refused("0.5", "less than 0.5", ("loss=robust",)),
        ],
        "simpo_gamma": [Changes("0.3", ("loss=simpo",)), Refused("0.3", IDLE), Refused("0.3", IDLE, ("loss=orpo",))],
    },
    KTOConfig: {
        "policy": [Changes("{other}")],
        "beta": [Changes("0.5")],
        "desirable_weight": [Changes("2")],
        "undesirable_weight": [Changes("2")],
    },
    SamplingConfig: {
        "policy": [Changes("{other}")],
        "process_model": [Changes("{other_process}", PROCESS_REWARD), Refused("{process}", IDLE)],
        "reward_model": [Changes("{other_reward}", MODEL_REWARD), Refused("{reward}", IDLE)],
        "rewards": [Changes("[{{name: length_penalty, arguments: {{target_words: 2}}}}]")],
    },
    NamedJudge: {
        "name": [Changes("another", LENGTH_JUDGE)],
        "kind": [Fails("gold", "prompts of the built-in world only", LENGTH_JUDGE)],
    },
    LengthJudgeConfig: {"prefer": [Changes("shorter", LENGTH_JUDGE)]},
    ColumnJudgeConfig: {"column": [Changes("refused", COLUMN_JUDGE)]},
    RewardModelJudgeConfig: {
        "source": [Changes("{other_reward}", REWARD_JUDGE)],
        "prompt_template": [
            Changes("red {{prompt}} green", REWARD_JUDGE),
            Refused("red", "write {prompt} where", REWARD_JUDGE),
        ],
    },
    FunctionJudgeConfig: {"function": [Changes("{functions}:two", FUNCTION_JUDGE)]},
    PairFunctionJudgeConfig: {"function": [Changes("{functions}:front", PAIR_JUDGE)]},
    LLMJudgeConfig: {
        "unparsable_retries": [Changes("0", llm_judge("prose"))],
        "instructions": [Changes("{instructions}", llm_judge()), Refused("no/where", "no such file", llm_judge())],
        "use_cache": [Changes("false", llm_judge())],
    },
    ChatApiConfig: {
        "base_url": [Changes("{server}/deeper", llm_judge()), Refused("ftp://h", "an address like", llm_judge())],
        "model": [Changes("another", llm_judge())],
        "api_key_env": [Changes("{key_variable}", llm_judge()), Refused("a-key", "NAME of an env", llm_judge())],
        "temperature": [Changes("1", llm_judge()), Changes("null", llm_judge())],
        "max_tokens": [Changes("7", llm_judge())],
        "max_tokens_key": [Changes("max_completion_tokens", llm_judge())],
        "extra_body": [Changes("{{top_p: 0.5}}", llm_judge())],
        "concurrency": [Changes("1", llm_judge("crowd"))],
        "requests_per_minute": [Changes("900", llm_judge("clock"))],
        "timeout_seconds": [Fails("0.05", "no reply within 0.05 s", llm_judge("slow", ", max_retries: 0"))],
        "max_retries": [Fails("0", "failed 1 times", llm_judge("flaky"))],
        "backoff_seconds": [Changes("3", llm_judge("patience", ", concurrency: 64"))],
    },
    BudgetConfig: {
        "max_requests": [Fails("1", "the budget of 1 requests is spent", llm_judge())],
        "max_tokens": [Fails("10", "the budget of 10 tokens allows no", llm_judge())],
        "max_cost": [
            Fails("1e-9", "the budget of 1e-09 allows no", PRICED),
            Refused("1", "max_cost needs the prices", llm_judge()),
        ],
        "price_per_million_prompt_tokens": [Changes("5", PRICED)],
        "price_per_million_completion_tokens": [Changes("5", PRICED)],
    },
    CompareConfig: {
        "first": [Changes("{other_answers}")],
        "second": [Changes("{answers}")],
        "judges": [Changes("[{{kind: length, prefer: shorter}}]"), Fails("[]", "no judge is named")],
        "rule": [Changes("agreed", PAIR_JUDGE)],
        "where": [Changes("{{kind: even}}")],
        "panel": [Changes("[longer, shorter]", TWO_JUDGES), Fails("[longer]", "one judge alone", TWO_JUDGES)],
        "max_pairs": [Changes("3")],
        "title": [Changes("Another title")],
    },
    ValidateConfig: {
        "labels": [Changes("{more_labelled}"), Fails("[]", "labels names no file")],
        "judges": [Changes("[{{kind: length, prefer: shorter}}]"), Fails("[]", "no judge is named")],
        "panel": [Changes("[longer, shorter]", TWO_JUDGES), Fails("[longer]", "one judge alone", TWO_JUDGES)],
        "rule": [Changes("agreed", PAIR_JUDGE)],
        "max_pairs": [Changes("3")],
        "title": [Changes("Another title")],
    },
    CurveConfig: {
        "sources": [
            Changes("{more_points}"),
            Fails("nobody", "there is no run 'nobody'"),
            Refused("[]", "no points without a source"),
        ],
        "name": [Changes("another")],
        "law": [Changes("best_of_n"), Fails("null", "say law: rl or best_of_n")],
        "kl": [Changes("nats")],
        "gold": [Changes("truth")],
        "proxy": [Changes("score")],
        "start": [Changes("measured")],
        "max_kl": [Changes("3")],
    },
    OveroptimizeConfig: {
        "curves": [Changes("[{{sources: '{more_points}', law: rl}}]"), Fails("[]", "curves names nothing to fit")],
        "num_resamples": [Changes("300")],
        "title": [Changes("Another title")],
    },
    RewardReportConfig: {
        "reward_model": [Changes("{other_reward}"), Fails("nobody", "nobody")],
        "num_pairs": [Changes("5")],
        "num_planted": [Changes("3")],
        "num_disagreements": [Changes("0", TINYCHAT)],
        "world_seed": [Changes("1", TINYCHAT), Refused("1", IDLE)],
    },
    PairsConfig: {
        "reference": [Changes("{other}")],
        "judges": [
            Changes("[{{kind: length}}]", NEIGHBOURS),
            Refused("[{{kind: length}}]", "takes scores"),
            Refused("[{{kind: length}}]", IDLE_REWARDS, ("pairs.choose=neighbours",)),
        ],
        "rule": [Changes("agreed", (*NEIGHBOURS, *PAIR_JUDGE)), Refused("agreed", IDLE)],
    },
    AblationConfig: {
        "methods": [
            Changes("[hinge]", ("lengths=null", "seconds=0.05")),
            Refused("[pdo]", "there is no method 'pdo'; did you mean 'ppo'?", ("lengths=null",)),
            Refused("[dpo, dpo]", "dpo is there twice"),
        ],
        "seeds": [Changes("[1]"), Refused("[0, 0]", "0 is there twice"), Refused("[-1]", "whole numbers from 0 on")],
        "seconds": [Changes("0.05", ("lengths=null", "seconds=0.5")), Refused("0", "seconds"), Refused("3", IDLE)],
        "clock": [Changes("cpu"), Refused("cpu", "set run.num_threads=1", ("run.num_threads=2",))],
        "lengths": [
            Changes("{{dpo: 2}}"),
            Refused("{{dpo: 0}}", "dpo is 0, expected at least 1"),
            Refused("{{pdo: 2}}", "lengths.pdo has no effect: there is no method of that name"),
        ],
        "settings": [
            Changes("{{dpo: {{beta: 5}}}}"),
            Refused("{{pdo: {{}}}}", "settings.pdo has no effect: there is no method of that name"),
            Fails("{{dpo: {{bta: 1}}}}", "settings.dpo: unknown config key 'bta'"),
            Fails("{{dpo: {{training: {{max_steps: 3}}}}}}", "seconds, or lengths.dpo, say how long it trains"),
        ],
        "policy": [Changes("{policy}"), Fails("nowhere", "there is no run 'nowhere'")],
        "reward_model": [Changes("{other_reward}"), Fails("null", "nothing measures the answers")],
    },
    OnlineDPOConfig: {
        "judges": [
            Changes("[{{kind: length}}]", NEIGHBOURS_OF_ROUNDS),
            Refused("[{{kind: length}}]", "takes scores"),
        ],
        "rule": [Changes("agreed", (*NEIGHBOURS_OF_ROUNDS, *PAIR_JUDGE)), Refused("agreed", IDLE)],
        "reward_model": [
            Changes("{other_reward}", MODEL_REWARD), Refused("{reward}", IDLE), Refused("{reward}", IDLE, REFRESHED),
        ],
    },
    RefreshConfig: {
        "num_prompts": [Changes("5")],
        "train_files": [Changes("{pairs}")],
        "validation_fraction": [Changes("0.4")],
        "backbone": [Changes("{other}")],
    },
    ComparisonSettings: {
        "num_prompts": [Changes("5")],
        "num_generations": [Changes("3"), Refused("1", "a pair has two answers")],
        "choose": [
            Changes("neighbours"), Changes("all_pairs"), Refused("neighbours", IDLE, (".num_generations=2",)),
        ],
        "cut_off": [Changes("leave_out"), Changes("as_it_is")],
        "min_gap": [Changes("0.5", (f"rewards=[{LENGTH}]", ".cut_off=as_it_is"))],
    },
    PairSettings: {"first_prompt": [Changes("3")]},
    RoundSettings: {
        "num_rounds": [Changes("1")],
        "reference": [
            Changes("previous"),
            Refused("previous", IDLE, (".num_rounds=1",)),
            Refused("previous", IDLE, ("loss=simpo",)),
        ],
    },
    # The harness need not be installed: what its keys do is seen in tests/integration/test_harness.py.
    HarnessConfig: {
        "folder": [Fails("nowhere", "lm-eval", HARNESS), Refused("nowhere", IDLE)],
        "num_shots": [Fails("2", "lm-eval", HARNESS), Refused("2", IDLE)],
        "chat_template": [Fails("true", "lm-eval", HARNESS), Refused("true", IDLE)],
    },
    EvaluateConfig: {
        "judges": [Changes("[{{kind: length}}]")],
        "models": [Changes("{{base: {other}}}"), Changes("{{third: {other}}}")],
        "reference": [
            Changes("tuned"), Refused("nobody", IDLE), Refused("tuned", IDLE, (*SUITES, "baseline={measured}")),
        ],
        "reward_model": [Changes("{reward}")],
        "num_reward_pairs": [Refused("1", IDLE)],
        "suites": [
            Changes("[preferences:{pairs}]", SUITES),
            Fails("[nowhere.jsonl]", "no suite", SUITES),
        ],
        "max_items": [Changes("5", SUITES), Refused("5", IDLE)],
        "baseline": [
            Changes("{measured}", SUITES), Fails("nobody", "there is none", SUITES), Refused("{measured}", IDLE),
        ],
        "tax": [
            Changes("[preferences:{more}]"), Fails("[reasoning]", "no choices to rank"),
            Refused("[preferences:{more}]", IDLE, SUITES),
        ],
        "num_tax_items": [Changes("3", ("tax=[preferences:{more}]",)), Refused("3", IDLE)],
        "greedy": [Changes("false")],
        "use_cache": [Changes("false")],
        "histories": [Changes("{{curve: {policy}}}")],
        "title": [Changes("Another title")],
    },
}  # fmt: skip

# What is the same in all recipes that sample.
ONLINE: dict[str, list[Case]] = {
    "model.lora.lora_dropout": [Refused("0.5", IDLE)],
    "data.max_validation_samples": [Refused("1", IDLE)],
    "generation.merge_adapter": [
        Changes("false"),
        Refused("false", IDLE, ("run.dtype=bf16",)),
        Refused("false", IDLE, FULL),
        Refused("false", IDLE, ("model.load_in_4bit=true",)),
    ],
}
OF_JUDGES: dict[str, list[Case]] = {
    "run.dtype": [Changes("bf16", REWARD_JUDGE)],
    "run.save_every_steps": [Refused("1", IDLE)],
    "run.keep_checkpoints": [Refused("1", IDLE)],
    "run.profile": [Refused("true", IDLE)],
    "run.profile_steps": [Refused("[2, 2]", IDLE)],
}
# Recipes that sample and train nothing.
SAMPLING: dict[str, list[Case]] = {
    "model.train": [Refused("full", IDLE)],
    "model.load_in_4bit": [Changes("true")],
    "model.gradient_checkpointing": [Refused("true", IDLE)],
    "model.random_init": [Refused("true", "trained weights")],
    **{f"model.lora.{name}": [Refused(value, IDLE)] for name, value in [
        ("r", "3"), ("lora_alpha", "5"), ("lora_dropout", "0.5"), ("target_modules", "[q_proj]"),
        ("use_rslora", "true"),
    ]},
    "data.max_validation_samples": [Refused("1", IDLE)],
    "model.attn_implementation": [Changes("sdpa", ("run.dtype=bf16",))],
    "generation.merge_adapter": [
        Changes("false", ("policy={policy}",)),
        Refused("false", IDLE, ("run.dtype=bf16",)),
        Refused("false", IDLE, ("model.load_in_4bit=true",)),
    ],
}  # fmt: skip

# Where one recipe differs from the others that have the section.
IN_ONE_RECIPE: dict[str, dict[str, list[Case]]] = {
    "judge_compare": OF_JUDGES,
    "judge_validate": OF_JUDGES | {"judges.0.column": [Fails("refused", "no column 'refused'", COLUMN_JUDGE)]},
    "pretrain": {
        "data.system_prompt": [Refused("big", IDLE)],
        "data.overlong": [Refused("truncate_prompt", IDLE)],
        "data.max_length": [Changes("10"), Refused("3000", "more than the context")],
        "run.dtype": [Changes("bf16")],
    },
    "sft": {
        "model.name_or_path": [Changes("{other}")],
        "model.random_init": [Changes("true", (*FULL, "run.seed=1")), Refused("true", "use model.train=full")],
        "data.overlong": [
            Changes("truncate_prompt", (".max_length=10", *UNVALIDATED)),
            Refused("drop", IDLE, ALL_TOKENS),
        ],
    },
    "reward": {
        "training.max_tokens_per_micro_batch": [Changes("20")],
        "model.train": [Refused("full", IDLE)],
        "model.load_in_4bit": [Changes("true"), Refused("true", "4-bit codes", ("reward.train=full",))],
        "model.random_init": [
            Changes("true", ("reward.train=full", "run.seed=1")),
            Refused("true", "use reward.train=full"),
        ],
        **{
            f"model.lora.{name}": [Changes(value), Refused(value, IDLE, (f"reward.train={train}",))]
            for name, value, train in [
                ("r", "3", "full"),
                ("lora_alpha", "5", "frozen"),
                ("lora_dropout", "0.5", "frozen"),
                ("target_modules", "[q_proj]", "full"),
                ("use_rslora", "true", "frozen"),
            ]
        },
    },
    "overoptimize": {
        **{f"run.{name}": [Refused("1", IDLE)] for name in ("max_minutes", "save_every_steps", "keep_checkpoints")},
        "run.profile": [Refused("true", IDLE)],
        "run.profile_steps": [Refused("[2, 2]", IDLE)],
        "run.dtype": [Refused("bf16", IDLE)],
    },
    "rm-report": {
        **{f"run.{name}": [Refused("1", IDLE)] for name in ("max_minutes", "save_every_steps", "keep_checkpoints")},
        "run.profile": [Refused("true", IDLE)],
        "run.profile_steps": [Refused("[2, 2]", IDLE)],
        "data.name": [
            Changes("toy/hub", TINYCHAT),
            Fails("no/where", "no/where", TINYCHAT),
            Refused("no/where", IDLE),
        ],
        "data.split_seed": [
            Changes("1", (".validation_fraction=0.5",)), Refused("1", IDLE), Refused("1", IDLE, TINYCHAT),
        ],
        "data.max_samples": [
            Changes("5"), Refused("5", IDLE, (".validation_fraction=0.5",)), Refused("5", IDLE, TINYCHAT),
        ],
        "data.max_validation_samples": [Changes("3", (".validation_fraction=0.5",)), Refused("3", IDLE)],
    },
    "prm": {
        "training.max_tokens_per_micro_batch": [Changes("20")],
        "model.train": [Refused("full", IDLE)],
        "model.load_in_4bit": [Changes("true"), Refused("true", "4-bit codes", ("prm.train=full",))],
        "model.random_init": [
            Changes("true", ("prm.train=full", "run.seed=1")),
            Refused("true", "use prm.train=full"),
        ],
        **{
            f"model.lora.{name}": [Changes(value), Refused(value, IDLE, (f"prm.train={train}",))]
            for name, value, train in [
                ("r", "3", "full"),
                ("lora_alpha", "5", "frozen"),
                ("lora_dropout", "0.5", "frozen"),
                ("target_modules", "[q_proj]", "full"),
                ("use_rslora", "true", "frozen"),
            ]
        },
        "data.name": [
            Changes("toy/steps", (*TINYCHAT, ".max_samples=8")),
            Fails("no/where", "no/where", TINYCHAT),
            Refused("no/where", IDLE),
        ],
        "data.train_files": [Changes("{more_steps}")],
        "data.validation_files": [Changes("{more_steps}")],
        "data.split": [Changes("test", STEP_SPLITS), Refused("test", IDLE), Refused("test", IDLE, TINYCHAT)],
        "data.validation_split": [
            Changes("test", STEP_SPLITS),
            Refused("test", IDLE, (".validation_files={more_steps}",)),
            Refused("test", IDLE, TINYCHAT),
        ],
        "data.data_dir": [Changes("part", (".train_files=toy/steps",)), Refused("part", IDLE)],
        "data.columns": [
            Changes("{{prompt: question}}", (".train_files={renamed_steps}",)), Refused("{{a: b}}", IDLE, TINYCHAT),
        ],
        "data.validation_fraction": [
            Changes("0.5"),
            Refused("0.5", IDLE, (".validation_files={more_steps}",)),
            Refused("0.5", IDLE, (*STEP_SPLITS, ".validation_split=test")),
            Refused("0.5", IDLE, TINYCHAT),
        ],
        "data.split_seed": [Changes("1"), Refused("1", IDLE, (".validation_files={more_steps}",))],
        "data.hh_as_messages": [Changes("true", (".train_files={hh_steps}",)), Refused("true", IDLE, TINYCHAT)],
    },
    "best_of_n": SAMPLING | {
        "generation.temperature": [Changes("0.7"), Refused("0", "all answers to a prompt are the same")],
        "generation.top_p": [Changes("0.5")],
        "generation.top_k": [Changes("3")],
        "measured_by.0.name": [Changes("keyword_sentiment", ("measured_by=[{{name: phrase_endings}}]",))],
        "measured_by.0.weight": [Changes("3", MEASURED)],
        "measured_by.0.arguments": [Changes("{{text: green}}", MEASURED)],
        "rewards.0.model": [
            Changes("{other_reward}", ("rewards=[{{name: helpful, model: {reward}}}]",)),
            Changes("{other_process}", ("rewards=[{{name: process, model: {process}}}]",)),
            Refused("{other_reward}", "or each names a model of its own", MODEL_REWARD),
        ],
        "measured_by.0.model": [Changes("{other_reward}", ("measured_by=[{{name: helpful, model: {reward}}}]",))],
        "measured_by.0.rule": [
            Changes("worst", ("measured_by=[{{name: a, model: {ensemble}}}]",)),
            Refused("worst", "has no members", MEASURED),
        ],
        "measured_by.0.penalty": [
            Changes("9", ("measured_by=[{{name: a, model: {ensemble}, rule: penalised}}]",)),
            Refused("9", "has no members", MEASURED),
        ],
    },
    "prm_label": SAMPLING | {
        "rewards.0.arguments": [Changes("{{text: green}}", RULES_ONLY)],
        "rewards.0.weight": [Changes("0.1")],
        "rewards.0.model": [Changes("{other_reward}", ("rewards=[{{name: a, model: {reward}}}]",))],
        "rewards.0.rule": [
            Changes("worst", ("rewards=[{{name: a, model: {ensemble}}}]", "sampling.right_from=0")),
            Refused("worst", "has no members"),
        ],
        "rewards.0.penalty": [
            Changes("9", ("rewards=[{{name: a, model: {ensemble}, rule: penalised}}]", "sampling.right_from=-25")),
            Refused("9", "has no members"),
        ],
        "generation.temperature": [Changes("0.7"), Refused("0", "all solutions of a question")],
        "generation.top_p": [Changes("0.5"), Refused("0.5", IDLE, GREEDY)],
        "generation.top_k": [Changes("3"), Refused("3", IDLE, GREEDY)],
    },
    "dpo": {
        "training.max_tokens_per_micro_batch": [Changes("20")],
        "model.lora.lora_dropout": [Refused("0.5", IDLE)],
    },
    "kto": {
        "training.max_tokens_per_micro_batch": [Changes("20")],
        "training.per_device_train_batch_size": [Changes("5"), Refused("1", "answers put behind other prompts")],
        "model.lora.lora_dropout": [Refused("0.5", IDLE)],
    },
    "ppo": ONLINE,
    "grpo": ONLINE,
    "pairs": {
        "data.max_validation_samples": [Refused("1", IDLE)],
        "model.train": [Refused("full", IDLE)],
        "model.attn_implementation": [Changes("sdpa", KL_MEASURED)],
        "model.gradient_checkpointing": [Refused("true", IDLE)],
        **{f"model.lora.{name}": [Refused(value, IDLE)] for name, value in [
            ("r", "3"), ("lora_alpha", "5"), ("lora_dropout", "0.5"), ("target_modules", "[q_proj]"),
            ("use_rslora", "true"),
        ]},
        "generation.batch_size": [Changes("3")],
        "generation.merge_adapter": [
            Changes("false", KL_MEASURED),
            Refused("false", IDLE, ("run.dtype=bf16",)),
            Refused("false", IDLE, ("model.load_in_4bit=true",)),
        ],
        "model.load_in_4bit": [Changes("true")],
    },
    "online_dpo": ONLINE | {
        "training.max_tokens_per_micro_batch": [Changes("20")],
        **{f"training.{name}": [Refused("1", IDLE)] for name in ("eval_steps", "early_stopping_patience")},
        "training.num_train_epochs": [Changes("1")],
        "refresh.reward.ensemble.members": [Changes("3")],
        "refresh.training.max_tokens_per_micro_batch": [Changes("20")],
        "refresh.training.eval_steps": [Changes("1"), Refused("1", IDLE, ("refresh.validation_fraction=0",))],
        "refresh.training.early_stopping_patience": [
            Changes("1", (".eval_steps=1", "refresh.optimizer.learning_rate=1e-30")),
            Refused("1", IDLE, ("refresh.validation_fraction=0",)),
        ],
    },
    "eval": {
        "run.max_minutes": [Refused("1", IDLE)],
        "run.save_every_steps": [Refused("1", IDLE)],
        "run.keep_checkpoints": [Refused("1", IDLE)],
        "run.profile": [Refused("true", IDLE)],
        "run.profile_steps": [Refused("[2, 2]", IDLE)],
        "model.train": [Refused("full", IDLE)],
        "model.random_init": [Refused("true", "trained weights")],
        "model.load_in_4bit": [Changes("true")],
        "model.gradient_checkpointing": [Refused("true", IDLE)],
        **{f"model.lora.{name}": [Refused(value, IDLE)] for name, value in [
            ("r", "3"), ("lora_alpha", "5"), ("lora_dropout", "0.5"), ("target_modules", "[q_proj]"),
            ("use_rslora", "true"),
        ]},
        "data.name": [
            Changes("toy/hub", TINYCHAT),
            Fails("no/where", "no/where", TINYCHAT),
            Refused("no/where", IDLE),
        ],
        "data.max_samples": [
            Changes("5", UNVALIDATED), Refused("5", IDLE), Refused("5", IDLE, TINYCHAT),
        ],
        "data.validation_files": [Changes("{more}"), Refused("{more}", IDLE, TINYCHAT)],
        "data.where": [
            Changes("{{subset: even}}", UNVALIDATED),
            Fails("{{subset: none}}", "asks for subset in ['none']"),
            Refused("{{family: facts}}", IDLE, TINYCHAT),
        ],
        "data.max_prompt_length": [Changes("3", UNVALIDATED), Refused("7", IDLE, TINYCHAT)],
        "data.families": [Refused("[facts]", IDLE), Refused("[facts]", IDLE, TINYCHAT)],
        "data.split_seed": [Changes("1"), Refused("1", IDLE, TINYCHAT)],
        "generation.temperature": [Changes("0.7"), Refused("0.7", IDLE, SUITES)],
        "suite.num_heldout": [
            Changes("4", ("data.validation_fraction=0.5",)), Refused("4", IDLE, SUITES),
        ],
        "num_reward_pairs": [
            Changes("1", ("reward_model={reward}", "data.validation_fraction=0.5")),
            Refused("1", IDLE),
            Refused("1", IDLE, ("reward_model={reward}", *UNVALIDATED)),
        ],
        "generation.batch_size": [Changes("3", ("data.validation_fraction=0.5",))],
    },
}  # fmt: skip


def keys_of(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel], str]]:
    """Every key below a class that is no section itself: (dotted key, class, name there); items of lists as item 0."""
    for name, field in cls.model_fields.items():
        sections = list(sections_in(field.annotation))
        items = [
            section for section in sections_in(field.annotation, inside_containers=True) if section not in sections
        ]
        for section in sections:
            yield from keys_of(section, f"{prefix}{name}.")
        if not sections:
            yield f"{prefix}{name}", cls, name
        for item in items:
            yield from keys_of(item, f"{prefix}{name}.0.")


def cases(recipe: str, key: str, cls: type[BaseModel], name: str) -> list[Case]:
    """What was said of a key; empty where nothing was."""
    found = IN_ONE_RECIPE.get(recipe, {}).get(key)
    if found is None:
        found = next((CASES[owner][name] for owner in cls.__mro__ if name in CASES.get(owner, {})), [])
    section = key.removesuffix(name)
    before = next((more for (one, start), more in AROUND.items() if one == recipe and key.startswith(start)), ())
    return [_absolute(case, section, before) for case in found]


def stage_keys() -> Iterator[tuple[str, str, list[Case]]]:
    """(recipe, key, cases) of every recipe that runs alone."""
    for recipe, cls in CONFIGS.items():
        if recipe != "pipeline":
            elsewhere = tuple(start for one, start in ONLY_IN_JUDGE_COMPARE if one == recipe)
            elsewhere += OF_AN_ABLATIONS_PARTS if recipe == "ablate" else ()
            keys = ((key, owner, name) for key, owner, name in keys_of(cls) if not key.startswith(elsewhere))
            yield from ((recipe, key, cases(recipe, key, owner, name)) for key, owner, name in keys)


def overrides(recipe: str, case: Case, places: Mapping[str, object], key: str | None = None) -> list[str]:
    """The command line of a case: what every run shares, what stands around, and with a key its value."""
    last = [] if key is None else [f"{key}={case.value}"]
    shared = [text for text in SHARED if recipe not in READS_NO_ROWS or not text.startswith("data.")]
    return [text.format_map(places) for text in [*shared, *BASE[recipe], *case.around, *last]]


def _absolute(case: Case, section: str, before: tuple[str, ...] = ()) -> Case:
    around = tuple(f"{section}{text[1:]}" if text.startswith(".") else text for text in case.around)
    return replace(case, around=(*before, *around))
