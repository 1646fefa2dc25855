"""Mean and second moment of a site's input, or of its output where that is smaller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rankwise.models import Site
from rankwise.progress import Reporter
from rankwise.statistics.base import Place, StartSums, Statistic
from rankwise.statistics.groups import BY_TOKENS
from rankwise.statistics.moment_sums import MomentSums, MomentTotals
from rankwise.statistics.response import Response, respond
from rankwise.statistics.streams import Stream, smaller_streams


@dataclass(frozen=True)
class SeenMoments:
    """Moments over all tokens, at one site.

    Attributes:
        asked: the statistic.
        totals: of the stream that serves the site.
        place: the site.
    """

    asked: Moments
    totals: MomentTotals
    place: Place

    def covariance(self) -> Response:
        """Sample covariance."""
        return respond(self.place, (self.asked, "covariance"), self.totals.mean, lambda _mean: self.totals.covariance())

    def second_moment(self) -> Response:
        """E[x x^T], not centred."""
        return respond(
            self.place,
            (self.asked, "second moment"),
            self.totals.mean,
            lambda mean: replace(self.totals, mean=mean).second_moment(),
        )


@dataclass(frozen=True)
class Moments(Statistic[MomentTotals, SeenMoments]):
    """Count, mean and scatter over all tokens; a method sees `SeenMoments`.

    Attributes:
        groups: groups of sequences that are summed in float32, as for `group_ends`.
    """

    name = "moments"
    totals = MomentTotals

    groups: int = BY_TOKENS

    def streams(self, sites: Sequence[Site]) -> list[Stream]:
        return smaller_streams(sites)

    def sums(self, streams: Sequence[Stream], sequences: int, reporter: Reporter) -> StartSums:
        return MomentSums

    def seen(self, totals: MomentTotals, place: Place) -> SeenMoments:
        return SeenMoments(self, totals, place)
