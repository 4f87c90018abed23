"""The peer's SFT, reward modelling, DPO and KTO.

    python bench/peer/offline.py KIND FOLDER STEPS [--bf16] [--same-batch] [--device cuda]

Runs in an environment of its own with the current TRL; FOLDER comes from `bench/workload.py`, KIND is sft, rm, dpo or
kto. The trainers keep their defaults wherever those are not part of the work; KTO's takes its rows in the file's order.
The last line printed is one JSON object.
"""

import json
import time

import torch
from datasets import Dataset
from measured import arguments, tell
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

ROWS = 8


def main() -> None:
    asked = arguments("sft", "rm", "dpo", "kto", flags=("--same-batch",))
    tokenizer = AutoTokenizer.from_pretrained(asked.folder / "policy")
    name = {"sft": "answers.jsonl", "kto": "labelled.jsonl"}.get(asked.kind, "pairs.jsonl")
    rows = [json.loads(line) for line in (asked.folder / name).read_text(encoding="utf-8").splitlines()]
    rows = rows[: ROWS if asked.same_batch else ROWS * asked.steps]
    data = Dataset.from_list(rows)
    settings = {
        "output_dir": "out",
        "per_device_train_batch_size": ROWS,
        "num_train_epochs": asked.steps if asked.same_batch else 1,
        "max_length": 256,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": asked.device == "cpu",
        "bf16": asked.bf16,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    if asked.kind == "rm":
        from trl import RewardConfig, RewardTrainer

        base = AutoModelForSequenceClassification.from_pretrained(asked.folder / "reward", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, asked.folder / "reward_start", is_trainable=True)
        trainer = RewardTrainer(
            model=model, args=RewardConfig(**settings), processing_class=tokenizer, train_dataset=data
        )
    else:
        from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

        base = AutoModelForCausalLM.from_pretrained(asked.folder / "policy", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, asked.folder / "start", is_trainable=True)
        kinds = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig), "kto": (KTOTrainer, KTOConfig)}
        make_trainer, make_config = kinds[asked.kind]
        trainer = make_trainer(
            model=model, args=make_config(**settings), processing_class=tokenizer, train_dataset=data
        )

    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    columns = [name for name in trainer.train_dataset.column_names if name.endswith("_ids")]
    tokens = sum(len(ids) for name in columns for ids in trainer.train_dataset[name])
    if "prompt_ids" in columns:  # stands before both answers: chosen and rejected, or its own and a stranger's
        tokens += sum(len(ids) for ids in trainer.train_dataset["prompt_ids"])
    tokens *= asked.steps if asked.same_batch else 1
    tell(asked, seconds, optimizer_steps=trainer.state.global_step, tokens=tokens, losses=losses)


if __name__ == "__main__":
    main()
