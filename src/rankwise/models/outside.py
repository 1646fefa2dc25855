"""Linear layers whose weights a model's own code reads beside calling them: nothing else may stand in their place."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.models.sites import Site

_MACHINERY = ("torch", "rankwise", "accelerate", "peft")
"""Packages whose reading of a weight is no model's."""


def read_outside(model: nn.Module, sites: Sequence[Site], input_ids: Tensor) -> list[str]:
    """Sites whose weight is read outside their own forward, in one pass.

    RWKV scales weights before its first token, sparse attention of some families reads those of an indexer.

    Args:
        model: the causal language model that holds the sites, dense; as before but for what its own code does.
        sites: those to watch.
        input_ids: a short sequence, shape `[1, tokens]`.

    Returns:
        Their names, in order.
    """
    found: set[str] = set()
    with _recording(model, sites, found), torch.no_grad():
        model(input_ids=input_ids, use_cache=False)
    return [site.name for site in sites if site.name in found]


@contextmanager
def _recording(model: nn.Module, sites: Sequence[Site], found: set[str]) -> Iterator[None]:
    """For the block, each site's layer is of a subclass of its class that notes who asks for its weight."""
    before: list[tuple[nn.Module, type]] = []
    try:
        for site in sites:
            module = site.module(model)
            before.append((module, type(module)))
            module.__class__ = _watched(type(module), site.name, found)
        yield
    finally:
        for module, kind in before:
            module.__class__ = kind


def _watched(kind: type, name: str, found: set[str]) -> type:
    def getattr_(self: Any, key: str) -> Any:
        if key == "weight":
            reader = sys._getframe(1)
            own = reader.f_locals.get("self") is self and reader.f_code.co_name == "forward"
            if not own and reader.f_globals.get("__name__", "").split(".")[0] not in _MACHINERY:
                found.add(name)
        return kind.__getattr__(self, key)  # type: ignore[attr-defined]

    return type(kind.__name__, (kind,), {"__getattr__": getattr_, "__module__": kind.__module__})
