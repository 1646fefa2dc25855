"""Sizes in bits: what a quantised site takes on disk, and a budget of bits a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from rankwise.errors import BudgetError
from rankwise.models import Site
from rankwise.quantizers.codes import BLOCK
from rankwise.sizes.parameters import Budget, Rank

FULL_BITS = 16
"""Bits of a number that is not quantised: of factors, scales, and a site that stays dense."""

_BISECTIONS = 60


class QuantizedRank(int):
    """A rank of L R that also says how many bits a weight of Q has, 0 for no Q.

    Two of them are equal when both agree.
    """

    q_bits: int

    def __new__(cls, rank: int, q_bits: int) -> QuantizedRank:
        made = super().__new__(cls, rank)
        made.q_bits = q_bits
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuantizedRank) and (int(self), self.q_bits) == (int(other), other.q_bits)

    def __ne__(self, other: object) -> bool:
        # Said outright: that of int would look at the rank alone.
        return not self == other

    def __hash__(self) -> int:
        return hash((int(self), self.q_bits))

    def __repr__(self) -> str:
        return f"QuantizedRank({int(self)}, q_bits={self.q_bits})"


class BitForm(BaseModel):
    """How the parts of a quantised site are stored, the same at every site.

    Attributes:
        codebook: of Q.
        group: columns of Q that share a scale; 0 when a row does, or (see `row_scales`) the whole matrix.
        row_scales: whether each row of Q has a scale of its own.
        lr_bits: bits of L and R, 16 for not quantised.
        lr_codebook: of L and R.
        hadamard: whether W is rotated on both sides, which takes a sign an input and an output.
        trained_signs: whether those signs are 16-bit numbers.
        full_rank: so many ranks of L R, the first ones, are 16-bit numbers whatever `lr_bits` says.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    codebook: str = "e8p"
    group: int = 0
    row_scales: bool = True
    lr_bits: int = FULL_BITS
    lr_codebook: str = "e8p"
    hadamard: bool = True
    trained_signs: bool = False
    full_rank: int = 0

    def full(self, rank: int) -> int:
        """How many of so many ranks are 16-bit numbers."""
        return rank if self.lr_bits == FULL_BITS else min(rank, self.full_rank)

    def scales(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of Q's scales for W of shape `(m, n)`."""
        m, n = shape
        if self.group:
            return m, -(-n // self.group)
        return (m, 1) if self.row_scales else (1, 1)

    def rank_bits(self, shape: tuple[int, int]) -> int:
        """What one rank takes, scales of its two vectors counted."""
        m, n = shape
        if self.lr_bits == FULL_BITS:
            return FULL_BITS * (m + n)
        return self.lr_bits * (_whole(m) + _whole(n)) + 2 * FULL_BITS

    def q_bits(self, shape: tuple[int, int], bits: int) -> int:
        """What Q takes at so many bits a weight, its scales and the signs of the rotation counted."""
        m, n = shape
        signs = 0
        if self.hadamard:
            signs = FULL_BITS * (m + n) if self.trained_signs else _whole(m) + _whole(n)
        rows, groups = self.scales(shape)
        return signs + (m * _whole(n) * bits + FULL_BITS * rows * groups if bits else 0)

    def site_bits(self, shape: tuple[int, int], bits: int, rank: int) -> int:
        """All bits of a site's weight: B_Q m n + r (B_L m + B_R n) (CALDERA), and what goes with it."""
        full = self.full(rank)
        return self.q_bits(shape, bits) + full * FULL_BITS * sum(shape) + (rank - full) * self.rank_bits(shape)


def _whole(size: int) -> int:
    """Rounded up to whole blocks of eight."""
    return -(-size // BLOCK) * BLOCK


class BitBudget(Budget):
    """Bits for the decoder's linear weights, all of them together. Costs are in bits.

    Without `bits` every site gets `rank` and the one choice of Q.

    Attributes:
        form: how sites are stored.
        choices: bits a weight that Q may have, ascending.
        rank: given; None where the budget decides.
        dense_bits: bits a weight of a site that stays dense.
    """

    form: BitForm
    choices: tuple[int, ...]
    rank: int | None = None
    dense_bits: int = FULL_BITS

    @property
    def sized(self) -> bool:
        return self.bits is not None

    @property
    def asked(self) -> str:
        return f"{self.bits:g} bits a weight"

    @property
    def unit(self) -> str:
        return "bits a weight of the whole"

    @property
    def option(self) -> str:
        return "--bits"

    def reach(self) -> tuple[float, float]:
        """Least and most bits a weight that a group of a search may take: the coarsest Q, and 2 above the finest."""
        return float(self.choices[0]), float(min(FULL_BITS, self.choices[-1] + 2))

    def cost(self, site: Site, rank: Rank) -> int:
        """Bits of a site."""
        if rank is None:
            return self.dense_bits * site.parameters
        if not isinstance(rank, QuantizedRank):
            raise TypeError(f"{site.name}: a rank without the bits of Q has no size in bits")
        return self.form.site_bits((site.m, site.n), rank.q_bits, int(rank))

    def allowed(self, sites: Sequence[Site]) -> int:
        if self.bits is None:
            raise BudgetError("No bits a weight are set.", where="budget.bits", remedy="give --bits")
        return math.floor(self.bits * sum(site.parameters for site in sites) + 1e-6)

    def largest_rank(self, site: Site) -> int:
        if self.rank is not None:
            return int(self._given(site))
        return min(site.m, site.n) // self.rank_multiple * self.rank_multiple

    def next_rank(self, site: Site, rank: Rank) -> Rank:
        """One step of rank more with the same Q, or of Q where the rank is given; None when there is none."""
        assert isinstance(rank, QuantizedRank)
        if self.rank is not None:
            finer = [bits for bits in self.choices if bits > rank.q_bits]
            return QuantizedRank(int(rank), finer[0]) if finer else None
        above = int(rank) + self.rank_multiple
        return QuantizedRank(above, rank.q_bits) if above <= self.largest_rank(site) else None

    def at_bits(self, site: Site, wanted: float) -> QuantizedRank:
        """The finest Q that fits so many bits a weight, and the rank that fits beside it; at least the coarsest Q."""
        room, shape = wanted * site.parameters + 1e-6, (site.m, site.n)
        if self.rank is not None:
            room -= self.largest_rank(site) * self.form.rank_bits(shape)
        fitting = [bits for bits in self.choices if self.form.q_bits(shape, bits) <= room]
        q_bits = fitting[-1] if fitting else self.choices[0]
        if self.rank is not None:
            return QuantizedRank(self.largest_rank(site), q_bits)
        rest = room - self.form.q_bits(shape, q_bits)
        # Without Q there has to be a rank.
        steps = max(0 if q_bits else 1, math.floor(rest / (self.rank_multiple * self.form.rank_bits(shape))))
        return QuantizedRank(min(steps * self.rank_multiple, self.largest_rank(site)), q_bits)

    def fill(self, sites: Sequence[Site], fractions: Mapping[str, float | None]) -> dict[str, Rank]:
        """Bits and ranks in the proportions asked for that spend the budget as exactly as the steps allow.

        Args:
            sites: all sites the budget counts.
            fractions: by site name, bits relative to the others; None for dense.

        Raises:
            BudgetError: when even the coarsest Q without L R does not fit, or a given rank is above min(m, n).
        """
        if self.bits is None:
            return {site.name: self._given(site) for site in sites}
        wanted = {name: f for name, f in fractions.items() if f is not None}
        allowed = self.allowed(sites)

        def at(scale: float) -> dict[str, Rank]:
            return {s.name: self.at_bits(s, scale * wanted[s.name]) if s.name in wanted else None for s in sites}

        def spent(ranks: Mapping[str, Rank]) -> int:
            return sum(self.cost(site, ranks[site.name]) for site in sites)

        self.check_smallest(sites, spent(at(0.0)))
        low, high = 0.0, float(FULL_BITS * 2)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if spent(at(middle)) <= allowed else (low, middle)
        ranks = at(low)
        left = allowed - spent(ranks)
        # What is left goes step by step to the sites that rounding cut most.
        order = sorted((s for s in sites if s.name in wanted), key=lambda s: -self._cut(s, ranks[s.name], low, wanted))
        for site in order:
            above = self.next_rank(site, ranks[site.name])
            if above is not None and (step := self.cost(site, above) - self.cost(site, ranks[site.name])) <= left:
                ranks[site.name] = above
                left -= step
        return ranks

    def check_smallest(self, sites: Sequence[Site], smallest: int) -> None:
        """Raise when so many bits are already too much.

        Raises:
            BudgetError: saying how many bits a weight that is.
        """
        if smallest > self.allowed(sites):
            least = smallest / sum(site.parameters for site in sites)
            raise BudgetError(
                f"Nothing fits {self.bits:g} bits a weight: Q of {self.choices[0]} bits with its scales and signs, and "
                f"what has to stay dense, takes {least:.4f}.",
                where="budget.bits",
                remedy=f"raise --bits to {math.ceil(least * 1000) / 1000:g} or more, or set method.row_scales=false",
            )

    def _cut(self, site: Site, rank: Rank, scale: float, wanted: Mapping[str, float]) -> float:
        return scale * wanted[site.name] - self.cost(site, rank) / site.parameters

    def _given(self, site: Site) -> QuantizedRank:
        assert self.rank is not None
        if self.rank > min(site.m, site.n):
            raise BudgetError(
                f"The rank {self.rank} is above min(m, n) = {min(site.m, site.n)}.",
                where=f"{site.name} [{site.m}, {site.n}]",
                remedy="lower --rank, or give --bits and let each site have its own",
            )
        return QuantizedRank(self.rank, self.choices[0])


def as_plan_bits(ranks: Mapping[str, Rank]) -> dict[str, int]:
    """Bits of Q by site name, of the sites that are quantised."""
    return {name: rank.q_bits for name, rank in ranks.items() if isinstance(rank, QuantizedRank)}


def bit_details(budget: Budget, ranks: Mapping[str, Rank]) -> dict[str, Any]:
    """What a plan on a budget of bits records beside the ranks; empty for other budgets."""
    if not isinstance(budget, BitBudget):
        return {}
    return {
        "bits": budget.bits,
        "q_bits": as_plan_bits(ranks),
        "form": budget.form,
        "dense_bits": budget.dense_bits,
    }
