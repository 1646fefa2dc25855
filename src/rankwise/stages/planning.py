"""Planning: what an allocation looks at is put together here, and its answer becomes a plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.allocation import Choice, Evidence, Looks, Outcome, Problem, UnitChoice, by_variance, random_plans
from rankwise.errors import DataError
from rankwise.models import Site
from rankwise.reports import KeptPredictions, SearchSummary, SearchTimes, ValidationText
from rankwise.sizes import Plan
from rankwise.stages.crews import at_work
from rankwise.stages.judged import Judging, judging
from rankwise.stages.keys import calibration_key, chosen_key
from rankwise.stages.outlooks import Outlooks
from rankwise.stages.work import Work


@dataclass(frozen=True)
class Chosen:
    """A plan, and how it was found.

    Attributes:
        plan: cut of every site.
        search: what it did; None when there was none.
        trials: its trials as plain values.
        spectra: by role, pairs of bits a weight and the estimated loss of all its sites together at that size; empty
            where nothing was estimated.
    """

    plan: Plan
    search: SearchSummary | None
    trials: list[dict[str, Any]]
    spectra: dict[str, list[tuple[float, float]]]


def choose_cuts(work: Work, outlooks: Outlooks) -> Chosen:
    """Spread the budget over the sites.

    Raises:
        BudgetError: when nothing fits.
        RunError: when the log of trials belongs to another recipe.
    """
    recipe = work.recipe
    allocation, found = work.allocation, work.searched
    problem = outlooks.problem()
    if work.looks < Looks.OBJECTIVE:
        evidence = Evidence(reporter=work.reporter, fingerprint=work.fingerprint)
        choice = problem.checked(allocation.choose(problem, evidence), allocation.name)
        if found is None:
            return Chosen(plan_of(work, choice), None, [], spectra_of(problem))
        units = found.choice
        choice = replace(choice, space=units.space, coordinates=units.coordinates, objective=units.objective)
        return Chosen(plan_of(work, choice), found.summary, units.trials, spectra_of(problem))
    samples = select_samples(work, outlooks)
    outlooks.require(pairs_of(work))
    # The number of trials may be raised later, so it is not part of what a trial depends on.
    key = {**objective_key(work, samples), "allocation": allocation.model_dump(exclude={"trials"})}
    key |= {"budget": recipe.budget.model_dump(), "plan": content_of(recipe.plan_file)}
    key |= chosen_key(work)
    with at_work(work) as crew:
        # So many at a time give another search than one after another.
        stage = work.stage("search", key | ({"ahead": crew.workers} if crew.workers > 1 else {}))
        judge = Judging(crew, outlooks.everything(), samples)
        evidence = Evidence(
            judge=judge.outcomes,
            ahead=crew.workers,
            log=stage.log("trials.jsonl"),
            log_key=stage.key,
            seed=recipe.seed,
            reporter=work.reporter,
            fingerprint=work.fingerprint,
        )
        choice = problem.checked(allocation.choose(problem, evidence), allocation.name)
        search = summary_of(work, samples, judge.facts(), choice)
    return Chosen(plan_of(work, choice), search, choice.trials, spectra_of(problem))


_SPECTRUM = 24
"""Sizes at which a spectrum is told."""


def spectra_of(problem: Problem) -> dict[str, list[tuple[float, float]]]:
    """What each role is estimated to lose over what it takes: every site the best cut within so many bits a weight."""
    found: dict[str, list[tuple[float, float]]] = {}
    by_role: dict[str, list[Site]] = {}
    for site in problem.sites:
        if problem.candidates[site.name].losses is not None:
            by_role.setdefault(site.role, []).append(site)
    for role, sites in by_role.items():
        tables = [(problem.candidates[site.name], site.parameters) for site in sites]
        least = max(float(table.bits.min()) / weights for table, weights in tables)
        most = max(float(table.bits.max()) / weights for table, weights in tables)
        points = []
        for step in range(_SPECTRUM):
            size = least + (most - least) * step / (_SPECTRUM - 1)
            within = [t.losses[t.bits <= size * weights + 0.5] for t, weights in tables if t.losses is not None]
            points.append((size, float(sum(losses.min() for losses in within))))
        found[role] = points
    return found


def pairs_of(work: Work) -> list[tuple[Site, int]]:
    """Every site with the bits of every Q that it may get."""
    tables = [(site, work.problem.candidates[site.name]) for site in work.sites]
    return [(site, q_bits) for site, table in tables if not table.stays for q_bits in table.choices]


def content_of(path: str | None) -> str | None:
    """The text of a file; None for no file."""
    return None if path is None else Path(path).read_text()


def plan_of(work: Work, choice: Choice) -> Plan:
    """The plan that a choice is, with what it was made for."""
    recipe = work.recipe
    return Plan.make(
        work.sites,
        choice.cuts,
        work.problem.form,
        work.problem.allowance,
        architecture=type(work.loaded.model).__name__,
        method=recipe.method.name,
        allocation=recipe.allocation.name,
        fingerprint=work.fingerprint,
        method_settings=recipe.method.model_dump(exclude={"name"}),
        stays={name: units.tolist() for name, units in work.stays.items()},
        originals=dict(work.originals),
        whole_weights=work.problem.allowance.weights if work.originals else None,
        groups=_groups(work, choice),
        space=choice.space,
        coordinates=choice.coordinates,
        objective=choice.objective,
    )


def _groups(work: Work, choice: Choice) -> dict[str, float]:
    """What each group takes a weight; of a model that was made smaller, what each role keeps of the original's."""
    if not work.originals:
        return choice.groups
    whole: dict[str, int] = {}
    kept: dict[str, int] = {}
    for site in work.sites:
        if site.name in work.originals:
            m, n = work.originals[site.name]
            whole[site.role] = whole.get(site.role, 0) + m * n * work.problem.allowance.unit_bits
            kept[site.role] = kept.get(site.role, 0) + work.problem.cost(site, choice.cuts[site.name])
    return {role: kept[role] / whole[role] for role in whole}


