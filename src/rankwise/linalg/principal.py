"""Principal directions of vectors: an orthogonal basis in which the first k coordinates hold the most of them."""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.linalg.finite import all_finite

DAMPING = 0.01
"""Of the mean of the diagonal, added to all of it; moves no direction, and orders those that nothing was seen in."""


def of_equal_norm(vectors: Tensor, eps: float) -> Tensor:
    """Vectors, each divided by the root of its mean square: x / sqrt(mean_i x_i^2 + eps).

    Args:
        vectors: shape `[..., d]`.
        eps: keeps a vector of zeros finite.
    """
    return vectors * torch.rsqrt(vectors.square().mean(-1, keepdim=True) + eps)


def without_mean(vectors: Tensor) -> Tensor:
    """x M with M = I - 1 1^T / d: each vector less the mean of its numbers.

    Args:
        vectors: shape `[..., d]`.
    """
    return vectors - vectors.mean(-1, keepdim=True)


def second_moment(vectors: Tensor) -> Tensor:
    """sum_t x_t x_t^T, not centred, shape `[d, d]`, float64.

    Args:
        vectors: shape `[..., d]`.
    """
    rows = vectors.reshape(-1, vectors.shape[-1]).double()
    return rows.T @ rows


def principal_directions(moment: Tensor) -> Tensor:
    """Eigenvectors of a second moment as columns, the largest eigenvalue first.

    Args:
        moment: symmetric, shape `[d, d]`, float64.

    Returns:
        Q, orthogonal, shape `[d, d]`, float64.

    Raises:
        ValueError: when the moment is not finite.
    """
    if not all_finite(moment):
        raise ValueError("the second moment is not finite")
    damped = (moment + moment.T) / 2
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    return torch.linalg.eigh(damped).eigenvectors.flip(-1)
