"""The sample covariance, averaged over groups of sequences (Bolaco, arXiv 2405.10616, Eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from rankwise.models import Site
from rankwise.progress import Reporter
from rankwise.statistics.base import Place, StartSums, Statistic, Totals
from rankwise.statistics.moment_sums import MomentSums, MomentTotals
from rankwise.statistics.response import Response, respond
from rankwise.statistics.streams import Stream, smaller_streams


@dataclass(frozen=True)
class PooledTotals(Totals):
    """Sums over groups of each group's mean and sample covariance.

    Attributes:
        groups: groups seen.
        mean_sum: shape `[d]`, float64.
        covariance_sum: shape `[d, d]`, float64.
        vectors: vectors in all groups.
    """

    vectors_in: ClassVar[str] = "vectors"

    groups: int
    mean_sum: Tensor
    covariance_sum: Tensor
    vectors: int = 0

    @classmethod
    def of_group(cls, moments: MomentTotals) -> Self:
        return cls(1, moments.mean, moments.covariance(), moments.count)

    def merge(self, other: Self) -> Self:
        return replace(
            self,
            groups=self.groups + other.groups,
            mean_sum=self.mean_sum + other.mean_sum,
            covariance_sum=self.covariance_sum + other.covariance_sum,
            vectors=self.vectors + other.vectors,
        )

    def weighing(self, vectors: int) -> Self:
        return replace(
            self,
            groups=vectors,
            mean_sum=self.mean() * vectors,
            covariance_sum=self.covariance() * vectors,
            vectors=vectors,
        )

    def mean(self) -> Tensor:
        """Mean of the groups' means, shape `[d]`."""
        return self.mean_sum / self.groups

    def covariance(self) -> Tensor:
        """Mean of the groups' covariances, shape `[d, d]`."""
        return self.covariance_sum / self.groups


@dataclass(frozen=True)
class PooledCovariance(Statistic[PooledTotals, Response]):
    """Mean of the groups' sample covariances; a method sees it as a `Response`.

    Attributes:
        groups: groups of sequences that are averaged over.
    """

    name = "pooled_covariance"
    totals = PooledTotals

    groups: int = 32

    def streams(self, sites: Sequence[Site]) -> list[Stream]:
        return smaller_streams(sites)

    def sums(self, streams: Sequence[Stream], sequences: int, reporter: Reporter) -> StartSums:
        if sequences < self.groups:
            reporter.note(f"{sequences} calibration sequences make {sequences} pooling groups, not {self.groups}")
        return MomentSums

    def totals_of(self, taken: Any) -> PooledTotals:
        return PooledTotals.of_group(taken)

    def seen(self, totals: PooledTotals, place: Place) -> Response:
        return respond(place, self, totals.mean(), lambda _mean: totals.covariance())
