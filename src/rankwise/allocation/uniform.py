"""The same kept fraction at every site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from rankwise.allocation.base import Allocation, Choice, Evidence
from rankwise.errors import RecipeError
from rankwise.models import Site
from rankwise.sizes import Budget


class Uniform(Allocation):
    """Every site gets the rank that costs the kept fraction of it, rounded so that the whole fills the budget."""

    name: Literal["uniform"] = "uniform"

    @classmethod
    def parse(cls, text: str) -> Self:
        if text:
            raise RecipeError("uniform takes no settings.", where=f"uniform:{text}", remedy="write uniform")
        return cls()

    def choose(self, sites: Sequence[Site], budget: Budget, evidence: Evidence) -> Choice:
        return Choice.by_role(sites, budget.fill(sites, {site.name: 1.0 for site in sites}), budget)
