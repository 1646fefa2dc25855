"""What the head of a model reads and says on a text: the two sides that a head of two factors is fitted by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import NotFiniteError
from rankwise.models import Head, Logits
from rankwise.progress import Reporter
from rankwise.statistics.moment_sums import MomentSums, MomentTotals


@dataclass(frozen=True)
class HeadMoments:
    """Means over the tokens of a text.

    Attributes:
        inputs: E[x x^T] of what the head reads, shape `[d, d]`, float64.
        rows: E[p (1 - p)], p the probabilities that the model predicts, shape `[v]`, float64: the diagonal of the
            loss's curvature in the logits.
    """

    inputs: Tensor
    rows: Tensor

    def to(self, device: torch.device) -> HeadMoments:
        """The same on a device."""
        return HeadMoments(self.inputs.to(device), self.rows.to(device))


@torch.no_grad()
def head_moments(model: Any, ids: Tensor, batch_size: int, reporter: Reporter | None = None) -> HeadMoments:
    """Run a model over a text. Logits are made of few tokens at a time.

    Args:
        model: causal language model whose head is linear, on its device.
        ids: token sequences, shape `[sequences, tokens]`.
        batch_size: sequences a batch.
        reporter: told about progress.

    Returns:
        Both, on the CPU.

    Raises:
        NotFiniteError: when what the head reads or gives is not finite.
    """
    layer = model.get_output_embeddings()
    v, d = layer.weight.shape
    device = layer.weight.device
    head, sums, batches = Head(model, ids), MomentSums(d, device), ids.split(batch_size)
    rows = torch.zeros(v, dtype=torch.float64)
    total: MomentTotals | None = None
    with _reading(layer) as read:
        for batch in (reporter or Reporter(show=False)).track(batches, "inputs of the head", total=len(batches)):
            found = head(batch.to(device))
            if head.apart:
                # It was run on one token of each sequence.
                read.clear()
            logits = Logits(head, found.hidden.flatten(0, 1))
            for part in logits.parts():
                p = logits.of(part).float().softmax(-1)
                rows[: p.shape[-1]] += (p - p.square()).sum(0).double().cpu()
                while read:
                    sums.add(read.pop())
            taken = sums.take().to(torch.device("cpu"))
            total = taken if total is None else total.merge(taken)
    assert total is not None
    if not (total.is_finite() and torch.isfinite(rows).all()):
        raise NotFiniteError(
            "What the head reads or gives on the calibration text is NaN or infinite.",
            where="head",
            remedy="load the model with precision float32; if that fails too it is damaged",
        )
    return HeadMoments(total.second_moment(), rows / total.count)


@contextmanager
def _reading(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What a layer reads, as long as nobody takes it."""
    read: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    try:
        yield read
    finally:
        handle.remove()
