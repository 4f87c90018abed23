"""What PPO, GRPO and evaluation do with their memory: sampling, scoring, the reference and the update, run in a shadow.

Legend: N rows sampled at once, P prompt columns, R response columns, D model width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, Cache

from rlhf.data.chat import ChatEncoder
from rlhf.data.prompt_dataset import PromptExample
from rlhf.infra.device import autocast
from rlhf.infra.experiment import Run, RunConfig
from rlhf.models.backbone import Backbone, ModelConfig
from rlhf.models.decoding import GenerationConfig, choose_tokens, make_cache
from rlhf.models.ensemble import member_adapters
from rlhf.models.hollow import BASE
from rlhf.models.lora import lora_layers
from rlhf.models.policy import Policy
from rlhf.models.reference import Reference
from rlhf.models.reward_model import RewardModel
from rlhf.models.value_head import ValueHead
from rlhf.recipes.evaluate import reference_sums
from rlhf.recipes.evaluate_config import EvaluateConfig
from rlhf.recipes.grpo import GRPO
from rlhf.recipes.grpo_config import GRPOConfig
from rlhf.recipes.online_config import OnlineConfig
from rlhf.recipes.plan_stages import start_policy
from rlhf.recipes.plan_trace import ADAPTERS, CACHE, MANY, PlannedTrainer, RewardStart, Start, Tracer
from rlhf.recipes.ppo import PPO
from rlhf.recipes.ppo_config import PPOConfig
from rlhf.recipes.rollouts import OnlineParts
from rlhf.rewards.learned import SCORING_TOKENS, LearnedReward
from rlhf.rewards.protocol import CombinedReward, RewardTerm, Scores
from rlhf.rewards.shaping import ShapedScores
from rlhf.rollout.cache import CachedAnswer
from rlhf.rollout.passes import passes
from rlhf.rollout.trajectory import Experience, Trajectory

SOME_TOKEN = 0  # what every drawn token is in a shadow


def trace_ppo(tracer: Tracer, config: PPOConfig, start: Start, rewards: Sequence[RewardStart]) -> None:
    """An iteration of PPO, with its critic."""
    wants_own = config.ppo.value_adapter and config.model.train == "lora"
    policy, reference, adapter = start_policy(tracer, start, config.model, config.run, value_adapter=wants_own)
    with torch.device("meta"):
        head = ValueHead(policy.backbone.width, config.ppo.value_head)
    tracer.shadow.imagine_module(head, ADAPTERS)
    policy.value_head = head
    with _parts(config, policy, Reference(reference, adapter)) as (run, parts):
        algorithm = PPO(config, run, parts)
        recomputes = config.ppo.recompute_logprobs or config.ppo.value_adapter
        _trace_iteration(tracer, algorithm, config.ppo.rollout_batch_size, rewards, recomputes=recomputes)


def trace_grpo(tracer: Tracer, config: GRPOConfig, start: Start, rewards: Sequence[RewardStart]) -> None:
    """An iteration without a critic."""
    policy, reference, adapter = start_policy(tracer, start, config.model, config.run)
    with _parts(config, policy, Reference(reference, adapter)) as (run, parts):
        num_rows = config.grpo.num_prompts * config.grpo.num_generations
        algorithm = GRPO(config, run, parts)
        _trace_iteration(tracer, algorithm, num_rows, rewards, recomputes=config.grpo.recompute_logprobs)


def _trace_iteration(
    tracer: Tracer, algorithm: PPO | GRPO, num_rows: int, rewards: Sequence[RewardStart], *, recomputes: bool
) -> None:
    """Answers of full length to prompts of full length, scored, compared with the reference, and learnt from."""
    config, policy = algorithm.config, algorithm.policy
    trained = [name for name in (policy.adapter, policy.value_adapter) if name is not None]
    scorers = _scorers(tracer, rewards, policy.backbone, trained, config.run.dtype)
    limit, num_rows_of_step = config.updates.max_tokens_per_micro_batch, num_rows // config.updates.num_mini_batches
    with tracer.shadow:
        trajectory, is_accumulated = _largest_pass(tracer, algorithm, limit, num_rows_of_step)
    algorithm.updates.trainer = trainer = PlannedTrainer(
        tracer,
        policy.trainable_parameters(),
        config.optimizer,
        scale_loss=config.run.dtype == "fp16",
        is_accumulated=is_accumulated,
    )
    with tracer.phase("generate"), torch.no_grad():
        count, length = min(config.generation.batch_size, num_rows), config.data.max_prompt_length
        trace_generation(tracer, policy, config.generation, count, length, _answers_per_prompt(config))
    if scorers:
        with tracer.phase("score"), torch.no_grad():
            for score in scorers:
                score(config.data.max_prompt_length + config.generation.max_new_tokens)
    with tracer.phase("reference"):
        wide, _ = _largest_pass(tracer, algorithm, 2 * limit, num_rows)
        if recomputes:
            algorithm.rollouts.recomputed(wide, logprobs=True)
        _experience(algorithm, wide)
    with tracer.shadow:
        experience = _experience(algorithm, trajectory)
    with tracer.phase("update"):
        trainer.step([experience], algorithm.loss(experience))


def trace_evaluation(
    tracer: Tracer, config: EvaluateConfig, starts: Sequence[Start], rewards: Sequence[RewardStart]
) -> None:
    """All models side by side: full-length answers to full-length prompts, scored and held against a reference."""
    held, shelf = config.model.model_copy(update={"train": "lora"}), dict[str, Backbone]()
    policies = []
    for number, start in enumerate(starts):
        base = f"{start.shape.name} {start.held(held).quantisation}"
        if base not in shelf:
            shelf[base] = tracer.backbone(replace(start, adapter=None), start.held(held), config.run.dtype)
        name = None if start.adapter is None else f"policy_{number}"
        if name is not None and start.adapter is not None:
            tracer.add_adapter(shelf[base], name, start.adapter)
        policies.append(Policy(shelf[base], name))
    first, last = policies[0], policies[-1]
    scorers = _scorers(tracer, rewards, first.backbone, (), config.run.dtype)
    suite, longest = config.suite, config.data.max_prompt_length + config.generation.max_new_tokens
    asked = suite.num_heldout + (suite.num_ood + 2 * suite.num_probes if config.data.is_tinychat else 0)
    with tracer.phase("generate"), torch.no_grad():
        count = min(config.generation.batch_size, asked)
        trace_generation(tracer, last, config.generation, count, config.data.max_prompt_length)
    if scorers:
        with tracer.phase("score"), torch.no_grad():
            for score in scorers:
                score(longest)
    rows = tracer.largest_rows(SCORING_TOKENS, longest, MANY)
    with tracer.phase("reference"):
        answers = [CachedAnswer([SOME_TOKEN], [SOME_TOKEN] * (rows.width - 1), True, 0.0, 0.0)] * rows.count
        reference_sums(Reference(last.backbone, last.adapter), answers, config.generation.temperature)


def trace_generation(
    tracer: Tracer, policy: Policy, config: GenerationConfig, num_rows: int, prompt_length: int, group: int = 1
) -> None:
    """The pass over the prompts with the first token, and the last token's step, when the cache is full.

    `group` answers are drawn for each prompt.
    """
    backbone, capacity = policy.backbone, prompt_length + config.max_new_tokens
    prompt_ids_NP, mask_NP = _columns(num_rows, prompt_length, group)
    uniforms_NR = torch.zeros(num_rows, config.max_new_tokens, dtype=torch.float64)
    merge = config.merge_adapter and backbone.dtype_name == "fp32" and not backbone.is_quantised
    heads, width = _key_shape(backbone)
    tracer.cache_shapes = {
        shape
        for count in (ceil(num_rows / group), num_rows)  # while prompts are read, and answers drawn
        for shape in ((count, heads, capacity, width), (count, heads, width, capacity))
    }
    if merge and policy.adapter is not None:
        tracer.folded_shapes = {
            tuple(layer.weight.shape) for layer in lora_layers(backbone.model, policy.adapter).values()
        }
    # Every token drawn here ends its answer, so this returns after the first one.
    policy.generate(prompt_ids_NP, mask_NP, uniforms_NR, config, [SOME_TOKEN])
    # What `decode` does in its last step.
    with backbone.merged(policy.adapter) if merge else backbone.using(policy.adapter):
        cache = _full_cache(tracer, backbone, policy.adapter, num_rows, capacity)
        ids_NT, mask_NT = _columns(num_rows, capacity)
        tokens_N1, positions_N1 = ids_NT[:, -1:], mask_NT.sum(dim=1, keepdim=True) - 1
        hidden_ND = backbone.hidden(tokens_N1, mask_NT, positions_N1, adapter=policy.adapter, cache=cache)[:, -1]
        log_p_NV = backbone.logits(hidden_ND, adapter=policy.adapter).float().log_softmax(dim=-1)
        choose_tokens(log_p_NV, uniforms_NR[:, -1], config)
    tracer.cache_shapes, tracer.folded_shapes = set(), set()


def _full_cache(tracer: Tracer, backbone: Backbone, adapter: str | None, num_rows: int, capacity: int) -> Cache:
    """A cache that lacks one token of its capacity, as it is before the last step."""
    cache, (heads, width) = make_cache(backbone, capacity), _key_shape(backbone)
    # The model itself writes the first token, and so decides the format of the numbers.
    backbone.hidden(*_columns(num_rows, 1), adapter=adapter, cache=cache)
    for number, layer in enumerate(cache.layers):
        states = torch.zeros(num_rows, heads, capacity - 2, width, dtype=layer.keys.dtype)
        cache.update(states, states, number)
        tracer.shadow.relabel((layer.keys, layer.values), CACHE)
    return cache


def _key_shape(backbone: Backbone) -> tuple[int, int]:
    """Heads that keys have in a block, and the width of each."""
    shape = backbone.model.config.get_text_config()
    heads = shape.to_dict().get("num_key_value_heads") or shape.num_attention_heads
    return heads, shape.to_dict().get("head_dim") or shape.hidden_size // shape.num_attention_heads


def _scorers(
    tracer: Tracer, rewards: Sequence[RewardStart], shared: Backbone, trained: Sequence[str], dtype: str
) -> list[Callable[[int], None]]:
    """How each reward model scores full-length rows; all are put on the shared base or on bases of their own first."""
    return [_scorer(tracer, one, shared, f"reward_{place}", trained, dtype) for place, one in enumerate(rewards)]


def _scorer(
    tracer: Tracer, reward: RewardStart, shared: Backbone, name: str, trained: Sequence[str], dtype: str
) -> Callable[[int], None]:
    if reward.is_classifier:
        return _classifier(tracer, reward, dtype)
    start, backbone = reward.start, shared
    if reward.has_own_base:
        backbone = tracer.backbone(replace(start, adapter=None), start.held(ModelConfig()), dtype)
    members = []
    for adapter in member_adapters(name, reward.num_members):
        if start.adapter is not None:
            tracer.add_adapter(backbone, adapter, start.adapter)
        model = RewardModel(backbone, adapter if start.adapter is not None else None, train="frozen")
        tracer.shadow.imagine_module(model.head, ADAPTERS)
        members.append(LearnedReward(model, shared.tokenizer))
    if backbone is shared and start.adapter is not None:
        backbone.train_only(trained)

    def score(length: int) -> None:
        for learned in members:
            rows = tracer.largest_rows(learned.max_batch_tokens, length, MANY)
            learned.score_ids([[SOME_TOKEN] * (rows.width - (row == 0)) for row in range(rows.count)])

    return score


def _classifier(tracer: Tracer, reward: RewardStart, dtype: str) -> Callable[[int], None]:
    """A sequence classifier, held as its file says and called under the run's autocast."""
    shape = reward.start.shape
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(shape.config, dtype=shape.file_dtype)
    tracer.shadow.imagine_module(model.eval().requires_grad_(False), BASE)
    shape.config.pad_token_id = SOME_TOKEN

    def score(length: int) -> None:
        rows = tracer.largest_rows(SCORING_TOKENS, length, MANY)
        ids, mask = _columns(rows.count, rows.width)
        with autocast(ids.device, dtype):
            model(input_ids=ids + 1, attention_mask=mask)

    return score


