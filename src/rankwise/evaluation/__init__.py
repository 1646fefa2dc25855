"""What was lost and what was saved: perplexity, parameters, bytes, generated text."""

from rankwise.evaluation.chat import answer, chat_ids, is_chat
from rankwise.evaluation.cost import Cost, measure_cost
from rankwise.evaluation.generate import generate
from rankwise.evaluation.objective import Objective, ObjectiveSettings
from rankwise.evaluation.perplexity import Perplexity, perplexity, scored_windows
from rankwise.evaluation.speed import decode_speed

__all__ = [
    "Cost",
    "Objective",
    "ObjectiveSettings",
    "Perplexity",
    "answer",
    "chat_ids",
    "decode_speed",
    "generate",
    "is_chat",
    "measure_cost",
    "perplexity",
    "scored_windows",
]
