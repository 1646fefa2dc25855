"""Incoherence: a weight and its Hessian rotated at random, so that no entry stands out (QuIP, QuIP#)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.quantizers.codes import BYTE, pack_bits
from rankwise.quantizers.rotation import rotate


@dataclass(frozen=True)
class Rotation:
    """U and V of W~ = U W V^T: random signs, then the Hadamard rotation of `rotation.rotate`; or nothing at all.

    Attributes:
        minus_in: where V's signs are minus, bool of shape `[n]`, or the signs themselves where they are numbers that
            were trained; None for no rotation.
        minus_out: where U's are, shape `[m]`.
    """

    minus_in: Tensor | None = None
    minus_out: Tensor | None = None

    @classmethod
    def drawn(cls, m: int, n: int, source: torch.Generator) -> Rotation:
        """Signs from a generator on the CPU."""
        minus_in = torch.rand(n, generator=source) < 0.5
        return cls(minus_in, torch.rand(m, generator=source) < 0.5)

    def weight(self, weight: Tensor) -> Tensor:
        """U W V^T for W of shape `[m, n]`."""
        if self.minus_in is None or self.minus_out is None:
            return weight
        return rotate(self.inputs(weight).T * _signs(self.minus_out, weight)).T

    def inputs(self, weight: Tensor) -> Tensor:
        """W V^T for W of shape `[m, n]`."""
        return weight if self.minus_in is None else rotate(weight * _signs(self.minus_in, weight))

    def hessian(self, hessian: Tensor) -> Tensor:
        """V H V^T for H of shape `[n, n]`."""
        return _turned(hessian, self.minus_in)

    def curvature(self, curvature: Tensor) -> Tensor:
        """U F U^T for F of shape `[m, m]`."""
        return _turned(curvature, self.minus_out)

    def undo(self, weight: Tensor) -> Tensor:
        """U^T W~ V, shape `[m, n]`."""
        if self.minus_in is None or self.minus_out is None:
            return weight
        turned = rotate(weight) * _signs(self.minus_in, weight)
        return (rotate(turned.T) * _signs(self.minus_out, weight)).T


def _turned(matrix: Tensor, minus: Tensor | None) -> Tensor:
    """A symmetric matrix rotated on both sides."""
    if minus is None:
        return matrix
    signs = _signs(minus, matrix)
    turned = rotate(rotate(matrix * signs).T * signs)
    return (turned + turned.T) / 2


def _signs(minus: Tensor, like: Tensor) -> Tensor:
    return minus.to(like) if minus.is_floating_point() else 1 - 2 * minus.to(like)


def packed_signs(minus: Tensor) -> Tensor:
    """One bit a sign, uint8 of shape `[ceil(d / 8), 1]`."""
    wide = torch.nn.functional.pad(minus.long(), (0, -len(minus) % BYTE))
    return pack_bits(wide.unflatten(0, (-1, BYTE)), 1)
