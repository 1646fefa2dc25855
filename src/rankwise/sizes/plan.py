"""`Plan`: the cut of every site, as a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rankwise.errors import BudgetError
from rankwise.models import Site
from rankwise.quantizers import CODEBOOKS
from rankwise.reading import UnreadableError, first_problem, read_json, shown
from rankwise.sizes.budget import Allowance
from rankwise.sizes.cut import DENSE, Cut
from rankwise.sizes.form import FULL_BITS, Form

PLAN_FORMAT = "rankwise-plan/2"
_FIRST_FORMAT = "rankwise-plan/1"
_LARGEST_FACTOR_BITS = 16
_WIDEST_NUMBER = 64

Side = Annotated[int, Field(ge=1, lt=1 << 40)]
"""Rows or columns of a weight."""


class Plan(BaseModel):
    """Site -> cut, with what it was made for. A JSON file that can be published and reused.

    Files of the first format, which held ranks and bits apart, are read too.

    Attributes:
        format: version of this file's form.
        architecture: class name of the model it was made for.
        fingerprint: hash of that model's weights; None when it is not known.
        method: name of the method that fits its cuts.
        method_settings: all its settings.
        allocation: how the cuts were chosen.
        keep: fraction asked for; None when the size was spelled otherwise, or not at all.
        bits: bits a weight asked for.
        size: bytes of all weight files asked for.
        rank_multiple: what ranks are multiples of.
        form: how cuts are stored.
        shapes: by site name, `[m, n]`; what is left where the model was made smaller first.
        originals: the same of the original, where the model was made smaller first; empty where it was not.
        stays: by name of a module that lost units (channels, or groups of heads), those that stay.
        whole_weights: numbers in the weights of the whole model, where it was made smaller first.
        cuts: by site name.
        groups: by group of the search (or by role), what it takes a weight: a fraction, or bits, as spelled.
        space: the search's space, `5x1` or `spectral`; None when nothing was searched.
        coordinates: the point of that space, by label.
        objective: value, perplexity and KL on the validation samples, where they were measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format: Literal["rankwise-plan/2"] = "rankwise-plan/2"
    architecture: str
    fingerprint: str | None = None
    method: str
    method_settings: dict[str, Any] = {}
    allocation: str
    keep: Annotated[float, Field(gt=0)] | None = None
    bits: Annotated[float, Field(gt=0)] | None = None
    size: Annotated[int, Field(gt=0)] | None = None
    rank_multiple: Annotated[int, Field(ge=1, lt=1 << 40)]
    form: Form
    shapes: Annotated[dict[str, tuple[Side, Side]], Field(min_length=1)]
    originals: dict[str, tuple[Side, Side]] = {}
    cuts: dict[str, Cut]
    stays: dict[str, Annotated[list[Annotated[int, Field(ge=0, lt=1 << 40)]], Field(min_length=1)]] = {}
    whole_weights: Annotated[int, Field(gt=0)] | None = None
    groups: dict[str, float] = {}
    space: str | None = None
    coordinates: dict[str, float] = {}
    objective: dict[str, float] | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_any_format(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("format") == _FIRST_FORMAT:
            return _from_first_format(values)
        if isinstance(values, dict) and values.get("format", PLAN_FORMAT) != PLAN_FORMAT:
            raise ValueError(
                f"format {shown(values['format'])} was written by another version: this one reads {PLAN_FORMAT}"
            )
        return values

    @model_validator(mode="after")
    def _whole(self) -> Plan:
        if set(self.cuts) != set(self.shapes):
            name = min(set(self.cuts) ^ set(self.shapes))
            raise ValueError(f"{name} has a cut without a shape, or a shape without a cut")
        if self.form.number_bits > _WIDEST_NUMBER:
            raise ValueError(f"no number has {shown(self.form.number_bits)} bits")
        for name, units in self.stays.items():
            if units != sorted(set(units)):
                raise ValueError(f"{name}: the units that stay are not in ascending order, each once")
        for name, cut in self.cuts.items():
            if cut.rank is not None and cut.rank > min(self.shapes[name]):
                raise ValueError(f"{name}: the rank {cut.rank} does not lie in 0..{min(self.shapes[name])}")
            used = [(self.form.codebook, cut.q_bits)]
            if cut.lr_bits is not None and cut.lr_bits != FULL_BITS:
                used.append((self.form.factor_codebook(cut.lr_bits), cut.lr_bits))
            for codebook, bits in used:
                # One of a user's own says when it is used: a plan that is read runs no code.
                if bits and codebook in CODEBOOKS and bits not in CODEBOOKS[codebook].known_bits:
                    raise ValueError(f"{name}: the codebook {codebook} has no {bits} bits")
        return self

    @property
    def weights(self) -> int:
        """Numbers in the dense weights of all sites, before the model was made smaller."""
        return self.whole_weights or sum(m * n for m, n in self.shapes.values())

    def site_bits(self, name: str) -> int:
        """Bits of the site of this name."""
        return self.form.bits(self.shapes[name], self.cuts[name])

    @property
    def kept_bits(self) -> int:
        """Bits of all sites."""
        return sum(self.site_bits(name) for name in self.shapes)

    @property
    def bits_a_weight(self) -> float:
        """Bits of all sites over their weights."""
        return self.kept_bits / self.weights

    @property
    def kept(self) -> float:
        """Bits of all sites over those of their dense weights."""
        return self.kept_bits / (self.weights * self.form.number_bits)

    @property
    def coded(self) -> bool:
        """Whether any site holds codes, so that bits say more than numbers."""
        return any(cut.coded for cut in self.cuts.values())

    @property
    def spelling(self) -> dict[str, float | int | None]:
        """The size asked for, as `Budget.spelling`."""
        return {"keep": self.keep, "bits": self.bits, "size": self.size}

    def fractions(self) -> dict[str, float | None]:
        """By site name, the fraction of the dense bits that is kept; None for dense."""
        return {
            name: None if cut.dense else self.site_bits(name) / self.form.bits(self.shapes[name], DENSE)
            for name, cut in self.cuts.items()
        }

    @classmethod
    def make(
        cls,
        sites: Sequence[Site],
        cuts: Mapping[str, Cut],
        form: Form,
        allowance: Allowance,
        *,
        architecture: str,
        method: str,
        allocation: str,
        **details: Any,
    ) -> Plan:
        """A plan that is checked against its allowance.

        Args:
            sites: every site the allowance counts.
            cuts: by site name.
            form: how they are stored.
            allowance: what they are checked against.
            architecture: class name of the model.
            method: name of the method.
            allocation: how the cuts were chosen.
            **details: further attributes of the plan.

        Raises:
            BudgetError: when the cuts take more than is allowed, or a site has none.
        """
        missing = [site.name for site in sites if site.name not in cuts]
        if missing:
            raise BudgetError("The plan has no cut for a site.", where=missing[0])
        plan = cls(
            architecture=architecture,
            method=method,
            allocation=allocation,
            rank_multiple=allowance.budget.rank_multiple,
            form=form,
            shapes={site.name: (site.m, site.n) for site in sites},
            cuts={site.name: cuts[site.name] for site in sites},
            **allowance.budget.spelling,
            **details,
        )
        if allowance.sized and plan.kept_bits > allowance.bits:
            raise BudgetError(
                f"The plan takes {allowance.in_words(plan.kept_bits)}, more than {allowance.asked}.", where="budget"
            )
        return plan

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan file.

        Raises:
            BudgetError: when the file is missing or not a plan.
        """
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as problem:
            _, place, message = first_problem(problem)
            why = f"{place}: {message}" if place else message
        except UnreadableError as problem:
            why = str(problem)
        raise BudgetError("The plan cannot be read.", where=str(path), remedy=why) from None

    def fitting(self, sites: Sequence[Site], where: str) -> dict[str, Cut]:
        """Its cuts for a model's sites.

        Args:
            sites: sites of the model it is to be used on.
            where: the plan's file, for errors.

        Raises:
            BudgetError: naming the first site that is missing or has another shape.
        """
        _require_shapes({site.name: (site.m, site.n) for site in sites}, self, "the model's", where)
        return {site.name: self.cuts[site.name] for site in sites}


def _from_first_format(values: dict[str, Any]) -> dict[str, Any]:
    """A plan of the first format, in which ranks, bits of Q and one `lr_bits` for all stood apart."""
    for name in ("ranks", "q_bits", "form"):
        part = values.get(name)
        if not isinstance(part, dict) and (part is not None or name == "ranks"):
            raise ValueError(f"{name} is missing, or no mapping")
    kept = {
        name: value
        for name, value in values.items()
        if name not in ("format", "storage", "ranks", "q_bits", "form", "dense_bits")
    }
    old, ranks, q_bits = dict(values.get("form") or {}), dict(values["ranks"]), dict(values.get("q_bits") or {})
    ranked = {name for name, rank in ranks.items() if rank is not None}
    if (old or q_bits) and set(q_bits) != ranked:
        raise ValueError(f"{min(set(q_bits) ^ ranked)} has a rank without bits of Q (q_bits), or bits without a rank")
    if q_bits and not old:
        raise ValueError("q_bits are given, and not the form that quantised sites are stored in")
    lr_bits = old.pop("lr_bits", _LARGEST_FACTOR_BITS)
    return {
        **kept,
        "form": {
            **old,
            "storage": values.get("storage", "two_factor"),
            "number_bits": values.get("dense_bits", FULL_BITS),
        },
        "cuts": {
            name: {
                "rank": rank,
                "q_bits": q_bits.get(name, 0),
                "lr_bits": lr_bits if name in q_bits and rank else None,
            }
            for name, rank in ranks.items()
        },
    }


def _require_shapes(shapes: Mapping[str, tuple[int, int]], plan: Plan, whose: str, where: str) -> None:
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


def same_shapes(first: Plan, second: Plan, where_first: str, where_second: str) -> None:
    """Raise unless two plans are for the same sites and shapes.

    Raises:
        BudgetError: naming the first site that differs.
    """
    _require_shapes(first.shapes, second, f"{where_first}'s", where_second)
