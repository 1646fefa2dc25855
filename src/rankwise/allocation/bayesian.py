"""Bayesian optimisation of ranks (Bolaco, arXiv 2405.10616, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor

from rankwise.allocation.base import Allocation, Choice, Cuts, Evidence, Looks, Problem, note_other_weights
from rankwise.allocation.box import Box
from rankwise.allocation.search import Judge, Seen, search
from rankwise.allocation.spaces import parse_groups, space_named
from rankwise.allocation.surrogate import propose, require_botorch
from rankwise.allocation.trials import TrialLog
from rankwise.allocation.units import Counts, UnitSpace
from rankwise.errors import RankwiseError
from rankwise.sizes import Plan


@dataclass(frozen=True)
class UnitChoice:
    """Numbers of units, and how they came about.

    Attributes:
        counts: by coupling, how many stay.
        space: the space searched.
        coordinates: the point chosen in it, by label.
        objective: its outcome as plain numbers.
        trials: every trial as plain values.
    """

    counts: Counts
    space: str
    coordinates: dict[str, float]
    objective: dict[str, float]
    trials: list[dict[str, Any]]


class Bayesian(Allocation):
    """Searches a space of plans for the least validation objective; where units are taken out, of numbers of units.

    Attributes:
        space: `5x1`, `5x4` or another GxL (role groups by depth groups), or `spectral` (multipliers of that plan).
        trials: plans judged on the validation samples in all, the known starts among them. May be raised later.
        plan: a plan's file to start from as well, or None.
        lowest: smallest fraction of its bits that a group in GxL keeps.
        length_scales: of the Matern 5/2 kernel: `fitted`, or `paper` (1.0 for attention, 0.8 for MLP coordinates).
        acquisition: `log_ei`, or `qlog_nei` for a noisy objective; while trials are pending, `qlog_nei` always.
    """

    looks: ClassVar[Looks] = Looks.OBJECTIVE

    name: Literal["bayesian"] = "bayesian"
    space: str = "5x1"
    trials: Annotated[int, Field(ge=1)] = 50
    plan: str | None = None
    lowest: Annotated[float, Field(gt=0, lt=1)] = 0.2
    length_scales: Literal["fitted", "paper"] = "fitted"
    acquisition: Literal["log_ei", "qlog_nei"] = "log_ei"

    @field_validator("space")
    @classmethod
    def _known_space(cls, text: str) -> str:
        if text != "spectral":
            try:
                parse_groups(text)
            except RankwiseError as problem:
                raise ValueError(f"{problem.problem} {problem.remedy}") from None
        return text

    @classmethod
    def parse(cls, text: str) -> Self:
        if text and text != "spectral":
            parse_groups(text)
        return cls(space=text) if text else cls()

    def require(self) -> None:
        """Raise unless what a search needs is installed.

        Raises:
            MissingPackageError: saying what to install.
        """
        require_botorch()

    def check(self, problem: Problem) -> None:
        self.require()
        self._given(problem)
        space_named(self.space, problem, self.lowest)

    def _given(self, problem: Problem) -> tuple[Plan, Cuts] | None:
        if self.plan is None:
            return None
        given = Plan.load(Path(self.plan))
        return given, given.fitting(problem.sites, self.plan)

    def choose(self, problem: Problem, evidence: Evidence) -> Choice:
        assert evidence.judge is not None
        space = space_named(self.space, problem, self.lowest)
        cuts_given: Cuts | None = None
        coordinates: dict[str, float] = {}
        if (found := self._given(problem)) is not None:
            plan, cuts_given = found
            note_other_weights(plan, str(self.plan), evidence)
            coordinates = plan.coordinates if plan.space == space.name else {}
        starts = space.starts(cuts_given, coordinates)

        best, trials = self._searched(space, starts, evidence.judge, evidence)
        cuts = space.cuts(torch.tensor(best["point"], dtype=torch.float64))
        return Choice(
            cuts=cuts,
            groups=space.groups(cuts),
            space=space.name,
            coordinates=dict(zip(space.labels, best["point"], strict=True)),
            objective=_outcome(best),
            trials=trials,
        )

    def choose_units(self, space: UnitSpace, judge: Judge, evidence: Evidence) -> UnitChoice:
        """Choose how many units of every coupling stay.

        Args:
            space: where points lie, and how many stay at each.
            judge: numbers of units by coupling -> their outcomes.
            evidence: the log, the seed and who is told.

        Raises:
            BudgetError: when every trial failed.
        """
        coordinates: dict[str, float] = {}
        counts: Counts | None = None
        if self.plan is not None:
            plan = Plan.load(Path(self.plan))
            note_other_weights(plan, self.plan, evidence)
            coordinates = plan.coordinates if plan.space == space.name else {}
            counts = {name: len(units) for name, units in plan.stays.items()}
        known = space.starts(coordinates, counts)
        if counts is not None and all(name != "plan" for name, _ in known):
            evidence.reporter.note(f"{self.plan} is no point of the space {space.name}: the search begins without it")
        # Where the plan takes no units out, say, two of them stand for the same.
        starts = {tuple(space.decided(point).values()): (name, point) for name, point in reversed(known)}
        best, trials = self._searched(space, list(starts.values())[::-1], judge, evidence)
        return UnitChoice(
            counts=space.decided(torch.tensor(best["point"], dtype=torch.float64)),
            space=space.name,
            coordinates=dict(zip(space.labels, best["point"], strict=True)),
            objective=_outcome(best),
            trials=trials,
        )

    def _searched(
        self, space: Box, starts: Sequence[tuple[str, Tensor]], judge: Judge, evidence: Evidence
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The record of the best trial, and those of all."""

        def proposer(seen: Seen, trial: int, is_new: Callable[[Tensor], bool]) -> Tensor:
            step = partial(propose, scales=self.length_scales, acquisition=self.acquisition, is_new=is_new)
            return step(space, seen.points, seen.values, trial, evidence.seed, pending=seen.pending)

        log = TrialLog(evidence.log, evidence.log_key, evidence.reporter)
        best = search(
            space,
            starts,
            judge,
            proposer,
            log,
            self.trials,
            evidence.seed,
            evidence.reporter,
            ahead=evidence.ahead,
        )
        return best, log.records[: self.trials]


def _outcome(record: Mapping[str, Any]) -> dict[str, float]:
    return {"value": record["objective"], "perplexity": record["perplexity"], "kl": record["kl"]}
