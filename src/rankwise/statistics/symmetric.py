"""Symmetric matrices in files: the panels that hold the lower half, and the whole made of them again, to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

PANEL = 64
"""Rows of a panel: it reaches from the first column to its own last one."""

_LOWER, _SIZE = ".lower", ".size"


def lower_numbers(n: int) -> int:
    """Numbers that the panels of a symmetric matrix `[n, n]` hold."""
    return sum((end - start) * end for start, end in panels(n))


def panels(n: int, rows: int = PANEL) -> Iterator[tuple[int, int]]:
    """First row of every panel of a matrix `[n, n]` and the one behind its last, so many rows each."""
    return ((start, min(start + rows, n)) for start in range(0, n, rows))


def _symmetric(tensor: Tensor) -> bool:
    return tensor.dim() >= 2 and tensor.shape[-1] == tensor.shape[-2] > PANEL and torch.equal(tensor, tensor.mT)


def halved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with each symmetric tensor `[..., n, n]`, n above a panel, in place of which its panels stand.

    Args:
        tensors: by name.

    Returns:
        By name, and for what is symmetric by name with `.lower`, shape `[..., numbers]`, and `.size`, which is n.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not _symmetric(tensor):
            found[name] = tensor
            continue
        n = tensor.shape[-1]
        lower = [tensor[..., start:end, :end].flatten(-2) for start, end in panels(n)]
        found |= {name + _LOWER: torch.cat(lower, -1), name + _SIZE: torch.tensor([n])}
    return found


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `halved` was made of; files with whole matrices are what they were."""
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith((_LOWER, _SIZE))}
    for key, packed in tensors.items():
        if not key.endswith(_LOWER):
            continue
        name = key.removesuffix(_LOWER)
        n, at = int(tensors[name + _SIZE]), 0
        matrix = packed.new_empty(*packed.shape[:-1], n, n)
        for start, end in panels(n):
            panel = packed[..., at : at + (end - start) * end].unflatten(-1, (end - start, end))
            matrix[..., start:end, :end] = panel
            matrix[..., :end, start:end] = panel.mT
            at += (end - start) * end
        found[name] = matrix
    return found
