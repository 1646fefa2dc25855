"""What the methods that quantise have in common: codebook, rotation, Hessian, and the sizes that follow."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rankwise.errors import RankwiseError
from rankwise.factors import Basis, Quantized
from rankwise.linalg import InputMetric, OutputMetric, decompose
from rankwise.methods.base import Method
from rankwise.quantizers import CODEBOOKS, Codebook, Hessian, Packed, Rotation, codebook_named, improve, ldlq
from rankwise.sizes import BitBudget, BitForm, Budget, QuantizedRank
from rankwise.statistics import SiteStatistics, Statistic
from rankwise.statistics.curvature import Curvature
from rankwise.statistics.input_moments import InputMoments

_PLAN_DAMPING = 1.0
"""Of the curvature, as in `two_sided`."""
_CURVATURE = Curvature(labels="sampled")
"""What a plan looks at."""


class QuantizingMethod(Method):
    """A method that gives codes of few bits.

    Attributes:
        codebook: of Q: `e8p` (2 to 4 bits), `uniform` or `nf` (2 to 8).
        q_bits: bits a weight of Q. None lets a budget of bits choose.
        group: columns of Q that share a scale, a multiple of eight; 0 for none.
        row_scales: whether each row of Q has a scale of its own, 16 / n bits a weight; without, the lattice has one for
            the whole matrix.
        hadamard: whether W is rotated at random on both sides.
        feedback: whether rounding feeds its errors back (LDLQ). Without, every weight goes to the nearest.
        damping: added to H relative to its mean diagonal; raised tenfold if H is not positive definite.
        passes: over all blocks after LDLQ, each re-rounding a block with all others given.
    """

    one_unit: ClassVar[bool] = True
    quantizes: ClassVar[bool] = True

    codebook: Literal["e8p", "uniform", "nf"] = "e8p"
    q_bits: Annotated[int, Field(ge=0, le=8)] | None = None
    group: Annotated[int, Field(ge=0, multiple_of=8)] = 0
    row_scales: bool = True
    hadamard: bool = True
    feedback: bool = True
    damping: Annotated[float, Field(gt=0)] = 0.01
    passes: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _known_bits(self) -> QuantizingMethod:
        if self.q_bits:
            try:
                codebook_named(self.codebook, self.q_bits)
            except RankwiseError as problem:
                raise ValueError(f"{problem.problem} {problem.remedy}") from None
        return self

    @abstractmethod
    def form(self) -> BitForm:
        """How a site is stored."""

    @property
    @abstractmethod
    def given_rank(self) -> int | None:
        """The rank that the settings fix; None when a budget chooses it."""

    def check_size(self, asked: Budget, allocation: str) -> None:
        if asked.storage != "two_factor":
            raise ValueError(f"{self.name} stores codes: budget.storage means nothing to it")
        settings = {"q_bits": self.q_bits, "rank": self.given_rank}
        if asked.bits is None:
            missing = [option for option, value in settings.items() if value is None]
            if missing and allocation != "plan":
                raise ValueError(f"{self.name} needs {' and '.join(missing)}, or budget.bits to choose by")
            if allocation not in ("uniform", "plan"):
                raise ValueError(f"the allocation {allocation} spends bits: give budget.bits")
        elif None not in settings.values():
            given = " and ".join(option for option in settings if option in type(self).model_fields)
            raise ValueError(f"bits are given beside {given}: leave something to be chosen")

    def requests(self) -> tuple[Statistic, ...]:
        return (InputMoments(),)

    def plan_requests(self) -> tuple[Statistic, ...]:
        return (_CURVATURE,)

    def budget(self, asked: Budget) -> BitBudget:
        known = CODEBOOKS[self.codebook].known_bits
        choices = tuple(known) if self.q_bits is None else (self.q_bits,)
        return BitBudget(
            keep=None,
            bits=asked.bits,
            rank_multiple=asked.rank_multiple,
            form=self.form(),
            choices=choices,
            rank=self.given_rank,
        )

    def codes(self, q_bits: int) -> Codebook:
        """Q's codebook."""
        return codebook_named(self.codebook, q_bits, self.group, self.row_scales)

    def decompose(self, weight: Tensor, statistics: SiteStatistics) -> Basis:
        raise NotImplementedError("a quantising method gives codes: see quantize and residual_basis")

    @abstractmethod
    def quantize(
        self, weight: Tensor, statistics: SiteStatistics, rank: QuantizedRank, source: torch.Generator
    ) -> Quantized:
        """Quantise one weight.

        Args:
            weight: W, shape `[m, n]`, float64.
            statistics: what was collected at this site.
            rank: of L R, with the bits of Q.
            source: for the signs of the rotation.
        """

    def residual_basis(
        self, weight: Tensor, statistics: SiteStatistics, q_bits: int, source: torch.Generator
    ) -> tuple[Tensor, Basis]:
        """Q alone, and the basis of what it leaves: how much loss each rank beside it would save.

        Energies estimate twice the loss a token as those of `two_sided` do, so they compare between sites.

        Args:
            weight: W, shape `[m, n]`, float64.
            statistics: what was collected at this site, curvature included.
            q_bits: bits a weight of Q.
            source: for the signs of the rotation.

        Returns:
            Q as a matrix `[m, n]`, and the basis of W - Q.
        """
        alone = self.quantize(weight, statistics, QuantizedRank(0, q_bits), source)
        coarse = alone.reconstruct() if alone.q is not None else torch.zeros_like(weight)
        hessian = Hessian.of(statistics.of(InputMoments()).second_moment().to(weight), self.damping)
        curvature, inputs = statistics.of(_CURVATURE).to(weight), InputMetric(hessian.matrix)
        if not curvature.any():
            # Nothing that happens here changes the loss.
            found = decompose(weight - coarse, inputs=inputs)
            return coarse, Basis(found.left, found.right, torch.zeros_like(found.energy))
        metric = OutputMetric.of(curvature, _PLAN_DAMPING)
        found = decompose(weight - coarse, inputs=inputs, metric=metric)
        # Both dampings only steer the directions: what is counted is the loss by the measured metrics.
        seen = ((found.right @ statistics.of(InputMoments()).second_moment().to(weight)) * found.right).sum(1)
        damped = ((found.right @ hessian.matrix) * found.right).sum(1)
        shares = metric.undamped_share(found.left) * (seen / damped.clamp_min(torch.finfo(seen.dtype).tiny))
        return coarse, Basis(found.left, found.right, found.energy * shares.clamp(0, 1), damping=metric.damping)


def rounded(
    method: QuantizingMethod, codebook: Codebook, target: Tensor, hessian: Tensor, feedback: Tensor | None
) -> Packed:
    """Q for a target, by LDLQ or to the nearest.

    Args:
        method: its settings.
        codebook: Q's.
        target: shape `[m, n]`.
        hessian: H, shape `[n, n]`.
        feedback: U of H; None to round to the nearest.
    """
    if feedback is None:
        return codebook.quantize(target)
    packed = ldlq(target, feedback, codebook, codebook.scales(target, feedback=True))
    return improve(target, hessian, packed, codebook, method.passes)


def drawn_rotation(method: QuantizingMethod, weight: Tensor, source: torch.Generator) -> Rotation:
    """The rotation a method asks for."""
    if not method.hadamard:
        return Rotation(None, None)
    return Rotation.drawn(weight.shape[0], weight.shape[1], source)
