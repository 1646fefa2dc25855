"""What every allocation is, what it may look at, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from rankwise.models import Site
from rankwise.progress import Reporter
from rankwise.sizes import Budget, Rank, RankPlan, kept_by


class Looks(IntEnum):
    """What an allocation looks at, cheapest first; each includes the ones before it."""

    SHAPES = 0
    ENERGIES = 1
    OBJECTIVE = 2


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


@dataclass(frozen=True)
class Evidence:
    """What a plan may be chosen from.

    Attributes:
        energies: by site name, each component's loss, shape `[k]`; empty for an allocation that looks at shapes only.
        objective: ranks -> outcome, one forward pass; None unless the allocation looks at it.
        log: file for finished trials; None keeps them in memory.
        log_key: hash of all that a trial's outcome depends on.
        seed: for everything drawn.
        reporter: told about trials.
        fingerprint: of the model's weights.
    """

    energies: Mapping[str, Tensor] = field(default_factory=dict)
    objective: Callable[[Mapping[str, Rank]], Outcome] | None = None
    log: Path | None = None
    log_key: str = ""
    seed: int = 0
    reporter: Reporter = field(default_factory=lambda: Reporter(show=False))
    fingerprint: str | None = None


@dataclass(frozen=True)
class Choice:
    """Ranks, and how they came about.

    Attributes:
        ranks: by site name; None for dense.
        groups: by group, the fraction kept.
        space: the space searched, or None.
        coordinates: the point chosen in it, by label.
        objective: its outcome as plain numbers, or None.
        trials: every trial of a search as plain values.
    """

    ranks: dict[str, Rank]
    groups: dict[str, float] = field(default_factory=dict)
    space: str | None = None
    coordinates: dict[str, float] = field(default_factory=dict)
    objective: dict[str, float] | None = None
    trials: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def by_role(cls, sites: Sequence[Site], ranks: dict[str, Rank], budget: Budget) -> Choice:
        """A choice without a search, its groups being the roles."""
        return cls(ranks, kept_by({site.name: site.role for site in sites}, sites, ranks, budget))


def note_other_weights(plan: RankPlan, file: str, evidence: Evidence) -> None:
    """Say that a plan was made for the same shapes with other weights, such as the model before fine-tuning."""
    if evidence.fingerprint is not None and plan.fingerprint not in (None, evidence.fingerprint):
        evidence.reporter.note(f"{file} was made for a model of the same architecture with other weights")


class Allocation(BaseModel, ABC):
    """A frozen settings object that is its own node in a recipe and turns a budget into ranks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    looks: ClassVar[Looks] = Looks.SHAPES

    name: str

    @property
    def searches(self) -> bool:
        """Whether validation samples are needed."""
        return self.looks == Looks.OBJECTIVE

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Self:
        """Read the part behind the colon of the command line's form.

        Raises:
            RecipeError: when it cannot be read.
        """

    def check(self, sites: Sequence[Site], budget: Budget) -> None:
        """Find out, before anything slow, that no plan can meet the budget.

        Raises:
            BudgetError: saying what has to be kept at least.
            RecipeError: when the settings do not fit these sites.
        """
        self.choose(sites, budget, Evidence())

    @abstractmethod
    def choose(self, sites: Sequence[Site], budget: Budget, evidence: Evidence) -> Choice:
        """Choose ranks.

        Raises:
            BudgetError: when nothing fits.
            RecipeError: when the settings do not fit these sites.
        """
