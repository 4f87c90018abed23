"""Train a language model from human preferences: fine-tuning, reward models, DPO, PPO and their evaluation."""

__version__ = "0.1.0"
