"""Put factors into a model, and bring them into the form they are stored in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankwise.factors import Factors
from rankwise.layers.low_rank import LowRankLinear
from rankwise.layers.pivoted import PivotedLinear
from rankwise.linalg import Pivoted
from rankwise.sites import Site


def _parameter(values: Tensor, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    # A copy of its own: a view would keep the whole basis in memory, and in the file.
    copied = values.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    return nn.Parameter(copied, requires_grad=False)


def substitute(model: nn.Module, site: Site, factors: Factors, dtype: torch.dtype | None = None) -> LowRankLinear:
    """Replace a site's module by a low-rank layer that holds `factors`, on the device it had.

    Args:
        model: changed in place.
        site: which weight.
        factors: L `[m, r]`, R `[r, n]` and an optional bias `[m]`.
        dtype: what they are held in; None for the dtype of the module replaced.

    Returns:
        The new layer.
    """
    old = next(site.module(model).parameters())
    dtype = dtype or old.dtype
    with torch.device("meta"):
        layer = LowRankLinear(site.n, site.m, factors.rank, factors.bias is not None)
    layer.right.weight = _parameter(factors.right, old.device, dtype)
    layer.left.weight = _parameter(factors.left, old.device, dtype)
    if factors.bias is not None:
        layer.left.bias = _parameter(factors.bias, old.device, dtype)
    model.set_submodule(site.name, layer)
    return layer


def substitute_pivoted(
    model: nn.Module, site: Site, pivoted: Pivoted, bias: Tensor | None, dtype: torch.dtype
) -> PivotedLinear:
    """Replace a site's module by a pivoted layer, on the device it had.

    Args:
        model: changed in place.
        site: which weight.
        pivoted: rows, map and order.
        bias: shape `[m]`, or None.
        dtype: what they are held in.

    Returns:
        The new layer.
    """
    device = next(site.module(model).parameters()).device
    rank = pivoted.first.shape[0]
    with torch.device("meta"):
        layer = PivotedLinear(site.n, site.m, rank, bias is not None)
    layer.first.weight = _parameter(pivoted.first, device, dtype)
    layer.rest.weight = _parameter(pivoted.rest, device, dtype)
    if bias is not None:
        layer.first_bias = _parameter(bias[pivoted.order[:rank].to(bias.device)], device, dtype)
        layer.rest.bias = _parameter(bias[pivoted.order[rank:].to(bias.device)], device, dtype)
    layer.place = pivoted.order.argsort().to(device, torch.int32)
    model.set_submodule(site.name, layer)
    return layer


def read_factors(module: LowRankLinear | PivotedLinear) -> Factors:
    """A layer's factors, in float64 on the CPU. A pivoted one gives L = [I; T], rows in the order of the outputs."""
    if isinstance(module, LowRankLinear):
        bias = module.left.bias
        return Factors(
            module.left.weight.detach().double().cpu(),
            module.right.weight.detach().double().cpu(),
            None if bias is None else bias.detach().double().cpu(),
        )
    rest = module.rest.weight.detach().double().cpu()
    left = torch.cat([torch.eye(rest.shape[1], dtype=torch.float64), rest])
    if module.place is not None:
        left = left[module.place.cpu()]
    added = module.dense_bias()
    return Factors(
        left, module.first.weight.detach().double().cpu(), None if added is None else added.detach().double().cpu()
    )
