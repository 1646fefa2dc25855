"""Put factors into a model."""

from __future__ import annotations

import torch
from torch import nn

from rankwise.factors import Factors
from rankwise.layers.low_rank import LowRankLinear
from rankwise.sites import Site


def substitute(model: nn.Module, site: Site, factors: Factors) -> None:
    """Replace a site's module by a low-rank layer that holds `factors`, in the dtype and on the device it had.

    Args:
        model: changed in place.
        site: which weight.
        factors: L `[m, r]`, R `[r, n]` and an optional bias `[m]`.
    """
    old = site.module(model).weight
    with torch.device("meta"):
        layer = LowRankLinear(site.n, site.m, factors.rank, factors.bias is not None)

    def parameter(values: torch.Tensor) -> nn.Parameter:
        # A copy of its own: a view would keep the whole basis in memory, and in the file.
        copied = values.to(old.device, old.dtype, copy=True, memory_format=torch.contiguous_format)
        return nn.Parameter(copied, requires_grad=False)

    layer.right.weight = parameter(factors.right)
    layer.left.weight = parameter(factors.left)
    if factors.bias is not None:
        layer.left.bias = parameter(factors.bias)
    model.set_submodule(site.name, layer)
