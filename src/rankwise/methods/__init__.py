"""Compression methods, one file each. A new one is a file and a line in `METHODS`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Tag

from rankwise.errors import RecipeError, nearest
from rankwise.methods.afm import AFM
from rankwise.methods.asvd import ASVD
from rankwise.methods.base import AtSite, Factorisation, Looking, Method, Outlook, estimated_losses, make_basis
from rankwise.methods.bolaco import Bolaco
from rankwise.methods.caldera import Caldera
from rankwise.methods.flap import FLAP
from rankwise.methods.fwsvd import FWSVD
from rankwise.methods.llm_pruner import LLMPruner
from rankwise.methods.mixed import Mixed
from rankwise.methods.plugins import PLUGINS, Plugged
from rankwise.methods.pruned import Pruned
from rankwise.methods.pruning import Part, Pruning
from rankwise.methods.quantize import Quantize
from rankwise.methods.slicegpt import SliceGPT
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
    "flap": FLAP,
    "llm_pruner": LLMPruner,
    "pruned": Pruned,
    "slicegpt": SliceGPT,
}


AnyMethod = Annotated[
    Annotated[SVD, Tag("svd")]
    | Annotated[FWSVD, Tag("fwsvd")]
    | Annotated[ASVD, Tag("asvd")]
    | Annotated[SVDLLM, Tag("svd_llm")]
    | Annotated[AFM, Tag("afm")]
    | Annotated[Bolaco, Tag("bolaco")]
    | Annotated[TwoSided, Tag("two_sided")]
    | Annotated[Quantize, Tag("quantize")]
    | Annotated[Caldera, Tag("caldera")]
    | Annotated[Mixed, Tag("mixed")]
    | Annotated[FLAP, Tag("flap")]
    | Annotated[LLMPruner, Tag("llm_pruner")]
    | Annotated[Pruned, Tag("pruned")]
    | Annotated[SliceGPT, Tag("slicegpt")]
    | Annotated[Plugged, Tag("plugin")],
    Discriminator(lambda value: PLUGINS.branch(value, METHODS)),
]
"""A method as a node of a recipe, told by its name."""


FACTORISATIONS = tuple(name for name, method in METHODS.items() if method.keeps_factors and not method.prunes)
"""The methods that give factors alone."""

IN_NUMBERS = tuple(name for name, method in METHODS.items() if method.default_keep is not None)
"""The methods whose size is a number of numbers, of factors or of weights, which compare at equal kept fractions."""


def method_class(name: object) -> type[Method] | None:
    """The class of a method, built in or not; None when there is none of this name.

    Raises:
        RecipeError: when a file is named and what it holds is no method.
    """
    if not isinstance(name, str):
        return None
    return METHODS.get(name) or (PLUGINS.node(name) if PLUGINS.has(name) else None)


def method_named(name: str) -> Method:
    """A method with its default settings.

    Raises:
        RecipeError: naming the nearest method.
    """
    kind = method_class(name)
    if kind is None:
        raise RecipeError(f"There is no method {name!r}.", where="method", remedy=nearest(name, METHODS))
    return kind(name=name)


__all__ = [
    "FACTORISATIONS",
    "IN_NUMBERS",
    "METHODS",
    "AnyMethod",
    "AtSite",
    "Factorisation",
    "Looking",
    "Method",
    "Outlook",
    "Part",
    "Pruning",
    "SliceGPT",
    "estimated_losses",
    "make_basis",
    "method_class",
    "method_named",
]
