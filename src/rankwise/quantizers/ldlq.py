"""LDLQ: rounding with feedback of the errors already made (QuIP, arXiv 2307.13304; blocks as in QuIP#, 2402.04396)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.linalg import plus_diagonal
from rankwise.quantizers.codebooks import Codebook, Packed, padded
from rankwise.quantizers.codes import wide_scale

_PANEL = 128
_LARGEST_DAMPING = 1.0


@dataclass(frozen=True)
class Hessian:
    """H = E[x x^T] with what was added to its diagonal, and its factor (U + I) D (U + I)^T.

    Attributes:
        matrix: H, damped, shape `[n, n]`.
        damping: what was added, relative to the mean diagonal.
        fallback: whether H was zero, and the identity stands for it.
    """

    matrix: Tensor
    damping: float
    fallback: bool = False

    @property
    def added(self) -> float:
        """What was added to every entry of the diagonal."""
        return self.damping * float(self.matrix.diagonal().mean()) / (1 + self.damping)

    @classmethod
    def of(cls, matrix: Tensor, damping: float) -> Hessian:
        """Damp H until it has a Cholesky factor.

        Args:
            matrix: symmetric positive semi-definite, shape `[n, n]`.
            damping: relative to the mean diagonal; raised tenfold until the factor exists.

        Raises:
            ValueError: when H is not finite, or not positive semi-definite.
        """
        mean = matrix.diagonal().mean()
        if not torch.isfinite(matrix).all():
            raise ValueError("the second moment of the inputs is not finite")
        if not matrix.any():
            return cls(torch.eye(len(matrix)).to(matrix), 0.0, fallback=True)
        most = max(damping, _LARGEST_DAMPING)
        while damping <= most:
            found = plus_diagonal(matrix, damping * mean)
            if not torch.linalg.cholesky_ex(found)[1]:
                return cls(found, damping)
            damping = 10 * max(damping, 1e-10)
        raise ValueError("the second moment of the inputs is not positive semi-definite")

    def split(self, width: int) -> tuple[Tensor, Tensor]:
        """U, strictly block upper triangular with blocks of this width, for H padded to whole blocks: `[n', n']`; and
        C_k with D_k = C_k C_k^T, shape `[blocks, width, width]`.
        """
        n = len(self.matrix)
        wide = padded(self.matrix, width)
        wide = torch.cat([wide, wide.new_zeros(wide.shape[1] - n, wide.shape[1])])
        wide.diagonal()[n:] = self.matrix.diagonal().mean()
        # Reversed, a lower factor becomes an upper one.
        upper = torch.linalg.cholesky(wide.flip(0, 1)).flip(0, 1)
        count = len(upper) // width
        blocks = upper.unflatten(1, (count, width)).transpose(0, 1)
        roots = blocks.unflatten(1, (count, width)).diagonal(dim1=0, dim2=1).permute(2, 0, 1)
        unit = torch.linalg.solve_triangular(roots, blocks, upper=True, left=False).transpose(0, 1).flatten(1)
        unit.diagonal().sub_(1)
        return unit, roots

    def feedback(self, width: int) -> Tensor:
        """U, as `split` gives it."""
        return self.split(width)[0]


def inverse_of_unit(upper: Tensor) -> Tensor:
    """(I + U)^-1 for U strictly upper triangular, shape `[n, n]`."""
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(plus_diagonal(upper, 1.0), identity, upper=True)


@dataclass(frozen=True)
class Target:
    """A weight to be rounded by LDLQ.

    Attributes:
        weight: W, shape `[m, n]`.
        feedback: U of the padded H, from `Hessian.feedback`.
        scale: as `Packed.scale`.
    """

    weight: Tensor
    feedback: Tensor
    scale: Tensor


def ldlq(weight: Tensor, feedback: Tensor, codebook: Codebook, scale: Tensor) -> Packed:
    """Round a weight block by block, each target moved by the errors of the blocks before it.

    With H = (U + I) D (U + I)^T the error tr(E H E^T) is the sum over blocks of tr(N_k D_k N_k^T), where N_k is only
    what the k-th rounding itself misses.

    Args:
        weight: W, shape `[m, n]`.
        feedback: U of the padded H, from `Hessian.feedback`.
        codebook: what is rounded to.
        scale: as `Packed.scale`.

    Returns:
        Codes for W.
    """
    return ldlq_together([Target(weight, feedback, scale)], codebook)[0]


def ldlq_together(targets: Sequence[Target], codebook: Codebook) -> list[Packed]:
    """`ldlq` of several weights with as many inputs, the k-th blocks of all rounded at once.

    The steps are many and short, so that most of their time goes before any number is rounded. What comes out is what
    comes out of each alone, but for ties within rounding.

    Args:
        targets: weights `[m, n]` of one n, on one device.
        codebook: what all are rounded to.
    """
    width = codebook.tile[1]
    each = [_Rounded(target, codebook) for target in targets]
    rows = [len(one.target) for one in each]
    columns = each[0].target.shape[1]
    codes = []
    for first in range(0, columns, _PANEL):
        last = min(first + _PANEL, columns)
        for one in each:
            one.enter(first, last)
        for start in range(first, last, width):
            codes.append(codebook.round(torch.cat([one.wanted(start, start + width) for one in each])))
            values = codebook.decode(codes[-1]).split(rows)
            for one, found in zip(each, values, strict=True):
                one.missed(start, start + width, found)
    parts = torch.cat(codes, 1).split(rows)
    return [
        Packed(part.clone(), target.scale, target.weight.shape[1], codebook.stored_name, codebook.group)
        for part, target in zip(parts, targets, strict=True)
    ]


class _Rounded:
    """A weight on its way through LDLQ: what was missed up to here."""

    def __init__(self, given: Target, codebook: Codebook) -> None:
        self.target, self._feedback = padded(given.weight, codebook.tile[1]), given.feedback
        columns = self.target.shape[1]
        self._unit = wide_scale(given.scale, codebook.group, columns).expand(len(self.target), columns)
        self._errors = torch.zeros_like(self.target)
        self._panel, self._first = self.target, 0

    def enter(self, first: int, last: int) -> None:
        """Begin with columns `first` to `last`, moved by what was missed before them."""
        target, errors, feedback = self.target, self._errors, self._feedback
        self._panel = target[:, first:last] + errors[:, :first] @ feedback[:first, first:last]
        self._first = first

    def wanted(self, start: int, stop: int) -> Tensor:
        """What a block is to be rounded at, scaled."""
        first, errors, feedback = self._first, self._errors, self._feedback
        wanted = self._panel[:, start - first : stop - first]
        wanted = wanted + errors[:, first:start] @ feedback[first:start, start:stop]
        return wanted / self._unit[:, start:stop]

    def missed(self, start: int, stop: int, values: Tensor) -> None:
        """Take down what a block's codes stand for, before scaling."""
        self._errors[:, start:stop] = self.target[:, start:stop] - values * self._unit[:, start:stop]


