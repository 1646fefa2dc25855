"""Cuts from a plan that was made before, for this model or for another of the same architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from rankwise.allocation.base import Allocation, Choice, Evidence, Problem, note_other_weights
from rankwise.allocation.fill import fill
from rankwise.errors import BudgetError, RecipeError
from rankwise.sizes import Plan


class Planned(Allocation):
    """Takes a plan's cuts as they stand; with another budget, in the same proportions.

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

    def choose(self, problem: Problem, evidence: Evidence) -> Choice:
        given = Plan.load(Path(self.file))
        cuts = given.fitting(problem.sites, self.file)
        note_other_weights(given, self.file, evidence)
        stays = [s.name for s in problem.sites if problem.candidates[s.name].stays and not cuts[s.name].dense]
        if stays and not all(each.stays for each in problem.candidates.values()):
            raise BudgetError(
                f"The plan compresses {stays[0]} ({cuts[stays[0]]}), which is left out here.",
                where=self.file,
                remedy="give the include and exclude that the plan was made with, or make a plan for these",
            )
        unknown = next((s.name for s in problem.sites if not problem.candidates[s.name].allows(cuts[s.name])), None)
        if unknown is not None:
            raise BudgetError(
                f"The plan was made with the method {given.method}: its cut of {unknown} ({cuts[unknown]}) is not one "
                "that this method, its codebook, or the bits and ranks given beside the plan allow.",
                where=self.file,
                remedy=f"leave --method, bits of Q and ranks away, or use --method {given.method}",
            )
        budget, storages = problem.allowance.budget, (given.form.storage, problem.form.storage)
        if budget.sized and (given.spelling != budget.spelling or storages[0] != storages[1]):
            form = given.form.model_copy(update={"number_bits": problem.form.number_bits})
            made_for = problem.allowance.in_words(given.model_copy(update={"form": form}).kept_bits)
            cuts = fill(problem, given.fractions())
            evidence.reporter.note(
                f"the plan takes {made_for} in {storages[0]} storage; its proportions are scaled to "
                f"{problem.allowance.asked} in {storages[1]} storage"
            )
        return Choice(
            cuts=cuts,
            groups=problem.by_role(cuts).groups,
            space=given.space,
            coordinates=given.coordinates,
        )