@contextmanager
def _parts(config: OnlineConfig, policy: Policy, reference: Reference) -> Iterator[tuple[Run, OnlineParts]]:
    """What the recipe's own object is made of, with a run in a folder that is gone afterwards."""
    tokenizer = policy.backbone.tokenizer
    encoder, nothing = ChatEncoder(tokenizer), CombinedReward([RewardTerm("none", lambda *given, **columns: [], 1.0)])
    with tempfile.TemporaryDirectory(prefix="rlhf-plan-") as folder:
        settings = RunConfig(name="plan", output_dir=Path(folder), device="cpu", dtype=config.run.dtype)
        with Run.create("plan", config, settings) as run:
            yield run, OnlineParts(policy, reference, nothing, [PromptExample([SOME_TOKEN], "", {})], encoder)


def _largest_pass(tracer: Tracer, algorithm: PPO | GRPO, max_tokens: int, num_rows: int) -> tuple[Trajectory, bool]:
    """The longest answers to the longest prompts, as many as pass at once, and whether that leaves some for another."""
    config, backbone = algorithm.config, algorithm.policy.backbone
    longest = config.data.max_prompt_length + config.generation.max_new_tokens
    rows = tracer.largest_rows(max_tokens, longest, num_rows)
    group = _answers_per_prompt(config)
    if group == 1:
        return _trajectory(config, rows.count, rows.width, group), rows.is_accumulated
    whole = _trajectory(config, num_rows, rows.width, group)
    parts = passes(whole, backbone, max_tokens)
    return whole.of_pass(max(parts, key=lambda trees: sum(map(len, trees)))), len(parts) > 1


