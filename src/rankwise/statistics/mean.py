"""`MeanStatistic`: a mean of something that is measured on every batch. The short way to a new statistic."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from rankwise.progress import Reporter
from rankwise.statistics.base import Place, StartSums, Statistic, Sums, Totals
from rankwise.statistics.streams import Stream


@dataclass(frozen=True)
class MeanTotals(Totals):
    """A sum, and how many it is over.

    Attributes:
        count: what was counted.
        total: float64.
        vectors: vectors it was measured on, be they what is counted or not.
    """

    vectors_in: ClassVar[str] = "vectors"

    count: int
    total: Tensor
    vectors: int = 0

    def merge(self, other: Self) -> Self:
        return replace(
            self,
            count=self.count + other.count,
            total=self.total + other.total,
            vectors=self.vectors + other.vectors,
        )

    def weighing(self, vectors: int) -> Self:
        return replace(self, count=vectors, total=self.value() * vectors, vectors=vectors)

    def value(self) -> Tensor:
        """The mean, in the shape of `total`."""
        return self.total / self.count


class MeasuredSums(Sums):
    """Sums of what is measured.

    Args:
        measure: gives a count and a sum, as `MeanStatistic.measure` does.
        d: dimension of the stream's vectors.
        device: where they live.

    Raises:
        TypeError: on adding, when the sum is not float32.
    """

    def __init__(self, measure: Callable[[Tensor, Tensor], tuple[int, Tensor]], d: int, device: torch.device) -> None:
        self._measure = measure
        self._count, self._vectors, self._total = 0, 0, torch.zeros((), device=device)

    @property
    def empty(self) -> bool:
        return self._count == 0

    def add(self, x: Tensor, inputs: Tensor) -> None:
        count, total = self._measure(x, inputs)
        if total.dtype != torch.float32:
            raise TypeError(f"what is measured was summed in {total.dtype}: sums are float32")
        self._total = self._total + total if self._count else total
        self._count += count
        self._vectors += x.numel() // x.shape[-1]

    def take(self) -> MeanTotals:
        taken = MeanTotals(self._count, self._total.double(), self._vectors)
        self._count = self._vectors = 0
        return taken


class MeanStatistic(Statistic[MeanTotals, Tensor]):
    """A sum over the calibration text, divided by a count; a method sees the quotient.

    A subclass has a `name`, settings as fields, `streams` and `measure`.
    """

    totals = MeanTotals

    @abstractmethod
    def measure(self, x: Tensor, inputs: Tensor) -> tuple[int, Tensor]:
        """Count and float32 sum of what was seen of a batch; arguments as for `Sums.add`."""

    def sums(self, streams: Sequence[Stream], sequences: int, reporter: Reporter) -> StartSums:
        return partial(MeasuredSums, self.measure)

    def seen(self, totals: MeanTotals, place: Place) -> Tensor:
        return totals.value()
