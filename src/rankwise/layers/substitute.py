"""Put factors into a model, and bring them into the form they are stored in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankwise.factors import Factors, Quantized
from rankwise.layers.low_rank import LowRankLinear
from rankwise.layers.pivoted import PivotedLinear
from rankwise.layers.quantized import PackedMatrix, QuantizedLinear
from rankwise.linalg import Pivoted
from rankwise.models import Site
from rankwise.quantizers import Packed, packed_signs
from rankwise.sizes import BitForm, QuantizedRank


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


def layer_form(form: BitForm, shape: tuple[int, int], rank: QuantizedRank, half: torch.dtype) -> dict[str, Any]:
    """A quantised layer's form as `QuantizedLinear` takes it.

    Args:
        form: how the plan's sites are stored.
        shape: `(m, n)`.
        rank: of L R, with the bits of Q.
        half: the 16-bit type of factors that are numbers.
    """

    def packed(bits: int, codebook: str, scales: tuple[int, int], group: int) -> dict[str, Any]:
        return {"bits": bits, "codebook": codebook, "scales": list(scales), "group": group}

    full = form.full(int(rank))
    factors = None if int(rank) == full else packed(form.lr_bits, form.lr_codebook, (int(rank) - full, 1), 0)
    return {
        "rank": int(rank),
        "full": full,
        "half": str(half).removeprefix("torch."),
        "hadamard": form.hadamard,
        "trained_signs": form.trained_signs,
        "q": packed(rank.q_bits, form.codebook, form.scales(shape), form.group) if rank.q_bits else None,
        "factors": factors,
    }


def sixteen(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit type in which numbers go into a checkpoint of this type."""
    return dtype if dtype.itemsize == 2 else torch.bfloat16


def empty_quantized(
    model: nn.Module, site: Site, form: BitForm, rank: QuantizedRank, dtype: torch.dtype
) -> QuantizedLinear:
    """Replace a site's module by a quantised layer without values, on the device it had; its bias is taken over.

    Args:
        model: changed in place.
        site: which weight.
        form: how the plan's sites are stored.
        rank: of L R, with the bits of Q.
        dtype: of the checkpoint; unquantised factors are held in `sixteen` of it.
    """
    device = next(site.module(model).parameters()).device
    bias = site.bias(model)
    layer = QuantizedLinear(site.n, site.m, bias is not None, layer_form(form, (site.m, site.n), rank, sixteen(dtype)))
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    layer.requires_grad_(False).to(device)
    model.set_submodule(site.name, layer)
    return layer


def fill_quantized(layer: QuantizedLinear, found: Quantized) -> None:
    """Put codes, scales, factors and signs into an empty layer."""

    def fill(into: PackedMatrix, packed: Packed) -> None:
        into.codes.copy_(packed.codes)
        into.scale.copy_(packed.scale)

    with torch.no_grad():
        if layer.q is not None and found.q is not None:
            fill(layer.q, found.q)
        if found.low_rank is not None:
            pair = found.low_rank
            if pair.packed is not None:
                fill(layer.packed_left, pair.packed[0])
                fill(layer.packed_right, pair.packed[1])
            else:
                layer.left.weight.copy_(pair.left)
                layer.right.weight.copy_(pair.right)
        for name, minus in (("signs_in", found.rotation.minus_in), ("signs_out", found.rotation.minus_out)):
            if minus is not None:
                getattr(layer, name).copy_(packed_signs(minus))
