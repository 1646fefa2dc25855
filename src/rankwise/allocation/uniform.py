"""The same share of its bits at every site."""

from __future__ import annotations

from typing import Literal

from rankwise.allocation.base import Allocation, Choice, Evidence, Problem
from rankwise.allocation.fill import fill


class Uniform(Allocation):
    """Every site gets the cut that takes the kept fraction of it, rounded so that the whole fills the budget."""

    name: Literal["uniform"] = "uniform"

    def choose(self, problem: Problem, evidence: Evidence) -> Choice:
        return problem.by_role(fill(problem, {site.name: 1.0 for site in problem.sites}))
