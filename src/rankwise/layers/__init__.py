"""Modules that take the place of a linear layer."""

from rankwise.layers.fold import fold_orders
from rankwise.layers.low_rank import LowRankLinear
from rankwise.layers.pivoted import PivotedLinear
from rankwise.layers.replace import replace_linears
from rankwise.layers.sliced import SlicedLinear, sliced
from rankwise.layers.substitute import read_factors, substitute, substitute_pivoted

__all__ = [
    "FACTORED",
    "LowRankLinear",
    "PivotedLinear",
    "SlicedLinear",
    "fold_orders",
    "read_factors",
    "replace_linears",
    "sliced",
    "substitute",
    "substitute_pivoted",
]

FACTORED = (LowRankLinear, PivotedLinear)
"""The layers a checkpoint may hold in place of a linear one."""
