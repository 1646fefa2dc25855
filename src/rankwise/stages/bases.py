"""Statistics and bases: what calibration measures at every site, and the factors of full rank made from it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankwise.allocation import Looks
from rankwise.errors import NotFiniteError
from rankwise.factors import Basis
from rankwise.methods import QuantizingMethod
from rankwise.models import Site
from rankwise.sizes import BitBudget
from rankwise.stages.work import Work, calibration_key, model_key
from rankwise.statistics import SiteStatistics, Store, collect, save_totals


def collect_statistics(work: Work) -> Store:
    """Collect what the method asks for and no finished stage holds: one pass for all of it.

    Raises:
        NotFiniteError: naming the layer.
    """
    method = work.recipe.method
    requests = method.requests()
    if work.recipe.allocation.looks >= Looks.ENERGIES:
        requests += method.plan_requests()
    stages = {
        statistic: work.run.stage(
            f"statistics-{statistic.name}", {**calibration_key(work), "statistic": statistic.settings()}
        )
        for statistic in requests
    }
    missing = [statistic for statistic, stage in stages.items() if not stage.done]
    if missing:
        snapshot = work.run.stage("snapshot", {**calibration_key(work), "statistics": [s.settings() for s in missing]})
        collected = collect(
            work.loaded.model,
            work.sites,
            work.texts.calibration.ids,
            missing,
            batch_size=work.recipe.calibration.batch_size,
            seed=work.recipe.seed,
            snapshot=snapshot.partial,
            reporter=work.reporter,
        )
        for statistic, by_stream in collected.items():
            with stages[statistic].making() as folder:
                for key, totals in by_stream.items():
                    save_totals(folder / f"{key}.safetensors", totals)
        snapshot.discard()
    return Store({statistic: stage.folder for statistic, stage in stages.items()}, work.sites)


def save_basis(path: Path, basis: Basis, coarse: Tensor | None = None) -> None:
    parts = {
        "coarse": coarse,
        "left": basis.left,
        "right": basis.right,
        "energy": basis.energy,
        "mean_output": basis.mean_output,
        "mean_code": basis.mean_code,
        "damping": torch.tensor([basis.damping]),
    }
    fresh = path.with_suffix(".new")
    save_file({name: part.float().cpu().contiguous() for name, part in parts.items() if part is not None}, fresh)
    fresh.replace(path)


def load_basis(path: Path) -> Basis:
    parts: dict[str, Any] = dict(load_file(path))
    damping = float(parts.pop("damping"))
    parts.pop("coarse", None)
    return Basis(**parts, damping=damping)


def decompose_sites(work: Work, store: Store) -> Path:
    """Factor every site at full rank; a site that is on disk already is not done again.

    Returns:
        The folder with one basis a site.

    Raises:
        NotFiniteError: naming the site.
    """
    method = work.recipe.method
    if isinstance(method, QuantizingMethod):
        return decompose_residuals(work, method, store)
    key = (
        {**calibration_key(work), "method": method.model_dump()}
        if method.requests()
        else {**model_key(work), "method": method.model_dump()}
    )
    stage = work.run.stage(f"bases-{method.name}", key)
    if stage.done:
        return stage.folder
    with stage.making() as folder:
        left = [site for site in work.sites if not (folder / f"{site.name}.safetensors").exists()]
        done = len(work.sites) - len(left)
        for site in work.reporter.track(left, "decomposition", total=len(work.sites), done=done):
            weight, seen = weight_and_statistics(work, store, site)
            with naming(site):
                basis = method.decompose(weight, seen)
            basis.check_finite(site.name)
            save_basis(folder / f"{site.name}.safetensors", basis)
    return stage.folder


def weight_and_statistics(work: Work, store: Store, site: Site) -> tuple[Tensor, SiteStatistics]:
    """W in float64 on the CPU, shape `[m, n]`, and what was collected at its site."""
    weight = site.weight(work.loaded.model).double().cpu()
    bias = site.bias(work.loaded.model)
    return weight, SiteStatistics(site, weight, None if bias is None else bias.cpu(), store)


@contextmanager
def naming(site: Site) -> Iterator[None]:
    """Give a numerical failure the name of its site.

    Raises:
        NotFiniteError: naming it.
    """
    try:
        yield
    except (torch.linalg.LinAlgError, ValueError) as problem:
        raise NotFiniteError(
            f"The decomposition failed: {problem}.",
            where=site.name,
            remedy="use more calibration text, or another method",
        ) from problem


def draw_for(work: Work, site: Site) -> torch.Generator:
    """A generator for one site: what it draws does not depend on the other sites."""
    digest = hashlib.sha256(f"{work.recipe.seed}:{site.name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def decompose_residuals(work: Work, method: QuantizingMethod, store: Store) -> Path:
    """For every site and every number of bits Q may have: Q alone, and the basis of what it leaves.

    Only an allocation that looks at energies needs them; for others the folder stays empty.

    Returns:
        The folder with a file a site and number of bits.

    Raises:
        NotFiniteError: naming the site.
    """
    looks = work.recipe.allocation.looks
    looked_at = looks >= Looks.ENERGIES
    key = {**calibration_key(work), "method": method.model_dump(), "looks": int(looks)}
    stage = work.run.stage(f"residuals-{method.name}", key)
    if stage.done:
        return stage.folder
    budget = method.budget(work.recipe.budget)
    with stage.making() as folder:
        wanted = [(site, bits) for site in work.sites for bits in budget.choices] if looked_at else []
        left = [(s, b) for s, b in wanted if not residual_file(folder, s, b).exists()]
        for site, bits in work.reporter.track(
            left, "quantisation, first look", total=len(wanted), done=len(wanted) - len(left)
        ):
            weight, seen = weight_and_statistics(work, store, site)
            with naming(site):
                coarse, basis = method.residual_basis(
                    weight.to(work.loaded.model.device), seen, bits, draw_for(work, site)
                )
            basis.check_finite(site.name)
            file = residual_file(folder, site, bits)
            if looks >= Looks.OBJECTIVE:
                save_basis(file, basis, coarse)
            else:
                # A plan by estimated loss needs no more, and this is little.
                save_file({"energy": basis.energy.float().cpu().contiguous()}, file)
    return stage.folder


def residual_file(folder: Path, site: Site, bits: int) -> Path:
    """Where `decompose_residuals` leaves what it found."""
    return folder / f"{site.name}.{bits}bits.safetensors"


def site_bases(work: Work, folder: Path, site: Site) -> dict[int | None, tuple[Tensor | None, Basis]]:
    """What a site's rank slices: by bits of Q (None without Q) what stands beside L R, and the basis."""
    budget = work.budget
    if not isinstance(budget, BitBudget):
        return {None: (None, load_basis(folder / f"{site.name}.safetensors"))}
    found: dict[int | None, tuple[Tensor | None, Basis]] = {}
    for bits in budget.choices:
        file = residual_file(folder, site, bits)
        found[bits] = load_file(file)["coarse"], load_basis(file)
    return found


def read_energies(work: Work, bases: Path) -> dict[str, Tensor]:
    """Every site's component losses by site name: shape `[k]`, or `[choices, k]` for choices of bits of Q."""
    budget = work.budget
    energies = {}
    for site in work.sites:
        files = [bases / f"{site.name}.safetensors"]
        if isinstance(budget, BitBudget):
            files = [residual_file(bases, site, bits) for bits in budget.choices]
        parts = []
        for each in files:
            with safe_open(each, framework="pt") as file:
                parts.append(file.get_tensor("energy"))
        energies[site.name] = torch.stack(parts) if isinstance(budget, BitBudget) else parts[0]
    return energies
