"""The one decomposition behind all low-rank parts: principal outputs of a weight under two metrics.

With P P^T a metric on outputs and M one on inputs, the minimiser of tr(P^T (W - L R) M (W - L R)^T P) over rank r is
L = P^{-T} U_r, R = U_r^T P^T W, with U the eigenvectors of P^T W M W^T P. A method is a choice of M and P.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.linalg.metrics import InputMetric, OutputMetric

_NEGLIGIBLE = 1e-12
_MOST_DOUBLINGS = 60


@dataclass(frozen=True)
class Decomposition:
    """Factors of full rank k = min(m, n).

    Attributes:
        left: L, shape `[m, k]`.
        right: R, shape `[k, n]`.
        energy: shape `[k]`, descending.
        directions: U, orthonormal columns, shape `[m, k]`: R = U^T P^T W.
        metric: P; None for the identity.
    """

    left: Tensor
    right: Tensor
    energy: Tensor
    directions: Tensor
    metric: OutputMetric | None = None

    @property
    def encoder(self) -> Tensor:
        """E with R = E W, shape `[k, m]`."""
        return (self.directions if self.metric is None else self.metric.spread(self.directions)).T

    def encode(self, outputs: Tensor) -> Tensor:
        """E y for a vector y of outputs, shape `[m]`, without the whole of E: shape `[k]`."""
        weighed = outputs if self.metric is None else self.metric.weigh(outputs[:, None])[:, 0]
        return self.directions.T @ weighed


def balancing(left: Tensor, right: Tensor) -> Tensor:
    """What to multiply the columns of L by, and to divide the rows of R by, so that both get about one norm.

    Powers of two: L R stays what it is to the last bit, and so does what rounding leaves of either. Unbalanced, all
    scale is on one side, which a 16-bit type may have no room for.

    Args:
        left: L, shape `[m, r]`.
        right: R, shape `[r, n]`.

    Returns:
        Shape `[r]`, in the dtype of `left`; 1 where a column or row is zero.
    """
    columns = torch.linalg.vector_norm(left, dim=0, dtype=torch.float64)
    rows = torch.linalg.vector_norm(right, dim=1, dtype=torch.float64)
    doublings = ((rows / columns).log2() / 2).round().clamp(-_MOST_DOUBLINGS, _MOST_DOUBLINGS)
    usable = (columns > 0) & (rows > 0) & torch.isfinite(doublings)
    return torch.where(usable, doublings, torch.zeros_like(doublings)).exp2().to(left.dtype)


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """L and R of the same product, columns and rows of about one norm; see `balancing`."""
    scale = balancing(left, right)
    return left * scale, right / scale[:, None].to(right.dtype)


def _descending(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _tall_directions(weight: Tensor, inputs: InputMetric | None) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of (W S)(W S)^T for m > n, from the smaller n x n side.

    Directions that M never excites have no image under W S. They are completed from W itself, so that all k columns
    together still span the range of W and full rank stays exact. What is as tall as W is let go as soon as it can be.
    """
    root = weight if inputs is None else inputs.times_root(weight)
    energy, vectors = _descending(root.T @ root)
    strong = int((energy > _NEGLIGIBLE * energy[0]).sum())
    columns = root @ vectors[:, :strong]
    del root
    columns /= energy[:strong].sqrt()
    weak = weight.shape[1] - strong
    if weak:
        residual = weight - columns @ (columns.T @ weight)
        residual = residual - columns @ (columns.T @ residual)
        _, rest = _descending(residual.T @ residual)
        energy = torch.cat([energy[:strong], torch.zeros_like(energy[strong:])])
        columns = torch.cat([columns, residual @ rest[:, :weak]], dim=1)
    reflected, scales = torch.geqrf(columns)
    del columns
    signs = torch.where(reflected.diagonal() < 0, -1.0, 1.0).to(reflected)
    return energy, torch.linalg.householder_product(reflected, scales).mul_(signs)


def decompose(
    weight: Tensor,
    *,
    inputs: InputMetric | None = None,
    outputs: Tensor | None = None,
    metric: OutputMetric | None = None,
) -> Decomposition:
    """Order a weight's output directions by what they carry.

    The eigenproblem is always of the smaller side of W. Inputs that are zero weigh nothing: the identity stands for
    their metric, and all energies are zero.

    Args:
        weight: W, shape `[m, n]`, float64.
        inputs: the metric M on inputs; None for the identity.
        outputs: W M W^T measured directly, shape `[m, m]`; takes the place of `inputs`.
        metric: P; None for the identity.

    Returns:
        Factors whose leading r columns and rows are the best rank-r pair under (M, P). Energies are the eigenvalues.
    """
    m, n = weight.shape
    blind = (outputs is not None and not outputs.any()) or (inputs is not None and not inputs.matrix.any())
    if blind:
        inputs = outputs = None
    weighed = weight if metric is None else metric.weigh(weight)
    if outputs is not None:
        # P^T C P with C symmetric: weigh the columns, then the rows.
        moment = outputs if metric is None else metric.weigh(metric.weigh(outputs).T)
        energy, directions = _descending(moment)
    elif m <= n:
        energy, directions = _descending(weighed @ weighed.T if inputs is None else inputs.output_moment(weighed))
    else:
        energy, directions = _tall_directions(weighed, inputs)
    k = min(m, n)
    energy, directions = energy[:k], directions[:, :k]
    if blind:
        energy = torch.zeros_like(energy)
    left = directions if metric is None else metric.undo(directions)
    return Decomposition(left, directions.T @ weighed, energy, directions, metric)
