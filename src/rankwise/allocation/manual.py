"""A kept fraction for every role, given by hand, as in LoRD (Kaushal et al., 2023, Appendix C)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError

from rankwise.allocation.base import Allocation, Choice, Evidence, Problem
from rankwise.allocation.fill import fill, nearest_cuts
from rankwise.errors import RecipeError, nearest

Fraction = Annotated[float, Field(gt=0, le=1)] | Literal["dense"]


class Manual(Allocation):
    """Kept fractions by role; roles that are not named stay dense.

    On a budget the fractions give the proportions and the whole is scaled to fill it. Without one they are taken as
    they stand, each at the candidate whose size is nearest.

    Attributes:
        roles: role -> kept fraction, or `dense`.
    """

    name: Literal["manual"] = "manual"
    roles: dict[str, Fraction]

    @classmethod
    def parse(cls, text: str) -> Self:
        roles: dict[str, float | str] = {}
        for part in text.split(","):
            role, equals, value = part.partition("=")
            if not equals or not role:
                raise RecipeError(
                    "A role has no fraction.", where=f"manual:{text}", remedy="write manual:q=0.7,v=dense"
                )
            try:
                roles[role.strip()] = "dense" if value.strip() == "dense" else float(value)
            except ValueError:
                raise RecipeError(
                    f"{value!r} is no fraction.", where=f"manual:{text}", remedy="use a number in (0, 1] or dense"
                ) from None
        try:
            return cls(roles=roles)
        except ValidationError:
            raise RecipeError(
                "A fraction is outside (0, 1].", where=f"manual:{text}", remedy="use a number in (0, 1] or dense"
            ) from None

    def choose(self, problem: Problem, evidence: Evidence) -> Choice:
        present = {site.role for site in problem.sites}
        for role in self.roles:
            if role not in present:
                raise RecipeError(
                    f"The model has no role {role!r}.", where="allocation.roles", remedy=nearest(role, present)
                )
        fractions: dict[str, float | None] = {}
        for site in problem.sites:
            fraction = self.roles.get(site.role, "dense")
            # 1 and dense are the same where a weight may stay as it is.
            stays = fraction == 1 and problem.candidates[site.name].whole
            fractions[site.name] = None if fraction == "dense" or stays else float(fraction)
        spread = fill if problem.allowance.sized else nearest_cuts
        return problem.by_role(spread(problem, fractions))
