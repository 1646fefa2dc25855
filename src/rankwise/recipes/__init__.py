"""The validated objects that say what a run does; ready recipes lie in `ready/`."""

from rankwise.recipes.comparison import Comparison, Way, comparison_from, read_sizes, read_ways
from rankwise.recipes.compression import (
    STEPS,
    Calibration,
    Evaluation,
    Recipe,
    Repair,
    Validation,
)
from rankwise.recipes.finetuning import TRAININGS, FineTune, finetune_from
from rankwise.recipes.reading import read_recipe, ready_recipes, recipe_from, set_value

__all__ = [
    "STEPS",
    "TRAININGS",
    "Calibration",
    "Comparison",
    "Evaluation",
    "FineTune",
    "Recipe",
    "Repair",
    "Validation",
    "Way",
    "comparison_from",
    "finetune_from",
    "read_recipe",
    "read_sizes",
    "read_ways",
    "ready_recipes",
    "recipe_from",
    "set_value",
]
