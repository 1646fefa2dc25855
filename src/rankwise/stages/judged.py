"""Plans judged: the model made ready for any cuts, and outcomes asked for of whoever works."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from rankwise.allocation import Outcome
from rankwise.evaluation import Objective
from rankwise.layers.sliced import Beside, sliced
from rankwise.methods import Outlook
from rankwise.models import Site
from rankwise.runs import Crew, Job
from rankwise.sizes import Cut
from rankwise.stages.work import Work


@contextmanager
def judging(work: Work, looked: Callable[[Site, int], Outlook], samples: Tensor) -> Iterator[Objective]:
    """The model with every basis resident, for as long as the block runs, and the objective that steers it.

    Args:
        work: the run.
        looked: what the method sees at a site beside a Q of so many bits.
        samples: validation samples, shape `[samples, length]`.
    """
    recipe, loaded = work.recipe, work.loaded

    def load(site: Site) -> dict[int, Beside]:
        found = {}
        for q_bits in work.problem.candidates[site.name].choices:
            outlook = looked(site, q_bits)
            found[q_bits] = outlook.q, outlook.rotation, outlook.basis
        return found

    with sliced(loaded.model, work.sites, load, work.problem.candidates, loaded.stored_dtypes) as set_cuts:
        yield Objective(loaded.model, samples, recipe.objective, set_cuts, recipe.validation.batch_size)


class Judging:
    """Outcomes of plans on some samples, and what the objective says of itself.

    Args:
        crew: who judges.
        reads: all that was seen in the weights, as files below the run directory.
        samples: validation samples, shape `[samples, length]`.
    """

    def __init__(self, crew: Crew, reads: tuple[Path, ...], samples: Tensor) -> None:
        self._crew, self._reads, self._samples = crew, reads, samples
        self._facts: dict[str, Any] = {}

    def _job(self, cuts: Mapping[str, Cut] | None) -> Job:
        plain = None if cuts is None else {name: [cut.rank, cut.q_bits, cut.lr_bits] for name, cut in cuts.items()}
        asked = {"cuts": plain, "samples": self._samples}
        return Job("rankwise.stages.jobs:judge_cuts", asked, self._reads, "a trial")

    def outcomes(self, plans: Iterable[Mapping[str, Cut]]) -> Iterator[Outcome]:
        """Of one plan after another, in their order."""
        for done in self._crew.results(self._job(cuts) for cuts in plans):
            found, facts = done.value
            self._keep(facts)
            yield Outcome(*found)

    def facts(self) -> dict[str, Any]:
        """Of the objective: its loss of the original, how predictions are kept, and what a bare pass takes."""
        if not self._facts:
            for done in self._crew.results([self._job(None)]):
                self._keep(done.value[1])
        return self._facts

    def _keep(self, facts: Mapping[str, Any]) -> None:
        """Of several workers, the largest share that was missed."""
        missed = [each.get("largest_share_of_kl_missed") for each in (self._facts, facts)]
        known = [each for each in missed if each is not None]
        self._facts = {**facts, "largest_share_of_kl_missed": max(known, default=None)}
