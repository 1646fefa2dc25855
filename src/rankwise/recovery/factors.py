"""Training of all factors at once, against the original model's predictions or on text."""

from __future__ import annotations

from rankwise.recovery.training import Training


class FullFactors(Training):
    """How L, R and biases are trained.

    Attributes:
        norms: whether the norms of the blocks are trained too.
    """

    norms: bool = False
