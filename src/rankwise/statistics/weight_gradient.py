"""Gradient of the loss at a weight, summed over sequences, and the squares of each sequence's (LLM-Pruner)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.models import Site
from rankwise.statistics.base import Labels
from rankwise.statistics.mean import MeanStatistic
from rankwise.statistics.streams import Stream, gradient_streams


@dataclass(frozen=True)
class WeightGradient(MeanStatistic):
    """Gradients of the mean next-token loss of a sequence at W; a method sees shape `[1, m, n]` or `[2, m, n]`.

    The first is their mean over sequences, which is the gradient of the mean loss; the second the mean of their
    squares, entry by entry (arXiv 2305.11627, section 3.2). Sums move to float64 after every batch, and with the block
    they belong to.

    Attributes:
        squares: whether the second is kept.
        labels: where the loss gradient is taken.
    """

    name = "weight_gradient"

    squares: bool = False
    labels: Labels = "text"

    def streams(self, sites: Sequence[Site]) -> list[Stream]:
        return gradient_streams(sites)

    def measure(self, x: Tensor, inputs: Tensor) -> tuple[int, Tensor]:
        inputs, x = (t.float() if t.ndim == 3 else t.float()[None] for t in (inputs, x))
        # The loss is summed over the tokens that are predicted: one less than there are.
        of_each = x.mT @ inputs / max(1, x.shape[1] - 1)
        parts = [of_each.sum(0)]
        if self.squares:
            parts.append(of_each.square().sum(0))
        return len(inputs), torch.stack(parts)