def improve(weight: Tensor, hessian: Tensor, packed: Packed, codebook: Codebook, passes: int) -> Packed:
    """Round every block once more, all others given; a row's codeword changes only where its error falls.

    Args:
        weight: W, shape `[m, n]`.
        hessian: H, shape `[n, n]`.
        packed: what `ldlq` gave for W.
        codebook: its codebook.
        passes: over all blocks.
    """
    if not passes:
        return packed
    width = codebook.tile[1]
    target = padded(weight, width)
    short = target.shape[1] - len(hessian)
    # What is padded weighs nothing; it only has to have an inverse.
    filling = torch.cat([hessian.new_zeros(len(hessian)), hessian.diagonal().mean().expand(short)])
    hessian = torch.nn.functional.pad(hessian, (0, short, 0, short))
    unit = wide_scale(packed.scale, codebook.group, target.shape[1]).expand(target.shape)
    errors = target - codebook.decode(packed.codes) * unit
    codes = packed.codes.clone()
    for start in range(0, target.shape[1] * passes, width):
        start %= target.shape[1]
        block = slice(start, start + width)
        own = hessian[block, block]
        old = errors[:, block]
        pull = errors @ hessian[:, block] - old @ own
        wanted = target[:, block] + torch.linalg.solve(own + filling[block].diag(), pull.T).T
        found = codebook.round(wanted / unit[:, block])
        new = target[:, block] - codebook.decode(found) * unit[:, block]
        better = _change(new, own, pull) < _change(old, own, pull)
        errors[:, block] = torch.where(better.unsqueeze(1), new, old)
        codes[better, start // width] = found[better].squeeze(1)
    return Packed(codes, packed.scale, packed.columns, packed.codebook, packed.group)


def _change(error: Tensor, own: Tensor, pull: Tensor) -> Tensor:
    """What a block's error, shape `[m, 8]`, adds to tr(E H E^T), by row."""
    return ((error @ own + 2 * pull) * error).sum(1)
