"""What LDLQ is expected to lose, from the Hessian and the codebook alone: no weight is rounded.

A rotated weight looks like Gaussian numbers, so what a codebook misses of a block is known before it is rounded: a
share of the target and noise beside it, both functions of how large targets are. Feedback makes targets larger, by
what earlier blocks missed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log

import torch
from torch import Tensor

from rankwise.linalg import plus_diagonal
from rankwise.quantizers.codebooks import Codebook, padded
from rankwise.quantizers.ldlq import Hessian, inverse_of_unit

_SAMPLES = 1 << 15
"""Gaussian numbers that are rounded, at least, to learn how a codebook answers."""

_SIZES = tuple(2.0 ** (step / 3) for step in range(-3, 13))
"""Variances of targets that are tried, against what the scales were fitted to."""


@dataclass(frozen=True)
class Answer:
    """How a codebook answers to Gaussian targets of another variance than its scales were fitted to.

    Attributes:
        along: share of the target itself that is missed, for each of `_SIZES`.
        beside: variance of what is missed beside that share, relative to what the scales were fitted to.
    """

    along: Sequence[float]
    beside: Sequence[float]

    def at(self, size: float) -> tuple[float, float]:
        """`along` and `beside` at a variance, between those that were tried; beyond them as at the last."""
        size = min(max(size, _SIZES[0]), _SIZES[-1])
        right = max(bisect_left(_SIZES, size), 1)
        low, high = log(_SIZES[right - 1]), log(_SIZES[right])
        part = (log(size) - low) / (high - low)
        along = (1 - part) * self.along[right - 1] + part * self.along[right]
        # A variance grows by factors: between two it is no less than zero.
        beside = self.beside[right - 1] ** (1 - part) * self.beside[right] ** part
        return along, beside


_KNOWN: dict[tuple[object, ...], Answer] = {}


def gaussian_answer(codebook: Codebook, columns: int, feedback: bool) -> Answer:
    """How a codebook answers, by rounding Gaussian rows of so many columns; the same at every call.

    Args:
        codebook: with its scales by row, group or matrix.
        columns: of the weight, which tell how scales are fitted.
        feedback: whether errors are fed back.
    """
    key = (codebook.name, codebook.bits, codebook.group, codebook.by_row, columns, feedback)
    if key not in _KNOWN:
        draw = torch.Generator("cpu").manual_seed(0)
        wide = columns + -columns % codebook.tile[1]
        rows = torch.randn(-(-_SAMPLES // wide), wide, generator=draw, device="cpu")
        rows[:, columns:] = 0
        scale = codebook.scales(rows[:, :columns], feedback=feedback)
        along, beside = [], []
        for size in _SIZES:
            target = rows * size**0.5
            missed = target - codebook.quantize(target, scale).dense()
            target, missed = target[:, :columns], missed[:, :columns]
            share = float((missed * target).sum() / target.square().sum())
            along.append(share)
            beside.append(float((missed - share * target).square().mean()))
        _KNOWN[key] = Answer(along, beside)
    return _KNOWN[key]


@dataclass(frozen=True)
class Rounding:
    """A weight that could be rounded by LDLQ, its inputs rotated at random.

    With H = (I + U) D (I + U)^T block k is rounded at w_k + sum over j < k of E_j U_jk. Where A is diagonal with the
    share of the target that is missed, and Z the noise beside it,

        E = (W A + Z) T,   T = (I + U (I - A))^-1,   T H T^T = G D G^T,   G = T (I + U)

    Attributes:
        weight: W, the rotated inputs padded to whole blocks, shape `[m, n']`.
        felt: F W for the metric F of the outputs, likewise.
        feedback: U, shape `[n', n']`.
        roots: C_k with D_k = C_k C_k^T, shape `[blocks, width, width]`.
        damping: what was added to the diagonal of H.
        columns: n, those that count.
    """

    weight: Tensor
    felt: Tensor
    feedback: Tensor
    roots: Tensor
    damping: float
    columns: int

    @classmethod
    def of(cls, hessian: Hessian, weight: Tensor, felt: Tensor, width: int) -> Rounding:
        """From the rotated H, `[n, n]`, and W and F W of shape `[m, n]`; all is computed in the dtype of W."""
        unit, roots = (part.to(weight) for part in hessian.split(width))
        return cls(padded(weight, width), padded(felt, width), unit, roots, hessian.added, weight.shape[1])

    @property
    def width(self) -> int:
        return self.roots.shape[1]

    def backward(self, along: Tensor) -> Tensor:
        """T for the share of every block that is missed of its target, shape `[blocks]`."""
        return inverse_of_unit(self.feedback * (1 - self._wide(along)))

    @cached_property
    def _plain(self) -> tuple[Tensor, Tensor]:
        """T and W T where nothing of a target is missed."""
        backward = self.backward(self.roots.new_zeros(len(self.roots)))
        return backward, self.weight @ backward

    def answers(self, known: Answer, spread: float = 0.0) -> tuple[Tensor, Tensor]:
        """The share that is missed of every block's target and the variance of its noise, relative to that of W.

        The variance of a target is that of W and of what earlier blocks missed of W, as it is, and of their noise.

        Args:
            known: how the codebook answers.
            spread: variance that feedback along the outputs adds, relative to that of the noise so far.
        """
        backward, product = self._plain
        first, _ = known.at(1.0)
        square = self.weight.square().sum() / (len(self.weight) * self.columns)
        target = self.weight + first * (self.weight - product)
        # T U = I - T, where nothing of a target is missed.
        moved = (torch.eye(len(backward)).to(backward) - backward).square()
        sizes = self._by_block(target.square().mean(0) / square).double().cpu() / self.width
        growth = self._by_block(self._by_block(moved).T).T.double().cpu() / self.width
        along, beside, noiseless = torch.zeros_like(sizes), torch.zeros_like(sizes), sizes.clone()
        for block in range(len(sizes)):
            size = float(sizes[block]) + spread * float(sizes[block] - noiseless[block])
            # What the block itself misses comes back to its lower rows.
            size += spread * known.at(size)[1]
            along[block], beside[block] = known.at(size)
            sizes[block + 1 :] += beside[block] * growth[block, block + 1 :]
        return along.to(self.weight), beside.to(self.weight)

    def loss(self, known: Answer, trace: float, spread: float = 0.0) -> float:
        """tr(F E M E^T), expected.

        Args:
            known: how the codebook answers.
            trace: of F.
            spread: as for `answers`.
        """
        along, beside = self.answers(known, spread)
        backward, shares = self.backward(along), self._wide(along)
        # T U (I - A) = I - T.
        forward = backward + plus_diagonal(-backward, 1.0) / (1 - shares)
        cost = self._by_root(forward).square().sum(1) - self.damping * backward.square().sum(1)
        # What stands in for columns that are not there costs nothing.
        cost[self.columns :] = 0
        square = float(self.weight.square().sum()) / self.columns
        noise = trace / len(self.weight) * square * float((cost * self._wide(beside)).sum())
        parts = []
        for each in (self.weight * shares, self.felt * shares):
            missed = each @ backward
            parts.append((missed, self._by_root(missed + (each - missed) / (1 - shares))))
        (plain, weighed), (felt, felt_weighed) = parts
        return noise + float((weighed * felt_weighed).sum() - self.damping * (plain * felt).sum())

    def _wide(self, by_block: Tensor) -> Tensor:
        return by_block.repeat_interleave(self.width)

    def _by_block(self, values: Tensor) -> Tensor:
        """Sums over the columns of every block, the last dimension."""
        return values.unflatten(-1, (-1, self.width)).sum(-1)

    def _by_root(self, values: Tensor) -> Tensor:
        """Columns of every block times its C_k."""
        return (values.unflatten(1, (-1, self.width)).transpose(0, 1) @ self.roots).transpose(0, 1).flatten(1)
