"""Modules that take the place of a linear layer."""

from rankwise.layers.low_rank import LowRankLinear, replace_linears
from rankwise.layers.substitute import substitute

__all__ = ["LowRankLinear", "replace_linears", "substitute"]
