"""Outlooks: what the method sees in every weight, made where they are missing and kept in a file each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rankwise.allocation import Looks, Problem
from rankwise.methods import Method, Outlook, estimated_losses
from rankwise.models import Site
from rankwise.runs import Job
from rankwise.stages.crews import at_work
from rankwise.stages.looked import load_outlook, noise_of, outlook_file, outlook_stage
from rankwise.stages.work import Work
from rankwise.statistics import Store


class Outlooks:
    """What the method sees at every site; made at need, each kept in a file of its own.

    Args:
        work: the run.
        store: its statistics.
    """

    def __init__(self, work: Work, store: Store) -> None:
        self._work, self._store = work, store
        self.folder = outlook_stage(work).workspace()

    def of(self, site: Site, q_bits: int) -> Outlook:
        """The outlook at a site beside a Q of so many bits, with all of the basis that its candidates need.

        Raises:
            NotFiniteError: naming the site.
        """
        self.require([(site, q_bits)])
        known = self.known(site, q_bits)
        assert known is not None
        return known

    def known(self, site: Site, q_bits: int) -> Outlook | None:
        """What was kept of an outlook that was made before: energies and Q, and perhaps no basis; None for nothing."""
        file = outlook_file(site, q_bits)
        if not self.folder.has(file):
            return None
        return load_outlook(self.folder.path / file, self._work.problem.form.codebook)

    def require(self, wanted: Iterable[tuple[Site, int]]) -> None:
        """Make outlooks that are missing or were kept without the basis that their candidates need.

        Args:
            wanted: pairs of a site and the bits of Q.

        Raises:
            NotFiniteError: naming the site.
        """
        self._make([(site, q_bits) for site, q_bits in wanted if not self._has_basis(site, q_bits)], with_basis=True)

    def _has_basis(self, site: Site, q_bits: int) -> bool:
        if not self.folder.has(outlook_file(site, q_bits)):
            return False
        most = self._work.problem.candidates[site.name].with_ranks(q_bits) if q_bits else 1
        with safe_open(self.folder.path / outlook_file(site, q_bits), framework="pt") as file:
            return int(file.get_slice("right").get_shape()[0]) >= most

    def _make(self, wanted: list[tuple[Site, int]], with_basis: bool) -> None:
        self._fill(
            [
                Job(
                    "rankwise.stages.jobs:look_at",
                    {"site": site.name, "q_bits": q_bits, "with_basis": with_basis},
                    self.measured(site),
                    f"{site.name} beside {q_bits} bits" if q_bits else site.name,
                )
                for site, q_bits in wanted
            ]
        )

    def measured(self, site: Site) -> tuple[Path, ...]:
        """What is measured at a site, as files below the run directory."""
        root = self._work.run.directory
        return tuple(file.relative_to(root) for file in self._store.files(site))

    def looked(self, site: Site) -> tuple[Path, ...]:
        """What was seen at a site, as files below the run directory."""
        names = [outlook_file(site, q_bits) for q_bits in {0, *self._work.problem.candidates[site.name].choices}]
        return tuple(
            (self.folder.path / name).relative_to(self._work.run.directory) for name in names if self.folder.has(name)
        )

    def everything(self) -> tuple[Path, ...]:
        """What was seen at all sites, as files below the run directory."""
        return tuple(path for site in self._work.sites for path in self.looked(site))

    def _fill(self, jobs: list[Job]) -> None:
        """Do jobs whose files belong into the folder."""
        if not jobs:
            return
        with (
            self._work.reporter.counting("looking at weights", total=len(jobs)) as advance,
            at_work(self._work) as crew,
        ):
            for done in crew.results(jobs, 4 * crew.workers):
                for name in done.files:
                    with self.folder.writing(name) as path:
                        done.put(name, path)
                advance("looking at weights")

    def look(self) -> None:
        """Make all that the allocation looks at and that is not there.

        Raises:
            NotFiniteError: naming the site.
        """
        work = self._work
        sites = [site for site in work.sites if not work.problem.candidates[site.name].stays]
        self._fill(
            [
                Job("rankwise.stages.jobs:estimate_losses", {"site": site.name}, self.measured(site), site.name)
                for site in sites
                if self._estimated(site) is None
            ]
        )
        unseen = [(site, q_bits) for site in sites for q_bits in self._unseen(site)]
        self._make(unseen, with_basis=work.looks >= Looks.OBJECTIVE)

    def _unseen(self, site: Site) -> list[int]:
        """The choices of a site that are still to be looked at; a search looks at the codes of all."""
        choices = self._work.problem.candidates[site.name].choices
        if self._work.looks < Looks.OBJECTIVE and self._estimated(site):
            return []
        return [q_bits for q_bits in choices if not self.folder.has(outlook_file(site, q_bits))]

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
                with safe_open(self.folder.path / outlook_file(site, q_bits), framework="pt") as file:
                    energies[q_bits], noise[q_bits] = file.get_tensor("energy"), noise_of(file.get_tensor("noise"))
            losses = estimated_losses(table, energies, noise) * self._share(site)
            candidates[site.name] = table.with_losses(losses)
        return Problem(work.sites, candidates, work.problem.form, work.problem.allowance)
