"""What taking inputs out of a linear layer costs, in what order to do it, and how the rest makes up for it.

Of y = W x some inputs P go and others K stay. The best that is left is W' = W_K + W_P Sigma_PK Sigma_KK^{-1}, and what
it misses is tr(F W_P S W_P^T) with S = Sigma_PP - Sigma_PK Sigma_KK^{-1} Sigma_KP: the step of Optimal Brain Surgeon,
for a layer. With the inputs ordered from the one that goes last to the one that goes first, and Sigma = T T^T with T
lower triangular, S is T_PP T_PP^T, so that one factorisation gives the loss of every number of inputs:

    loss(k) = sum over columns j >= k of (W T)_j^T F (W T)_j
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.linalg.metrics import plus_diagonal


def damped(covariance: Tensor, damping: float) -> Tensor:
    """A covariance `[n, n]` with so much of its mean diagonal added; the identity where it is zero."""
    mean = covariance.diagonal().mean()
    ridge = damping * mean if float(mean) > 0 else torch.ones_like(mean)
    return plus_diagonal(covariance, ridge)


def removal_order(weight: Tensor, covariance: Tensor, size: int, steps: int = 64) -> Tensor:
    """Units of inputs in the order in which they should stay: the one that is missed most comes first.

    From the whole, those units go whose loss tr(w_G (C_GG)^{-1} w_G^T) is least, C = Sigma^{-1} and w as the inputs
    that are left make up for those that went; then both are brought up to date. With `steps` at least the number of
    units they go one at a time.

    Args:
        weight: P^T W for a metric F = P P^T on outputs, shape `[m, n]`, float64.
        covariance: Sigma, shape `[n, n]`, positive definite.
        size: inputs of a unit, which lie together.
        steps: how often losses are brought up to date.

    Returns:
        Units, shape `[n / size]`.

    Example:
        >>> removal_order(torch.tensor([[1.0, 3.0, 2.0]]).double(), torch.eye(3).double(), 1).tolist()
        [1, 2, 0]
    """
    units = weight.shape[1] // size
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    work = weight.clone()
    left = torch.arange(units, device=weight.device)
    gone: list[Tensor] = []
    each = -(-units // max(1, steps))
    while len(left) > 1:
        count = min(each, len(left) - 1)
        blocks = inverse.reshape(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)[left]
        columns = work.reshape(-1, units, size)[:, left].permute(1, 2, 0)
        losses = (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))
        chosen = losses.argsort(stable=True)[:count]
        gone.append(left[chosen])
        inputs = (left[chosen][:, None] * size + torch.arange(size, device=left.device)).flatten()
        solved = torch.linalg.solve(inverse[inputs][:, inputs], inverse[inputs])
        work = work - work[:, inputs] @ solved
        inverse = inverse - inverse[:, inputs] @ solved
        work[:, inputs] = 0
        # What is gone must not come back by rounding: its own block is kept solvable.
        inverse[inputs] = 0
        inverse[:, inputs] = 0
        inverse[inputs, inputs] = 1
        left = left[torch.ones(len(left), dtype=torch.bool, device=left.device).index_fill(0, chosen, False)]
    return torch.cat([left, *[part.flip(0) for part in reversed(gone)]])


def removal_losses(weight: Tensor, covariance: Tensor, order: Tensor, size: int) -> Tensor:
    """What is lost with the first k units of an order and a linear compensation, for k = 0 .. all.

    Args:
        weight: P^T W, shape `[m, n]`, float64.
        covariance: Sigma, shape `[n, n]`, positive definite.
        order: units, the one that stays longest first, shape `[n / size]`.
        size: inputs of a unit.

    Returns:
        Shape `[n / size + 1]`; the first is the loss without any, the last is zero.
    """
    inputs = (order[:, None] * size + torch.arange(size, device=order.device)).flatten()
    root = torch.linalg.cholesky(covariance[inputs][:, inputs])
    lost = (weight[:, inputs] @ root).square().sum(0).reshape(-1, size).sum(1)
    return torch.cat([lost.flip(0).cumsum(0).flip(0), lost.new_zeros(1)])


def compensated(weight: Tensor, covariance: Tensor, stays: Tensor) -> Tensor:
    """W' = W_K + W_P Sigma_PK Sigma_KK^{-1}: the inputs that stay make up for those that go.

    Args:
        weight: W, shape `[m, n]`, float64.
        covariance: Sigma, shape `[n, n]`, positive definite.
        stays: K, inputs, shape `[k]`.

    Returns:
        W', shape `[m, k]`.

    Example:
        >>> together = torch.tensor([[1.0, 1.0], [1.0, 1.0]]).double() + 1e-9 * torch.eye(2).double()
        >>> compensated(torch.tensor([[1.0, 2.0]]).double(), together, torch.tensor([0])).round(decimals=4).tolist()
        [[3.0]]
    """
    goes = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device).index_fill(0, stays, False)
    kept = covariance[stays][:, stays]
    along = torch.cholesky_solve(covariance[stays][:, goes], torch.linalg.cholesky(kept))
    return weight[:, stays] + weight[:, goes] @ along.T
