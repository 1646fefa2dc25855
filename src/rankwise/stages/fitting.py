"""Fits: what a plan decides is fitted, put in place of the weights, and brought into the form it is stored in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankwise.checkpoints import LoadedModel
from rankwise.errors import IllConditionedError
from rankwise.factors import Factors, Fit
from rankwise.layers import kind_of, substitute
from rankwise.layers.fold import fold_orders
from rankwise.models import Site
from rankwise.progress import Reporter
from rankwise.quantizers import Packed, Rotation
from rankwise.runs import Folder
from rankwise.sizes import Cut, Form, Plan
from rankwise.stages.at_site import draw_for, naming, on_gpu_or_cpu, weight_and_statistics
from rankwise.stages.outlooks import Outlooks
from rankwise.stages.work import Work, calibration_key
from rankwise.statistics import Store

SiteFacts = dict[str, dict[str, Any]]
"""What a report says of each site, by name."""


def fit_sites(work: Work, store: Store, outlooks: Outlooks, plan: Plan) -> SiteFacts:
    """Fit every site that is not dense, and put the factors in its place; L R in numbers is float32 until it is stored.

    Codes that are on disk already are not made again.

    Returns:
        By site name: what the fit says of itself, and bits.

    Raises:
        NotFiniteError: naming the site.
    """
    model, found = work.loaded.model, {}
    sites = [site for site in work.sites if not plan.cuts[site.name].dense]
    fits = _Fits(work, store, outlooks)
    with work.reporter.counting("fitting", total=len(sites), done=0) as advance:
        for site in sites:
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
            advance(f"fitting: {site.name}, {cut}")
    return found


class _Fits:
    """Fits of a run: codes are kept in files, slices of a basis are not."""

    def __init__(self, work: Work, store: Store, outlooks: Outlooks) -> None:
        self._work, self._store, self._outlooks = work, store, outlooks
        self._method = work.recipe.method
        # A site's codes depend on its own cut alone, so that another plan reuses what it shares.
        key = {**calibration_key(work), "method": self._method.model_dump(exclude={"q_bits", "rank"})}
        self._stage = work.stage(f"fits-{self._method.label}", key)

    @cached_property
    def _folder(self) -> Folder:
        return self._stage.workspace()

    def of(self, site: Site, cut: Cut) -> tuple[Factors, dict[str, Any]]:
        """The factors of a site and what its fit says of itself."""
        if not cut.coded:
            return self._fit(site, cut)
        file = f"{site.name}.{cut.q_bits}-{cut.rank}-{cut.lr_bits}.safetensors"
        says = f"{file}.json"
        if not (self._folder.has(file) and self._folder.has(says)):
            factors, facts = self._fit(site, cut)
            self._folder.write_json(says, facts)
            with self._folder.writing(file) as path:
                save_factors(path, factors)
        bias = site.bias(self._work.loaded.model)
        found = load_factors(self._folder.path / file, self._work.problem.form, cut, bias)
        return found, self._folder.read_json(says)

    def _fit(self, site: Site, cut: Cut) -> tuple[Factors, dict[str, Any]]:
        def fit_on(device: torch.device) -> tuple[Factors, Fit]:
            weight, seen = weight_and_statistics(self._work, self._store, site, device)
            with naming(site):
                looking = self._outlooks.seen(site)
                return self._method.fit(weight, seen, cut, draw_for(self._work, site), looking)

        # A cut that is not coded is a slice of a basis.
        factors, fit = on_gpu_or_cpu(self._work, site, fit_on) if cut.coded else fit_on(torch.device("cpu"))
        fit.check_finite(site.name)
        return factors, fit.facts()


def save_factors(path: Path, factors: Factors) -> None:
    """Write coded factors, their bias left out."""
    parts: dict[str, Tensor | None] = {
        "left": factors.left,
        "right": factors.right,
        "minus_in": factors.rotation.minus_in,
        "minus_out": factors.rotation.minus_out,
    }
    packed = {"q": factors.q}
    if factors.packed is not None:
        packed |= {"packed_left": factors.packed[0], "packed_right": factors.packed[1]}
    for name, part in packed.items():
        if part is not None:
            parts |= {
                f"{name}.codes": part.codes,
                f"{name}.scale": part.scale,
                f"{name}.columns": torch.tensor(part.columns),
            }
    save_file({name: part.cpu().contiguous() for name, part in parts.items() if part is not None}, path)


def load_factors(path: Path, form: Form, cut: Cut, bias: Tensor | None) -> Factors:
    """Read what `save_factors` wrote.

    Args:
        path: of the file.
        form: says the codebooks.
        cut: what the factors were fitted for.
        bias: of the layer.
    """
    parts = load_file(path)

    def packed(name: str, codebook: str, group: int) -> Packed | None:
        if f"{name}.codes" not in parts:
            return None
        columns = int(parts[f"{name}.columns"])
        return Packed(parts[f"{name}.codes"], parts[f"{name}.scale"], columns, codebook, group)

    of_pair = form.factor_codebook(cut.lr_bits) if cut.lr_bits is not None else ""
    left, right = packed("packed_left", of_pair, 0), packed("packed_right", of_pair, 0)
    return Factors(
        parts.get("left"),
        parts.get("right"),
        bias,
        q=packed("q", form.codebook, form.group),
        packed=None if left is None or right is None else (left, right),
        rotation=Rotation(parts.get("minus_in"), parts.get("minus_out")),
    )


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
    fold_orders(model, sites, probe.to(model.device))
    for site in sites:
        loaded.settle(site.name)
    return found
