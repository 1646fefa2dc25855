"""Modules that take the place of a linear layer."""

from rankwise.layers.fold import fold_orders
from rankwise.layers.low_rank import LowRankLinear
from rankwise.layers.pivoted import PivotedLinear
from rankwise.layers.quantized import PackedMatrix, QuantizedLinear, cache_dense
from rankwise.layers.replace import replace_linears
from rankwise.layers.sliced import SlicedLinear, sliced
from rankwise.layers.substitute import (
    empty_quantized,
    fill_quantized,
    layer_form,
    read_factors,
    sixteen,
    substitute,
    substitute_pivoted,
)

__all__ = [
    "FACTORED",
    "REPLACED",
    "LowRankLinear",
    "PackedMatrix",
    "PivotedLinear",
    "QuantizedLinear",
    "SlicedLinear",
    "cache_dense",
    "empty_quantized",
    "fill_quantized",
    "fold_orders",
    "layer_form",
    "read_factors",
    "replace_linears",
    "sixteen",
    "sliced",
    "substitute",
    "substitute_pivoted",
]

FACTORED = (LowRankLinear, PivotedLinear)
"""The layers that hold two factors in place of a weight."""

REPLACED = (*FACTORED, QuantizedLinear)
"""The layers a checkpoint may hold in place of a linear one."""
