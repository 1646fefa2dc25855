"""Factors: put in place of the weights, and brought into the form they are stored in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.checkpoints import LoadedModel
from rankwise.layers import LowRankLinear, fold_orders, read_factors, substitute, substitute_pivoted
from rankwise.linalg import pivot
from rankwise.models import Site
from rankwise.progress import Reporter
from rankwise.sizes import RankPlan, pivots
from rankwise.stages.bases import load_basis
from rankwise.stages.work import Work

SiteFacts = dict[str, dict[str, Any]]

_ILL_CONDITIONED = 100.0
"""Largest entry of a pivot map that is stored: beyond it rounding in bfloat16 would show."""


def put_factors(work: Work, bases: Path, plan: RankPlan) -> dict[str, dict[str, float]]:
    """Replace every site that is not dense by its factors, in float32.

    Returns:
        By site name: the share of the method's energy that was dropped, and the damping that was used.
    """
    losses = {}
    for site in work.sites:
        rank = plan.ranks[site.name]
        if rank is None:
            continue
        basis = load_basis(bases / f"{site.name}.safetensors")
        substitute(work.loaded.model, site, basis.truncate(rank, site.bias(work.loaded.model)), torch.float32)
        whole = float(basis.energy.double().sum())
        dropped = float(basis.energy[rank:].double().sum()) / whole if whole > 0 else 0.0
        losses[site.name] = {"dropped_energy": dropped, "damping": basis.damping}
    return losses


def store_factors(work: Work, plan: RankPlan, losses: Mapping[str, Mapping[str, float]]) -> SiteFacts:
    """Bring all factors into the plan's storage and all weights into the checkpoint's dtypes, and back to compute.

    Args:
        work: the run; its sites hold factors or are dense.
        plan: says how they are stored.
        losses: what `put_factors` returned.

    Returns:
        By site name: the losses, its storage and, where it is pivoted, the largest entry of the map.
    """
    probe = work.texts.calibration.ids[:1, :64]
    dtypes = {site.name: work.loaded.stored_dtypes[f"{site.name}.weight"] for site in work.sites if site.name in losses}
    found = store(work.loaded, work.sites, plan, dtypes, probe, work.reporter)
    return {name: {**facts, **found[name]} for name, facts in losses.items()}


def store(
    loaded: LoadedModel,
    sites: Sequence[Site],
    plan: RankPlan,
    dtypes: Mapping[str, torch.dtype],
    probe: Tensor,
    reporter: Reporter,
) -> SiteFacts:
    """What `store_factors` does, for any model whose factored sites hold `LowRankLinear`.

    Args:
        loaded: the model.
        sites: its sites, dense or not.
        plan: says how factors are stored.
        dtypes: what they are stored in, by site name.
        probe: a short token sequence, shape `[1, tokens]`.
        reporter: told about progress, and about sites that fall back to two factors.

    Returns:
        By name of each factored site: its storage and, where it is pivoted, the largest entry of the map.
    """
    model = loaded.model
    factored = [site for site in sites if isinstance(site.module(model), LowRankLinear)]
    found: SiteFacts = {}
    for site in reporter.track(factored, "storage", total=len(factored)):
        factors = read_factors(site.module(model))
        found[site.name] = {"storage": "two_factor"}
        if pivots((site.m, site.n), factors.rank, plan.storage):
            device = model.device if model.device.type == "cuda" else torch.device("cpu")
            pivoted = pivot(factors.left.to(device), factors.right.to(device))
            found[site.name]["largest_pivot_entry"] = pivoted.largest
            if math.isfinite(pivoted.largest) and pivoted.largest <= _ILL_CONDITIONED:
                substitute_pivoted(model, site, pivoted, factors.bias, dtypes[site.name])
                found[site.name]["storage"] = "pivoted"
                continue
            extra = factors.rank * (site.m + site.n) - plan.cost(site.name)
            reporter.note(
                f"{site.name} is stored as two factors, {extra} numbers more than planned: its pivots are "
                f"ill-conditioned (an entry of {pivoted.largest:.3g})"
            )
        substitute(model, site, factors, dtypes[site.name])
    loaded.to_stored_dtypes()
    loaded.to_compute_dtypes()
    fold_orders(model, sites, probe.to(model.device))
    return found
