"""The search of units: how many of every layer stay, judged with the rest planned by estimated loss.

A trial is all that a compression without a search does with so many units: they go, statistics are taken anew from the
smaller model, what is left is planned and fitted. So nothing is estimated of a trial that is not of its result.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rankwise.allocation import Bayesian, Counts, Evidence, Outcome, Spectral, Units, unit_space_named
from rankwise.device import computing
from rankwise.errors import BudgetError, NotFiniteError, RecipeError
from rankwise.evaluation import Objective
from rankwise.methods import Part, Pruning
from rankwise.models import Coupling
from rankwise.progress import Reporter
from rankwise.runs import SCRATCH, Run
from rankwise.sizes import Plan
from rankwise.stages.fitting import fit_sites
from rankwise.stages.keys import chosen_key
from rankwise.stages.measuring import collect_statistics
from rankwise.stages.outlooks import Outlooks
from rankwise.stages.planning import choose_cuts, content_of, objective_key, summary_of
from rankwise.stages.pruning import (
    chosen_units,
    couplings_of,
    decide,
    losing,
    require_same_layers,
    scores_of,
    seen_parts,
    without_units,
)
from rankwise.stages.work import Searched, Work

_FAILED = Outcome(math.inf, math.inf, math.nan)


def check_search(work: Work) -> None:
    """Find out before anything slow that there is nothing to search, or no such space.

    Raises:
        BudgetError: when a plan to start from was made for other layers.
        MissingPackageError: when BoTorch is not installed.
        RecipeError: when the space is not of this model, or no layer may lose units.
    """
    couplings = losing(work, couplings_of(work))
    allocation = _allocation(work)
    allocation.require()
    if allocation.plan is not None:
        require_same_layers(Plan.load(Path(allocation.plan)), couplings, allocation.plan)
    whole = {coupling.name: coupling.units for coupling in couplings}
    unit_space_named(allocation.space, _units(work, couplings, whole), _kept(work), lambda _weights: whole)


def search_units(work: Work, judge: Objective) -> tuple[Searched, dict[str, Tensor]]:
    """How many units of every layer stay, by trials; the first is the plan by estimated loss.

    Args:
        work: the run, its model whole.
        judge: the validation objective by that model.

    Returns:
        What was found, and by coupling the units that stay.

    Raises:
        BudgetError: when nothing fits, or every trial failed.
        NotFiniteError: naming the layer.
        RunError: when the log of trials belongs to another recipe.
    """
    every = couplings_of(work)
    couplings = losing(work, every)
    parts = seen_parts(work, couplings)
    scores = scores_of(work, parts)
    chosen = chosen_units(work, parts, scores)

    def planned(weights: Mapping[str, float]) -> Counts:
        return {name: len(units) for name, units in chosen(weights).items()}

    def stays(counts: Mapping[str, int]) -> dict[str, Tensor]:
        order = {name: score.argsort(descending=True, stable=True) for name, score in scores.items()}
        return {name: order[name][:count].sort().values for name, count in counts.items()}

    allocation, samples = _allocation(work), judge.ids
    space = unit_space_named(allocation.space, _units(work, couplings, planned({})), _kept(work), planned)
    # The number of trials may be raised later, so it is not part of what a trial depends on.
    key = {**objective_key(work, samples), "allocation": allocation.model_dump(exclude={"trials"})}
    key |= {"budget": work.recipe.budget.model_dump(), "plan": content_of(work.recipe.plan_file), **chosen_key(work)}
    key["couplings"] = [[coupling.name, coupling.units] for coupling in couplings]
    stage = work.stage("search", key)
    evidence = Evidence(
        log=stage.log("trials.jsonl"),
        log_key=stage.key,
        seed=work.recipe.seed,
        reporter=work.reporter,
        fingerprint=work.fingerprint,
    )
    trial = _Trials(work, every, parts, judge)

    def outcomes(plans: Iterable[Mapping[str, int]]) -> Iterator[Outcome]:
        for counts in plans:
            yield trial.outcome(stays(counts))

    choice = allocation.choose_units(space, outcomes, evidence)
    facts = {
        "dense_nll": judge.dense_nll,
        "form": judge.predictions_form,
        "bytes": judge.predictions_bytes,
        "largest_share_of_kl_missed": None,
        "bare_forward": judge.bare_seconds,
    }
    return Searched(choice, summary_of(work, samples, facts, choice)), stays(choice.counts)


class _Trials:
    """Models without some units, each made, judged and let go.

    Args:
        work: the run, its model whole.
        every: all couplings of it.
        parts: those that lose units.
        judge: the validation objective.
    """

    def __init__(self, work: Work, every: Sequence[Coupling], parts: Sequence[Part], judge: Objective) -> None:
        self._work, self._every, self._parts, self._judge = work, every, parts, judge
        self._recipe = work.recipe.model_copy(update={"allocation": Spectral()})

    def outcome(self, stays: Mapping[str, Tensor]) -> Outcome:
        """What the model with these units scores; infinite where the rest cannot meet the budget, or is not finite."""
        work, quiet = self._work, Reporter(show=False)
        folder = work.run.directory / f"{SCRATCH}trial"
        shutil.rmtree(folder, ignore_errors=True)
        run, loaded = Run(folder, quiet), replace(work.loaded)
        try:
            decision = decide(replace(work, reporter=quiet), self._parts, stays)
            tried = replace(work, recipe=self._recipe, run=run, loaded=loaded, reporter=quiet)
            small = without_units(tried, self._every, decision)
            outlooks = Outlooks(small, collect_statistics(small))
            outlooks.look()
            fit_sites(small, outlooks, choose_cuts(small, outlooks).plan)
            with computing(loaded.model):
                return Outcome(*self._judge.of(loaded.model)({}))
        except (BudgetError, NotFiniteError):
            return _FAILED
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _allocation(work: Work) -> Bayesian:
    allocation = work.recipe.allocation
    assert isinstance(allocation, Bayesian)
    return allocation


def _kept(work: Work) -> float:
    """The share of the bits of the linear weights that the budget allows."""
    problem = work.problem
    return min(1.0, problem.allowance.bits / (problem.form.number_bits * problem.allowance.weights))


def _units(work: Work, couplings: Sequence[Coupling], planned: Mapping[str, int]) -> list[Units]:
    """What may lose units, as a search sees it; what has but one chunk of them keeps it.

    Raises:
        RecipeError: when that is nothing.
    """
    method = work.recipe.method
    assert isinstance(method, Pruning)
    sites = {site.name: site for site in work.sites}
    found = []
    for coupling in couplings:
        part = Part(coupling, sites, _unseen)
        step = part.chunk(method.multiple)
        share = coupling.units * part.numbers / work.problem.allowance.weights
        known = (coupling.name, coupling.kind, coupling.block, coupling.units)
        if step < coupling.units:
            found.append(Units(*known, step, step, planned[coupling.name], share))
    if not found:
        raise RecipeError(
            f"No layer has more units than have to stay, {method.multiple} channels and one group of heads.",
            where="allocation",
            remedy="lower method.multiple, or leave out the search",
        )
    return found


def _unseen(name: str) -> Any:
    raise KeyError(name)
