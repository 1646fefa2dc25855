"""How size is spread over the sites."""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Tag

from rankwise.allocation.base import Allocation, Choice, Cuts, Evidence, Looks, Outcome, Problem
from rankwise.allocation.bayesian import Bayesian, UnitChoice
from rankwise.allocation.choice import MultipleChoice
from rankwise.allocation.fill import fill, nearest_cuts
from rankwise.allocation.manual import Manual
from rankwise.allocation.planned import Planned
from rankwise.allocation.plugins import PLUGINS, Plugged
from rankwise.allocation.selection import by_variance, random_plans
from rankwise.allocation.spectral import Spectral
from rankwise.allocation.trials import TrialLog, finite
from rankwise.allocation.uniform import Uniform
from rankwise.allocation.units import Counts, Units, unit_space_named
from rankwise.errors import RecipeError, nearest
from rankwise.plugins import in_file

ALLOCATIONS: dict[str, type[Allocation]] = {
    "uniform": Uniform,
    "manual": Manual,
    "spectral": Spectral,
    "bayesian": Bayesian,
    "plan": Planned,
}


AnyAllocation = Annotated[
    Annotated[Uniform, Tag("uniform")]
    | Annotated[Manual, Tag("manual")]
    | Annotated[Spectral, Tag("spectral")]
    | Annotated[Bayesian, Tag("bayesian")]
    | Annotated[Planned, Tag("plan")]
    | Annotated[Plugged, Tag("plugin")],
    Discriminator(lambda value: PLUGINS.branch(value, ALLOCATIONS)),
]
"""An allocation as a node of a recipe, told by its name."""


def split_allocation(text: str) -> tuple[str, str]:
    """The name of an allocation and what stands behind its colon: `FILE.py:Class` has a colon of its own."""
    known = text.partition(":")[0] in ALLOCATIONS
    inside = text.index(".py:") + len(".py:") if in_file(text) and not known else 0
    name, _, rest = text[inside:].partition(":")
    return text[:inside] + name, rest


def allocation_from(text: str) -> Allocation:
    """Read `uniform`, `spectral`, `bayesian:5x1`, `manual:q=0.7,v=dense,...`, `plan:FILE` or `FILE.py:Class`.

    Raises:
        RecipeError: naming the nearest allocation, or the bad part.
    """
    name, rest = split_allocation(text)
    if name in ALLOCATIONS:
        return ALLOCATIONS[name].parse(rest)
    if not PLUGINS.has(name):
        raise RecipeError(f"There is no allocation {name!r}.", where="allocation", remedy=nearest(name, ALLOCATIONS))
    found: Allocation = PLUGINS.node(name).parse(rest)
    return found


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
    "split_allocation",
    "unit_space_named",
]
