"""`Budget`: where a kept fraction becomes a rank, or back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from rankwise.errors import BudgetError
from rankwise.models import Site

Rank = int | None
"""A rank, or None for a site that stays dense."""

Storage = Literal["two_factor", "pivoted", "auto"]
"""How a matrix [m, n] of rank r is stored: as L and R, r (m + n) numbers; as r of its rows and the map from them to the
rest, r (m + n - r) numbers (see `linalg/pivot.py`); or `auto`, as whichever is
smaller when the m integers that say where each row belongs are counted too."""


def pivots(shape: tuple[int, int], rank: int, storage: Storage) -> bool:
    """Whether a matrix of this shape `(m, n)` and rank is stored as pivot rows."""
    return storage == "pivoted" or (storage == "auto" and rank * rank > shape[0])


def numbers(shape: tuple[int, int], rank: Rank, storage: Storage) -> int:
    """What a matrix costs.

    Args:
        shape: `(m, n)`.
        rank: r, or None for dense.
        storage: how a rank is stored.
    """
    m, n = shape
    if rank is None:
        return m * n
    if not pivots(shape, rank, storage):
        return rank * (m + n)
    return rank * (m + n - rank) + (m if storage == "auto" else 0)


def _rank_costing(shape: tuple[int, int], wanted: float, storage: Storage) -> float:
    """The real rank whose cost is `wanted` numbers, the inverse of `numbers`."""
    m, n = shape
    two_factor = wanted / (m + n)
    if storage == "two_factor":
        return two_factor
    spare = wanted - (m if storage == "auto" else 0)
    # r (m + n - r) = spare, the smaller root; it is real as long as spare <= m n.
    pivoted = ((m + n) - math.sqrt(max(0.0, (m + n) ** 2 - 4 * spare))) / 2
    return pivoted if storage == "pivoted" else max(two_factor if two_factor**2 <= m else 0.0, pivoted)


class Budget(BaseModel):
    """How much of the decoder's linear weights may be kept.

    Counted are the parameters of the sites' weights. Embeddings, head, norms and biases are not; the report gives
    true totals.

    Attributes:
        keep: fraction kept, in (0, 1]. None leaves the size to a manual allocation.
        rank_multiple: ranks are multiples of this. 8 suits the tensor cores of GPUs; 1 fills the budget closest.
        storage: how a site of rank r is stored, which decides what a rank costs.
        bits: bits a weight on the average, for methods that quantise; they take no `keep`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep: Annotated[float, Field(gt=0, le=1)] | None = 0.8
    rank_multiple: Annotated[int, Field(ge=1)] = 8
    storage: Storage = "two_factor"
    bits: Annotated[float, Field(gt=0, le=16)] | None = None

    @property
    def sized(self) -> bool:
        """Whether it says how large the whole may be."""
        return self.keep is not None

    @property
    def asked(self) -> str:
        """The size asked for, in words."""
        return f"{self.keep:g}"

    @property
    def unit(self) -> str:
        """What a share of it is counted in, in words."""
        return "of the whole"

    @property
    def option(self) -> str:
        """The option that sets it."""
        return "--keep"

    def cost(self, site: Site, rank: Rank) -> int:
        """Parameters of a site at a rank, m n when dense."""
        return numbers((site.m, site.n), rank, self.storage)

    def rank_at(self, site: Site, fraction: float) -> float:
        """The real rank that costs a fraction of the matrix. At 1 it is the break-even rank."""
        return _rank_costing((site.m, site.n), min(fraction, 1.0) * site.parameters, self.storage)

    def allowed(self, sites: Sequence[Site]) -> int:
        """Parameters that the sites may keep together.

        Raises:
            BudgetError: when no fraction is set.
        """
        if self.keep is None:
            raise BudgetError("No kept fraction is set.", where="budget.keep", remedy="give --keep")
        # The small excess forgives the rounding of a fraction such as 0.7.
        return math.floor(self.keep * sum(site.parameters for site in sites) + 1e-6)

    def largest_rank(self, site: Site) -> int:
        """The largest rank that costs less than the matrix itself; 0 when even one step does not."""
        most = min(site.m, site.n) // self.rank_multiple
        while most and self.cost(site, most * self.rank_multiple) >= site.parameters:
            most -= 1
        return most * self.rank_multiple

    def next_rank(self, site: Site, rank: Rank) -> Rank:
        """The rank one step up; None (dense) when that step would cost as much as the matrix itself.

        Raises:
            ValueError: when the site is dense already.
        """
        if rank is None:
            raise ValueError(f"{site.name} is dense already")
        above = rank + self.rank_multiple
        return None if self.cost(site, above) >= site.parameters or above > min(site.m, site.n) else above

    def round_rank(self, site: Site, rank: float) -> Rank:
        """The multiple nearest to a real rank, at least one step; dense when it saves nothing."""
        rounded = max(1, math.floor(rank / self.rank_multiple + 0.5)) * self.rank_multiple
        return self.next_rank(site, rounded - self.rank_multiple)

    def _floor_rank(self, site: Site, rank: float) -> Rank:
        # The small excess keeps a fraction such as 0.7 * 10 / 7 from landing one step low.
        floored = max(1, math.floor(rank / self.rank_multiple + 1e-9)) * self.rank_multiple
        return self.next_rank(site, floored - self.rank_multiple)

    def fill(self, sites: Sequence[Site], fractions: Mapping[str, float | None]) -> dict[str, Rank]:
        """Ranks in the proportions asked for that spend the budget as exactly as the multiple allows.

        All fractions are scaled by one number to the largest whose rounded-down ranks fit; what is left goes step by
        step to the sites that rounding cut most. The total is never above `keep`, and what stays unspent is less
        than the cheapest step that is left.

        Args:
            sites: all sites the budget counts.
            fractions: by site name, the kept fraction relative to the others; None for dense.

        Returns:
            Site name -> rank, None for dense.

        Raises:
            BudgetError: when even the smallest ranks do not fit.
        """
        total = sum(site.parameters for site in sites)
        allowed = self.allowed(sites)
        if self.keep == 1:
            return {site.name: None for site in sites}
        wanted = {name: f for name, f in fractions.items() if f is not None}

        def ranks_at(scale: float) -> dict[str, Rank]:
            return {
                s.name: self._floor_rank(s, self.rank_at(s, scale * wanted[s.name])) if s.name in wanted else None
                for s in sites
            }

        def spent(ranks: Mapping[str, Rank]) -> int:
            return sum(self.cost(site, ranks[site.name]) for site in sites)

        smallest = ranks_at(0.0)
        if spent(smallest) > allowed:
            raise BudgetError(
                f"Nothing fits a kept fraction of {self.keep:g}: the smallest ranks (one step of "
                f"{self.rank_multiple}, and what has to stay dense) keep {spent(smallest) / total:.4f}.",
                where="budget",
                remedy="raise --keep, lower budget.rank_multiple, or let more sites be compressed",
            )
        low, high = 0.0, 1.0
        while spent(ranks_at(high)) <= allowed and high < 2**20:
            low, high = high, 2 * high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if spent(ranks_at(middle)) <= allowed else (low, middle)
        ranks = ranks_at(low)
        left = allowed - spent(ranks)
        by_name = {site.name: site for site in sites}

        def shortfall(name: str) -> float:
            rank, target = ranks[name], self.rank_at(by_name[name], high * wanted[name])
            return -1.0 if rank is None else (target - rank) / target

        while True:
            steps = [
                (shortfall(name), name, step)
                for name in wanted
                if ranks[name] is not None
                and (step := self.cost(s := by_name[name], self.next_rank(s, ranks[name])) - self.cost(s, ranks[name]))
                <= left
            ]
            if not steps:
                return ranks
            # max() keeps the first of equals: ties go to the earlier site, so plans are reproducible.
            _, name, step = max(steps, key=lambda item: item[0])
            ranks[name] = self.next_rank(by_name[name], ranks[name])
            left -= step


def kept_by(
    labels: Mapping[str, str], sites: Sequence[Site], ranks: Mapping[str, Rank], budget: Budget
) -> dict[str, float]:
    """The fraction of parameters kept in each group of sites.

    Args:
        labels: site name -> group.
        sites: the sites.
        ranks: site name -> rank, None for dense.
        budget: says what a rank costs.
    """
    whole: dict[str, int] = {}
    kept: dict[str, int] = {}
    for site in sites:
        label = labels[site.name]
        whole[label] = whole.get(label, 0) + site.parameters
        kept[label] = kept.get(label, 0) + budget.cost(site, ranks[site.name])
    return {label: kept[label] / whole[label] for label in whole}
