"""Second moments of loss gradients. They merge by addition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Curvature:
    """Sum of g g^T over tokens, g the gradient of the loss at a site's output, in diagonal blocks.

    Attributes:
        count: tokens seen.
        blocks: shape `[k, b, b]`, k b = m, float64.
    """

    count: int
    blocks: Tensor

    def merge(self, other: Curvature) -> Curvature:
        return Curvature(self.count + other.count, self.blocks + other.blocks)

    def value(self) -> Tensor:
        """E[g g^T] in blocks, shape `[k, b, b]`."""
        return self.blocks / self.count


@dataclass(frozen=True)
class RowFisher:
    """Sum over sequences of the squared weight gradient, summed over each row: `total` of shape `[m]`, float64."""

    count: int
    total: Tensor

    def merge(self, other: RowFisher) -> RowFisher:
        return RowFisher(self.count + other.count, self.total + other.total)

    def value(self) -> Tensor:
        """Mean over sequences, shape `[m]`."""
        return self.total / self.count


def squared_rows(inputs: Tensor, gradients: Tensor) -> Tensor:
    """Row sums of the squared weight gradient of each sequence, without forming that gradient.

    The gradient of a sequence is G^T X. Its row i squares to sum_{t,t'} g_ti g_t'i <x_t, x_t'>.

    Args:
        inputs: X, shape `[sequences, tokens, n]`.
        gradients: G, shape `[sequences, tokens, m]`.

    Returns:
        Shape `[m]`, summed over sequences.
    """
    gram = inputs @ inputs.mT
    return ((gram @ gradients) * gradients).sum((0, 1))


class CurvatureSums:
    """Float32 accumulator of g g^T on the model's device, in diagonal blocks.

    Args:
        m: outputs of the site.
        block: size of a diagonal block; divides m.
        device: where the gradients live.
    """

    def __init__(self, m: int, block: int, device: torch.device) -> None:
        self._blocks = torch.zeros(m // block, block, block, device=device)
        self._count = 0

    @property
    def empty(self) -> bool:
        return self._count == 0

    def add(self, g: Tensor) -> None:
        """Add gradients of shape `[tokens, m]`."""
        count, block, _ = self._blocks.shape
        parts = g.float().reshape(len(g), count, block).transpose(0, 1)
        self._blocks.baddbmm_(parts.mT, parts)
        self._count += len(g)

    def take(self) -> Curvature:
        """What was added, in float64 on the CPU; the accumulator starts afresh."""
        taken = Curvature(self._count, self._blocks.to("cpu", torch.float64, copy=True))
        self._blocks.zero_()
        self._count = 0
        return taken


def block_size(m: int, largest: int) -> int:
    """The largest divisor of m that is at most `largest`: m itself means a full matrix."""
    return next(size for size in range(min(m, max(1, largest)), 0, -1) if m % size == 0)
