"""Training of all factors at once, against the original model's predictions or on text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from rankwise.models import Site
from rankwise.repair.parameters import trainable
from rankwise.repair.training import Training


class FullFactors(Training):
    """How L, R and biases are trained.

    Attributes:
        norms: whether the norms of the blocks are trained too.
    """

    epochs: Annotated[float, Field(gt=0)] = 4
    lr: Annotated[float, Field(gt=0)] = 0.005
    norms: bool = False

    def attach(self, model: Any, sites: Sequence[Site], seed: int) -> dict[str, nn.Parameter]:
        return trainable(model, sites, self.norms)
