"""SliceGPT: the residual stream in its principal directions, cut to the first k of d (Ashkboos et al., ICLR 2024)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rankwise.factors import Basis
from rankwise.linalg import decompose
from rankwise.methods.base import Factorisation, make_basis
from rankwise.sizes import DENSE, Budget, Candidates, Form
from rankwise.statistics import SiteStatistics


class SliceGPT(Factorisation):
    """Decides one number for the whole model: how many coordinates k of its residual stream stay.

    Every weight that reads the stream loses columns, every one that writes to it rows (arXiv 2401.15024, section 3.3).
    What is left of a weight is whole, so no site is factored.

    Attributes:
        adapters: `full` has directions of its own before and within each block, and matrices of k^2 numbers that carry
            the stream from one to the next. `none` has one rotation for the whole model; the result is a plain
            checkpoint of the original's architecture.
        tokens: `normalised` lets all tokens weigh the same, `raw` by the square of their norm (the released code).
        multiple: k is a multiple of this.
    """

    prunes: ClassVar[bool] = True
    keeps_factors: ClassVar[bool] = False

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

    def candidates(self, shape: tuple[int, int], form: Form, multiple: int, looks: bool) -> Candidates:
        bits = torch.tensor([form.bits(shape, DENSE)])
        return Candidates((DENSE,), bits, torch.tensor([0]), (0.0, float(form.number_bits)))

    def decompose(self, weight: Tensor, statistics: SiteStatistics) -> Basis:
        return make_basis(decompose(weight))
