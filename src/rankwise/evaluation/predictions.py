"""The original model's predictions, kept small, and the divergence of another model's predictions from them.

Full predictions are tokens x vocabulary numbers. Two forms are much smaller: the inputs of the head (exact; the head is
applied to them again), and the k most probable tokens with the mass of all others as one (a lower bound of the
divergence, by the data-processing inequality).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor, nn

Direction = Literal["compressed_original", "original_compressed"]
"""D(compressed || original), as in Bolaco's released code, or D(original || compressed), as in its Eq. 8."""

_LEAST_MASS = 1e-12


class Predictions(ABC):
    """Next-token distributions of one batch, and D between them and another model's."""

    bytes: int

    @abstractmethod
    def divergence(self, log_probabilities: Tensor, direction: Direction) -> Tensor:
        """Kullback-Leibler divergence of each token in nats.

        Args:
            log_probabilities: the other model's, shape `[tokens, vocabulary]`.
            direction: which of the two is averaged over.

        Returns:
            Shape `[tokens]`.
        """


class HeadInputs(Predictions):
    """Exact: the head's inputs.

    Args:
        inputs: shape `[tokens, d]`.
        head: the module that makes logits of them.
    """

    def __init__(self, inputs: Tensor, head: nn.Module) -> None:
        self._inputs = inputs
        self._head = head
        self.bytes = inputs.numel() * inputs.element_size()

    def divergence(self, log_probabilities: Tensor, direction: Direction) -> Tensor:
        original = self._head(self._inputs).float().log_softmax(-1)
        if direction == "compressed_original":
            return (log_probabilities.exp() * (log_probabilities - original)).sum(-1)
        return (original.exp() * (original - log_probabilities)).sum(-1)


class TopK(Predictions):
    """The k most probable tokens, and one class for the rest.

    Args:
        log_probabilities: the original's, shape `[tokens, vocabulary]`.
        k: tokens kept.
    """

    def __init__(self, log_probabilities: Tensor, k: int) -> None:
        kept = log_probabilities.topk(min(k, log_probabilities.shape[-1]), dim=-1)
        self._tokens = kept.indices
        self._kept = kept.values
        self._rest = _rest(kept.values)
        self.bytes = sum(t.numel() * t.element_size() for t in (self._tokens, self._kept, self._rest))

    def divergence(self, log_probabilities: Tensor, direction: Direction) -> Tensor:
        kept = log_probabilities.gather(-1, self._tokens)
        rest = _rest(kept)
        if direction == "compressed_original":
            return (kept.exp() * (kept - self._kept)).sum(-1) + rest.exp() * (rest - self._rest)
        return (self._kept.exp() * (self._kept - kept)).sum(-1) + self._rest.exp() * (self._rest - rest)


def _rest(kept: Tensor) -> Tensor:
    """Log of the mass outside the kept tokens."""
    return (1 - kept.exp().sum(-1)).clamp_min(_LEAST_MASS).log()
