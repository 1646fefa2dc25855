"""How size is spread over the sites."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rankwise.allocation.base import Allocation, Choice, Cuts, Evidence, Looks, Outcome, Problem
from rankwise.allocation.bayesian import Bayesian, UnitChoice
from rankwise.allocation.choice import MultipleChoice
from rankwise.allocation.fill import fill, nearest_cuts
from rankwise.allocation.manual import Manual
from rankwise.allocation.planned import Planned
from rankwise.allocation.selection import by_variance, random_plans
from rankwise.allocation.spectral import Spectral
from rankwise.allocation.trials import TrialLog, finite
from rankwise.allocation.uniform import Uniform
from rankwise.allocation.units import Counts, Units, unit_space_named
from rankwise.errors import RecipeError, nearest

ALLOCATIONS: dict[str, type[Allocation]] = {
    "uniform": Uniform,
    "manual": Manual,
    "spectral": Spectral,
    "bayesian": Bayesian,
    "plan": Planned,
}

AnyAllocation = Annotated[Uniform | Manual | Spectral | Bayesian | Planned, Field(discriminator="name")]


def allocation_from(text: str) -> Allocation:
    """Read `uniform`, `spectral`, `bayesian:5x1`, `manual:q=0.7,v=dense,...` or `plan:FILE`.

    Raises:
        RecipeError: naming the nearest allocation, or the bad part.
    """
    name, _, rest = text.partition(":")
    if name not in ALLOCATIONS:
        raise RecipeError(f"There is no allocation {name!r}.", where="allocation", remedy=nearest(name, ALLOCATIONS))
    return ALLOCATIONS[name].parse(rest)


__all__ = [
    "ALLOCATIONS",
    "Allocation",
    "AnyAllocation",
    "Bayesian",
    "Choice",
    "Counts",
    "Cuts",
    "Evidence",
    "Looks",
    "Manual",
    "MultipleChoice",
    "Outcome",
    "Planned",
    "Problem",
    "Spectral",
    "TrialLog",
    "Uniform",
    "UnitChoice",
    "Units",
    "allocation_from",
    "by_variance",
    "fill",
    "finite",
    "nearest_cuts",
    "random_plans",
    "unit_space_named",
]
