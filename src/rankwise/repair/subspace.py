"""Post-training in a fixed low-rank subspace: two diagonals a site (Bolaco, Eq. 9).

Y = (L R + diag(b) L_s diag(d) R_s) X, with L_s and R_s the leading s columns and rows, which stay as they are, and
vectors b `[m]`, d `[s]` that are trained. It merges without raising the rank: L_s becomes L_s + diag(b) L_s diag(d).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rankwise.layers import LowRankLinear, kind_of
from rankwise.models import Site
from rankwise.repair.training import Training


class SubspaceLinear(nn.Module):
    """A low-rank layer with its two trainable diagonals.

    Args:
        inner: the layer, frozen.
        directions: s.
    """

    def __init__(self, inner: LowRankLinear, directions: int) -> None:
        super().__init__()
        self.inner = inner
        self.directions = min(directions, inner.right.out_features)
        weight = inner.left.weight
        # With b = 0 the map is unchanged; with d = 1 the gradient of b is not zero.
        self.outputs = nn.Parameter(weight.new_zeros(inner.out_features), requires_grad=False)
        self.codes = nn.Parameter(weight.new_ones(self.directions), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., n]` to `[..., m]`."""
        code = self.inner.right(x)
        leading = code[..., : self.directions] * self.codes
        added = nn.functional.linear(leading, self.inner.left.weight[:, : self.directions])
        return self.inner.left(code) + self.outputs * added

    @torch.no_grad()
    def merged(self) -> LowRankLinear:
        """The same map as a low-rank layer of the same rank; the inner layer is changed."""
        leading = self.inner.left.weight[:, : self.directions]
        self.inner.left.weight[:, : self.directions] = leading + self.outputs[:, None] * leading * self.codes
        return self.inner


class Subspace(Training):
    """How the diagonals are trained; the defaults are the paper's.

    Attributes:
        directions: s, leading directions of a site; all of them where the rank is smaller.
    """

    batch_size: Annotated[int, Field(ge=1)] = 64
    lr: Annotated[float, Field(gt=0)] = 2e-3
    relative: bool = False
    loss: Literal["kl", "lm"] = "lm"
    directions: Annotated[int, Field(ge=1)] = 256

    def attach(self, model: Any, sites: Sequence[Site], seed: int) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for site in sites:
            layer = site.module(model)
            if kind_of(layer).trains:
                with_diagonals = SubspaceLinear(layer, self.directions)
                model.set_submodule(site.name, with_diagonals)
                found[f"{site.name}.outputs"] = with_diagonals.outputs
                found[f"{site.name}.codes"] = with_diagonals.codes
        return found

    def fold_in(self, model: Any, sites: Sequence[Site], limits: Mapping[str, int]) -> dict[str, Any]:
        for site in sites:
            merged = getattr(site.module(model), "merged", None)
            if merged is not None:
                model.set_submodule(site.name, merged())
        return {}
