"""Training of all factors at once, against the original model's predictions or on text."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rankwise.repair.training import Training


class FullFactors(Training):
    """How L, R and biases are trained.

    Attributes:
        norms: whether the norms of the blocks are trained too.
    """

    epochs: Annotated[float, Field(gt=0)] = 4
    lr: Annotated[float, Field(gt=0)] = 0.005
    norms: bool = False
