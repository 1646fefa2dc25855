"""Squared loss gradient of the weight, summed over each row (FWSVD, arXiv 2207.00112)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rankwise.models import Site
from rankwise.statistics.base import Labels
from rankwise.statistics.mean import MeanStatistic
from rankwise.statistics.streams import Stream, gradient_streams


def squared_rows(inputs: Tensor, gradients: Tensor) -> Tensor:
    """Row sums of the squared weight gradient of each sequence, without forming that gradient.

    The gradient of a sequence is G^T X. Its row i squares to sum_{t,t'} g_ti g_t'i <x_t, x_t'>.

    Args:
        inputs: X, shape `[sequences, tokens, n]`.
        gradients: G, shape `[sequences, tokens, m]`.

    Returns:
        Shape `[m]`, summed over sequences.
    """
    gram = inputs @ inputs.mT
    return ((gram @ gradients) * gradients).sum((0, 1))


@dataclass(frozen=True)
class RowFisher(MeanStatistic):
    """Mean over sequences of the squared weight gradient, summed over each row; a method sees it, shape `[m]`.

    Routed tokens of a batch count as one sequence. Sums move to float64 after every batch.

    Attributes:
        labels: where the loss gradient is taken.
    """

    name = "row_fisher"

    labels: Labels = "text"

    def streams(self, sites: Sequence[Site]) -> list[Stream]:
        return gradient_streams(sites)

    def measure(self, x: Tensor, inputs: Tensor) -> tuple[int, Tensor]:
        inputs, x = (t.float() if t.ndim == 3 else t.float()[None] for t in (inputs, x))
        return len(inputs), squared_rows(inputs, x)
