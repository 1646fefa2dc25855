"""Which samples tell plans apart (Bolaco, section 3.2): those whose perplexity varies most over random plans."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankwise.allocation.spaces import space_named
from rankwise.allocation.surrogate import generator
from rankwise.errors import BudgetError
from rankwise.models import Site
from rankwise.sizes import Budget, Rank

_NOT_A_TRIAL = 1 << 40


def random_plans(
    space: str, sites: Sequence[Site], budget: Budget, lowest: float, count: int, seed: int
) -> list[dict[str, Rank]]:
    """Plans drawn at random, all on the budget.

    They are drawn from the space given, or from one fraction a role where that space needs more than shapes.

    Args:
        space: `spectral` or GxL.
        sites: all sites.
        budget: what they may keep.
        lowest: smallest kept fraction.
        count: how many.
        seed: for drawing.

    Returns:
        Ranks by site name, `count` times.

    Raises:
        BudgetError: when no plan meets the budget.
    """
    source = generator(seed, _NOT_A_TRIAL)
    name = "rolesx1" if space == "spectral" else space
    while True:
        try:
            drawn_from = space_named(name, sites, budget, {}, lowest)
            break
        except BudgetError:
            # A small budget leaves no room above a fifth of every role.
            if lowest < 1e-3 or name != "rolesx1":
                raise
            lowest /= 2
    return [drawn_from.ranks(point) for point in drawn_from.draw(count, source)]


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
