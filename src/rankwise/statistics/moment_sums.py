"""Mean and second moment of vectors: sums in float32, totals in float64. Several statistics are made of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from rankwise.statistics.base import Sums, Totals
from rankwise.statistics.symmetric import panels


@dataclass(frozen=True)
class MomentTotals(Totals):
    """Count, mean and centred second moment of vectors of dimension d.

    Attributes:
        count: vectors seen.
        mean: shape `[d]`, float64.
        scatter: sum of (x - mean)(x - mean)^T, shape `[d, d]`, float64.
    """

    vectors_in: ClassVar[str] = "count"

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Self:
        """Moments of samples of shape `[tokens, d]`, computed in float64."""
        x = x.double()
        mean = x.mean(0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def merge(self, other: Self) -> Self:
        """Moments of both sets together (Chan et al.; Welford's update is the case of one vector)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter
        scatter.addr_(delta, delta, alpha=self.count * other.count / count)
        return replace(self, count=count, mean=self.mean + delta * (other.count / count), scatter=scatter)

    def weighing(self, vectors: int) -> Self:
        return replace(self, count=vectors, scatter=self.scatter * (vectors / self.count))

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.scatter.diagonal()).all())

    def covariance(self) -> Tensor:
        """Sample covariance, shape `[d, d]`; zero for a single vector."""
        return self.scatter / max(1, self.count - 1)

    def second_moment(self) -> Tensor:
        """E[x x^T], not centred, shape `[d, d]`."""
        return self.scatter / self.count + torch.outer(self.mean, self.mean)


def gram_panel(d: int, device: torch.device) -> int:
    """Rows of a Gram matrix to update at a time: small ones save most of the upper half, large ones keep GEMMs fast."""
    if device.type != "cpu":
        return max(1024, d // 4)
    return 128 if d < 2048 else 256


class MomentSums(Sums):
    """Sums of x and x x^T.

    They are taken of x - shift, the shift being the mean of the first vectors seen, so that float32 does not lose the
    covariance of inputs whose mean is large.

    Args:
        d: dimension.
        device: where the vectors live.
    """

    def __init__(self, d: int, device: torch.device) -> None:
        self._gram = torch.zeros(d, d, device=device)  # Only the lower triangle is kept up to date.
        self._panel = gram_panel(d, device)
        self._total = torch.zeros(d, device=device)
        self._shift = torch.zeros(d, device=device)
        self._count = 0

    @property
    def empty(self) -> bool:
        return self._count == 0

    def add(self, x: Tensor, inputs: Tensor | None = None) -> None:
        """Add vectors of shape `[..., d]`."""
        if not x.numel():
            return
        x = x.reshape(-1, x.shape[-1]).float()
        if self._count == 0:
            self._shift = x.mean(0)
        x = x - self._shift
        for start, stop in panels(x.shape[1], self._panel):
            self._gram[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])
        self._total += x.sum(0)
        self._count += len(x)

    def take(self) -> MomentTotals:
        total, count = self._total.double(), self._count
        scatter = self._gram.double()
        scatter.addr_(total, total, alpha=-1 / count).tril_()
        scatter += scatter.tril(-1).T
        moments = MomentTotals(count, self._shift.double() + total / count, scatter)
        self._gram.zero_()
        self._total.zero_()
        self._count = 0
        return moments
