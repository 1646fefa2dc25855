"""`StreamSizes`: what the linear weights of a decoder take when its residual stream keeps k of d coordinates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rankwise.models import PreNorm, Site


@dataclass(frozen=True)
class StreamSizes:
    """Shapes of all linear weights, summed up as slicing sees them.

    Attributes:
        width: d, of the stream.
        blocks: how many.
        read: rows of all weights that read the stream.
        written: columns of all weights that write to it.
        last: columns of those that write to it last.
        adapters: of a block: two, or one where attention and the MLP stand side by side.
    """

    width: int
    blocks: int
    read: int
    written: int
    last: int
    adapters: int = 2

    @classmethod
    def of(cls, sites: Sequence[Site], form: PreNorm) -> StreamSizes:
        """Those of a model's sites."""
        writers = tuple(f".{half.writer}" for half in form.halves)
        written = [site for site in sites if site.name.endswith(writers)]
        read = sum(site.m for site in sites) - sum(site.m for site in written)
        blocks = 1 + max(site.block for site in sites)
        last = sum(site.n for site in written if site.block == blocks - 1 and (form.parallel or site is written[-1]))
        return cls(form.width, blocks, read, sum(site.n for site in written), last, 1 if form.parallel else 2)

    @property
    def whole(self) -> int:
        """Numbers of the original."""
        return self.width * (self.read + self.written)

    def numbers(self, kept: int, adapters: bool) -> int:
        """Numbers with k coordinates kept, adapters counted.

        An adapter takes k^2 but the last one of the last block, whose output stays whole: it is k x d, and the weights
        beside it keep their d rows. Without adapters the last block is as all others.

        Args:
            kept: k.
            adapters: whether there are any.
        """
        cut = kept * (self.read + self.written)
        if not adapters:
            return cut
        return cut + self.adapters * kept * kept * self.blocks + (self.width - kept) * (kept + self.last)

    def widths(self, multiple: int) -> range:
        """What k may be, the largest first; d itself where it is no multiple is left out."""
        return range(self.width // multiple * multiple, 0, -multiple)

    def largest(self, allowed: Callable[[int], float], widths: Iterable[int], adapters: bool) -> int | None:
        """The first k of some that takes no more numbers than allowed; None where each takes more.

        Args:
            allowed: k -> numbers.
            widths: what k may be, the largest first.
            adapters: whether there are any.
        """
        return next((k for k in widths if self.numbers(k, adapters) <= allowed(k)), None)
