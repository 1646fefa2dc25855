"""Square roots of the positive semi-definite matrices that weigh a decomposition."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_LARGEST_DAMPING = 1.0


def psd_factor(matrix: Tensor) -> Tensor:
    """S with S S^T = matrix, by eigendecomposition, so that singular matrices pose no problem.

    Args:
        matrix: symmetric positive semi-definite, shape `[n, n]`. Negative eigenvalues from rounding count as zero.

    Returns:
        S, shape `[n, n]`.
    """
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt()


def plus_diagonal(matrix: Tensor, added: Tensor | float) -> Tensor:
    """A copy with so much added to the diagonal, shape `[..., n, n]`; no identity of that size is made."""
    found = matrix.clone()
    found.diagonal(dim1=-2, dim2=-1).add_(added)
    return found


@dataclass(frozen=True)
class InputMetric:
    """M, a positive semi-definite metric on a layer's inputs. Sites that share an input share its root.

    Attributes:
        matrix: M, shape `[n, n]`, or its diagonal, shape `[n]`.
    """

    matrix: Tensor

    @cached_property
    def root(self) -> Tensor:
        """S with S S^T = M, in the shape of `matrix`."""
        return self.matrix.clamp_min(0).sqrt() if self.matrix.ndim == 1 else psd_factor(self.matrix)

    def times_root(self, weight: Tensor) -> Tensor:
        """W S, shape `[m, n]`."""
        return weight * self.root if self.matrix.ndim == 1 else weight @ self.root

    def output_moment(self, weight: Tensor) -> Tensor:
        """W M W^T, shape `[m, m]`."""
        return ((weight * self.matrix) if self.matrix.ndim == 1 else (weight @ self.matrix)) @ weight.T


@dataclass(frozen=True)
class OutputMetric:
    """P with P P^T = F (damped), for a block-diagonal F over a layer's outputs.

    Attributes:
        blocks: Cholesky factors, shape `[k, b, b]` with k b = m. One block is a full metric, b = 1 a diagonal one.
        damping: fraction of F's mean diagonal that was added.
        added: what was added to the diagonal.
    """

    blocks: Tensor
    damping: float
    added: float

    @classmethod
    def of(cls, blocks: Tensor, damping: float) -> OutputMetric:
        """Factor F.

        Args:
            blocks: the diagonal blocks of F, shape `[k, b, b]`.
            damping: relative damping to start from; multiplied by ten until the factorisation succeeds.

        Raises:
            ValueError: when F is zero or not finite.
        """
        mean = blocks.diagonal(dim1=1, dim2=2).mean()
        if not torch.isfinite(mean) or mean <= 0:
            raise ValueError("the output metric is zero or not finite")
        most = max(damping, _LARGEST_DAMPING)
        while damping <= most:
            factor, failed = torch.linalg.cholesky_ex(plus_diagonal(blocks, damping * mean))
            if not failed.any():
                return cls(factor, damping, float(damping * mean))
            damping = 10 * max(damping, 1e-12)
        raise ValueError("the output metric is not positive semi-definite")

    @classmethod
    def where_felt(cls, blocks: Tensor, damping: float) -> OutputMetric | None:
        """The same; None where F is zero, so that errors of all outputs weigh the same."""
        return cls.of(blocks, damping) if blocks.any() else None

    def _split(self, x: Tensor) -> Tensor:
        count, size, _ = self.blocks.shape
        return x.reshape(count, size, x.shape[-1])

    def weigh(self, x: Tensor) -> Tensor:
        """P^T x for x of shape `[m, c]`."""
        return (self.blocks.mT @ self._split(x)).reshape(x.shape)

    def spread(self, x: Tensor) -> Tensor:
        """P x for x of shape `[m, c]`."""
        return (self.blocks @ self._split(x)).reshape(x.shape)

    def undo(self, x: Tensor) -> Tensor:
        """P^{-T} x for x of shape `[m, c]`."""
        solved = torch.linalg.solve_triangular(self.blocks.mT, self._split(x), upper=True)
        return solved.reshape(x.shape)

    def undamped_share(self, left: Tensor) -> Tensor:
        """l^T F l for columns l with l^T (F + added I) l = 1: how much of each is F's own, shape `[c]`.

        Args:
            left: shape `[m, c]`, as `undo` gives orthonormal columns.
        """
        return (1 - self.added * left.square().sum(0)).clamp_min(0)
