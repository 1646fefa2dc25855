"""`Cut`: what a plan decides about one weight."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cut:
    """W ~ Q + L R, any part absent. `DENSE` leaves W as it is.

    Attributes:
        rank: of L R; 0 for none, None for the full rank, which is W itself.
        q_bits: bits a weight of Q, 0 for no Q.
        lr_bits: bits of the entries of L and R. None leaves them numbers of the checkpoint's own type, not rotated.
    """

    rank: int | None = None
    q_bits: int = 0
    lr_bits: int | None = None

    def __post_init__(self) -> None:
        if self.rank is None and (self.q_bits or self.lr_bits is not None):
            raise ValueError("a weight of full rank has neither Q nor bits of L and R")
        if self.rank is not None and self.rank < 0:
            raise ValueError(f"the rank {self.rank} is negative")
        if self.rank == 0 and not self.q_bits:
            raise ValueError("a cut without Q needs a rank of 1 or more")
        if self.rank == 0 and self.lr_bits is not None:
            # Two ways to say one thing would not be equal.
            object.__setattr__(self, "lr_bits", None)
        if self.rank and self.q_bits and self.lr_bits is None:
            raise ValueError("L R beside Q needs the bits of its entries")

    @property
    def dense(self) -> bool:
        """Whether W stays as it is."""
        return self.rank is None

    @property
    def coded(self) -> bool:
        """Whether any part of it is rotated and written as codes, or as 16-bit numbers beside them."""
        return bool(self.q_bits) or self.lr_bits is not None

    def __str__(self) -> str:
        if self.dense:
            return "dense"
        pair = f"{self.rank}" if self.lr_bits is None else f"{self.rank} at {self.lr_bits} bits"
        if not self.q_bits:
            return pair
        return f"{self.q_bits} bits" + (f" + {pair}" if self.rank else "")


DENSE = Cut()
