"""`Form`: how cuts are stored, and the only arithmetic of what they take."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from rankwise.quantizers import is_codebook
from rankwise.quantizers.codes import BYTE, tile_of
from rankwise.sizes.cut import Cut

FULL_BITS = 16
"""Bits of a number beside codes: of scales, and of L and R that are not quantised."""

Storage = Literal["two_factor", "pivoted", "auto"]
"""How a matrix [m, n] of rank r in the checkpoint's own numbers is stored: as L and R, r (m + n) numbers; as r of its
rows and the map from them to the rest, r (m + n - r) numbers (see `linalg/pivot.py`); or `auto`, as whichever is
smaller when the m integers that say where each row belongs are counted too."""


def padded_to(size: int, step: int) -> int:
    """The least multiple of `step` that is not below `size`."""
    return -(-size // step) * step


def _checked(name: str) -> str:
    if not is_codebook(name):
        raise ValueError(f"there is no codebook {name[:80]!r}")
    return name


CodebookName = Annotated[str, AfterValidator(_checked)]
"""Of this package, or of one's own with the version of its code."""


class Form(BaseModel):
    """How the cuts of a plan are stored.

    Attributes:
        storage: of L R in the checkpoint's own numbers.
        number_bits: bits of such a number.
        codebook: of Q.
        group: columns of Q that share a scale; 0 when a row does, or (see `row_scales`) the whole matrix.
        row_scales: whether each row of Q has a scale of its own.
        lr_codebook: of L and R; None for the lattice up to 4 bits and `uniform` above.
        hadamard: whether coded weights are rotated on both sides, which takes a sign an input and an output.
        trained_signs: whether those signs are 16-bit numbers.
        full_rank: so many ranks of coded L R, the first ones, are 16-bit numbers whatever the cut says.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    storage: Storage = "auto"
    number_bits: Annotated[int, Field(gt=0)] = 16
    codebook: CodebookName = "e8p"
    group: Annotated[int, Field(ge=0)] = 0
    row_scales: bool = True
    lr_codebook: CodebookName | None = None
    hadamard: bool = True
    trained_signs: bool = False
    full_rank: Annotated[int, Field(ge=0)] = 0

    def factor_codebook(self, lr_bits: int) -> str:
        """Name of the codebook of L and R at so many bits."""
        return self.lr_codebook or ("e8p" if lr_bits <= 4 else "uniform")

    def pivots(self, shape: tuple[int, int], rank: int) -> bool:
        """Whether a matrix of this shape `(m, n)` and rank is stored as pivot rows."""
        return self.storage == "pivoted" or (self.storage == "auto" and rank * rank > shape[0])

    def kind(self, shape: tuple[int, int], cut: Cut) -> str:
        """Which layer holds the cut: `dense`, `quantized`, `pivoted` or `two_factor`."""
        if cut.rank is None:
            return "dense"
        if cut.coded:
            return "quantized"
        return "pivoted" if self.pivots(shape, cut.rank) else "two_factor"

    def numbers(self, shape: tuple[int, int], rank: int) -> int:
        """Numbers of a matrix `[m, n]` of this rank, none of them coded."""
        m, n = shape
        if not self.pivots(shape, rank):
            return rank * (m + n)
        return rank * (m + n - rank) + (m if self.storage == "auto" else 0)

    def rank_of_numbers(self, shape: tuple[int, int], wanted: float) -> float:
        """The real rank that takes so many numbers, the inverse of `numbers`; at most the one that takes m n."""
        m, n = shape
        wanted = min(wanted, m * n)
        two_factor = wanted / (m + n)
        if self.storage == "two_factor":
            return two_factor
        spare = wanted - (m if self.storage == "auto" else 0)
        # r (m + n - r) = spare, the smaller root; it is real as long as spare <= m n.
        pivoted = ((m + n) - math.sqrt(max(0.0, (m + n) ** 2 - 4 * spare))) / 2
        return pivoted if self.storage == "pivoted" else max(two_factor if two_factor**2 <= m else 0.0, pivoted)

    def scales(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of Q's scales for W of shape `(m, n)`."""
        m, n = shape
        if self.group:
            return m, -(-n // self.group)
        return (m, 1) if self.row_scales else (1, 1)

    def full(self, cut: Cut) -> int:
        """How many ranks of a coded cut are 16-bit numbers."""
        rank = cut.rank or 0
        return rank if cut.lr_bits == FULL_BITS else min(rank, self.full_rank)

    def rank_bits(self, shape: tuple[int, int], lr_bits: int) -> int:
        """What one rank of coded L R takes, scales of its two vectors counted."""
        m, n = shape
        if lr_bits == FULL_BITS:
            return FULL_BITS * (m + n)
        width = tile_of(self.factor_codebook(lr_bits))[1]
        return lr_bits * (padded_to(m, width) + padded_to(n, width)) + 2 * FULL_BITS

    def sign_bits(self, shape: tuple[int, int]) -> int:
        """What the signs of the rotation take."""
        if not self.hadamard:
            return 0
        return sum(FULL_BITS * d if self.trained_signs else padded_to(d, BYTE) for d in shape)

    def q_bits(self, shape: tuple[int, int], bits: int) -> int:
        """What Q takes at so many bits a weight, its scales counted."""
        if not bits:
            return 0
        (m, n), (rows, groups) = shape, self.scales(shape)
        height, width = tile_of(self.codebook)
        return padded_to(m, height) * padded_to(n, width) * bits + FULL_BITS * rows * groups

    def bits(self, shape: tuple[int, int], cut: Cut) -> int:
        """All bits of a weight `[m, n]` under a cut.

        Of codes it is B_Q m n + r (B_L m + B_R n) (CALDERA), and the scales and signs that go with them.
        """
        if cut.rank is None:
            return self.number_bits * shape[0] * shape[1]
        if not cut.coded:
            return self.number_bits * self.numbers(shape, cut.rank)
        full = self.full(cut)
        coded = (cut.rank - full) * self.rank_bits(shape, cut.lr_bits) if cut.lr_bits is not None else 0
        return self.sign_bits(shape) + self.q_bits(shape, cut.q_bits) + full * FULL_BITS * sum(shape) + coded
