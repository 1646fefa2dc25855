"""Every form at once: dense, low rank, codes, and both, site by site, whichever loses least for its bits."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rankwise.factors import Factors, Fit
from rankwise.linalg import OutputMetric
from rankwise.methods.base import Looking, Outlook, tail_losses
from rankwise.methods.caldera import Caldera
from rankwise.methods.quantizing import CURVATURE, weighed_by_blocks
from rankwise.methods.two_sided import TwoSided
from rankwise.sizes import DENSE, Budget, Candidates, Cut, Form, coded_candidates, join, low_rank_candidates
from rankwise.statistics import SiteStatistics, Statistic
from rankwise.statistics.input_moments import InputMoments

_TRIED_RANK = 4
"""Of min(m, n), one part in so many: the rank at which the rounding of L and R is tried."""


class Mixed(Caldera):
    """Candidates of `two_sided` (dense, and L R in numbers) beside those of `caldera` (Q, Q + L R) in one budget.

    Losses of both are in one unit, so one plan may mix them; what is chosen is then fitted by the one or the other. L R
    without Q may also be codes. What rounding its entries costs is tried once a site, at a quarter of the full rank.

    Attributes:
        alone_bits: bits of the entries of L R without Q; numbers of the checkpoint's own type are a choice besides.
        curvature_damping: of the output metric, see `two_sided`.
    """

    keeps_factors: ClassVar[bool] = False
    default_keep: ClassVar[float | None] = None

    name: Literal["mixed"] = "mixed"  # type: ignore[assignment]
    alone_bits: tuple[Annotated[int, Field(ge=2, le=8)], ...] = (4, 8)
    curvature_damping: Annotated[float, Field(ge=0)] = 1.0

    @property
    def _factorisation(self) -> TwoSided:
        return TwoSided(damping=self.curvature_damping)

    @property
    def adds_bias(self) -> bool:
        return self._factorisation.adds_bias

    def check_size(self, asked: Budget, allocation: str) -> None:
        if not asked.sized and allocation != "plan":
            raise ValueError("mixed needs a size to choose by: give bits, keep or size")

    def requests(self) -> tuple[Statistic, ...]:
        return (*super().requests(), *self._factorisation.requests())

    def plan_requests(self) -> tuple[Statistic, ...]:
        return ()

    def output_metric(self, statistics: SiteStatistics) -> OutputMetric:
        return self._factorisation.output_metric(statistics)

    def candidates(self, shape: tuple[int, int], form: Form, multiple: int, looks: bool) -> Candidates:
        coded = super().candidates(shape, form, multiple, looks)
        whole = form.bits(shape, DENSE)
        ranks = range(multiple, min(shape) + 1, multiple)
        alone = [
            coded_candidates(
                shape, form, (0,), bits, [r for r in ranks if form.bits(shape, Cut(r, 0, bits)) < whole], 0.0
            )
            for bits in self.alone_bits
        ]
        # By size alone Q climbs, and then the weight stays as it is.
        return join(coded, *alone, low_rank_candidates(shape, form, multiple))

    def outlook(self, weight: Tensor, statistics: SiteStatistics, q_bits: int, source: torch.Generator) -> Outlook:
        if q_bits:
            return super().outlook(weight, statistics, q_bits, source)
        basis = self._factorisation.decompose(weight, statistics)
        tail = tail_losses(basis.energy)
        seen, curvature = statistics.of(InputMoments()).second_moment().to(weight), statistics.of(CURVATURE).to(weight)
        rank = max(1, basis.rank // _TRIED_RANK)
        taken = float(tail[0] - tail[rank])
        noise = {}
        for bits in self.alone_bits:
            tried = super().fit(weight, statistics, Cut(rank, 0, bits), source, _no_looking)[0]
            rest = weight - tried.reconstruct()
            loss = float((weighed_by_blocks(curvature, rest) * (rest @ seen)).sum())
            noise[bits] = max(0.0, (loss - float(tail[rank])) / taken) if taken > 0 else 0.0
        return Outlook(basis, noise=noise)

    def fit(
        self, weight: Tensor, statistics: SiteStatistics, cut: Cut, source: torch.Generator, looking: Looking
    ) -> tuple[Factors, Fit]:
        if cut.coded:
            return super().fit(weight, statistics, cut, source, looking)
        return self._factorisation.fit(weight, statistics, cut, source, looking)


def _no_looking(_q_bits: int) -> None:
    """Nothing was seen yet."""
