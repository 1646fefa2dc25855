"""A head of two factors: its rank and size, and how it becomes one matrix again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rankwise.layers.kinds import dense_layer
from rankwise.layers.low_rank import LowRankLinear

_ROWS = 2**11
"""Of the head, in float64 at a time."""


def head_rank(shape: Sequence[int], keep: float, multiple: int = 1) -> int:
    """The largest rank of two factors that have no more than a fraction of a matrix's numbers; 1 at least.

    Args:
        shape: `(v, d)`.
        keep: the fraction, below 1.
        multiple: what the rank is a multiple of, where it is not smaller.
    """
    rows, columns = shape
    rank = max(1, int(keep * rows * columns / (rows + columns)))
    return rank - rank % multiple if rank >= multiple else rank


def factored_bytes(shape: Sequence[int], rank: int, number_bytes: int) -> int:
    """Bytes of two factors of a rank in place of a matrix, of numbers of so many bytes."""
    return rank * sum(shape) * number_bytes


def multiply_head(model: Any) -> None:
    """Let a head of two factors be the matrix that they make, in place; any other stays as it is.

    Args:
        model: causal language model.
    """
    read = model.get_output_embeddings()
    if isinstance(read, LowRankLinear):
        path = next(name for name, each in model.named_modules() if each is read)
        left, right = read.left.weight, read.right.weight.double()
        # A vocabulary in float64 may have no room beside the model.
        parts = [(rows.double() @ right).to(left.dtype) for rows in left.split(_ROWS)]
        model.set_submodule(path, dense_layer(torch.cat(parts), read.dense_bias(), False, left.dtype, left.device))
