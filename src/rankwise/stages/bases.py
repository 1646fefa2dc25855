"""Statistics and bases: what calibration measures at every site, and the factors of full rank made from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankwise.errors import NotFiniteError
from rankwise.factors import Basis
from rankwise.runs import Stage
from rankwise.stages.work import Work, calibration_key, model_key
from rankwise.statistics import Need, SiteStatistics, Store, collect, save_record, streams_of


def collect_statistics(work: Work) -> Store:
    """Collect what the method asks for and no finished stage holds: one pass for all of it.

    Raises:
        NotFiniteError: naming the layer.
    """
    requests = work.recipe.method.requests()
    stages: dict[Need, Stage] = {
        request.need: work.run.stage(f"statistics-{request.need}", {**calibration_key(work), **request.settings()})
        for request in requests
    }
    missing = [request for request in requests if not stages[request.need].done]
    if missing:
        snapshot = work.run.stage("snapshot", {**calibration_key(work), "requests": [r.settings() for r in missing]})
        records = collect(
            work.loaded.model,
            work.sites,
            work.texts.calibration.ids,
            missing,
            batch_size=work.recipe.calibration.batch_size,
            seed=work.recipe.seed,
            snapshot=snapshot.partial,
            reporter=work.reporter,
        )
        for need, by_stream in records.items():
            with stages[need].making() as folder:
                for key, record in by_stream.items():
                    save_record(folder / f"{key}.safetensors", record)
        snapshot.discard()
    stream_of = {
        need: {name: stream.key for stream in streams_of(need, work.sites) for name in stream.sites} for need in stages
    }
    return Store({need: stage.folder for need, stage in stages.items()}, stream_of)


def save_basis(path: Path, basis: Basis) -> None:
    parts = {
        "left": basis.left,
        "right": basis.right,
        "energy": basis.energy,
        "mean_output": basis.mean_output,
        "mean_code": basis.mean_code,
        "damping": torch.tensor([basis.damping]),
    }
    fresh = path.with_suffix(".new")
    save_file({name: part.float().contiguous() for name, part in parts.items() if part is not None}, fresh)
    fresh.replace(path)


def load_basis(path: Path) -> Basis:
    parts: dict[str, Any] = dict(load_file(path))
    damping = float(parts.pop("damping"))
    return Basis(**parts, damping=damping)


def decompose_sites(work: Work, store: Store) -> Path:
    """Factor every site at full rank; a site that is on disk already is not done again.

    Returns:
        The folder with one basis a site.

    Raises:
        NotFiniteError: naming the site.
    """
    method = work.recipe.method
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
            weight = site.weight(work.loaded.model).double().cpu()
            bias = site.bias(work.loaded.model)
            try:
                basis = method.decompose(
                    weight, SiteStatistics(site, weight, None if bias is None else bias.cpu(), store)
                )
            except (torch.linalg.LinAlgError, ValueError) as problem:
                raise NotFiniteError(
                    f"The decomposition failed: {problem}.",
                    where=site.name,
                    remedy="use more calibration text, or another method",
                ) from problem
            basis.check_finite(site.name)
            save_basis(folder / f"{site.name}.safetensors", basis)
    return stage.folder


def read_energies(work: Work, bases: Path) -> dict[str, Tensor]:
    """Every site's component losses, by site name."""
    energies = {}
    for site in work.sites:
        with safe_open(bases / f"{site.name}.safetensors", framework="pt") as file:
            energies[site.name] = file.get_tensor("energy")
    return energies
