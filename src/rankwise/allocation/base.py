"""What every allocation is, what it may look at, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict

from rankwise.errors import RecipeError
from rankwise.models import Site
from rankwise.progress import Reporter
from rankwise.sizes import DENSE, Allowance, Candidates, Cut, Form, Plan

Cuts = dict[str, Cut]
"""By site name."""


class Looks(IntEnum):
    """What an allocation looks at, cheapest first; each includes the ones before it."""

    SIZES = 0
    LOSSES = 1
    OBJECTIVE = 2


@dataclass(frozen=True)
class Problem:
    """A multiple choice: one cut for every site, all together within an allowance.

    Attributes:
        sites: all that the allowance counts.
        candidates: by site name, what it may choose from.
        form: how cuts are stored, which says what they take.
        allowance: what all may take together.
    """

    sites: Sequence[Site]
    candidates: Mapping[str, Candidates]
    form: Form
    allowance: Allowance

    def cost(self, site: Site, cut: Cut) -> int:
        """Bits of a site under a cut, which need not be among its candidates."""
        return self.form.bits((site.m, site.n), cut)

    def spent(self, cuts: Mapping[str, Cut]) -> int:
        """Bits of all sites."""
        return sum(self.cost(site, cuts[site.name]) for site in self.sites)

    def units(self, site: Site) -> int:
        """Bits of a site at one unit a weight, see `Allowance.unit_bits`."""
        return site.parameters * self.allowance.unit_bits

    def kept_by(self, labels: Mapping[str, str], cuts: Mapping[str, Cut]) -> dict[str, float]:
        """What each group of sites takes a weight: a fraction of it, or bits, as the budget is spelled.

        Args:
            labels: site name -> group.
            cuts: by site name.
        """
        whole: dict[str, int] = {}
        kept: dict[str, int] = {}
        for site in self.sites:
            label = labels[site.name]
            whole[label] = whole.get(label, 0) + self.units(site)
            kept[label] = kept.get(label, 0) + self.cost(site, cuts[site.name])
        return {label: kept[label] / whole[label] for label in whole}

    def by_role(self, cuts: Cuts) -> Choice:
        """A choice without a search, its groups being the roles."""
        return Choice(cuts, self.kept_by({site.name: site.role for site in self.sites}, cuts))

    def checked(self, choice: Choice, name: str) -> Choice:
        """The choice, when it is one of this problem; what it takes is checked where the plan is made.

        Args:
            choice: of an allocation.
            name: of that allocation, for errors.

        Raises:
            RecipeError: when a site has no cut, or one that its shape, the method or a pattern does not allow.
        """
        for site in self.sites:
            cut, known = choice.cuts.get(site.name), self.candidates[site.name]
            said = ""
            if cut is None:
                said = "no cut"
            elif cut.rank is not None and cut.rank > min(site.m, site.n):
                said = f"the rank {cut.rank}, above min(m, n) = {min(site.m, site.n)}"
            elif known.stays and not cut.dense:
                said = f"{cut}, though it stays as it is"
            elif cut.coded and not any(each.coded for each in known.cuts):
                said = f"{cut}, and the method has no codes"
            if said:
                raise RecipeError(
                    f"The allocation gives {site.name} {said}.",
                    where=name,
                    remedy="choose() answers with a cut of every site of problem.sites",
                )
        return choice

    def check_smallest(self, compressed: Callable[[Site], bool] = lambda _site: True) -> None:
        """Raise when the smallest candidates are already too much.

        Args:
            compressed: whether a site is; the others stay dense.

        Raises:
            BudgetError: saying what can be reached.
        """
        smallest = sum(
            self.candidates[site.name].smallest if compressed(site) else self.cost(site, DENSE) for site in self.sites
        )
        multiple = self.allowance.budget.rank_multiple
        self.allowance.require(
            smallest, f", lower budget.rank_multiple ({multiple} now), or let more sites be compressed"
        )


@dataclass(frozen=True)
class Outcome:
    """What one plan scored on the validation samples.

    Attributes:
        value: what a search minimises.
        perplexity: its first term.
        kl: divergence from the original model in nats a token, its second term before the weight.
    """

    value: float
    perplexity: float
    kl: float


Judge = Callable[[Iterable[Mapping[str, Cut]]], Iterator[Outcome]]
"""Cuts by site name, one plan after another -> their outcomes in the same order."""


@dataclass(frozen=True)
class Evidence:
    """What a choice may be made from, beside the problem.

    Attributes:
        judge: gives the outcome of one plan after another, a forward pass each; None unless the allocation looks at
            them. It takes the next plan when all but `ahead - 1` of those before it have been answered.
        ahead: plans that are judged at a time.
        log: file for finished trials; None keeps them in memory.
        log_key: hash of all that a trial's outcome depends on.
        seed: for everything drawn.
        reporter: told about trials.
        fingerprint: of the model's weights.
    """

    judge: Judge | None = None
    ahead: int = 1
    log: Path | None = None
    log_key: str = ""
    seed: int = 0
    reporter: Reporter = field(default_factory=lambda: Reporter(show=False))
    fingerprint: str | None = None


@dataclass(frozen=True)
class Choice:
    """Cuts, and how they came about.

    Attributes:
        cuts: by site name.
        groups: by group, what it takes a weight in the unit of the budget.
        space: the space searched, or None.
        coordinates: the point chosen in it, by label.
        objective: its outcome as plain numbers, or None.
        trials: every trial of a search as plain values.
    """

    cuts: Cuts
    groups: dict[str, float] = field(default_factory=dict)
    space: str | None = None
    coordinates: dict[str, float] = field(default_factory=dict)
    objective: dict[str, float] | None = None
    trials: list[dict[str, Any]] = field(default_factory=list)


def note_other_weights(plan: Plan, file: str, evidence: Evidence) -> None:
    """Say that a plan was made for the same shapes with other weights, such as the model before fine-tuning."""
    if evidence.fingerprint is not None and plan.fingerprint not in (None, evidence.fingerprint):
        evidence.reporter.note(f"{file} was made for a model of the same architecture with other weights")


class Allocation(BaseModel, ABC):
    """A frozen settings object that is its own node in a recipe and chooses a cut for every site."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    looks: ClassVar[Looks] = Looks.SIZES

    name: str

    @property
    def searches(self) -> bool:
        """Whether validation samples are needed."""
        return self.looks == Looks.OBJECTIVE

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the part behind the colon of the command line's form; there is none unless a class says otherwise.

        Raises:
            RecipeError: when it cannot be read.
        """
        name = cls.model_fields["name"].default
        if text:
            raise RecipeError(f"{name} takes no settings here.", where=f"{name}:{text}", remedy=f"write {name}")
        return cls(name=name)

    def check(self, problem: Problem) -> None:
        """Find out, before anything slow, that no plan can meet the allowance.

        Args:
            problem: its candidates without losses.

        Raises:
            BudgetError: saying what has to be kept at least.
            RecipeError: when the settings do not fit these sites.
        """
        self.choose(problem, Evidence())

    @abstractmethod
    def choose(self, problem: Problem, evidence: Evidence) -> Choice:
        """Choose a cut for every site.

        Raises:
            BudgetError: when nothing fits.
            RecipeError: when the settings do not fit these sites.
        """
