"""Rounding to 8 bits, to the nearest of 255 levels, with a scale a group of columns."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 127
_ROWS = 2**14


def eight_bits(weight: Tensor, groups: int = 1, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Codes in -127..127 and scales, the largest entry of a group over 127.

    Rounding changes an entry by half a scale at most. Smaller scales, which clip, hardly have a smaller error at 8
    bits (docs/storage.md).

    Args:
        weight: finite, shape `[v, d]`.
        groups: of columns in a row, which divide d.
        dtype: of the scales; that of the weight by default.

    Returns:
        Codes, int8, shape `[v, d]`, and scales, shape `[v, groups]`.

    Example:
        >>> codes, scale = eight_bits(torch.tensor([[0.5, -1.0], [0.0, 0.0]]))
        >>> codes.tolist(), [round(float(s), 5) for s in scale]
        ([[64, -127], [0, 0]], [0.00787, 0.0])
    """
    dtype = dtype or weight.dtype
    codes, scales = [], []
    for rows in weight.split(_ROWS):
        values = rows.float().unflatten(-1, (groups, -1))
        scale = (values.abs().amax(-1) / _LARGEST).to(dtype)
        wide = scale.float().unsqueeze(-1)
        # A scale that is zero is of entries that are, or that its type has no number for.
        level = torch.where(wide > 0, values / wide, 0.0).round().clamp(-_LARGEST, _LARGEST)
        codes.append(level.to(torch.int8).flatten(-2))
        scales.append(scale)
    return torch.cat(codes), torch.cat(scales)
