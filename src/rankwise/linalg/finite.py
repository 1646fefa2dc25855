"""Whether all of a large tensor is finite, without a second one of its size."""

from __future__ import annotations

import torch
from torch import Tensor

_PART = 2**22


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite. Looks at a few million at a time."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    flat = tensor.detach()
    if tensor.numel() <= _PART or not tensor.is_contiguous():
        return bool(torch.isfinite(flat).all())
    return all(bool(torch.isfinite(part).all()) for part in flat.view(-1).split(_PART))
