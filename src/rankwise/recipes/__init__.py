"""The validated objects that say what a run does; ready recipes lie in `ready/`."""

from rankwise.recipes.compression import (
    STEPS,
    Calibration,
    Evaluation,
    Recipe,
    Repair,
    Validation,
    read_recipe,
    ready_recipes,
    recipe_from,
    set_value,
)
from rankwise.recipes.finetuning import TRAININGS, FineTune

__all__ = [
    "STEPS",
    "TRAININGS",
    "Calibration",
    "Evaluation",
    "FineTune",
    "Recipe",
    "Repair",
    "Validation",
    "read_recipe",
    "ready_recipes",
    "recipe_from",
    "set_value",
]
