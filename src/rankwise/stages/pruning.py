"""Pruning: units are taken out of the model before anything else is measured, where the method takes units out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankwise.allocation import Planned
from rankwise.checkpoints import fingerprint
from rankwise.errors import BudgetError, ModelError, RecipeError
from rankwise.layers import BiasedLinear
from rankwise.methods import Part, Pruning
from rankwise.models import Coupling, Site, find_sites, share_inputs, shrink, usable_couplings
from rankwise.runs import Stage
from rankwise.sizes import DENSE, Plan
from rankwise.stages.at_site import naming, weight_and_statistics
from rankwise.stages.keys import calibration_key, chosen_key
from rankwise.stages.measuring import collect_requests
from rankwise.stages.work import Work, problem_of
from rankwise.statistics import SiteStatistics, Store

_STAYS, _CONSUMERS = "stays.json", "consumers.safetensors"


def couplings_of(work: Work) -> list[Coupling]:
    """What may lose units; what may not is said.

    Raises:
        ModelError: naming the architecture, when nothing may.
    """
    probe = work.texts.calibration.ids[:1, :64].to(work.loaded.model.device)
    found, reasons = usable_couplings(work.loaded.model, work.sites, probe, BiasedLinear)
    for kind, reason in reasons.items():
        layers = "attention" if kind == "heads" else "feed-forward"
        work.reporter.note(f"no units are taken out of {layers} layers: {reason}")
    return found


def losing(work: Work, couplings: list[Coupling]) -> list[Coupling]:
    """Of the couplings of a model, those that lose units: all but those with a site that is left out, which is said.

    Raises:
        RecipeError: when that is none.
    """
    whole = [coupling for coupling in couplings if work.left_out.intersection(coupling.sites)]
    if whole and len(whole) == len(couplings):
        raise RecipeError(
            f"{work.recipe.method.name} takes units out of all weights that they go through, and of each of the "
            f"{len(couplings)} sets of such weights one at least is left out.",
            where="include, exclude",
            remedy=f"leave out whole sets, such as {', '.join(whole[0].sites)}, or take a method of low rank",
        )
    if whole:
        work.reporter.note(
            f"no units are taken out of {len(whole)} of {len(couplings)} heads or feed-forward layers: they go through "
            f"weights that are left out, such as {next(n for n in whole[0].sites if n in work.left_out)}"
        )
    return [coupling for coupling in couplings if coupling not in whole]


def check_pruning(work: Work) -> None:
    """Find out before anything slow that pruning cannot meet the budget.

    Raises:
        BudgetError: saying what has to be kept at least, or that a plan was made for other layers or another size.
        RecipeError: when the model is not held whole.
    """
    method = work.recipe.method
    assert isinstance(method, Pruning)
    if work.memory != "whole":
        raise RecipeError(
            f"{method.name} takes units out of a model that is whole in memory, not held by {work.memory}.",
            where="memory",
            remedy="give --memory whole, or a method that keeps shapes, such as two_sided",
        )
    if work.recipe.format == "dense" and not method.equal:
        raise RecipeError(
            "A plain checkpoint has one number of units for all layers, and here they differ.",
            where="format",
            remedy="leave out --format dense, or let all layers lose alike (--set method.equal=true)",
        )
    if not hasattr(work.loaded.model.config, "is_heterogeneous"):
        raise ModelError(
            f"Layers of different sizes need transformers 5.15 or newer; installed is {transformers.__version__}.",
            where=method.name,
            remedy="install a newer transformers",
        )
    problem = work.problem
    sites = {site.name: site for site in work.sites}
    couplings = losing(work, couplings_of(work))
    if method.equal and work.left_out:
        _require_equal(work, couplings)
    _planned(work, couplings)
    parts = [Part(coupling, sites, _nothing) for coupling in couplings]
    if method.rests:
        problem.allowance.require(_least_bits(work, method, parts))
        return
    least = (method.least(parts) + _others(work, parts)) * problem.form.number_bits
    problem.allowance.require(least, ", lower method.multiple, or protect fewer layers", "the fewest units")


def _require_equal(work: Work, couplings: list[Coupling]) -> None:
    """Raise when some layers lose units and others of their kind are left out, and all are to be equal."""
    for kind in ("heads", "channels"):
        losing = {coupling.block for coupling in couplings if coupling.kind == kind}
        blocks = {site.block for site in work.sites}
        if losing and losing != blocks:
            raise RecipeError(
                f"Layers are to keep as many units each (method.equal), and {len(blocks - losing)} of {len(blocks)} "
                "blocks have weights that are left out.",
                where="include, exclude",
                remedy="leave out the same weights in every block, or leave away method.equal",
            )


def _least_bits(work: Work, method: Pruning, parts: list[Part]) -> int:
    """What the fewest units take where what is left is made as small as it can be."""
    shapes = {site.name: (site.m, site.n) for site in work.sites}
    for part in parts:
        coupling, left = part.coupling, part.chunk(method.multiple)
        for name in coupling.sites[:-1]:
            rows = sum(left * section.size for section in coupling.rows if section.site == name)
            shapes[name] = rows, shapes[name][1]
        consumer = coupling.columns.site
        shapes[consumer] = shapes[consumer][0], left * coupling.columns.size
    form, multiple = work.problem.form, work.recipe.budget.rank_multiple
    return sum(
        form.bits(shape, DENSE) if name in work.left_out else method.candidates(shape, form, multiple, True).smallest
        for name, shape in shapes.items()
    )


def _nothing(name: str) -> tuple[Tensor, SiteStatistics]:
    raise KeyError(name)


def _others(work: Work, parts: list[Part]) -> int:
    """Numbers of the sites that lose nothing."""
    coupled = {name for part in parts for name in part.coupling.sites}
    return sum(site.parameters for site in work.sites if site.name not in coupled)


@dataclass(frozen=True)
class Decision:
    """What a pruning decided.

    Attributes:
        stays: by coupling that loses units, those that stay.
        consumers: by site name, W' and the bias of what reads them.
    """

    stays: dict[str, Tensor]
    consumers: dict[str, tuple[Tensor, Tensor | None]]


def prune(work: Work, found: Mapping[str, Tensor] | None = None) -> Work:
    """Take units out of the model, as many as its method and budget say.

    Args:
        work: the run.
        found: by coupling that loses units, those that stay, where a search found them.

    Returns:
        The run with the smaller model: its sites, fingerprint and problem; the budget is that of the original.

    Raises:
        BudgetError: when nothing fits.
        NotFiniteError: naming the layer.
    """
    method = work.recipe.method
    assert isinstance(method, Pruning)
    every = couplings_of(work)
    couplings = losing(work, every)
    key = {**calibration_key(work), "method": method.model_dump(), "budget": work.recipe.budget.model_dump()}
    key |= chosen_key(work)
    key["couplings"] = [[coupling.name, coupling.units] for coupling in couplings]
    planned = _planned(work, couplings) if found is None else found
    if planned is not None:
        key["plan"] = {name: units.tolist() for name, units in planned.items()}
    stage = work.stage("pruning", key)
    if not stage.taken_over():
        parts = seen_parts(work, couplings)
        stays = chosen_units(work, parts)({}) if planned is None else planned
        decision = decide(work, parts, stays)
        with stage.making() as folder:
            folder.write_json(_STAYS, {name: units.tolist() for name, units in decision.stays.items()})
            with folder.writing(_CONSUMERS) as path:
                save_file(_tensors(decision.consumers), path)
    decision = _read(stage)
    _tell(work, couplings, decision.stays)
    return without_units(work, every, decision)


def without_units(work: Work, every: Sequence[Coupling], decision: Decision) -> Work:
    """The run with the smaller model, which takes the place of the one that is loaded.

    Args:
        work: the run.
        every: all couplings of the model.
        decision: what stays.
    """
    loaded = work.loaded
    small = shrink(loaded.model, every, work.sites, decision.stays, decision.consumers, BiasedLinear)
    dtypes = {name: loaded.stored_dtypes.get(name) for name, _ in small.named_parameters()}
    loaded.stored_dtypes = {
        name: dtype or loaded.stored_dtypes[name.rpartition(".")[0] + ".weight"] for name, dtype in dtypes.items()
    }
    loaded.model = small
    probe = work.texts.calibration.ids[:1].to(small.device)
    keeping = {site.name for site in work.sites if site.keeps_zeros}
    found = [replace(site, keeps_zeros=site.name in keeping) for site in find_sites(small)]
    sites = share_inputs(small, found, probe)
    weights = work.problem.allowance.weights
    return replace(
        work,
        sites=sites,
        smaller=fingerprint(small, loaded.stored_dtypes),
        originals={site.name: (site.m, site.n) for site in work.sites},
        problem=problem_of(work.recipe, loaded, sites, weights, work.left_out, work.vocabulary),
        stays=decision.stays,
    )


def _tell(work: Work, couplings: list[Coupling], stays: Mapping[str, Tensor]) -> None:
    """Say how much is left."""
    for kind, words in (("heads", "groups of heads"), ("channels", "channels of feed-forward layers")):
        of_kind = [coupling for coupling in couplings if coupling.kind == kind]
        whole = sum(coupling.units for coupling in of_kind)
        left = sum(len(stays[each.name]) if each.name in stays else each.units for each in of_kind)
        if whole:
            work.reporter.note(f"{left} of {whole} {words} stay")


def seen_parts(work: Work, couplings: Sequence[Coupling]) -> list[Part]:
    """Couplings that lose units, with what calibration measures of the whole model at their sites.

    Raises:
        NotFiniteError: naming the layer.
    """
    method = work.recipe.method
    assert isinstance(method, Pruning)
    by_name = {site.name: site for site in work.sites}
    names: set[str] = set()
    for coupling in couplings:
        names |= {coupling.columns.site} if method.at_consumers else set(coupling.sites)
    watched = [site for site in work.sites if site.name in names]
    store = collect_requests(work, method.pruning_requests(), watched, beside={"sites": sorted(names)})
    return [Part(coupling, by_name, partial(_seen, work, store, by_name)) for coupling in couplings]


def scores_of(work: Work, parts: Sequence[Part]) -> dict[str, Tensor]:
    """By coupling, how much each unit matters, shape `[units]`.

    Raises:
        NotFiniteError: naming the layer.
    """
    method, scores = work.recipe.method, {}
    assert isinstance(method, Pruning)
    for part in work.reporter.track(parts, "scoring units", total=len(parts)):
        with naming(part.sites[part.coupling.columns.site]):
            scores[part.coupling.name] = method.scores(part)
    return scores


def chosen_units(
    work: Work, parts: list[Part], scores: Mapping[str, Tensor] | None = None
) -> Callable[[Mapping[str, float]], dict[str, Tensor]]:
    """What stays within the budget, by weights of couplings, see `Pruning.chooses`.

    Args:
        work: the run.
        parts: see `seen_parts`.
        scores: of their units, where they are known already.
    """
    method = work.recipe.method
    assert isinstance(method, Pruning)
    known = scores_of(work, parts) if scores is None else scores
    return method.chooses(parts, known, _allowed(work, method, parts), work.problem.form)


def decide(work: Work, parts: Sequence[Part], stays: Mapping[str, Tensor]) -> Decision:
    """What becomes of the weights that read the units that stay.

    Args:
        work: the run.
        parts: see `seen_parts`.
        stays: by coupling, the units that stay; one that is not named keeps all.

    Raises:
        NotFiniteError: naming the layer.
    """
    method = work.recipe.method
    assert isinstance(method, Pruning)
    stays = {part.coupling.name: stays[part.coupling.name] for part in parts if _loses(part, stays)}
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    losing = [part for part in parts if part.coupling.name in stays]
    for part in work.reporter.track(losing, "taking units out", total=len(losing)):
        site = part.sites[part.coupling.columns.site]
        with naming(site):
            made = method.consumer(part, stays[part.coupling.name])
        if made is not None:
            found[site.name] = made
    return Decision(stays, found)


def _allowed(work: Work, method: Pruning, parts: list[Part]) -> int:
    """Bits that the weights of couplings may take: all but those of the others, which stay as they are, or their share
    where others are made smaller as well.
    """
    allowance, others = work.problem.allowance, _others(work, parts)
    if method.rests:
        left = sum(site.parameters for site in work.sites if site.name in work.left_out)
        spare = max(0, allowance.bits - left * work.problem.form.number_bits)
        return spare * (allowance.weights - others) // (allowance.weights - left)
    return allowance.bits - others * work.problem.form.number_bits


def _loses(part: Part, stays: Mapping[str, Tensor]) -> bool:
    name = part.coupling.name
    return name in stays and len(stays[name]) < part.coupling.units


def _planned(work: Work, couplings: list[Coupling]) -> dict[str, Tensor] | None:
    """The units that a plan keeps, by coupling that loses some; None where the recipe names no plan.

    Raises:
        BudgetError: when it was made for other layers, or another size.
    """
    if not isinstance(work.recipe.allocation, Planned):
        return None
    where = work.recipe.allocation.file
    plan = Plan.load(Path(where))
    if plan.stays and plan.spelling != work.recipe.budget.spelling:
        raise BudgetError(
            "The plan says which units stay, and was made for another size.",
            where=where,
            remedy="give the size it was made for, or make a plan for this one",
        )
    require_same_layers(plan, couplings, where)
    return {name: torch.tensor(units) for name, units in plan.stays.items()}


def require_same_layers(plan: Plan, couplings: Sequence[Coupling], where: str) -> None:
    """Raise when a plan takes out units that are not there.

    Args:
        plan: says which units stay.
        couplings: of the model, those that lose units.
        where: its file.

    Raises:
        BudgetError: naming the layer.
    """
    by_name = {coupling.name: coupling for coupling in couplings}
    for name, units in plan.stays.items():
        if name not in by_name or max(units) >= by_name[name].units:
            raise BudgetError(
                f"The plan takes units out of {name}, which has none of that number here.",
                where=where,
                remedy="use a plan made for a model with the same layers",
            )


def _seen(work: Work, store: Store, sites: Mapping[str, Site], name: str) -> tuple[Tensor, SiteStatistics]:
    return weight_and_statistics(work, store, sites[name])


def _tensors(consumers: Mapping[str, tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
    parts = {}
    for name, (weight, bias) in consumers.items():
        parts[f"{name}.weight"] = weight.float().cpu().contiguous()
        if bias is not None:
            parts[f"{name}.bias"] = bias.float().cpu().contiguous()
    return parts


def _read(stage: Stage) -> Decision:
    stays = json.loads((stage.folder / _STAYS).read_text())
    parts = load_file(stage.folder / _CONSUMERS)
    names = [name.removesuffix(".weight") for name in parts if name.endswith(".weight")]
    return Decision(
        {name: torch.tensor(units) for name, units in stays.items()},
        {name: (parts[f"{name}.weight"], parts.get(f"{name}.bias")) for name in names},
    )
