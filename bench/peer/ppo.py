"""The peer's PPO: python bench/peer/ppo.py FOLDER ITERATIONS [--bf16] [--logprobs] [--device cuda].

Runs in an environment of its own with TRL 1.12, the last release that has it; FOLDER comes from `bench/workload.py`.
The value model is a full classifier, as that trainer wants it. `--logprobs` trains nothing and prints the mean
log-probability of fixed rows, to hold beside ours. The last line printed is one JSON object.
"""

import json
import os
import time
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from measured import arguments, tell
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer
from trl.experimental.ppo.ppo_trainer import forward
from trl.trainer.utils import selective_log_softmax

ROLLOUT, NEW_TOKENS, PROMPT_TOKENS = 32, 48, 64


def main() -> None:
    asked = arguments(steps="iterations", flags=("--logprobs",))
    tokenizer = AutoTokenizer.from_pretrained(asked.folder / "policy", padding_side="left")
    lines = (asked.folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines[: ROLLOUT * asked.steps]]
    base = AutoModelForCausalLM.from_pretrained(asked.folder / "policy", dtype=torch.float32)
    policy = PeftModel.from_pretrained(base, asked.folder / "start", is_trainable=True)
    if asked.logprobs:
        print(
            json.dumps({"mean_logprob": mean_logprob(policy.to(asked.device), ids[:ROLLOUT], tokenizer.pad_token_id)})
        )
        return
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir="out",
            per_device_train_batch_size=ROLLOUT,
            gradient_accumulation_steps=1,
            num_ppo_epochs=4,
            num_mini_batches=1,
            total_episodes=ROLLOUT * asked.steps,
            response_length=NEW_TOKENS,
            temperature=1.0,
            num_sample_generations=0,
            learning_rate=1e-5,
            bf16=asked.bf16,
            gradient_checkpointing=False,
            report_to=[],
            use_cpu=asked.device == "cpu",
            save_strategy="no",
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=classifier(asked.folder),
        value_model=classifier(asked.folder),
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        eval_dataset=Dataset.from_dict({"input_ids": ids[:8]}),
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    tell(asked, seconds, optimizer_steps=4 * asked.steps, tokens=ROLLOUT * NEW_TOKENS * asked.steps)


def classifier(folder: Path) -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1, dtype=torch.float32)


@torch.no_grad()
def mean_logprob(policy: torch.nn.Module, ids: list[list[int]], pad_token_id: int) -> float:
    """Of the prompts' last tokens, read as answers, through the trainer's own forward pass and log-softmax."""
    rows = torch.tensor(ids, device=next(policy.parameters()).device)
    policy.eval()
    logits = forward(policy, rows, pad_token_id).logits[:, PROMPT_TOKENS - 16 - 1 : -1]
    return float(selective_log_softmax(logits, rows[:, PROMPT_TOKENS - 16 :]).mean())


if __name__ == "__main__":
    main()
