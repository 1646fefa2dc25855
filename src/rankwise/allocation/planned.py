"""Ranks from a plan that was made before, for this model or for another of the same architecture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from rankwise.allocation.base import Allocation, Choice, Evidence, note_other_weights
from rankwise.errors import BudgetError, RecipeError
from rankwise.models import Site
from rankwise.sizes import BitBudget, Budget, QuantizedRank, RankPlan, kept_by


class Planned(Allocation):
    """Takes a plan's ranks as they stand; with another `budget.keep`, in the same proportions.

    Attributes:
        file: the plan's JSON file.
    """

    name: Literal["plan"] = "plan"
    file: str

    @classmethod
    def parse(cls, text: str) -> Self:
        if not text:
            raise RecipeError("A plan needs a file.", where="plan:", remedy="write plan:FILE.json")
        return cls(file=text)

    def choose(self, sites: Sequence[Site], budget: Budget, evidence: Evidence) -> Choice:
        given = RankPlan.load(Path(self.file))
        ranks = given.fitting(sites, self.file)
        note_other_weights(given, self.file, evidence)
        if isinstance(budget, BitBudget) != bool(given.q_bits):
            raise BudgetError(
                f"The plan was made with the method {given.method}, and its ranks mean nothing to this one.",
                where=self.file,
                remedy=f"leave --method away, or use --method {given.method}",
            )
        if isinstance(budget, BitBudget):
            ranked = [rank for rank in ranks.values() if isinstance(rank, QuantizedRank)]
            other_bits = len(budget.choices) == 1 and any(rank.q_bits != budget.choices[0] for rank in ranked)
            if other_bits or (budget.rank is not None and any(int(rank) != budget.rank for rank in ranked)):
                raise BudgetError(
                    "The plan has other bits of Q or other ranks than those given beside it.",
                    where=self.file,
                    remedy="leave q_bits and rank away; the plan says both",
                )
            if budget.bits is not None and budget.bits != given.bits:
                ranks = budget.fill(sites, given.fractions())
                evidence.reporter.note(
                    f"the plan takes {given.bits_a_weight:.4f} bits a weight; its proportions are scaled to "
                    f"{budget.asked}"
                )
        elif budget.sized and (budget.keep, budget.storage) != (given.keep, given.storage):
            ranks = budget.fill(sites, given.fractions())
            evidence.reporter.note(
                f"the plan keeps {given.kept:.4f} in {given.storage} storage; its proportions are scaled to "
                f"{budget.keep:g} in {budget.storage} storage"
            )
        return Choice(
            ranks=ranks,
            groups=kept_by({site.name: site.role for site in sites}, sites, ranks, budget),
            space=given.space,
            coordinates=given.coordinates,
        )
