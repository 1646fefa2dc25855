"""Statistics, and outlooks: what calibration measures at every site, and what the method sees in its weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankwise.allocation import Looks, Problem
from rankwise.errors import NotFiniteError, RankwiseError
from rankwise.factors import Basis
from rankwise.methods import Looking, Method, Outlook, estimated_losses
from rankwise.models import Site
from rankwise.quantizers import Packed, Rotation
from rankwise.stages.at_site import draw_for, naming, on_gpu_or_cpu, weight_and_statistics
from rankwise.stages.chosen import watched
from rankwise.stages.routed import note_experts
from rankwise.stages.work import Work, calibration_key, model_key
from rankwise.statistics import HIDDEN_GB, Statistic, Store, collecting, save_totals


def collect_statistics(work: Work) -> Store:
    """Collect what the method asks for and no finished stage holds: one pass for all of it.

    Raises:
        NotFiniteError: naming the layer.
    """
    method = work.recipe.method
    requests = method.requests()
    if work.looks >= Looks.LOSSES:
        requests += method.plan_requests()
    sites = watched(work.sites, work.left_out)
    beside = {"sites": sorted(site.name for site in sites)} if len(sites) < len(work.sites) else None
    store = collect_requests(work, requests, sites, beside)
    note_experts(work.sites, store, work.reporter)
    return store


def collect_requests(
    work: Work, requests: Sequence[Statistic], sites: Sequence[Site], beside: Mapping[str, Any] | None = None
) -> Store:
    """Collect some statistics at some sites, where no finished stage holds them.

    Args:
        work: the run.
        requests: what is collected.
        sites: where.
        beside: what their stages depend on besides; where these are not all sites, which they are.

    Raises:
        NotFiniteError: naming the layer.
    """
    common = {**calibration_key(work), **(beside or {})}
    stages = {
        statistic: work.stage(f"statistics-{statistic.name}", {**common, "statistic": statistic.settings()})
        for statistic in requests
    }
    missing = [statistic for statistic, stage in stages.items() if not stage.taken_over()]
    if missing:
        snapshot = work.stage("snapshot", {**common, "statistics": [s.settings() for s in missing]})
        folders = {statistic: stages[statistic].begun() for statistic in missing}
        found = collecting(
            work.loaded.model,
            sites,
            work.texts.calibration.ids,
            missing,
            batch_size=work.recipe.calibration.batch_size,
            seed=work.recipe.seed,
            snapshot=snapshot.partial,
            hidden_gb=0.0 if work.memory == "disk" else HIDDEN_GB,
            known=lambda statistic, key: folders[statistic].has(f"{key}.safetensors"),
            reporter=work.reporter,
        )
        for statistic, key, totals in found:
            with folders[statistic].writing(f"{key}.safetensors") as path:
                save_totals(path, totals)
        for statistic in missing:
            with stages[statistic].making():
                _note(work, statistic, sites)
        snapshot.discard()
    return Store({statistic: stage.folder for statistic, stage in stages.items()}, sites)


def _note(work: Work, statistic: Statistic, sites: Sequence[Site]) -> None:
    """Say again what a statistic says of how it adds, so that it is kept with the stage of this one alone."""
    statistic.sums(statistic.streams(sites), len(work.texts.calibration.ids), work.reporter)


def save_outlook(path: Path, outlook: Outlook, most: int) -> None:
    """Write an outlook.

    Args:
        path: of the file.
        outlook: what is kept of it: energies, codes of Q, and
        most: so many components of the basis.
    """
    basis = outlook.basis
    parts: dict[str, Tensor | None] = {
        "energy": basis.energy.float(),
        "damping": torch.tensor([basis.damping]),
        "noise": torch.tensor([[float(bits), share] for bits, share in outlook.noise.items()]).reshape(-1, 2).double(),
    }
    parts |= {
        "left": basis.left[:, :most].float(),
        "right": basis.right[:most].float(),
        "mean_output": None if basis.mean_output is None else basis.mean_output.float(),
        "mean_code": None if basis.mean_code is None else basis.mean_code[:most].float(),
        "minus_in": outlook.rotation.minus_in,
        "minus_out": outlook.rotation.minus_out,
    }
    if outlook.q is not None:
        parts |= {"q.codes": outlook.q.codes, "q.scale": outlook.q.scale, "q.group": torch.tensor(outlook.q.group)}
        parts["q.columns"] = torch.tensor(outlook.q.columns)
    save_file({name: part.cpu().contiguous() for name, part in parts.items() if part is not None}, path)


def load_outlook(path: Path, codebook: str) -> Outlook:
    """Read what `save_outlook` wrote."""
    parts = load_file(path)
    q = None
    if "q.codes" in parts:
        columns, group = int(parts["q.columns"]), int(parts["q.group"])
        q = Packed(parts["q.codes"], parts["q.scale"], columns, codebook, group)
    basis = Basis(
        parts["left"],
        parts["right"],
        parts["energy"],
        parts.get("mean_output"),
        parts.get("mean_code"),
        float(parts["damping"]),
    )
    return Outlook(basis, q, Rotation(parts.get("minus_in"), parts.get("minus_out")), _noise_of(parts["noise"]))


def _noise_of(rows: Tensor) -> dict[int, float]:
    return {int(bits): share for bits, share in rows.tolist()}


class Outlooks:
    """What the method sees at every site; made at need, each kept in a file of its own.

    Args:
        work: the run.
        store: its statistics.
    """

    def __init__(self, work: Work, store: Store) -> None:
        self._work, self._store = work, store
        method = work.recipe.method
        key = calibration_key(work) if method.requests() else model_key(work)
        self.folder = work.stage(f"outlooks-{method.label}", {**key, "method": method.model_dump()}).workspace()

    def _file(self, site: Site, q_bits: int) -> str:
        return f"{site.name}.safetensors" if not q_bits else f"{site.name}.{q_bits}bits.safetensors"

    def of(self, site: Site, q_bits: int) -> Outlook:
        """The outlook at a site beside a Q of so many bits, with all of the basis that its candidates need.

        Raises:
            NotFiniteError: naming the site.
        """
        most = self._work.problem.candidates[site.name].with_ranks(q_bits)
        known = self.known(site, q_bits)
        if known is None or known.basis.rank < (most if q_bits else 1):
            self._make(site, q_bits, with_basis=True)
            known = self.known(site, q_bits)
        assert known is not None
        return known

    def known(self, site: Site, q_bits: int) -> Outlook | None:
        """What was kept of an outlook that was made before: energies and Q, and perhaps no basis; None for nothing."""
        file = self._file(site, q_bits)
        if not self.folder.has(file):
            return None
        return load_outlook(self.folder.path / file, self._work.problem.form.codebook)

    def seen(self, site: Site) -> Looking:
        """What a fit at a site may look at: W without a Q, made at need, and beside a Q what is known."""
        return lambda q_bits: self.known(site, q_bits) if q_bits else self.of(site, 0)

    def _make(self, site: Site, q_bits: int, with_basis: bool) -> None:
        work = self._work

        def make(device: torch.device) -> Outlook:
            weight, seen = weight_and_statistics(work, self._store, site, device)
            with naming(site):
                return work.recipe.method.outlook(weight, seen, q_bits, draw_for(work, site))

        outlook = on_gpu_or_cpu(work, site, make)
        outlook.basis.check_finite(site.name)
        # Without a Q the basis is what fits are sliced from; beside one it is for a search alone.
        most = min(site.m, site.n)
        if q_bits:
            most = work.problem.candidates[site.name].with_ranks(q_bits) if with_basis else 0
        with self.folder.writing(self._file(site, q_bits)) as path:
            save_outlook(path, outlook, most)

    def look(self) -> None:
        """Make all that the allocation looks at and that is not there.

        Raises:
            NotFiniteError: naming the site.
        """
        work = self._work
        sites = [site for site in work.sites if not work.problem.candidates[site.name].stays]
        left = [site for site in sites if self._estimated(site) is None or self._unseen(site)]
        done = len(sites) - len(left)
        for site in work.reporter.track(left, "looking at weights", total=len(sites), done=done):
            if self._estimated(site) is None:
                self._estimate(site)
            for q_bits in self._unseen(site):
                self._make(site, q_bits, with_basis=work.looks >= Looks.OBJECTIVE)

    def _unseen(self, site: Site) -> list[int]:
        """The choices of a site that are still to be looked at; a search looks at the codes of all."""
        choices = self._work.problem.candidates[site.name].choices
        if self._work.looks < Looks.OBJECTIVE and self._estimated(site):
            return []
        return [q_bits for q_bits in choices if not self.folder.has(self._file(site, q_bits))]

    def _losses(self, site: Site) -> str:
        return f"{site.name}.losses.json"

    def _estimated(self, site: Site) -> dict[int, float] | None:
        """By bits of Q, losses that the method estimated without codes, perhaps none; None if it was not asked yet."""
        if self._work.looks < Looks.LOSSES or type(self._work.recipe.method).estimates is Method.estimates:
            return {}
        if not self.folder.has(self._losses(site)):
            return None
        found = {int(q_bits): loss for q_bits, loss in self.folder.read_json(self._losses(site)).items()}
        # Another budget may have left other choices.
        return None if found and not found.keys() >= set(self._work.problem.candidates[site.name].choices) else found

    def _estimate(self, site: Site) -> None:
        """Keep the losses that the method estimates without codes; that there are none, too."""
        work = self._work
        choices = work.problem.candidates[site.name].choices

        def estimate(device: torch.device) -> Mapping[int, float]:
            weight, seen = weight_and_statistics(work, self._store, site, device)
            with naming(site):
                return work.recipe.method.estimates(weight, seen, choices, draw_for(work, site))

        losses = on_gpu_or_cpu(work, site, estimate)
        if not all(map(math.isfinite, losses.values())):
            raise NotFiniteError(
                "An estimated loss is not finite.",
                where=site.name,
                remedy="--set precision=float32 if the model overflows in half precision",
            )
        if losses and set(losses) != set(choices):
            raise RankwiseError(
                f"{work.recipe.method.label} estimates losses of {sorted(losses)} bits, asked for {sorted(choices)}.",
                where=site.name,
                remedy="estimates gives a loss for every choice, or nothing",
            )
        self.folder.write_json(self._losses(site), {str(q_bits): loss for q_bits, loss in losses.items()})

    def _share(self, site: Site) -> float:
        """The share of the text's tokens that come to a site: losses are estimated a token seen, and spent a token."""
        reach = self._store.reach(site)
        return 1.0 if reach is None else reach.counted / self._work.texts.calibration.ids.numel()

    def problem(self) -> Problem:
        """The run's problem with losses, where the allocation looks at them."""
        work = self._work
        if work.looks < Looks.LOSSES:
            return work.problem
        candidates = {}
        for site in work.sites:
            energies: dict[int, Tensor] = {}
            noise: dict[int, Mapping[int, float]] = {}
            table = work.problem.candidates[site.name]
            if table.stays:
                candidates[site.name] = table.with_losses(torch.zeros(1, dtype=torch.float64))
                continue
            # What was estimated counts even where codes are there, so that a plan does not depend on earlier runs.
            estimated = self._estimated(site) or {}
            for q_bits in table.choices:
                if q_bits in estimated:
                    energies[q_bits], noise[q_bits] = torch.tensor([estimated[q_bits]]), {}
                    continue
                with safe_open(self.folder.path / self._file(site, q_bits), framework="pt") as file:
                    energies[q_bits], noise[q_bits] = file.get_tensor("energy"), _noise_of(file.get_tensor("noise"))
            losses = estimated_losses(table, energies, noise) * self._share(site)
            candidates[site.name] = table.with_losses(losses)
        return Problem(work.sites, candidates, work.problem.form, work.problem.allowance)
