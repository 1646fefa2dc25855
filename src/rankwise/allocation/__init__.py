"""How much rank each site gets."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rankwise.allocation.base import Allocation
from rankwise.allocation.manual import Manual
from rankwise.allocation.uniform import Uniform
from rankwise.errors import RecipeError, nearest

ALLOCATIONS: dict[str, type[Allocation]] = {"uniform": Uniform, "manual": Manual}

AnyAllocation = Annotated[Uniform | Manual, Field(discriminator="name")]


def allocation_from(text: str) -> Allocation:
    """Read `uniform` or `manual:q=0.7,v=dense,...`.

    Raises:
        RecipeError: naming the nearest allocation, or the bad part.
    """
    name, _, rest = text.partition(":")
    if name not in ALLOCATIONS:
        raise RecipeError(f"There is no allocation {name!r}.", where="allocation", remedy=nearest(name, ALLOCATIONS))
    return ALLOCATIONS[name].parse(rest)


__all__ = ["ALLOCATIONS", "Allocation", "AnyAllocation", "Manual", "Uniform", "allocation_from"]
