"""The original model's parts that compression replaces, kept so that it can be run again in the same memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankwise.models.sites import Site


@dataclass(frozen=True)
class Original:
    """Dense modules and norms of a model, everything else being shared with the compressed one.

    Attributes:
        modules: site name -> the linear module it had.
        vectors: values of the one-dimensional parameters that belong to no site (norms), by name.
    """

    modules: dict[str, nn.Module]
    vectors: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, sites: Sequence[Site]) -> Original:
        """Remember a model that is still dense."""
        owned = tuple(f"{site.name}." for site in sites)
        vectors = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.ndim == 1 and not name.startswith(owned)
        }
        return cls({site.name: site.module(model) for site in sites}, vectors)

    @contextmanager
    def in_place(self, model: nn.Module, sites: Sequence[Site] | None = None) -> Iterator[None]:
        """The original, for as long as the block runs.

        Args:
            model: the compressed model, changed in place and back.
            sites: only these sites are exchanged; None for all.
        """
        names = list(self.modules) if sites is None else [site.name for site in sites]
        modules = {name: model.get_submodule(name) for name in names}
        parameters = dict(model.named_parameters())
        vectors = {
            name: parameters[name].data.clone()
            for name, value in self.vectors.items()
            if parameters[name].dtype != value.dtype or not torch.equal(parameters[name].data, value)
        }
        for name in names:
            model.set_submodule(name, self.modules[name])
        for name in vectors:
            parameters[name].data.copy_(self.vectors[name])
        try:
            yield
        finally:
            for name, module in modules.items():
                model.set_submodule(name, module)
            for name, value in vectors.items():
                parameters[name].data.copy_(value)
