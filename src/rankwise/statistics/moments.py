"""Sufficient statistics of vectors: they merge by addition, so resuming and distributing are the same operation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean and centred second moment of vectors of dimension d.

    Attributes:
        count: vectors seen.
        mean: shape `[d]`, float64.
        scatter: sum of (x - mean)(x - mean)^T, shape `[d, d]`, float64.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Moments of samples of shape `[tokens, d]`, computed in float64."""
        x = x.double()
        mean = x.mean(0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together (Chan et al.; Welford's update is the case of one vector)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter
        scatter.addr_(delta, delta, alpha=self.count * other.count / count)
        return Moments(count, self.mean + delta * (other.count / count), scatter)

    def covariance(self) -> Tensor:
        """Sample covariance, shape `[d, d]`; zero for a single vector."""
        return self.scatter / max(1, self.count - 1)

    def second_moment(self) -> Tensor:
        """E[x x^T], not centred, shape `[d, d]`."""
        return self.scatter / self.count + torch.outer(self.mean, self.mean)


@dataclass(frozen=True)
class PooledMoments:
    """Sums over groups of each group's mean and sample covariance (Bolaco, Eq. 4).

    Attributes:
        groups: groups seen.
        mean_sum: shape `[d]`, float64.
        covariance_sum: shape `[d, d]`, float64.
    """

    groups: int
    mean_sum: Tensor
    covariance_sum: Tensor

    @classmethod
    def of_group(cls, moments: Moments) -> PooledMoments:
        return cls(1, moments.mean, moments.covariance())

    def merge(self, other: PooledMoments) -> PooledMoments:
        return PooledMoments(
            self.groups + other.groups, self.mean_sum + other.mean_sum, self.covariance_sum + other.covariance_sum
        )

    def mean(self) -> Tensor:
        """Mean of the groups' means, shape `[d]`."""
        return self.mean_sum / self.groups

    def covariance(self) -> Tensor:
        """Mean of the groups' covariances, shape `[d, d]`."""
        return self.covariance_sum / self.groups


@dataclass(frozen=True)
class AbsoluteMean:
    """Sum of absolute values: count and `total` of shape `[d]`, float64."""

    count: int
    total: Tensor

    def merge(self, other: AbsoluteMean) -> AbsoluteMean:
        return AbsoluteMean(self.count + other.count, self.total + other.total)

    def value(self) -> Tensor:
        """E|x|, shape `[d]`."""
        return self.total / self.count


def _gram_block(d: int, device: torch.device) -> int:
    """Rows of a Gram matrix to update at a time: small blocks save most of its upper half, large ones suit GEMMs."""
    if device.type != "cpu":
        return max(1024, d // 4)
    return 128 if d < 2048 else 256


class MomentSums:
    """Float32 accumulator on the model's device for one group of sequences.

    Sums are taken of x - shift, the shift being the mean of the first vectors seen, so that float32 does not lose the
    covariance of inputs whose mean is large.

    Args:
        d: dimension.
        device: where the vectors live.
    """

    def __init__(self, d: int, device: torch.device) -> None:
        self._gram = torch.zeros(d, d, device=device)  # Only the lower triangle is kept up to date.
        self._block = _gram_block(d, device)
        self._total = torch.zeros(d, device=device)
        self._shift = torch.zeros(d, device=device)
        self._count = 0

    @property
    def empty(self) -> bool:
        return self._count == 0

    def add(self, x: Tensor) -> None:
        """Add vectors of shape `[tokens, d]`."""
        x = x.float()
        if self._count == 0:
            self._shift = x.mean(0)
        x = x - self._shift
        for start in range(0, x.shape[1], self._block):
            stop = start + self._block
            self._gram[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])
        self._total += x.sum(0)
        self._count += len(x)

    def take(self) -> Moments:
        """The moments of what was added, in float64 on the CPU; the accumulator starts afresh."""
        total, count = self._total.cpu().double(), self._count
        scatter = self._gram.to("cpu", torch.float64)
        scatter.addr_(total, total, alpha=-1 / count).tril_()
        scatter += scatter.tril(-1).T
        moments = Moments(count, self._shift.cpu().double() + total / count, scatter)
        self._gram.zero_()
        self._total.zero_()
        self._count = 0
        return moments
