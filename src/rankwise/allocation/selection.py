"""Which samples tell plans apart (Bolaco, section 3.2): those whose perplexity varies most over random plans."""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.allocation.base import Cuts, Problem
from rankwise.allocation.spaces import space_named
from rankwise.allocation.surrogate import generator
from rankwise.errors import BudgetError

_NOT_A_TRIAL = 1 << 40


def random_plans(space: str, problem: Problem, lowest: float, count: int, seed: int) -> list[Cuts]:
    """Plans drawn at random, all on the budget.

    They are drawn from the space given, or from one share a role where that space needs more than sizes.

    Args:
        space: `spectral` or GxL.
        problem: what is chosen from.
        lowest: smallest fraction of a group's bits.
        count: how many.
        seed: for drawing.

    Returns:
        Cuts by site name, `count` times.

    Raises:
        BudgetError: when no plan meets the budget.
    """
    source = generator(seed, _NOT_A_TRIAL)
    name = "rolesx1" if space == "spectral" else space
    while True:
        try:
            drawn_from = space_named(name, problem, lowest)
            break
        except BudgetError:
            # A small budget leaves no room above a fifth of every role.
            if lowest < 1e-3 or name != "rolesx1":
                raise
            lowest /= 2
    return [drawn_from.cuts(point) for point in drawn_from.draw(count, source)]


def by_variance(perplexities: Tensor, count: int, largest: bool) -> Tensor:
    """Indices of the samples whose perplexity varies most (or least) over plans, ascending.

    Args:
        perplexities: shape `[plans, samples]`; a value that is not finite counts as the largest that is.
        count: how many to take.
        largest: most or least.
    """
    finite = perplexities[torch.isfinite(perplexities)]
    ceiling = float(finite.max()) if len(finite) else 1.0
    variance = perplexities.nan_to_num(nan=ceiling, posinf=ceiling).var(0)
    order = variance.argsort(descending=largest, stable=True)
    return order[:count].sort().values
