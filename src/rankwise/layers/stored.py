"""Numbers as a checkpoint stores them: in memory of their own, in its type, and inside its range."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rankwise.errors import NotFiniteError


def parameter(values: Tensor, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """A frozen parameter with memory of its own: a view would keep the whole basis in memory, and in the file.

    Raises:
        NotFiniteError: when a value is not finite, or beyond the range of the type.
    """
    copied = values.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    return nn.Parameter(finite(copied, values), requires_grad=False)


def finite(stored: Tensor, values: Tensor) -> Tensor:
    """What is stored of values, if all of it is finite."""
    if torch.isfinite(stored).all():
        return stored
    most, kind = float(values.abs().max()), str(stored.dtype).removeprefix("torch.")
    if not math.isfinite(most):
        raise NotFiniteError(
            "A number that is to be stored is NaN or infinite.",
            remedy="look at this layer's activations; a float32 run (--set precision=float32) may help",
        )
    raise NotFiniteError(
        f"A number of {most:.3g} does not fit {kind}, which the checkpoint is stored in.",
        remedy="store the original in bfloat16 or float32 and compress that",
    )


def store(into: Tensor, values: Tensor) -> None:
    """Store values in a tensor of another type, where they fit."""
    finite(into.copy_(values), values)


def sixteen(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit type in which numbers beside codes go into a checkpoint of this type."""
    return dtype if dtype.itemsize == 2 else torch.bfloat16
