"""A kept fraction for every role, given by hand, as in LoRD (Kaushal et al., 2023, Appendix C)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError

from rankwise.allocation.base import Allocation, Choice, Evidence
from rankwise.errors import RecipeError, nearest
from rankwise.models import Site
from rankwise.sizes import BitBudget, Budget

Fraction = Annotated[float, Field(gt=0, le=1)] | Literal["dense"]


class Manual(Allocation):
    """Kept fractions by role; roles that are not named stay dense.

    With `budget.keep` set, the fractions give the proportions and the whole is scaled to fill the budget. Without it
    they are taken as they stand, each rank rounded to the nearest multiple.

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

    def choose(self, sites: Sequence[Site], budget: Budget, evidence: Evidence) -> Choice:
        present = {site.role for site in sites}
        for role in self.roles:
            if role not in present:
                raise RecipeError(
                    f"The model has no role {role!r}.", where="allocation.roles", remedy=nearest(role, present)
                )
        fractions: dict[str, float | None] = {}
        whole = not isinstance(budget, BitBudget)
        for site in sites:
            fraction = self.roles.get(site.role, "dense")
            # 1 and dense are the same: at the break-even rank the factors cost as much as the matrix.
            fractions[site.name] = None if fraction == "dense" or (whole and fraction == 1) else float(fraction)
        if budget.sized:
            return Choice.by_role(sites, budget.fill(sites, fractions), budget)
        return Choice.by_role(
            sites,
            {
                site.name: None
                if (f := fractions[site.name]) is None
                else budget.round_rank(site, budget.rank_at(site, f))
                for site in sites
            },
            budget,
        )
