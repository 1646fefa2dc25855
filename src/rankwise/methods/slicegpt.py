"""SliceGPT: the residual stream in its principal directions, cut to the first k of d (Ashkboos et al., ICLR 2024)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rankwise.methods.whole import WholeWeights
from rankwise.sizes import Budget


class SliceGPT(WholeWeights):
    """Decides one number for the whole model: how many coordinates k of its residual stream stay.

    Every weight that reads the stream loses columns, every one that writes to it rows (arXiv 2401.15024, section 3.3).
    What is left of a weight is whole, so no site is factored.

    Attributes:
        adapters: `full` has directions of its own before and within each block, and matrices of k^2 numbers that carry
            the stream from one to the next. `none` has one rotation for the whole model; the result is a plain
            checkpoint of the original's architecture, whose norms are RMSNorms.
        tokens: `normalised` lets all tokens weigh the same, `raw` by the square of their norm (the released code).
        multiple: k is a multiple of this.
    """

    by_site: ClassVar[bool] = False

    name: Literal["slicegpt"] = "slicegpt"
    adapters: Literal["full", "none"] = "full"
    tokens: Literal["normalised", "raw"] = "normalised"
    multiple: Annotated[int, Field(ge=1)] = 8

    @property
    def plain(self) -> bool:
        """Whether the result is a plain checkpoint."""
        return self.adapters == "none"

    def check_size(self, asked: Budget, allocation: str) -> None:
        if not asked.sized:
            raise ValueError("slicegpt needs a size to choose a width by: give budget.keep, bits or size")
        if allocation != "uniform":
            raise ValueError(f"slicegpt cuts all sites alike: the allocation {allocation} has nothing to decide")
