"""`Budget`: how large the result may be, in one of three spellings, all of which come down to bits."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rankwise.errors import BudgetError
from rankwise.sizes.form import Storage

SPELLINGS = ("keep", "bits", "size")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_LEAST_TEXT = "the smallest cuts there are, and what has to stay dense"


def parse_size(text: str) -> int:
    """Bytes from `90MB`, `1.5 GB`, `700MiB` or a plain number of bytes.

    Raises:
        ValueError: when it is none of these.
    """
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B|)", text.strip().upper())
    if matched is None:
        raise ValueError(f"{text!r} is no size: write 90MB, 1.5GB or 700MiB")
    return math.floor(float(matched[1]) * _UNITS[matched[2]])


def bytes_in_words(count: float) -> str:
    """A number of bytes with its unit."""
    for unit in ("B", "KB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


class Budget(BaseModel):
    """How much of a model may be kept: one of `keep`, `bits` and `size`, or none where the cuts are given by hand.

    Attributes:
        keep: fraction of the decoder's linear weights, in (0, 1], counted in numbers of the checkpoint's own type.
        bits: bits a weight of them on the average.
        size: bytes of all weight files, embeddings, head and headers included; a number or text such as `90MB`.
        rank_multiple: ranks are multiples of this. 8 suits the tensor cores of GPUs; 1 fills the budget closest.
        storage: how a site of rank r is stored in the checkpoint's own numbers, which decides what a rank costs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    bits: Annotated[float, Field(gt=0, le=64)] | None = None
    size: Annotated[int, Field(gt=0)] | None = None
    rank_multiple: Annotated[int, Field(ge=1)] = 8
    storage: Storage = "auto"

    @field_validator("size", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        return parse_size(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_spelling(self) -> Budget:
        given = [name for name in SPELLINGS if getattr(self, name) is not None]
        if len(given) > 1:
            listed = " and ".join(f"{name} {getattr(self, name):g}" for name in given)
            raise ValueError(f"{listed} each say how large the result may be: give one of them")
        if self.storage == "pivoted" and given and given[0] != "keep":
            raise ValueError(
                "storage pivoted leaves out the integers that order its rows, as published: with "
                f"{given[0]} use auto, which counts them"
            )
        return self

    @property
    def sized(self) -> bool:
        """Whether it says how large the whole may be."""
        return any(value is not None for value in self.spelling.values())

    @property
    def spelling(self) -> dict[str, float | int | None]:
        """What says the size, by name; one of them at most is not None."""
        return {name: getattr(self, name) for name in SPELLINGS}


@dataclass(frozen=True)
class Allowance:
    """A budget for a model: what its sites may take together, in bits.

    Attributes:
        budget: as it was spelled.
        weights: numbers in the dense weights of all sites.
        number_bits: bits of such a number in the checkpoint.
        rest_bytes: everything else in the weight files: embeddings, head, norms, biases, headers.
    """

    budget: Budget
    weights: int
    number_bits: int
    rest_bytes: int = 0

    @property
    def sized(self) -> bool:
        return self.budget.sized

    @property
    def bits(self) -> int:
        """Bits that all sites may take together.

        Raises:
            BudgetError: when no size is set.
        """
        budget = self.budget
        # The small excess forgives the rounding of a fraction such as 0.7.
        if budget.keep is not None:
            return math.floor(budget.keep * self.weights + 1e-6) * self.number_bits
        if budget.bits is not None:
            return math.floor(budget.bits * self.weights + 1e-6)
        if budget.size is not None:
            return max(0, 8 * (budget.size - self.rest_bytes))
        raise BudgetError("No size is set.", where="budget", remedy="give --keep, --bits or --size")

    @property
    def unit_bits(self) -> int:
        """Bits a weight that are one unit of the spelling: a whole number where fractions are kept, else one bit."""
        return self.number_bits if self.budget.keep is not None or not self.sized else 1

    @property
    def option(self) -> str:
        """The option that sets it."""
        return "--" + next((name for name in SPELLINGS if getattr(self.budget, name) is not None), "keep")

    @property
    def asked(self) -> str:
        """The size asked for, in words."""
        budget = self.budget
        if budget.keep is not None:
            return f"a kept fraction of {budget.keep:g}"
        if budget.bits is not None:
            return f"{budget.bits:g} bits a weight"
        return f"a size of {bytes_in_words(budget.size or 0)}"

    def in_words(self, bits: float) -> str:
        """What sites that take so many bits amount to, in the unit of the spelling."""
        budget = self.budget
        if budget.keep is not None or not self.sized:
            return f"a fraction of {bits / (self.weights * self.number_bits):.4f}"
        if budget.bits is not None:
            return f"{bits / self.weights:.4f} bits a weight"
        return f"{bytes_in_words(bits / 8 + self.rest_bytes)} in all"

    def remedy(self, bits: float) -> str:
        """The option with a value that is just large enough for so many bits."""
        budget = self.budget
        if budget.bits is not None:
            return f"raise --bits to {math.ceil(1000 * bits / self.weights) / 1000:g} or more"
        if budget.size is not None:
            return f"raise --size to {math.ceil((bits / 8 + self.rest_bytes) / 1e4) / 100:g}MB or more"
        return f"raise --keep to {math.ceil(1e4 * bits / (self.weights * self.number_bits)) / 1e4:g} or more"

    def require(self, smallest: int, steps: str = "", what: str = _LEAST_TEXT) -> None:
        """Raise when so many bits are already too much.

        Args:
            smallest: the least that can be reached.
            steps: what would make it smaller, for the error.
            what: which takes so much, in words.

        Raises:
            BudgetError: saying what can be reached.
        """
        if smallest <= self.bits and (self.budget.size is None or self.budget.size >= self.rest_bytes):
            return
        rest = ""
        if self.budget.size is not None:
            rest = f" ({bytes_in_words(self.rest_bytes)} of it embeddings, head, norms, biases and headers)"
        raise BudgetError(
            f"Nothing fits {self.asked}: {what} take {self.in_words(smallest)}{rest}.",
            where="budget",
            remedy=self.remedy(smallest) + steps,
        )
