"""Where the points of a search lie: a box with one linear equation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

_PROJECTIONS = 60


class Box(ABC):
    """A box with one linear equation, and what each of its points stands for.

    Attributes:
        name: as a recipe writes it.
        labels: name of each coordinate, d of them.
        lower: shape `[d]`, float64.
        upper: shape `[d]`.
        weights: c of the equation c . x = total, shape `[d]`, positive on the coordinates it binds.
        total: its right side.
        attention: by coordinate, whether it steers attention alone.
    """

    name: str
    labels: list[str]
    lower: Tensor
    upper: Tensor
    weights: Tensor
    total: float
    attention: list[bool]

    @property
    def dimensions(self) -> int:
        return len(self.labels)

    def project(self, points: Tensor) -> Tensor:
        """Move points onto the equation inside the box, by one shift a point.

        Args:
            points: shape `[..., d]`.
        """
        bound = self.weights > 0
        widest = float((self.upper - self.lower).max()) + float((points - self.lower).abs().max())
        low = torch.full(points.shape[:-1], -2 * widest, dtype=torch.float64)
        high = -low
        free = points.clamp(self.lower, self.upper)

        def shifted(by: Tensor) -> Tensor:
            return torch.where(bound, (points + by.unsqueeze(-1)).clamp(self.lower, self.upper), free)

        for _ in range(_PROJECTIONS):
            middle = (low + high) / 2
            short = (shifted(middle) * self.weights).sum(-1) < self.total
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        return shifted((low + high) / 2)

    def draw(self, count: int, source: torch.Generator) -> Tensor:
        """Points spread over the space, shape `[count, d]`."""
        drawn = torch.rand(count, self.dimensions, generator=source, dtype=torch.float64)
        return self.project(self.lower + drawn * (self.upper - self.lower))

    @abstractmethod
    def decided(self, point: Tensor) -> Mapping[str, Hashable]:
        """What is decided at a point of shape `[d]`, by name of what it is decided of."""

    def given(self, coordinates: Mapping[str, float]) -> Tensor | None:
        """A point from its coordinates by label; None unless all are there."""
        if set(coordinates) != set(self.labels):
            return None
        return torch.tensor([coordinates[label] for label in self.labels], dtype=torch.float64)


def unit(space: Box, points: Tensor) -> Tensor:
    """Points scaled to the unit cube, shape `[..., d]`."""
    return (points - space.lower) / (space.upper - space.lower)
