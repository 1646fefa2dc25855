"""`Basis` (full-rank factors in order of importance), `Factors` and `Quantized` (what is left of a weight)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.errors import NotFiniteError
from rankwise.quantizers import LowRank, Packed, Rotation


@dataclass(frozen=True)
class Factors:
    """W ~ L R, with the bias of the layer.

    Attributes:
        left: L, shape `[m, r]`.
        right: R, shape `[r, n]`.
        bias: shape `[m]`, or None.
    """

    left: Tensor
    right: Tensor
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def parameters(self) -> int:
        """Numbers in L and R: r (m + n). The bias is not counted."""
        return self.left.numel() + self.right.numel()

    def reconstruct(self) -> Tensor:
        """L R, shape `[m, n]`."""
        return self.left @ self.right

    def reduced(self, rank: int) -> tuple[Factors, float]:
        """The nearest product of a lower rank, its components ordered and balanced, in float64.

        Args:
            rank: wanted; at most the present one, which only orders.

        Returns:
            The factors, with the same bias, and the share of the squared norm that they lose.
        """
        q_left, t_left = torch.linalg.qr(self.left.double())
        q_right, t_right = torch.linalg.qr(self.right.double().T)
        u, s, v = torch.linalg.svd(t_left @ t_right.T, full_matrices=False)
        root = s[:rank].sqrt()
        lost = float(s[rank:].square().sum() / s.square().sum().clamp_min(torch.finfo(s.dtype).tiny))
        return Factors(q_left @ (u[:, :rank] * root), (root[:, None] * v[:rank]) @ q_right.T, self.bias), lost


@dataclass(frozen=True)
class Basis:
    """Full-rank factors of one site, most important component first. Truncating is slicing.

    Attributes:
        left: shape `[m, k]` with k = min(m, n).
        right: shape `[k, n]`; `left @ right` is W.
        energy: shape `[k]`, what dropping each component costs in the method's own metric.
        mean_output: E[W x], shape `[m]`; None when the method leaves the mean alone.
        mean_code: E[R x], shape `[k]`; None together with `mean_output`.
        damping: relative damping that the decomposition needed; 0 when none.
    """

    left: Tensor
    right: Tensor
    energy: Tensor
    mean_output: Tensor | None = None
    mean_code: Tensor | None = None
    damping: float = 0.0

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def truncate(self, rank: int, bias: Tensor | None = None) -> Factors:
        """The first `rank` components, with the bias that makes up for the mean of what was dropped.

        The bias is b + (W - L R) E[x] (Bolaco, section 3.1), which needs only E[W x] and E[R x].

        Args:
            rank: components kept, 1 to k.
            bias: the layer's own bias, shape `[m]`, or None.

        Raises:
            ValueError: when `rank` is out of range.
        """
        if not 1 <= rank <= self.rank:
            raise ValueError(f"rank must lie in 1..{self.rank}, not {rank}")
        left, right = self.left[:, :rank], self.right[:rank]
        if self.mean_output is not None and self.mean_code is not None:
            compensation = self.mean_output - left @ self.mean_code[:rank]
            bias = compensation if bias is None else bias.to(compensation) + compensation
        return Factors(left, right, bias)

    def check_finite(self, name: str) -> None:
        """Raise when a factor is not finite.

        Raises:
            NotFiniteError: naming the site.
        """
        parts = (self.left, self.right, self.energy, self.mean_output, self.mean_code)
        if not all(torch.isfinite(part).all() for part in parts if part is not None):
            raise NotFiniteError(
                "The decomposition gave NaN or an infinity.",
                where=name,
                remedy="look at this layer's activations; a float32 run (--set precision=float32) may help",
            )


@dataclass(frozen=True)
class Quantized:
    """W ~ U^T (Q + L R) V at low precision.

    Attributes:
        q: Q's codes, or None when there is no Q.
        low_rank: L and R, or None.
        rotation: U and V.
        errors: tr(E H E^T) / tr(W H W^T) after each outer iteration.
        damping: what was added to H, relative to its mean diagonal.
        fallback: whether H was zero, and the identity stood for it.
    """

    q: Packed | None
    low_rank: LowRank | None
    rotation: Rotation
    errors: tuple[float, ...]
    damping: float
    fallback: bool

    @property
    def kept(self) -> int:
        """Which iteration this is: the first of least error."""
        return self.errors.index(min(self.errors))

    def reconstruct(self) -> Tensor:
        """The matrix it stands for, shape `[m, n]`."""
        parts = [] if self.q is None else [self.q.dense()]
        if self.low_rank is not None:
            parts.append(self.low_rank.product())
        if not parts:
            raise ValueError("there is neither Q nor L R")
        return self.rotation.undo(torch.stack(parts).sum(0))
