"""Mean and variance of every input by itself (FLAP, arXiv 2312.11983)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from rankwise.models import Site
from rankwise.progress import Reporter
from rankwise.statistics.base import Place, StartSums, Statistic, Sums, Totals
from rankwise.statistics.streams import Stream, input_streams


@dataclass(frozen=True)
class SpreadTotals(Totals):
    """Count, mean and squared deviations of vectors of dimension d, entry by entry.

    Attributes:
        count: vectors seen.
        mean: shape `[d]`, float64.
        scatter: sum of (x - mean)^2, shape `[d]`, float64.
    """

    vectors_in: ClassVar[str] = "count"

    count: int
    mean: Tensor
    scatter: Tensor

    def merge(self, other: Self) -> Self:
        count = self.count + other.count
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter + delta.square() * (self.count * other.count / count)
        return replace(self, count=count, mean=self.mean + delta * (other.count / count), scatter=scatter)

    def variance(self) -> Tensor:
        """Var(x), shape `[d]`; zero for a single vector."""
        return self.scatter / max(1, self.count - 1)

    def mean_square(self) -> Tensor:
        """E[x^2], shape `[d]`."""
        return self.scatter / self.count + self.mean.square()


class SpreadSums(Sums):
    """One batch after another, each in float64: it is d numbers a token.

    Args:
        d: dimension.
        device: where the vectors live.
    """

    def __init__(self, d: int, device: torch.device) -> None:
        self._found: SpreadTotals | None = None

    @property
    def empty(self) -> bool:
        return self._found is None

    def add(self, x: Tensor, inputs: Tensor | None = None) -> None:
        """Add vectors of shape `[..., d]`."""
        if not x.numel():
            return
        x = x.reshape(-1, x.shape[-1]).double()
        mean = x.mean(0)
        found = SpreadTotals(len(x), mean, (x - mean).square().sum(0))
        self._found = found if self._found is None else self._found.merge(found)

    def take(self) -> SpreadTotals:
        assert self._found is not None
        taken, self._found = self._found, None
        return taken


@dataclass(frozen=True)
class InputSpread(Statistic[SpreadTotals, SpreadTotals]):
    """Mean and variance of each input over all tokens; a method sees both, shape `[n]`."""

    name = "input_spread"
    totals = SpreadTotals

    def streams(self, sites: Sequence[Site]) -> list[Stream]:
        return input_streams(sites)

    def sums(self, streams: Sequence[Stream], sequences: int, reporter: Reporter) -> StartSums:
        return SpreadSums

    def seen(self, totals: SpreadTotals, place: Place) -> SpreadTotals:
        return totals
