"""Two-sided rounding: errors fed back along the outputs as well as along the inputs (after YAQA, arXiv 2505.22988).

With H = (I + B) D_H (I + B)^T of the inputs and F = (I + A) D_F (I + A)^T of the outputs, A and B strictly upper in
blocks, the loss tr(F E H E^T) is that of N = (I + A)^T E (I + B) under D_F and D_H. A block that is rounded at

    W + A^T E + E B + A^T E B,

with E of the blocks before it, leaves in N only what its own rounding misses. A = 0 is LDLQ.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rankwise.linalg import plus_diagonal
from rankwise.quantizers.codebooks import Codebook, Packed, padded
from rankwise.quantizers.codes import wide_scale
from rankwise.quantizers.ldlq import Hessian, Target, inverse_of_unit

OUTPUT_BLOCK = 16
"""Rows that are rounded at once. At five weights of SmolLM2-135M blocks of 4 left 0.4 to 5% less of the loss and took
1.4 to 2 times as long; no benchmark repeats it."""


@dataclass(frozen=True)
class OutputFeedback:
    """What feedback along the outputs does at a site.

    Attributes:
        feedback: A, in blocks of `OUTPUT_BLOCK` rows, shape `[m', m']`, m' a multiple of that; float32.
        roots: C_k with C_k C_k^T the blocks of D_F, shape `[blocks, rows, rows]`.
        added: what was added to the diagonal of F.
        trace: of F as it was measured.
        m: rows that count.
    """

    feedback: Tensor
    roots: Tensor
    added: float
    trace: float
    m: int

    @classmethod
    def of(cls, curvature: Tensor, damping: float) -> OutputFeedback:
        """From F, shape `[m, m]`, not zero, and what is added to its diagonal, relative to the mean."""
        if not torch.isfinite(curvature).all():
            raise ValueError("the curvature at the outputs is not finite")
        metric = Hessian.of(curvature.float(), damping)
        return cls(*metric.split(OUTPUT_BLOCK), metric.added, float(curvature.trace()), len(curvature))

    @cached_property
    def _inverse(self) -> Tensor:
        """(I + A)^-1. What is missed is E = (I + A)^-T N, N white."""
        return inverse_of_unit(self.feedback)

    @property
    def left(self) -> float:
        """tr(F E H E^T) relative to what it is without, F as it was measured, for rounding that misses white noise."""
        weighed = self.roots.flatten(0, 1)[: self.m].square().sum()
        beside = self.added * self._inverse[: self.m, : self.m].square().sum()
        return max(float(weighed - beside), 0.0) / self.trace

    @property
    def spread(self) -> float:
        """Variance that A^T E adds to what is rounded, relative to that of E (I + B)."""
        return float(plus_diagonal(-self._inverse, 1.0)[: self.m, : self.m].square().sum()) / self.m


def round_along_both(target: Target, feedback: Tensor, codebook: Codebook) -> Packed:
    """Round a weight block by block, each target moved by the errors of the blocks above it and before it.

    Blocks whose row and column add up to the same number wait for none of each other and are rounded at once.

    Args:
        target: the weight, with U of its inputs and its scales.
        feedback: A, from `OutputFeedback`.
        codebook: what is rounded to.

    Returns:
        Codes for the weight.
    """
    rows, columns = target.weight.shape
    blocks = _Blocks(target, feedback, codebook)
    codes = torch.cat([blocks.round(step, codebook) for step in range(blocks.down + blocks.across - 1)])
    ordered = torch.empty_like(codes)
    ordered[blocks.order] = codes
    ordered = ordered.unflatten(0, (blocks.down, blocks.across)).transpose(1, 2).flatten(0, 1)[:rows]
    return Packed(ordered.clone(), target.scale, columns, codebook.stored_name, codebook.group)


class _Blocks:
    """A weight on its way through, cut into `down` x `across` blocks of `OUTPUT_BLOCK` rows and a tile's columns.

    Numbers are float32: what that loses is far below what rounding misses.
    """

    def __init__(self, target: Target, feedback: Tensor, codebook: Codebook) -> None:
        width = codebook.tile[1]
        weight = padded(target.weight, width)
        columns = weight.shape[1]
        unit = wide_scale(target.scale, codebook.group, columns).expand(weight.shape)
        short = -len(weight) % OUTPUT_BLOCK
        self.down, self.across = (len(weight) + short) // OUTPUT_BLOCK, columns // width
        self._weight = self._cut(torch.nn.functional.pad(weight.float(), (0, 0, 0, short)))
        self._unit = self._cut(torch.nn.functional.pad(unit.float(), (0, 0, 0, short), value=1.0))
        # A^T by rows of blocks, B by columns of blocks.
        self._above = feedback.float().T.contiguous().unflatten(0, (self.down, OUTPUT_BLOCK))
        by_column = target.feedback.float().unflatten(1, (self.across, width)).transpose(0, 1)
        # The last column of blocks first: along an anti-diagonal columns then follow rows.
        self._before = by_column.flip(0)
        # E by columns of blocks, likewise; (I + A)^T E by rows of them.
        self._missed = self._weight.new_zeros(self.across, self.down * OUTPUT_BLOCK, width)
        self._moved = self._weight.new_zeros(self.down, OUTPUT_BLOCK, columns)
        places = torch.arange(self.down * self.across, device=weight.device)
        steps = places // self.across + places % self.across
        self.order = steps.argsort(stable=True)

    def _cut(self, matrix: Tensor) -> Tensor:
        """In blocks, shape `[down, across, rows, columns]`."""
        parts = matrix.unflatten(0, (self.down, OUTPUT_BLOCK)).unflatten(2, (self.across, -1))
        return parts.transpose(1, 2).contiguous()

    def round(self, step: int, codebook: Codebook) -> Tensor:
        """Codes of the blocks whose row and column add up to `step`, by row; shape `[blocks, rows, bits]`."""
        first, last = max(0, step - self.across + 1), min(self.down - 1, step)
        down = torch.arange(first, last + 1, device=self._weight.device)
        across = step - down
        # Only what is above the lowest and before the last of them can have been missed.
        high, wide = last * OUTPUT_BLOCK, (step - first) * codebook.tile[1]
        rows, columns = slice(first, last + 1), slice(first - step - 1 + self.across, last - step + self.across)
        above = self._above[rows, :, :high] @ self._missed[columns, :high]
        before = self._moved[rows, :, :wide] @ self._before[columns, :wide]
        weight, unit = self._weight[down, across], self._unit[down, across]
        wanted = (weight + above + before) / unit
        codes = codebook.round(wanted.flatten(0, 1))
        missed = weight - codebook.decode(codes).unflatten(0, wanted.shape[:2]).to(weight) * unit
        self._missed.unflatten(1, (self.down, OUTPUT_BLOCK))[self.across - 1 - across, down] = missed
        self._moved.unflatten(2, (self.across, -1))[down, :, across] = missed + above
        return codes.squeeze(1).unflatten(0, wanted.shape[:2])
