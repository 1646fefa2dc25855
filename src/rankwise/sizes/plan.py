"""`RankPlan`: what every site keeps, as a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from rankwise.errors import BudgetError
from rankwise.models import Site
from rankwise.quantizers import CODEBOOKS
from rankwise.sizes.bits import FULL_BITS, BitForm, QuantizedRank, bit_details
from rankwise.sizes.parameters import Budget, Rank, Storage, numbers


class RankPlan(BaseModel):
    """Site -> rank or dense, with what it was made for. A JSON file that can be published and reused.

    Attributes:
        format: version of this file's form.
        architecture: class name of the model it was made for.
        fingerprint: hash of that model's weights; None when it is not known.
        method: name of the method whose bases it slices.
        method_settings: all its settings.
        allocation: how the ranks were chosen.
        keep: fraction asked for; None when the ranks were given.
        rank_multiple: what ranks are multiples of.
        storage: how a site of rank r is stored.
        shapes: by site name, `[m, n]`.
        ranks: by site name, the rank; null for dense.
        groups: by group of the search (or by role), the fraction of its parameters kept, or its bits a weight.
        space: the search's space, `5x1` or `spectral`; None when nothing was searched.
        coordinates: the point of that space, by label.
        objective: value, perplexity and KL on the validation samples, where they were measured.
        bits: bits a weight asked for; None when they were not.
        q_bits: by name of each quantised site, bits a weight of Q.
        form: how quantised sites are stored; None when there are none.
        dense_bits: bits a weight of a site that stays dense, in plans of bits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["rankwise-plan/1"] = "rankwise-plan/1"
    architecture: str
    fingerprint: str | None = None
    method: str
    method_settings: dict[str, Any] = {}
    allocation: str
    keep: float | None
    rank_multiple: int
    storage: Storage = "two_factor"
    shapes: dict[str, tuple[int, int]]
    ranks: dict[str, int | None]
    groups: dict[str, float] = {}
    space: str | None = None
    coordinates: dict[str, float] = {}
    objective: dict[str, float] | None = None
    bits: float | None = None
    q_bits: dict[str, int] = {}
    form: BitForm | None = None
    dense_bits: int = FULL_BITS

    @model_validator(mode="after")
    def _whole(self) -> RankPlan:
        if set(self.ranks) != set(self.shapes):
            name = min(set(self.ranks) ^ set(self.shapes))
            raise ValueError(f"{name} has a rank without a shape, or a shape without a rank")
        for name, rank in self.ranks.items():
            if rank is not None and not 0 <= rank <= min(self.shapes[name]):
                raise ValueError(f"{name}: the rank {rank} does not lie in 0..{min(self.shapes[name])}")
        ranked = {name for name, rank in self.ranks.items() if rank is not None}
        if (self.form is not None or self.q_bits) and set(self.q_bits) != ranked:
            name = min(set(self.q_bits) ^ ranked)
            raise ValueError(f"{name} has a rank without bits of Q (q_bits), or bits without a rank")
        if bool(self.q_bits) and self.form is None:
            raise ValueError("q_bits are given, and not the form that quantised sites are stored in")
        if self.form is not None:
            for name, bits in self.q_bits.items():
                if bits and bits not in CODEBOOKS[self.form.codebook].known_bits:
                    raise ValueError(f"{name}: the codebook {self.form.codebook} has no {bits} bits")
        return self

    @property
    def dense_parameters(self) -> int:
        return sum(m * n for m, n in self.shapes.values())

    @property
    def kept_parameters(self) -> int:
        return sum(self.cost(name) for name in self.shapes)

    def cost(self, name: str) -> int:
        """Numbers the site of this name keeps; of a quantised one, its bits in numbers of 16."""
        if name in self.q_bits:
            return -(-self.site_bits(name) // FULL_BITS)
        return numbers(self.shapes[name], self.ranks[name], self.storage)

    def site_bits(self, name: str) -> int:
        """Bits of the site of this name, 16 a number where it is not quantised."""
        rank = self.ranks[name]
        if name not in self.q_bits or self.form is None or rank is None:
            return self.dense_bits * self.cost(name)
        return self.form.site_bits(self.shapes[name], self.q_bits[name], rank)

    @property
    def bits_a_weight(self) -> float:
        """Bits of all sites over their weights."""
        return sum(self.site_bits(name) for name in self.shapes) / self.dense_parameters

    def fractions(self) -> dict[str, float | None]:
        """By site name, the fraction of the matrix that is kept; None for dense."""
        return {
            name: None if self.ranks[name] is None else self.cost(name) / (m * n)
            for name, (m, n) in self.shapes.items()
        }

    @property
    def kept(self) -> float:
        """Fraction of the sites' parameters kept."""
        return self.kept_parameters / self.dense_parameters

    @classmethod
    def make(
        cls,
        sites: Sequence[Site],
        ranks: Mapping[str, Rank],
        budget: Budget,
        *,
        architecture: str,
        method: str,
        allocation: str,
        **details: Any,
    ) -> RankPlan:
        """A plan that is checked against its budget.

        Args:
            sites: every site the budget counts.
            ranks: by site name; None for dense.
            budget: what it is checked against.
            architecture: class name of the model.
            method: name of the method.
            allocation: how the ranks were chosen.
            **details: further attributes of the plan.

        Raises:
            BudgetError: when the ranks keep more than the budget allows, or a site has no rank.
        """
        missing = [site.name for site in sites if site.name not in ranks]
        if missing:
            raise BudgetError("The plan has no rank for a site.", where=missing[0])
        plan = cls(
            architecture=architecture,
            method=method,
            allocation=allocation,
            keep=budget.keep,
            rank_multiple=budget.rank_multiple,
            storage=budget.storage,
            shapes={site.name: (site.m, site.n) for site in sites},
            ranks={site.name: None if (r := ranks[site.name]) is None else int(r) for site in sites},
            **bit_details(budget, ranks),
            **details,
        )
        if plan.bits is not None and plan.bits_a_weight > plan.bits + 1e-9:
            raise BudgetError(
                f"The plan takes {plan.bits_a_weight:.4f} bits a weight, more than the {plan.bits:g} allowed.",
                where="budget.bits",
            )
        if budget.keep is not None and plan.kept > budget.keep + 1e-9:
            raise BudgetError(
                f"The plan keeps {plan.kept:.4f}, more than the {budget.keep:g} allowed.", where="budget.keep"
            )
        return plan

    @classmethod
    def load(cls, path: Path) -> RankPlan:
        """Read a plan file.

        Raises:
            BudgetError: when the file is missing or not a plan.
        """
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, ValidationError, ValueError) as problem:
            raise BudgetError("The plan cannot be read.", where=str(path), remedy=_first_line(problem)) from None

    def fitting(self, sites: Sequence[Site], where: str) -> dict[str, Rank]:
        """Its ranks for a model's sites.

        Args:
            sites: sites of the model it is to be used on.
            where: the plan's file, for errors.

        Raises:
            BudgetError: naming the first site that is missing or has another shape.
        """
        _require_shapes({site.name: (site.m, site.n) for site in sites}, self, "the model's", where)
        return {site.name: self.setting(site.name) for site in sites}

    def setting(self, name: str) -> Rank:
        """A site's rank, with the bits of Q where it is quantised."""
        rank = self.ranks[name]
        return rank if rank is None or name not in self.q_bits else QuantizedRank(rank, self.q_bits[name])


