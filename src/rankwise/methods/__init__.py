"""Compression methods, one file each. A new one is a file and a line in `METHODS`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rankwise.errors import RecipeError, nearest
from rankwise.methods.afm import AFM
from rankwise.methods.asvd import ASVD
from rankwise.methods.base import Factorisation, Looking, Method, Outlook, estimated_losses
from rankwise.methods.bolaco import Bolaco
from rankwise.methods.caldera import Caldera
from rankwise.methods.fwsvd import FWSVD
from rankwise.methods.mixed import Mixed
from rankwise.methods.quantize import Quantize
from rankwise.methods.svd import SVD
from rankwise.methods.svd_llm import SVDLLM
from rankwise.methods.two_sided import TwoSided

METHODS: dict[str, type[Method]] = {
    "svd": SVD,
    "fwsvd": FWSVD,
    "asvd": ASVD,
    "svd_llm": SVDLLM,
    "afm": AFM,
    "bolaco": Bolaco,
    "two_sided": TwoSided,
    "quantize": Quantize,
    "caldera": Caldera,
    "mixed": Mixed,
}

AnyMethod = Annotated[
    SVD | FWSVD | ASVD | SVDLLM | AFM | Bolaco | TwoSided | Quantize | Caldera | Mixed, Field(discriminator="name")
]


FACTORISATIONS = tuple(name for name, method in METHODS.items() if method.keeps_factors)
"""The methods that give factors, which compare at equal kept fractions."""


def method_named(name: str) -> Method:
    """A method with its default settings.

    Raises:
        RecipeError: naming the nearest method.
    """
    if name not in METHODS:
        raise RecipeError(f"There is no method {name!r}.", where="method", remedy=nearest(name, METHODS))
    return METHODS[name](name=name)


__all__ = [
    "FACTORISATIONS",
    "METHODS",
    "AnyMethod",
    "Factorisation",
    "Looking",
    "Method",
    "Outlook",
    "estimated_losses",
    "method_named",
]
