"""The low-rank part: L R ~ E in the metric of the inputs, both factors at low precision (CALDERA, Algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.linalg import InputMetric, decompose
from rankwise.quantizers.codebooks import Codebook, Packed
from rankwise.quantizers.ldlq import ldlq


@dataclass(frozen=True)
class LowRank:
    """L R, each part a matrix or its codes.

    Attributes:
        left: L, shape `[m, r]`; what its codes say, or not yet rounded to 16 bits.
        right: R, shape `[r, n]`, likewise.
        packed: codes of L^T and of R; None when they are kept at 16 bits.
    """

    left: Tensor
    right: Tensor
    packed: tuple[Packed, Packed] | None = None

    def product(self) -> Tensor:
        """L R, shape `[m, n]`."""
        return self.left @ self.right


def weighed_error(error: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T) for E of shape `[m, n]`."""
    return float(((error @ hessian) * error).sum())


def rank_constrained(residual: Tensor, metric: InputMetric, rank: int) -> tuple[Tensor, Tensor]:
    """The best L R of this rank for tr((E - L R) H (E - L R)^T), L with orthonormal columns.

    Args:
        residual: E, shape `[m, n]`.
        metric: H.
        rank: r.
    """
    found = decompose(residual, inputs=metric)
    return found.left[:, :rank], found.right[:rank]


def low_rank(
    residual: Tensor,
    metric: InputMetric,
    rank: int,
    codebook: Codebook | None,
    iterations: int,
    feedback: Tensor | None = None,
) -> LowRank:
    """Fit L R to E. With a codebook, each factor is fitted in turn to the other and rounded; the best pair is kept.

    Args:
        residual: E, shape `[m, n]`.
        metric: H, of full rank.
        rank: r.
        codebook: what both factors are rounded to; None leaves them as they are.
        iterations: turns.
        feedback: U of H: R is then rounded with feedback; None rounds it to the nearest.

    Raises:
        ValueError: when a fit is not finite.
    """
    left, right = rank_constrained(residual, metric, rank)
    if codebook is None:
        return LowRank(left, right)
    hessian = metric.matrix
    weighed = residual @ hessian
    whole = float((weighed * residual).sum())
    best: tuple[float, LowRank] | None = None
    gram = right @ hessian @ right.T
    for _ in range(iterations):
        packed_left = codebook.quantize(_solve(gram, right @ weighed.T))
        left = packed_left.dense().T
        wanted = _solve(left.T @ left, left.T @ residual)
        if feedback is None:
            packed_right = codebook.quantize(wanted)
        else:
            packed_right = ldlq(wanted, feedback, codebook, codebook.scales(wanted, feedback=True))
        right = packed_right.dense()
        # tr((E - L R) H (E - L R)^T) without another product of full size.
        gram = right @ hessian @ right.T
        error = whole - 2 * float(((left.T @ weighed) * right).sum()) + float(((left.T @ left) * gram).sum())
        if best is None or error < best[0]:
            best = error, LowRank(left, right, (packed_left, packed_right))
    assert best is not None
    return best[1]


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """Least squares through a Gram matrix that may be singular, shape `[r, columns]`."""
    solved = torch.linalg.pinv(gram, hermitian=True) @ right
    if not torch.isfinite(solved).all():
        raise ValueError("the fit of a low-rank factor is not finite")
    return solved
