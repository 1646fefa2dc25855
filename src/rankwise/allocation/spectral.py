"""A plan from estimated loss over the whole model, without a search."""

from __future__ import annotations

from typing import ClassVar, Literal

from rankwise.allocation.base import Allocation, Choice, Evidence, Looks, Problem
from rankwise.allocation.choice import MultipleChoice


class Spectral(Allocation):
    """Cuts that minimise the sum of estimated losses, see `choice.py`.

    Meant for methods whose losses are in one unit at every site (`two_sided`, and all that quantise). Those of others
    have a scale of their own at each site; the plan is then only as good as that scale.
    """

    looks: ClassVar[Looks] = Looks.LOSSES

    name: Literal["spectral"] = "spectral"

    def check(self, problem: Problem) -> None:
        problem.check_smallest()

    def choose(self, problem: Problem, evidence: Evidence) -> Choice:
        return problem.by_role(MultipleChoice(problem).plan())
