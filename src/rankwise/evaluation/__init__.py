"""What was lost and what was saved: perplexity, parameters, bytes, generated text."""

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
    "decode_speed",
    "generate",
    "measure_cost",
    "perplexity",
    "scored_windows",
]
