"""What makes a model smaller before its weights are looked at: units go, or directions of its residual stream."""

from __future__ import annotations

from rankwise.methods import SliceGPT
from rankwise.stages.pruning import check_pruning, prune
from rankwise.stages.slicing import check_slicing, slice_residual
from rankwise.stages.work import Work


def check_smaller(work: Work) -> None:
    """Find out before anything slow that it cannot be done, or not within the budget.

    Raises:
        ModelError: naming the architecture.
        BudgetError: saying what has to be kept at least.
        RecipeError: when the model is not held whole, or cannot be written as asked.
    """
    check = check_slicing if isinstance(work.recipe.method, SliceGPT) else check_pruning
    check(work)


def make_smaller(work: Work) -> Work:
    """Make the model smaller, as its method and the budget say.

    Returns:
        The run with the smaller model and its sites; the budget is that of the original.

    Raises:
        BudgetError: when nothing fits.
        NotFiniteError: naming the layer.
    """
    make = slice_residual if isinstance(work.recipe.method, SliceGPT) else prune
    return make(work)
