"""Second moment of the loss gradient at a site's output, in diagonal blocks (the output side of K-FAC)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rankwise.models import Site
from rankwise.progress import Reporter
from rankwise.statistics.base import Labels, Place, StartSums, Statistic, Sums, Totals
from rankwise.statistics.groups import BY_TOKENS
from rankwise.statistics.moment_sums import gram_panel
from rankwise.statistics.streams import Stream, gradient_streams
from rankwise.statistics.symmetric import panels

DEFAULT_CURVATURE_GB = 8.0
_BYTES_PER_ENTRY = 12  # float32 on the device, float64 for the total


@dataclass(frozen=True)
class CurvatureTotals(Totals):
    """Sum of g g^T over tokens, g the gradient of the loss at a site's output, in diagonal blocks.

    Attributes:
        count: tokens seen.
        blocks: shape `[k, b, b]`, k b = m, float64.
    """

    vectors_in: ClassVar[str] = "count"

    count: int
    blocks: Tensor

    def merge(self, other: Self) -> Self:
        return replace(self, count=self.count + other.count, blocks=self.blocks + other.blocks)

    def weighing(self, vectors: int) -> Self:
        return replace(self, count=vectors, blocks=self.blocks * (vectors / self.count))

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.blocks.diagonal(dim1=1, dim2=2)).all())

    def value(self) -> Tensor:
        """E[g g^T] in blocks, shape `[k, b, b]`."""
        return self.blocks / self.count


class CurvatureSums(Sums):
    """Sums of g g^T, in diagonal blocks.

    Args:
        m: outputs of the site.
        block: size of a diagonal block; divides m.
        device: where the gradients live.
    """

    def __init__(self, m: int, block: int, device: torch.device) -> None:
        self._blocks = torch.zeros(m // block, block, block, device=device)  # Their lower halves are kept up to date.
        self._panel = gram_panel(block, device)
        self._count = 0

    @property
    def empty(self) -> bool:
        return self._count == 0

    def add(self, x: Tensor, inputs: Tensor | None = None) -> None:
        """Add gradients of shape `[..., m]`."""
        if not x.numel():
            return
        count, block, _ = self._blocks.shape
        g = x.reshape(-1, count, block).float()
        parts = g.transpose(0, 1)
        for start, stop in panels(block, self._panel):
            self._blocks[:, start:stop, :stop].baddbmm_(parts[:, :, start:stop].mT, parts[:, :, :stop])
        self._count += len(g)

    def take(self) -> CurvatureTotals:
        nothing = CurvatureTotals(0, torch.zeros_like(self._blocks, dtype=torch.float64))
        return self._added_to(nothing)

    def add_to(self, before: Any) -> CurvatureTotals | None:
        return self._added_to(before) if before.blocks.device == self._blocks.device else None

    def _added_to(self, before: CurvatureTotals) -> CurvatureTotals:
        total = before.blocks
        for start, stop in panels(total.shape[-1], self._panel):
            panel = self._blocks[:, start:stop, :stop]
            corner = panel[:, :, start:]
            corner.copy_(corner.tril() + corner.tril(-1).mT)
            total[:, start:stop, :stop] += panel
            total[:, :start, start:stop] += panel[:, :, :start].mT
            panel.zero_()
        after = CurvatureTotals(before.count + self._count, total)
        self._count = 0
        return after


def block_size(m: int, largest: int) -> int:
    """The largest divisor of m that is at most `largest`: m itself means a full matrix."""
    return next(size for size in range(min(m, max(1, largest)), 0, -1) if m % size == 0)


@dataclass(frozen=True)
class _StartInBlocks:
    """Starts sums in blocks of at most `largest` outputs."""

    largest: int

    def __call__(self, d: int, device: torch.device) -> CurvatureSums:
        return CurvatureSums(d, block_size(d, self.largest), device)


@dataclass(frozen=True)
class Curvature(Statistic[CurvatureTotals, Tensor]):
    """E[g g^T] in diagonal blocks; a method sees it, shape `[k, b, b]`, k b = m.

    Attributes:
        labels: where the loss gradient g is taken.
        groups: groups of sequences that are summed in float32, as for `group_ends`.
        memory_gb: what the curvature of all sites together may take, in 10^9 bytes. Where full matrices do not fit,
            the largest diagonal blocks that do are kept.
    """

    name = "curvature"
    totals = CurvatureTotals

    labels: Labels = "text"
    groups: int = BY_TOKENS
    memory_gb: float = DEFAULT_CURVATURE_GB

    def streams(self, sites: Sequence[Site]) -> list[Stream]:
        return gradient_streams(sites)

    def sums(self, streams: Sequence[Stream], sequences: int, reporter: Reporter) -> StartSums:
        largest, block = max(stream.d for stream in streams), self._largest_block(streams)
        if block < largest:
            reporter.note(
                f"the full curvature does not fit {self.memory_gb:g} GB: diagonal blocks of at most {block} outputs "
                "are kept (curvature_gb raises the limit where a method has it)"
            )
        return _StartInBlocks(block)

    def _largest_block(self, streams: Sequence[Stream]) -> int:
        """Outputs of the largest blocks that fit; those of the widest site where all of its curvature does."""
        block = max(stream.d for stream in streams)
        while block > 1:
            entries = sum(stream.d * block_size(stream.d, block) for stream in streams)
            if entries * _BYTES_PER_ENTRY <= self.memory_gb * 1e9:
                break
            block //= 2
        return block

    def shared(self, streams: Sequence[Stream]) -> dict[str, Any]:
        block = self._largest_block(streams)
        return {"block": block} if block < max(stream.d for stream in streams) else {}

    def seen(self, totals: CurvatureTotals, place: Place) -> Tensor:
        return totals.value()
