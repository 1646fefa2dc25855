"""Bayesian optimisation of ranks (Bolaco, arXiv 2405.10616, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor

from rankwise.allocation.base import Allocation, Choice, Cuts, Evidence, Looks, Problem, note_other_weights
from rankwise.allocation.search import Seen, search
from rankwise.allocation.spaces import parse_groups, space_named
from rankwise.allocation.surrogate import propose, require_botorch
from rankwise.allocation.trials import TrialLog
from rankwise.errors import RankwiseError
from rankwise.sizes import Plan


class Bayesian(Allocation):
    """Searches a space of plans for the least validation objective.

    Attributes:
        space: `5x1`, `5x4` or another GxL (role groups by depth groups), or `spectral` (multipliers of that plan).
        trials: forward passes over the validation samples in all, the known starts among them. May be raised later.
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

    def check(self, problem: Problem) -> None:
        require_botorch()
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

        def proposer(seen: Seen, trial: int, is_new: Callable[[Tensor], bool]) -> Tensor:
            step = partial(propose, scales=self.length_scales, acquisition=self.acquisition, is_new=is_new)
            return step(space, seen.points, seen.values, trial, evidence.seed, pending=seen.pending)

        log = TrialLog(evidence.log, evidence.log_key, evidence.reporter)
        best = search(
            space,
            starts,
            evidence.judge,
            proposer,
            log,
            self.trials,
            evidence.seed,
            evidence.reporter,
            ahead=evidence.ahead,
        )
        cuts = space.cuts(torch.tensor(best["point"], dtype=torch.float64))
        return Choice(
            cuts=cuts,
            groups=space.groups(cuts),
            space=space.name,
            coordinates=dict(zip(space.labels, best["point"], strict=True)),
            objective={"value": best["objective"], "perplexity": best["perplexity"], "kl": best["kl"]},
            trials=log.records[: self.trials],
        )
