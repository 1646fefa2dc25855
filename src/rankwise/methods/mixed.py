"""Every form at once: dense, low rank, codes, and both, site by site, whichever loses least for its bits."""

from __future__ import annotations

from dataclasses import replace
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
from rankwise.quantizers import Rotation
from rankwise.sizes import DENSE, Budget, Candidates, Cut, Form, coded_candidates, join, low_rank_candidates
from rankwise.statistics import SiteStatistics, Statistic
from rankwise.statistics.input_moments import InputMoments

_TRIED_ALONE = 4
_TRIED_BESIDE = 16
"""Of min(m, n), one part in so many: the rank at which L R is tried without a Q, and beside one."""


class Mixed(Caldera):
    """Candidates of `two_sided` (dense, and L R in numbers) beside those of `caldera` (Q, Q + L R) in one budget.

    Losses of both are in one unit, so one plan may mix them; what is chosen is then fitted by the one or the other. L R
    without Q may also be codes. Where L R is codes it is fitted to the loss: errors of outputs weigh by the curvature,
    as in `two_sided`. What a fit misses of the loss that a rank would save is tried once a site and number of bits, and
    counted in.

    Attributes:
        alone_bits: bits of the entries of L R without Q; numbers of the checkpoint's own type are a choice besides.
        curvature_damping: of the output metric, see `two_sided`.
        output_feedback: as in `quantize`: Q is rounded for what L and R are fitted to.
        outer: as in `caldera`. None takes 1 where Q is rounded on two sides, where more bring at most 1% less
            divergence (benchmarks/results/turns.md), and 15 where it is not.
    """

    keeps_factors: ClassVar[bool] = False
    default_keep: ClassVar[float | None] = None

    name: Literal["mixed"] = "mixed"  # type: ignore[assignment]
    alone_bits: tuple[Annotated[int, Field(ge=2, le=8)], ...] = (4, 8)
    curvature_damping: Annotated[float, Field(ge=0)] = 1.0
    output_feedback: bool = True
    outer: Annotated[int, Field(ge=1)] | None = None  # type: ignore[assignment]

    @property
    def _turns(self) -> int:
        return self.outer or (1 if self.feeds_outputs else Caldera().outer)

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

    def output_metric(self, statistics: SiteStatistics) -> OutputMetric | None:
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

    def output_weights(self, statistics: SiteStatistics, rotation: Rotation, like: Tensor) -> Tensor | None:
        blocks = statistics.of(CURVATURE).to(like)
        if not blocks.any():
            return None
        curvature = torch.block_diag(*blocks)
        curvature.diagonal().add_(self.curvature_damping * curvature.diagonal().mean())
        return rotation.curvature(curvature)

    def outlook(self, weight: Tensor, statistics: SiteStatistics, q_bits: int, source: torch.Generator) -> Outlook:
        state = source.get_state()
        if q_bits:
            found = super().outlook(weight, statistics, q_bits, source)
        else:
            found = Outlook(self._factorisation.decompose(weight, statistics))
        tail = tail_losses(found.basis.energy)
        rank = max(1, (len(tail) - 1) // (_TRIED_BESIDE if q_bits else _TRIED_ALONE))
        taken = float(tail[0] - tail[rank])
        noise = {}
        for bits in (self.lr_bits,) if q_bits else self.alone_bits:
            # Signs are drawn as they will be for the fit.
            source.set_state(state)
            tried = self._tried(weight, statistics, Cut(rank, q_bits, bits), source, found)
            lost = self._loss(weight - tried.reconstruct(), statistics)
            noise[bits] = max(0.0, (lost - float(tail[rank])) / taken) if taken > 0 else 0.0
        return replace(found, noise=noise)

    def _tried(
        self, weight: Tensor, statistics: SiteStatistics, cut: Cut, source: torch.Generator, found: Outlook
    ) -> Factors:
        """One turn of a fit."""
        once = self.model_copy(update={"outer": 1})
        return super(Mixed, once).fit(weight, statistics, cut, source, lambda _q_bits: found)[0]

    @staticmethod
    def _loss(error: Tensor, statistics: SiteStatistics) -> float:
        """tr(F E H E^T) by the measured metrics, E of shape `[m, n]`."""
        seen = statistics.of(InputMoments()).second_moment().to(error)
        return float((weighed_by_blocks(statistics.of(CURVATURE).to(error), error) * (error @ seen)).sum())

    def fit(
        self, weight: Tensor, statistics: SiteStatistics, cut: Cut, source: torch.Generator, looking: Looking
    ) -> tuple[Factors, Fit]:
        if cut.coded:
            return super().fit(weight, statistics, cut, source, looking)
        return self._factorisation.fit(weight, statistics, cut, source, looking)
