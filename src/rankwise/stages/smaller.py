"""What makes a model smaller before its weights are looked at: units go, or directions of its residual stream."""

from __future__ import annotations

from dataclasses import replace

from rankwise.evaluation import Objective
from rankwise.methods import SliceGPT
from rankwise.stages.planning import select_samples
from rankwise.stages.pruning import check_pruning, prune
from rankwise.stages.slicing import check_slicing, slice_residual
from rankwise.stages.unit_search import check_search, search_units
from rankwise.stages.work import Work


def check_budget(work: Work) -> None:
    """Find out before anything slow that no plan can meet the budget, or that the model cannot be made smaller.

    Raises:
        ModelError: naming the architecture.
        BudgetError: saying what has to be kept at least.
        RecipeError: when the model is not held whole, or cannot be written as asked.
    """
    if not work.recipe.method.prunes:
        work.recipe.allocation.check(work.problem)
    elif isinstance(work.recipe.method, SliceGPT):
        check_slicing(work)
    else:
        check_pruning(work)
        if work.recipe.allocation.searches:
            check_search(work)


def make_smaller(work: Work) -> Work:
    """Make the model smaller, as its method and the budget say, or as a search finds best.

    Returns:
        The run with the smaller model and its sites; the budget is that of the original.

    Raises:
        BudgetError: when nothing fits.
        NotFiniteError: naming the layer.
        RunError: when the log of trials belongs to another recipe.
    """
    if isinstance(work.recipe.method, SliceGPT):
        return slice_residual(work)
    if not work.recipe.judges:
        return prune(work)
    samples, settings = select_samples(work, None), work.recipe.objective
    judge = Objective(work.loaded.model, samples, settings, lambda _cuts: None, work.recipe.validation.batch_size)
    if work.recipe.allocation.searches:
        found, stays = search_units(work, judge)
        made = replace(prune(work, stays), searched=found)
    else:
        made = prune(work)
    return replace(made, judge=judge.of(made.loaded.model))