def _answers_per_prompt(config: OnlineConfig) -> int:
    return config.grpo.num_generations if isinstance(config, GRPOConfig) else 1


def _trajectory(config: OnlineConfig, num_rows: int, width: int, group: int) -> Trajectory:
    """Rows of this width, the answers as long as they may be, so many to each prompt."""
    num_responses = min(config.generation.max_new_tokens, width - 1)
    prompt_ids_BP, prompt_mask_BP = _columns(num_rows, width - num_responses, group)
    response_ids_BR, response_mask_BR = _columns(num_rows, num_responses)
    response_mask_BR = response_mask_BR.flip(1)  # padded on the right
    logprobs_BR, entropy_BR, values_BR = torch.zeros(3, *response_ids_BR.shape)
    return Trajectory(
        prompt_ids_BP,
        prompt_mask_BP,
        response_ids_BR,
        response_mask_BR,
        logprobs_BR,
        entropy_BR,
        values_BR,
        torch.zeros(num_rows, dtype=torch.bool),
        config.generation.temperature,
    )


def _experience(algorithm: PPO | GRPO, trajectory: Trajectory) -> Experience:
    scores, zeros_B = Scores([0.0] * len(trajectory), {}), torch.zeros(len(trajectory))
    if isinstance(algorithm, PPO):
        return algorithm.estimate_advantages(trajectory, scores, ShapedScores(zeros_B, {}))
    # As `GRPO.compare` leaves it; rows that pass at once need not be whole groups, which it would ask for.
    reference_BR = algorithm.rollouts.reference_logprobs(trajectory)
    zeros_BR = torch.zeros_like(reference_BR)
    return Experience(trajectory, reference_BR, zeros_BR, zeros_BR, zeros_B, zeros_B)


def _columns(num_rows: int, width: int, group: int = 1) -> tuple[Tensor, Tensor]:
    """Ids and mask of rows padded on the left to a width, the first a token shorter than the others.

    They are equal by groups of `group`, of which the whole first one is shorter.
    """
    mask = torch.ones(num_rows, width, dtype=torch.bool)
    if num_rows > group and width > 1:
        mask[:group, 0] = False
    ids = torch.full((num_rows, width), SOME_TOKEN)
    ids[:, -1] += torch.arange(num_rows) // group
    return ids, mask
