"""Which way a model is held in memory."""

from __future__ import annotations

from rankwise.progress import Reporter
from rankwise.recipes import Recipe


def choose_memory(recipe: Recipe, reporter: Reporter) -> str:
    return "whole" if recipe.memory == "auto" else recipe.memory
