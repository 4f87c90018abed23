"""From a run to a folder that plain transformers, and whatever else reads Hugging Face folders, can load.

The order of events: load the model as it was trained, let it answer a few prompts, merge onto the original weights,
write aside, load what was written as a stranger would, compare, and only then give the folder its name.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf.data.chat import ChatEncoder
from rlhf.infra.device import resolve_device
from rlhf.infra.durable import sha256_file, write_json, write_text, written_aside
from rlhf.infra.errors import UserError
from rlhf.infra.run_folder import package_versions, utc_now
from rlhf.models import export
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.models.decoding import GenerationConfig
from rlhf.models.export import CheckRow, ExportDtype
from rlhf.models.policy import Policy
from rlhf.models.reward_model import RewardModel
from rlhf.models.scoring import CONFIG_FILE as REWARD_CONFIG
from rlhf.recipes.export_card import model_card, words
from rlhf.recipes.export_request import (
    CARD,
    EXPORT_INFO,
    ExportConfig,
    Source,
    files_in,
    find_source,
    refuse_base,
    refuse_taken,
)
from rlhf.recipes.export_sources import CheckSource, check_source, lineage_of, system_prompt_of
from rlhf.recipes.stages import load_policy
from rlhf.rollout.sampler import Sampler

NUM_ANSWER_TOKENS = 32

# Several times what sound exports show (docs/export.md), far below what a wrong merge does: bf16 keeps 8 bits of a
# weight and of what a layer hands on, fp32 differs by the order of sums alone. Scores are in standard deviations.
TOLERANCES: dict[ExportDtype, dict[str, float]] = {
    "bf16": {"max_abs_difference": 1.0, "mean_kl": 1e-3, "max_abs_score_difference": 0.2},
    "fp32": {"max_abs_difference": 1e-3, "mean_kl": 1e-6, "max_abs_score_difference": 1e-3},
}


@dataclass(frozen=True)
class Exported:
    """Where the export is, and what `export.json` says of it."""

    folder: Path
    report: Mapping[str, Any]

    def summary(self) -> str:
        """What was measured, in one line."""
        measured, tolerance = self.report["measured"], self.report["tolerance"]
        parts = [
            f"{words(self.report['kind'], name)}: {measured[name]:.2g} (tolerance {bound:g})"
            for name, bound in tolerance.items()
        ]
        return f"against the run: {'; '.join(parts)}"


def run_export(config: ExportConfig) -> Exported:
    """Write the export and return where it is.

    Raises:
        UserError: there is nothing to export, the target is taken, the model has no such form, or what was read back
            is further from its source than the tolerance; nothing is left behind then.
    """
    source = find_source(config)
    target = config.target or Path("exports") / (source.run.name if source.run else Path(source.folder).name)
    refuse_taken(target, config.overwrite, source)
    refuse_base(config, source)
    device = resolve_device(config.device)
    with written_aside(target) as aside:
        make = _export_policy if source.kind == "policy" else _export_reward
        report = _described(config, source) | make(config, source, device, aside)
        files = {str(path.relative_to(aside)): sha256_file(path) for path in files_in(aside)}
        report |= {"files": files, "versions": package_versions(), "exported": utc_now()}
        write_json(aside / EXPORT_INFO, report)
        write_text(aside / CARD, model_card(target.name, report))
    return Exported(target, report)


def _described(config: ExportConfig, source: Source) -> dict[str, Any]:
    stages = lineage_of(source.run, config.output_dir)
    return {
        "kind": source.kind,
        "source": source.folder,
        "dtype": config.dtype,
        "system_prompt": system_prompt_of(source.run),
        "lineage": [stage.as_json() for stage in stages],
    }


def _coding(config: ExportConfig, source: Source, backbone: Backbone) -> dict[str, Any]:
    """How the base that the model was trained on is quantised; empty where it is not.

    Raises:
        UserError: it is stored so, and `--base` does not name original weights; or `--base` would exchange sound ones.
    """
    coding = export.coding(backbone)
    if coding and not backbone.quantisation and config.base is None:
        export.refuse_codes(backbone)
    if not coding and config.base is not None and source.base_is_there:
        raise UserError(f"the base on record, '{source.base}', is there and not quantised; leave --base out")
    return coding


# ---------------------------------------------------------------- policies


def _export_policy(config: ExportConfig, source: Source, device: torch.device, aside: Path) -> dict[str, Any]:
    trained_on = None if source.base_is_there else config.base
    loaded = load_policy(source.folder, ModelConfig(), config.output_dir, device, base=trained_on)
    coding = _coding(config, source, loaded.backbone)
    encoder = ChatEncoder(loaded.backbone.tokenizer, system_prompt_of(source.run))
    checked = check_source(source.run, encoder)
    rows = _answered(Policy(loaded.backbone, loaded.adapter), encoder, checked)
    trained = wanted = export.answer_logits(loaded.backbone, loaded.adapter, rows)
    if coding:
        del loaded
        gc.collect()
        dense = ModelConfig(load_in_4bit=False)
        loaded = load_policy(source.folder, dense, config.output_dir, device, base=config.base)
        wanted = export.answer_logits(loaded.backbone, loaded.adapter, rows)
    base, had_adapter = loaded.backbone.name, loaded.adapter is not None
    export.write_policy(loaded.backbone, loaded.adapter, aside, config.dtype, encoder.stop_token_ids)
    del loaded
    gc.collect()
    found = export.answer_logits_of_folder(aside, rows, device)
    measured = export.agreement(wanted, found)
    tolerance = _tolerance(config)
    _refuse_far(config, asdict(measured), {name: tolerance[name] for name in ("max_abs_difference", "mean_kl")})
    return {
        "base_model": base if had_adapter else None,
        "has_chat_template": bool(encoder.tokenizer.chat_template),
        "stop_token_ids": encoder.stop_token_ids,
        "compared_on": f"{checked.words}, greedy answers of at most {NUM_ANSWER_TOKENS} tokens",
        "measured": asdict(measured),
        "tolerance": {name: tolerance[name] for name in ("max_abs_difference", "mean_kl")},
        "trained_on_quantised_base": coding,
        "measured_against_quantised": asdict(export.agreement(trained, found)) if coding else None,
    }


def _answered(policy: Policy, encoder: ChatEncoder, checked: CheckSource) -> list[CheckRow]:
    """The prompts with the policy's own greedy answers: what is compared is what it would say."""
    settings = GenerationConfig(temperature=0.0, max_new_tokens=NUM_ANSWER_TOKENS)
    prompts = encoder.prompt_ids_batch(checked.prompts)
    answers = Sampler(policy, settings, encoder.stop_token_ids).sample(prompts, seed=0).responses()
    return [CheckRow(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


# ---------------------------------------------------------------- reward models


def _export_reward(config: ExportConfig, source: Source, device: torch.device, aside: Path) -> dict[str, Any]:
    if not (Path(source.folder) / REWARD_CONFIG).is_file():
        raise UserError(f"'{source.folder}' holds no reward model that was trained here; name the run that trained one")
    trained_on = None if source.base_is_there else config.base
    reward = RewardModel.load(Path(source.folder), base=trained_on).to(device)
    coding = _coding(config, source, reward.backbone)
    export.refuse_other_pooling(reward)
    encoder = ChatEncoder(reward.tokenizer, system_prompt_of(source.run))
    checked = check_source(source.run, encoder)
    rows = _dialogues(encoder, checked)
    trained = wanted = export.reward_scores(reward, rows)
    if coding:
        del reward
        gc.collect()
        reward = RewardModel.load(Path(source.folder), original_weights=True, base=config.base).to(device)
        wanted = export.reward_scores(reward, rows)
    base, suffix, scale = reward.backbone.name, reward.suffix, asdict(reward.scale)
    export.write_classifier(reward, aside, config.dtype)
    del reward
    gc.collect()
    found = export.scores_of_folder(aside, rows, suffix, device)
    measured = export.score_agreement(wanted, found)
    tolerance = {"max_abs_difference": _tolerance(config)["max_abs_score_difference"]}
    _refuse_far(config, asdict(measured), tolerance)
    return {
        "base_model": base,
        "has_chat_template": bool(encoder.tokenizer.chat_template),
        "end_of_turn": encoder.tokenizer.convert_ids_to_tokens(encoder.stop_token_ids[0]),
        "suffix": suffix,
        "score_scale": scale,
        "compared_on": f"{checked.words} with {len(rows)} answers",
        "measured": asdict(measured),
        "tolerance": tolerance,
        "trained_on_quantised_base": coding,
        "measured_against_quantised": asdict(export.score_agreement(trained, found)) if coding else None,
    }


def _dialogues(encoder: ChatEncoder, checked: CheckSource) -> list[list[int]]:
    """Prompts with the data's answers, as ids. A score needs no answer of anybody's own."""
    pairs = [(p, text) for p, texts in zip(checked.prompts, checked.answers, strict=True) for text in texts]
    if len(pairs) < 2:
        raise UserError(f"{checked.words} hold no two answers whose scores could be compared; name another run")
    starts = encoder.prompt_ids_batch([prompt for prompt, _ in pairs])
    answers = encoder.response_ids_batch([prompt for prompt, _ in pairs], [text for _, text in pairs])
    return [[*start, *answer] for start, answer in zip(starts, answers, strict=True)]


# ---------------------------------------------------------------- tolerance


def _tolerance(config: ExportConfig) -> dict[str, float]:
    given = {
        "max_abs_difference": config.max_abs_difference,
        "max_abs_score_difference": config.max_abs_difference,
        "mean_kl": config.max_mean_kl,
    }
    return {
        name: value if (asked := given[name]) is None else asked for name, value in TOLERANCES[config.dtype].items()
    }


def _refuse_far(config: ExportConfig, measured: Mapping[str, float], tolerance: Mapping[str, float]) -> None:
    in_fp32 = "export in fp32, or " if config.dtype == "bf16" else ""
    for name, bound in tolerance.items():
        # Not `>`: a NaN is far as well.
        if not measured[name] <= bound:
            raise UserError(
                f"what was read back in {config.dtype} is too far from its source: {name} is {measured[name]:.3g}, "
                f"above the tolerance of {bound:g}; {in_fp32}allow more with --{_OPTIONS[name]}"
            )


_OPTIONS = {"max_abs_difference": "max-abs-difference", "mean_kl": "max-mean-kl"}
