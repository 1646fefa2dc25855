"""The low-rank part: L R ~ E in the metric of the inputs, both factors at low precision (CALDERA, Algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.linalg import InputMetric, OutputMetric, decompose
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


def weighed_error(error: Tensor, hessian: Tensor, outputs: Tensor | None = None) -> float:
    """tr(F E H E^T) for E of shape `[m, n]`; F, shape `[m, m]`, is the identity when it is None."""
    weighed = error @ hessian
    return float((weighed * (error if outputs is None else outputs @ error)).sum())


def rank_constrained(
    residual: Tensor, metric: InputMetric, rank: int, outputs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best L R of this rank for tr(F (E - L R) H (E - L R)^T).

    Args:
        residual: E, shape `[m, n]`.
        metric: H.
        rank: r.
        outputs: F, shape `[m, m]`, positive definite; None for the identity, and L then has orthonormal columns.
    """
    weights = None if outputs is None else OutputMetric.of(outputs.unsqueeze(0), 0.0)
    found = decompose(residual, inputs=metric, metric=weights)
    return found.left[:, :rank], found.right[:rank]


def low_rank(
    residual: Tensor,
    metric: InputMetric,
    rank: int,
    codebook: Codebook | None,
    iterations: int,
    feedback: Tensor | None = None,
    outputs: Tensor | None = None,
) -> LowRank:
    """Fit L R to E. With a codebook, each factor is fitted in turn to the other and rounded; the best pair is kept.

    Args:
        residual: E, shape `[m, n]`.
        metric: H, of full rank.
        rank: r.
        codebook: what both factors are rounded to; None leaves them as they are.
        iterations: turns.
        feedback: U of H: R is then rounded with feedback; None rounds it to the nearest.
        outputs: F, shape `[m, m]`, positive definite: errors of outputs weigh by it; None weighs all the same.

    Raises:
        ValueError: when a fit is not finite.
    """
    left, right = rank_constrained(residual, metric, rank, outputs)
    if codebook is None:
        return LowRank(left, right)
    hessian = metric.matrix
    seen = residual if outputs is None else outputs @ residual
    weighed = residual @ hessian
    whole = float((weighed * seen).sum())
    best: tuple[float, LowRank] | None = None
    gram = right @ hessian @ right.T
    for _ in range(iterations):
        packed_left = codebook.quantize(_solve(gram, right @ weighed.T))
        left = packed_left.dense().T
        # F says nothing of the best L for an R; it does of the best R for an L.
        felt = left if outputs is None else outputs @ left
        wanted = _solve(left.T @ felt, left.T @ seen)
        if feedback is None:
            packed_right = codebook.quantize(wanted)
        else:
            packed_right = ldlq(wanted, feedback, codebook, codebook.scales(wanted, feedback=True))
        right = packed_right.dense()
        # tr(F (E - L R) H (E - L R)^T) without another product of full size.
        gram = right @ hessian @ right.T
        error = whole - 2 * float(((felt.T @ weighed) * right).sum()) + float(((left.T @ felt) * gram).sum())
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
