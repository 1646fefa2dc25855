"""Mean and second moment of a site's input, whatever its size: the Hessian of layer-wise rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rankwise.models import Site
from rankwise.progress import Reporter
from rankwise.statistics.base import Place, StartSums, Statistic
from rankwise.statistics.groups import BY_TOKENS
from rankwise.statistics.moment_sums import MomentSums, MomentTotals
from rankwise.statistics.streams import Stream, input_streams


@dataclass(frozen=True)
class InputMoments(Statistic[MomentTotals, MomentTotals]):
    """Count, mean and scatter of the input over all tokens; a method sees these, `[n]` and `[n, n]`.

    Attributes:
        groups: groups of sequences that are summed in float32, as for `group_ends`.
    """

    name = "input_moments"
    totals = MomentTotals

    groups: int = BY_TOKENS

    def streams(self, sites: Sequence[Site]) -> list[Stream]:
        return input_streams(sites)

    def sums(self, streams: Sequence[Stream], sequences: int, reporter: Reporter) -> StartSums:
        return MomentSums

    def seen(self, totals: MomentTotals, place: Place) -> MomentTotals:
        return totals
