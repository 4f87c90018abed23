"""A small assistant world with known truth: tasks, answers of mixed quality, a gold scorer and a noisy labeller."""

from rlhf.data.tinychat.gold import GoldConfig, GoldScore, GoldScorer
from rlhf.data.tinychat.labeller import Labeller, LabellerConfig
from rlhf.data.tinychat.quality import Candidate, QualityConfig, write_candidate
from rlhf.data.tinychat.rows import answer_reward, gold_reward, preference_pairs, prompt_rows
from rlhf.data.tinychat.schema import Task, is_task_of
from rlhf.data.tinychat.steps import judge_steps, step_rows
from rlhf.data.tinychat.tasks import make_tasks

__all__ = [
    "Candidate",
    "GoldConfig",
    "GoldScore",
    "GoldScorer",
    "Labeller",
    "LabellerConfig",
    "QualityConfig",
    "Task",
    "answer_reward",
    "gold_reward",
    "is_task_of",
    "judge_steps",
    "make_tasks",
    "preference_pairs",
    "prompt_rows",
    "step_rows",
    "write_candidate",
]
