"""What was lost and what was saved: perplexity, parameters, bytes, generated text."""

from rankwise.evaluation.chat import answer, chat_ids, is_chat
from rankwise.evaluation.cost import Cost, measure_cost
from rankwise.evaluation.generate import generate
from rankwise.evaluation.objective import Objective, ObjectiveSettings
from rankwise.evaluation.operations import Operations, count_operations
from rankwise.evaluation.perplexity import Perplexity, perplexity, scored_windows
from rankwise.evaluation.scoring import Scored, differences, require_same_tokenizer
from rankwise.evaluation.speed import Speeds, decode_speed, measure_speeds
from rankwise.evaluation.tasks import TaskResults, TaskScore, paired_difference, require_tasks, run_tasks

__all__ = [
    "Cost",
    "Objective",
    "ObjectiveSettings",
    "Operations",
    "Perplexity",
    "Scored",
    "Speeds",
    "TaskResults",
    "TaskScore",
    "answer",
    "chat_ids",
    "count_operations",
    "decode_speed",
    "differences",
    "generate",
    "is_chat",
    "measure_cost",
    "measure_speeds",
    "paired_difference",
    "perplexity",
    "require_same_tokenizer",
    "require_tasks",
    "run_tasks",
    "scored_windows",
]
