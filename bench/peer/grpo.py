"""The peer's GRPO: python bench/peer/grpo.py FOLDER ITERATIONS [--bf16] [--same-batch] [--device cuda].

Runs in an environment of its own with the current TRL; FOLDER comes from `bench/workload.py`. Four prompts are answered
eight times each in every iteration, and one optimizer step is made from them; the reward is a rule. The trainer keeps
its defaults wherever those are not part of the work. `--same-batch` draws nothing: the answers are starts of other
prompts, and ITERATIONS are the updates made from them. The last line printed is one JSON object.
"""

import json
import os
import time
from collections import defaultdict

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from measured import arguments, tell
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

PROMPTS, GROUP, NEW_TOKENS, TARGET_WORDS = 4, 8, 48, 30


def main() -> None:
    asked = arguments(steps="iterations", flags=("--same-batch",))
    tokenizer = AutoTokenizer.from_pretrained(asked.folder / "policy", padding_side="left")
    lines = (asked.folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"] for line in lines]
    base = AutoModelForCausalLM.from_pretrained(asked.folder / "policy", dtype=torch.float32)
    policy = PeftModel.from_pretrained(base, asked.folder / "start", is_trainable=True)
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=length_penalty,
        rollout_func=given_answers(tokenizer, texts) if asked.same_batch else None,
        args=GRPOConfig(
            output_dir="out",
            per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            num_iterations=asked.steps if asked.same_batch else 1,
            num_train_epochs=1,
            max_completion_length=NEW_TOKENS,
            beta=0.05,
            # The objective of the paper, which is our default. Left alone, the trainer takes DAPO's mean over tokens
            # and weighs the KL by the ratio to the policy that sampled: the same passes over the model.
            loss_type="grpo",
            use_bias_correction_kl=False,
            learning_rate=1e-4,
            logging_steps=1,
            bf16=asked.bf16,
            gradient_checkpointing=False,
            report_to=[],
            use_cpu=asked.device == "cpu",
            save_strategy="no",
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": texts[: PROMPTS * (1 if asked.same_batch else asked.steps)]}),
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    log = [line for line in trainer.state.log_history if "loss" in line]
    losses = [line["loss"] for line in log]
    tell(asked, seconds, optimizer_steps=trainer.state.global_step, tokens=answer_tokens(log), losses=losses)


def length_penalty(completions: list[str], **columns: object) -> list[float]:
    """Minus the words by which an answer is shorter or longer than the target."""
    return [-float(abs(len(text.split()) - TARGET_WORDS)) for text in completions]


def given_answers(tokenizer, texts: list[str]):
    """What stands for the sampling: answer k of prompt n is the start of prompt 4 + 8 n + k, k tokens short of 48."""

    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict:
        drawn: dict[str, int] = defaultdict(int)
        answers = []
        for prompt in prompts:
            k = drawn[prompt]
            drawn[prompt] += 1
            other = texts[PROMPTS + GROUP * texts.index(prompt) + k]
            answers.append(tokenizer(other)["input_ids"][: NEW_TOKENS - k])
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        return {"prompt_ids": ids, "completion_ids": answers, "logprobs": None}

    return rollout


def answer_tokens(log: list[dict[str, float]]) -> int:
    """Tokens drawn; several updates from one rollout have one line with lengths."""
    lengths = [line["completions/mean_length"] for line in log if "completions/mean_length" in line]
    return round(sum(lengths) * PROMPTS * GROUP)


if __name__ == "__main__":
    main()
