"""Sizes: the only place where a kept fraction or a number of bits becomes a rank, or back."""

from rankwise.sizes.bits import FULL_BITS, BitBudget, BitForm, QuantizedRank
from rankwise.sizes.parameters import Budget, Rank, Storage, kept_by, numbers, pivots
from rankwise.sizes.plan import RankPlan, same_shapes

__all__ = [
    "FULL_BITS",
    "BitBudget",
    "BitForm",
    "Budget",
    "QuantizedRank",
    "Rank",
    "RankPlan",
    "Storage",
    "kept_by",
    "numbers",
    "pivots",
    "same_shapes",
]