def _first_line(problem: Exception) -> str:
    if isinstance(problem, ValidationError):
        first = problem.errors()[0]
        return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, "))))
    return str(problem).splitlines()[0]


def _require_shapes(shapes: Mapping[str, tuple[int, int]], plan: RankPlan, whose: str, where: str) -> None:
    remedy = "use a plan made for a model with the same layers"
    for name, shape in shapes.items():
        there = plan.shapes.get(name)
        if there != shape:
            found = "has no such site" if there is None else f"has {list(there)} there"
            raise BudgetError(
                f"The plan is for another architecture ({plan.architecture}): {whose} {name} is {list(shape)}, and "
                f"the plan {found}.",
                where=where,
                remedy=remedy,
            )
    extra = next((name for name in plan.shapes if name not in shapes), None)
    if extra is not None:
        raise BudgetError(
            f"The plan is for another architecture ({plan.architecture}): it has {extra}, which is not among "
            f"{whose} sites.",
            where=where,
            remedy=remedy,
        )


def same_shapes(first: RankPlan, second: RankPlan, where_first: str, where_second: str) -> None:
    """Raise unless two plans are for the same sites and shapes.

    Raises:
        BudgetError: naming the first site that differs.
    """
    _require_shapes(first.shapes, second, f"{where_first}'s", where_second)
