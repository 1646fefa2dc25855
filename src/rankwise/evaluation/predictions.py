"""The original model's predictions, kept small, and the divergence of another model's predictions from them.

Full predictions are tokens x vocabulary numbers. Two forms are much smaller: the inputs of the head (exact; the head is
applied to them again), and the k most probable tokens with the mass of all others as one (a lower bound of the
divergence, by the data-processing inequality).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal, Self

import torch
from torch import Tensor

from rankwise.models import Head, Logits

Direction = Literal["compressed_original", "original_compressed"]
"""D(compressed || original), as in Bolaco's released code, or D(original || compressed), as in its Eq. 8."""

_LEAST_MASS = 1e-12


class Predictions(ABC):
    """Next-token distributions of one batch, and D between them and another model's."""

    bytes: int

    @abstractmethod
    def divergence(self, log_probabilities: Tensor, part: slice, direction: Direction) -> Tensor:
        """Kullback-Leibler divergence of each token in nats.

        Args:
            log_probabilities: the other model's, shape `[part, vocabulary]`.
            part: which tokens of the batch these are.
            direction: which of the two is averaged over.

        Returns:
            Shape `[part]`.
        """

    @abstractmethod
    def under(self, head: Head) -> Self:
        """The same, made again by the head of another model that has the original's."""


class HeadInputs(Predictions):
    """Exact: what the original's logits are made of.

    Args:
        logits: of the batch's tokens in one row.
    """

    def __init__(self, logits: Logits) -> None:
        self._logits = Logits(logits.head, logits.hidden.clone())
        self.bytes = self._logits.hidden.numel() * self._logits.hidden.element_size()

    def divergence(self, log_probabilities: Tensor, part: slice, direction: Direction) -> Tensor:
        original = self._logits.of(part).float().log_softmax(-1)
        if direction == "compressed_original":
            return (log_probabilities.exp() * (log_probabilities - original)).sum(-1)
        return (original.exp() * (original - log_probabilities)).sum(-1)

    def under(self, head: Head) -> Self:
        made = copy.copy(self)
        made._logits = Logits(head, self._logits.hidden)
        return made


class TopK(Predictions):
    """The k most probable tokens, and one class for the rest.

    Args:
        log_probabilities: the original's, in parts, shape `[part, vocabulary]` each.
        k: tokens kept.
    """

    def __init__(self, log_probabilities: Iterable[Tensor], k: int) -> None:
        kept = [logs.topk(min(k, logs.shape[-1]), dim=-1) for logs in log_probabilities]
        self._tokens = torch.cat([each.indices for each in kept])
        self._kept = torch.cat([each.values for each in kept])
        self._rest = _rest(self._kept)
        self.bytes = sum(t.numel() * t.element_size() for t in (self._tokens, self._kept, self._rest))

    def divergence(self, log_probabilities: Tensor, part: slice, direction: Direction) -> Tensor:
        original, original_rest = self._kept[part], self._rest[part]
        kept = log_probabilities.gather(-1, self._tokens[part])
        rest = _rest(kept)
        if direction == "compressed_original":
            return (kept.exp() * (kept - original)).sum(-1) + rest.exp() * (rest - original_rest)
        return (original.exp() * (original - kept)).sum(-1) + original_rest.exp() * (original_rest - rest)

    def under(self, head: Head) -> Self:
        return self


def _rest(kept: Tensor) -> Tensor:
    """Log of the mass outside the kept tokens."""
    return (1 - kept.exp().sum(-1)).clamp_min(_LEAST_MASS).log()
