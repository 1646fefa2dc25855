"""`Factors` (what is left of a weight), `Fit` (how it came out), and `Basis` (full-rank factors, ordered)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import NotFiniteError
from rankwise.quantizers import Packed, Rotation


@dataclass(frozen=True)
class Factors:
    """W ~ U^T (Q + L R) V, with the bias of the layer; any part may be absent.

    Attributes:
        left: L's first t columns as numbers, shape `[m, t]`; None for none.
        right: R's first t rows, shape `[t, n]`.
        bias: shape `[m]`, or None.
        q: codes of Q, or None.
        packed: codes of the other columns of L, transposed, and of the other rows of R; None for none.
        rotation: U and V.
    """

    left: Tensor | None
    right: Tensor | None
    bias: Tensor | None = None
    q: Packed | None = None
    packed: tuple[Packed, Packed] | None = None
    rotation: Rotation = field(default_factory=Rotation)

    @property
    def full(self) -> int:
        """Ranks that are numbers."""
        return 0 if self.left is None else self.left.shape[1]

    @property
    def rank(self) -> int:
        """Of L R."""
        return self.full + (0 if self.packed is None else self.packed[0].codes.shape[0])

    @property
    def parameters(self) -> int:
        """Entries of Q, L and R; the bias is not counted."""
        parts = [part.numel() for part in (self.left, self.right) if part is not None]
        packed = [part for part in (self.q, *(self.packed or ())) if part is not None]
        return sum(parts) + sum(part.codes.shape[0] * part.columns for part in packed)

    def pair(self) -> tuple[Tensor, Tensor]:
        """L, shape `[m, r]`, and R, shape `[r, n]`, whatever they are stored as.

        Raises:
            ValueError: when there is no L R.
        """
        lefts, rights = [], []
        if self.left is not None and self.right is not None:
            lefts.append(self.left)
            rights.append(self.right)
        if self.packed is not None:
            lefts.append(self.packed[0].dense().T)
            rights.append(self.packed[1].dense())
        if not lefts:
            raise ValueError("there is no L R")
        wide = torch.promote_types(lefts[0].dtype, lefts[-1].dtype)
        return torch.cat([part.to(wide) for part in lefts], 1), torch.cat([part.to(wide) for part in rights])

    def on(self, device: torch.device) -> Factors:
        """The same with L and R on a device, the bias where it is; where there are codes, all as it is."""
        if self.left is None or self.right is None or self.q is not None or self.packed is not None:
            return self
        return replace(self, left=self.left.to(device), right=self.right.to(device))

    def reconstruct(self) -> Tensor:
        """The matrix it stands for, shape `[m, n]`.

        Raises:
            ValueError: when there is neither Q nor L R.
        """
        parts = [] if self.q is None else [self.q.dense()]
        if self.rank:
            left, right = self.pair()
            parts.append(left @ right)
        if not parts:
            raise ValueError("there is neither Q nor L R")
        return self.rotation.undo(torch.stack(parts).sum(0))

    def reduced(self, rank: int) -> tuple[Factors, float]:
        """The nearest product of a lower rank, its components ordered and balanced, in float64.

        Args:
            rank: wanted; at most the present one, which only orders.

        Returns:
            The factors, with the same bias, and the share of the squared norm that they lose.
        """
        left, right = self.pair()
        q_left, t_left = torch.linalg.qr(left.double())
        q_right, t_right = torch.linalg.qr(right.double().T)
        u, s, v = torch.linalg.svd(t_left @ t_right.T, full_matrices=False)
        root = s[:rank].sqrt()
        lost = float(s[rank:].square().sum() / s.square().sum().clamp_min(torch.finfo(s.dtype).tiny))
        return Factors(q_left @ (u[:, :rank] * root), (root[:, None] * v[:rank]) @ q_right.T, self.bias), lost


@dataclass(frozen=True)
class Fit:
    """How the factors of one weight came out.

    Attributes:
        damping: what a metric needed, relative to its mean diagonal.
        dropped: share of the method's energy that was cut off; None where nothing is ordered.
        errors: tr(E H E^T) / tr(W H W^T) after each outer iteration; empty where there are none.
        fallback: whether the weight, its inputs or their gradient were zero, and what is known stood for it: of two
            metrics the other one, else the identity.
    """

    damping: float = 0.0
    dropped: float | None = None
    errors: tuple[float, ...] = ()
    fallback: bool = False

    @property
    def kept(self) -> int:
        """Which iteration the factors are of: the first of least error."""
        return self.errors.index(min(self.errors))

    def check_finite(self, name: str) -> None:
        """Raise when an error of any iteration is not finite.

        Raises:
            NotFiniteError: naming the site.
        """
        if not all(math.isfinite(error) for error in self.errors):
            raise NotFiniteError(
                "The error of the fitted weight is NaN or infinite.",
                where=name,
                remedy="look at this layer's activations; a float32 run (--set precision=float32) may help",
            )

    def facts(self) -> dict[str, Any]:
        """What a report says of it."""
        found: dict[str, Any] = {"damping": self.damping}
        if self.dropped is not None:
            found["dropped_energy"] = self.dropped
        if self.errors:
            found |= {"errors": list(self.errors), "iteration_kept": self.kept + 1, "error": self.errors[self.kept]}
            found["fallback"] = self.fallback
        elif self.fallback:
            found["fallback"] = True
        return found


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

    def dropped(self, rank: int) -> float:
        """Share of the energy that a rank leaves out."""
        whole = float(self.energy.double().sum())
        return float(self.energy[rank:].double().sum()) / whole if whole > 0 else 0.0

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
