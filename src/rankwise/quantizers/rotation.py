"""Randomised Hadamard rotation of vectors of any dimension: it spreads what is concentrated in few coordinates.

This file imports torch alone: its source is also written, word for word, into the modelling file of every checkpoint.
"""

from functools import cache

import torch
from torch import Tensor

_LARGEST_HADAMARD = 256


def hadamard_matrix(size: int) -> Tensor:
    """Sylvester's Hadamard matrix over its root, shape `[size, size]`, float64: orthogonal and symmetric.

    Args:
        size: a power of two.
    """
    rows = torch.arange(size, device="cpu")
    parity = rows[:, None] & rows[None, :]
    for shift in (16, 8, 4, 2, 1):
        parity = parity ^ (parity >> shift)
    return (1 - 2 * (parity & 1)).double() / size**0.5


def hartley_matrix(size: int) -> Tensor:
    """cos + sin of 2 pi j k / size, over its root, shape `[size, size]`, float64: orthogonal, symmetric and flat.

    A fixed matrix in closed form needs no place in a file, and no entry is above sqrt(2 / size).
    """
    steps = torch.arange(size, device="cpu")
    angle = (steps[:, None] * steps[None, :] % size).double() * (2 * torch.pi / size)
    return (angle.cos() + angle.sin()) / size**0.5


@cache
def rotation_parts(size: int) -> list:
    """Orthogonal symmetric matrices whose Kronecker product is the rotation of this dimension, float64.

    For `size` = 2^k q with q odd: Hadamard matrices of at most 256 for the 2^k, and a Hartley matrix for q, joined to
    the last of those where that is no larger.
    """
    odd = size
    while odd % 2 == 0:
        odd //= 2
    power, parts = size // odd, []
    while power > 1:
        parts.append(hadamard_matrix(min(power, _LARGEST_HADAMARD)))
        power //= min(power, _LARGEST_HADAMARD)
    if odd > 1:
        last = hartley_matrix(odd)
        if parts and len(parts[-1]) * odd <= _LARGEST_HADAMARD:
            last = torch.kron(parts.pop(), last)
        parts.append(last)
    return parts


def rotate(x: Tensor) -> Tensor:
    """Rotate vectors of shape `[..., d]`. Done twice it gives x back."""
    shape, before = x.shape, 1
    for part in rotation_parts(shape[-1]):
        size = part.shape[0]
        part = part.to(x)
        after = shape[-1] // (before * size)
        if after == 1:
            x = x.reshape(-1, size) @ part
        else:
            # One large product instead of many small ones: what is multiplied goes last, and back.
            turned = x.reshape(-1, size, after).transpose(1, 2)
            x = (turned.reshape(-1, size) @ part).reshape(-1, after, size).transpose(1, 2)
        before *= size
    return x.reshape(shape)
