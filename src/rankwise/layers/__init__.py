"""Modules that take the place of a linear layer."""

from rankwise.layers.low_rank import LowRankLinear, replace_linears
from rankwise.layers.sliced import SlicedLinear, sliced
from rankwise.layers.substitute import substitute

__all__ = ["LowRankLinear", "SlicedLinear", "replace_linears", "sliced", "substitute"]
