"""Fits: what a plan decides is fitted, put in place of the weights, and brought into the form it is stored in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rankwise.checkpoints import LoadedModel
from rankwise.device import computed_on
from rankwise.errors import IllConditionedError
from rankwise.factors import Factors
from rankwise.layers import kind_of, substitute
from rankwise.layers.fold import fold_orders
from rankwise.models import Site
from rankwise.progress import Reporter
from rankwise.runs import Folder, Job
from rankwise.sizes import Cut, Form, Plan
from rankwise.stages.at_once import most_together, together_bytes
from rankwise.stages.crews import at_work
from rankwise.stages.fitted import load_factors
from rankwise.stages.jobs import Hand, fit_site
from rankwise.stages.measuring import measured_key
from rankwise.stages.outlooks import Outlooks
from rankwise.stages.work import Work

SiteFacts = dict[str, dict[str, Any]]
"""What a report says of each site, by name."""


def fit_sites(work: Work, outlooks: Outlooks, plan: Plan) -> SiteFacts:
    """Fit every site that is not dense, and put the factors in its place; L R in numbers is float32 until it is stored.

    Codes that are on disk already are not made again.

    Returns:
        By site name: what the fit says of itself, and bits.

    Raises:
        NotFiniteError: naming the site.
    """
    model, found = work.loaded.model, {}
    sites = [site for site in work.sites if not plan.cuts[site.name].dense]
    outlooks.require([(site, 0) for site in sites if not plan.cuts[site.name].coded])
    fits = _Fits(work, outlooks)
    fits.make({site: plan.cuts[site.name] for site in sites if plan.cuts[site.name].coded})
    for site in work.reporter.track(sites, "factors", total=len(sites)):
        cut = plan.cuts[site.name]
        factors, facts = fits.of(site, cut)
        kind = "quantized" if cut.coded else "two_factor"
        dtype = work.loaded.stored_dtypes[f"{site.name}.weight"] if cut.coded else torch.float32
        substitute(model, site.name, factors, kind, dtype)
        work.loaded.settle(site.name)
        found[site.name] = {**facts, "bits": plan.site_bits(site.name), "storage": kind}
        if facts.get("fallback"):
            work.reporter.note(
                f"{site.name}: its inputs, their gradient or its weight are zero on the calibration text; it was "
                "fitted by what is known there, at worst as if all inputs weighed the same"
            )
    return found


class _Fits:
    """Fits of a run: codes are kept in files, slices of a basis are not."""

    def __init__(self, work: Work, outlooks: Outlooks) -> None:
        self._work, self._outlooks = work, outlooks
        self._hand = Hand(work)
        method = work.recipe.method
        # A site's codes depend on its own cut alone, so that another plan reuses what it shares.
        key = {**measured_key(work), "method": method.model_dump(exclude={"q_bits", "rank"})}
        self._stage = work.stage(f"fits-{method.label}", key)

    @cached_property
    def _folder(self) -> Folder:
        return self._stage.workspace()

    def make(self, wanted: Mapping[Site, Cut]) -> None:
        """Make the codes that are not on disk."""
        missing = []
        for site, cut in wanted.items():
            file = _file(site, cut)
            if not (self._folder.has(file) and self._folder.has(f"{file}.json")):
                missing.append((site, cut))
        if not missing:
            return
        with at_work(self._work, rounding=True) as crew:
            groups = _together(self._work, missing, crew.workers)
            jobs = [self._job(group) for group in groups]
            done = len(wanted) - len(missing)
            with self._work.reporter.counting("fitting", total=len(wanted), done=done) as advance:
                for job, group, made in zip(jobs, groups, crew.results(jobs, 4 * crew.workers), strict=True):
                    # What the fit says first: the codes alone would not be taken for whole.
                    for name in sorted(made.files, reverse=True):
                        with self._folder.writing(name) as path:
                            made.put(name, path)
                    for _ in group:
                        advance(f"fitting: {job.label}")

    def _job(self, group: Sequence[tuple[Site, Cut]]) -> Job:
        """The fits of sites that are fitted together."""
        asked = [(site.name, [cut.rank, cut.q_bits, cut.lr_bits], _file(site, cut)) for site, cut in group]
        reads = [(*self._outlooks.measured(site), *self._outlooks.looked(site)) for site, _ in group]
        (first, cut), more = group[0], len(group) - 1
        label = f"{first.name}, {cut}" + (f", and {more} more" if more else "")
        read = tuple(dict.fromkeys(file for files in reads for file in files))
        return Job("rankwise.stages.jobs:fit_codes", {"sites": asked}, read, label)

    def of(self, site: Site, cut: Cut) -> tuple[Factors, dict[str, Any]]:
        """The factors of a site and what its fit says of itself."""
        if not cut.coded:
            return fit_site(self._hand, site, cut)
        file = _file(site, cut)
        bias = site.bias(self._work.loaded.model)
        found = load_factors(self._folder.path / file, self._work.problem.form, cut, bias)
        return found, self._folder.read_json(f"{file}.json")


def _together(work: Work, wanted: Sequence[tuple[Site, Cut]], workers: int) -> list[list[tuple[Site, Cut]]]:
    """Sites in groups that are fitted together: of as many inputs and equal bits, near each other, and small."""
    if not work.recipe.method.together:
        return [[each] for each in wanted]
    most = most_together([site for site, _ in wanted], workers)
    groups: list[list[tuple[Site, Cut]]] = []
    last: dict[tuple[int, int | None], tuple[list[tuple[Site, Cut]], float]] = {}
    for site, cut in wanted:
        kind, takes = (site.n, cut.q_bits), together_bytes(site)
        group, held = last.get(kind, ([], math.inf))
        if held + takes > most:
            group, held = [], 0.0
            groups.append(group)
        group.append((site, cut))
        last[kind] = group, held + takes
    return groups


def _file(site: Site, cut: Cut) -> str:
    return f"{site.name}.{cut.q_bits}-{cut.rank}-{cut.lr_bits}.safetensors"


def store_sites(work: Work, plan: Plan, facts: Mapping[str, Mapping[str, Any]]) -> SiteFacts:
    """Bring all factors into the plan's storage and all weights into the checkpoint's dtypes, and back to compute.

    Args:
        work: the run; its sites hold factors or are dense.
        plan: says how they are stored.
        facts: what `fit_sites` returned.

    Returns:
        By site name: those facts, with its storage.
    """
    probe = work.texts.calibration.ids[:1, :64]
    dtypes = {name: work.loaded.stored_dtypes[f"{name}.weight"] for name in facts}
    # Channels are put in another order where no weight of theirs has to stay as it is.
    sites = [site for site in work.sites if site.name not in work.left_out]
    found = store_layers(work.loaded, sites, plan.form, dtypes, probe, work.reporter)
    return {name: {**each, **found.get(name, {})} for name, each in facts.items()}


def store_layers(
    loaded: LoadedModel,
    sites: Sequence[Site],
    form: Form,
    dtypes: Mapping[str, torch.dtype],
    probe: Tensor,
    reporter: Reporter,
) -> SiteFacts:
    """What `store_sites` does, for any model whose factored sites hold trainable factors.

    Args:
        loaded: the model.
        sites: its sites, dense or not.
        form: says how factors are stored.
        dtypes: what they are stored in, by site name.
        probe: a short token sequence, shape `[1, tokens]`.
        reporter: told about progress, and about sites that fall back to two factors.

    Returns:
        By name of each factored site: its storage and what its layer says of itself.
    """
    model = loaded.model
    factored = [site for site in sites if kind_of(site.module(model)).trains]
    found: SiteFacts = {}
    for site in reporter.track(factored, "storage", total=len(factored)):
        shape = (site.m, site.n)
        factors = kind_of(site.module(model)).factors(site.module(model))
        kind = form.kind(shape, Cut(factors.rank))
        found[site.name] = {"storage": kind}
        if kind == "pivoted" and computed_on(model).type == "cuda":
            # Also where the block lies in files of the host.
            factors = factors.on(computed_on(model))
        try:
            layer = substitute(model, site.name, factors, kind, dtypes[site.name])
            found[site.name] |= kind_of(layer).facts(layer)
            loaded.settle(site.name)
        except IllConditionedError as problem:
            substitute(model, site.name, factors, "two_factor", dtypes[site.name])
            found[site.name] = {"storage": "two_factor", "largest_pivot_entry": problem.largest}
            extra = factors.rank * sum(shape) - form.numbers(shape, factors.rank)
            loaded.settle(site.name)
            reporter.note(
                f"{site.name} is stored as two factors, {extra} numbers more than planned: its pivots are "
                f"ill-conditioned (an entry of {problem.largest:.3g})"
            )
    loaded.to_stored_dtypes()
    loaded.to_compute_dtypes()
    fold_orders(model, sites, probe.to(model.device), loaded.settle)
    return found