def summary_of(work: Work, samples: Tensor, facts: Mapping[str, Any], choice: Choice | UnitChoice) -> SearchSummary:
    """What a report says of a search.

    Args:
        work: the run.
        samples: validation samples, shape `[samples, length]`.
        facts: what the objective says of itself.
        choice: what was found.
    """
    trials, validation = choice.trials, work.texts.validation
    best = min((t for t in trials if not t["failed"]), key=lambda t: t["objective"])
    assert validation is not None
    assert choice.objective is not None
    return SearchSummary(
        space=choice.space,
        trials=len(trials),
        failed=sum(t["failed"] for t in trials),
        best_trial=best["trial"],
        best_origin=best["origin"],
        objective=Outcome(**choice.objective),
        dense_nll=facts["dense_nll"],
        validation=ValidationText(
            source=validation.source,
            sequences=samples.shape[0],
            length=samples.shape[1],
            select=work.recipe.validation.select,
        ),
        predictions=KeptPredictions(
            form=facts["form"],
            bytes=facts["bytes"],
            largest_share_of_kl_missed=facts["largest_share_of_kl_missed"],
        ),
        seconds=SearchTimes(
            bare_forward=facts["bare_forward"],
            trials=sum(t["trial_seconds"] for t in trials),
            optimiser=sum(t["optimiser_seconds"] for t in trials),
        ),
    )


def objective_key(work: Work, samples: Tensor) -> dict[str, Any]:
    """What an outcome depends on beside the cuts."""
    return {
        **calibration_key(work),
        "method": work.recipe.method.model_dump(),
        "samples": hashlib.sha256(samples.contiguous().numpy().tobytes()).hexdigest(),
        "shape": list(samples.shape),
        "batch_size": work.recipe.validation.batch_size,
        "objective": work.recipe.objective.model_dump(),
    }


def select_samples(work: Work, outlooks: Outlooks | None) -> Tensor:
    """The validation samples a search uses, shape `[samples, length]`; a selection by variance is kept as a stage.

    Args:
        work: the run.
        outlooks: of its sites; only a selection by variance looks at them.

    Raises:
        DataError: when more are to be selected than were read.
    """
    settings, read = work.recipe.validation, work.texts.validation
    assert read is not None
    if settings.select == "all":
        return read.ids
    if settings.count > len(read.ids):
        raise DataError(
            f"{settings.count} samples are to be selected and {len(read.ids)} were read.",
            where="validation.count",
            remedy="lower validation.count, or raise validation.sequences",
        )
    if settings.select == "random":
        order = torch.randperm(len(read.ids), generator=torch.Generator().manual_seed(work.recipe.seed))
        return read.ids[order[: settings.count].sort().values]
    recipe = work.recipe
    space = getattr(recipe.allocation, "space", "rolesx1")
    key = {**calibration_key(work), "method": recipe.method.model_dump(), "ids": read.fingerprint, "space": space}
    key |= {"budget": recipe.budget.model_dump(), "plans": settings.plans, **chosen_key(work)}
    stage = work.stage("selection", key)
    if not stage.taken_over():
        lowest = getattr(recipe.allocation, "lowest", 0.2)
        assert outlooks is not None
        plans = random_plans(space, work.problem, lowest, settings.plans, recipe.seed)
        with judging(work, outlooks.of, read.ids) as objective, stage.making() as folder:
            rows = [
                objective.sample_perplexities(plan).tolist()
                for plan in work.reporter.track(plans, "validation samples", total=len(plans))
            ]
            folder.write_json("perplexities.json", rows)
    perplexities = torch.tensor(json.loads((stage.folder / "perplexities.json").read_text()), dtype=torch.float64)
    return read.ids[by_variance(perplexities, settings.count, largest=settings.select == "top")]
