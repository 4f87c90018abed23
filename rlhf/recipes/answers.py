"""Models' answers for evaluation: sampled once for the same weights, settings, seed and prompt, then read from disk."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.data.chat import ChatEncoder
from rlhf.data.rows import Prompt
from rlhf.infra.determinism import derive_seed
from rlhf.infra.experiment import Run, RunConfig
from rlhf.models.decoding import GenerationConfig, text_before_stop
from rlhf.models.policy import Policy
from rlhf.recipes.stages import LoadedPolicy
from rlhf.rollout.cache import CachedAnswer, ResponseCache, answers_of, weights_hash
from rlhf.rollout.sampler import Sampler


class AnsweringStopped(Exception):  # noqa: N818 - not an error: it was asked for
    """Ctrl-C between two models, suites or portions of one; what was written by then is in the cache."""


def stop_if_asked(run: Run) -> None:
    """Raise AnsweringStopped once somebody has asked the run to end."""
    if run.should_stop():
        raise AnsweringStopped


def cached_answers(
    loaded: LoadedPolicy,
    prompts: Sequence[list[int]],
    generation: GenerationConfig,
    encoder: ChatEncoder,
    run: RunConfig,
    use_cache: bool,
) -> list[CachedAnswer]:
    """Answers to the prompts, in order; those that the cache knows are not sampled again."""
    seed = derive_seed(run.seed, "evaluation")
    cache = None
    if use_cache:
        folder = run.output_dir / "cache"
        cache = ResponseCache(folder, weights_hash(loaded.backbone, loaded.adapter), generation, seed)
    known = {i: found for i, ids in enumerate(prompts) if cache is not None and (found := cache.get(ids)) is not None}
    missing = [i for i in range(len(prompts)) if i not in known]
    if missing:
        sampler = Sampler(Policy(loaded.backbone, loaded.adapter), generation, encoder.stop_token_ids)
        fresh = answers_of(sampler.sample([prompts[i] for i in missing], seed))
        if cache is not None:
            cache.put(fresh)
        known |= dict(zip(missing, fresh, strict=True))
    return [known[i] for i in range(len(prompts))]


def texts_of(answers: Sequence[CachedAnswer], encoder: ChatEncoder, generation: GenerationConfig) -> list[str]:
    """The answers as people and rewards read them while PPO trains: without stop strings and what follows those."""
    texts = encoder.decode_batch([answer.response_ids for answer in answers])
    return [text_before_stop(text, generation.stop) for text in texts]


def askable(prompt: Prompt, encoder: ChatEncoder) -> Prompt:
    """The prompt in a form that the model knows: messages become a plain transcript where it has no chat template."""
    if isinstance(prompt, str) or encoder.tokenizer.chat_template:
        return prompt
    names = {"user": "Question", "assistant": "Answer"}
    turns = [f"{names.get(turn['role'], turn['role'].capitalize())}: {turn['content'].strip()}" for turn in prompt]
    return "\n\n".join(turns) + "\n\nAnswer:"
