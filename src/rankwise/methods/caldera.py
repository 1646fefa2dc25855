"""CALDERA (Saha et al., 2024, arXiv 2405.18886): W ~ Q + L R, all three at low precision."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rankwise.errors import RankwiseError
from rankwise.factors import Quantized
from rankwise.linalg import InputMetric
from rankwise.methods.quantizing import QuantizingMethod, drawn_rotation, rounded
from rankwise.quantizers import Codebook, Hessian, LowRank, Packed, codebook_named, low_rank, weighed_error
from rankwise.sizes import FULL_BITS, BitForm, QuantizedRank
from rankwise.statistics import SiteStatistics
from rankwise.statistics.input_moments import InputMoments


class Caldera(QuantizingMethod):
    """Minimises tr((W - Q - L R) H (W - Q - L R)^T), H = E[x x^T], in turns (Algorithm 1).

    Q takes what L R leaves, rounded by LDLQ; L R takes what Q leaves, by rank-constrained regression and then, when its
    factors are quantised, in turns of their own (Algorithm 2). The best triple of all iterations is kept.

    Attributes:
        rank: of L R. None lets a budget of bits choose.
        lr_bits: bits of L and R; 16 leaves them as 16-bit numbers.
        lr_codebook: of L and R; None for the lattice up to 4 bits and `uniform` above.
        outer: iterations over Q and L R; the paper takes 15 to 20.
        inner: turns of L and R in each; the paper takes 10 to 50.
        right_feedback: whether R is rounded with feedback of its errors along H; the paper rounds it to the nearest.
        downdate: whether Q is rounded along H less the directions that R spans, which L can still make up for.
    """

    name: Literal["caldera"] = "caldera"
    rank: Annotated[int, Field(ge=0)] | None = None
    lr_bits: Annotated[int, Field(ge=2, le=16)] = 4
    lr_codebook: Literal["e8p", "uniform", "nf"] | None = None
    outer: Annotated[int, Field(ge=1)] = 15
    inner: Annotated[int, Field(ge=1)] = 10
    right_feedback: bool = False
    downdate: bool = False

    @model_validator(mode="after")
    def _known_factor_bits(self) -> Caldera:
        if self.lr_bits != FULL_BITS:
            try:
                codebook_named(self._factor_codebook, self.lr_bits)
            except RankwiseError as problem:
                raise ValueError(f"{problem.problem} {problem.remedy}; 16 leaves L and R unquantised") from None
        if self.q_bits == 0 and self.rank == 0:
            raise ValueError("without Q (q_bits 0) there has to be a rank")
        return self

    @property
    def _factor_codebook(self) -> str:
        return self.lr_codebook or ("e8p" if self.lr_bits <= 4 else "uniform")

    @property
    def given_rank(self) -> int | None:
        return self.rank

    def form(self) -> BitForm:
        return BitForm(
            codebook=self.codebook,
            group=self.group,
            row_scales=self.row_scales,
            lr_bits=self.lr_bits,
            lr_codebook=self._factor_codebook,
            hadamard=self.hadamard,
        )

    def quantize(
        self, weight: Tensor, statistics: SiteStatistics, rank: QuantizedRank, source: torch.Generator
    ) -> Quantized:
        hessian = Hessian.of(statistics.of(InputMoments()).second_moment().to(weight), self.damping)
        rotation = drawn_rotation(self, weight, source)
        target = rotation.weight(weight)
        steps = _Steps(self, Hessian(rotation.hessian(hessian.matrix), hessian.damping), rank)
        whole = weighed_error(target, steps.hessian.matrix)
        pair: LowRank | None = None
        errors: list[float] = []
        best: tuple[Packed | None, LowRank | None] = None, None
        # Without a part there is nothing to take turns with.
        for _ in range(self.outer if rank and rank.q_bits else 1):
            q = steps.q_for(target if pair is None else target - pair.product(), pair)
            rest = target if q is None else target - q.dense()
            pair = steps.pair_for(rest) if rank else None
            error = weighed_error(rest if pair is None else rest - pair.product(), steps.hessian.matrix)
            errors.append(error / whole if whole > 0 else error)
            if errors.index(min(errors)) == len(errors) - 1:
                best = q, pair
        return Quantized(*best, rotation, tuple(errors), hessian.damping, hessian.fallback)


class _Steps:
    """The two steps of an outer iteration, for one rotated weight.

    Args:
        method: the settings.
        hessian: H, rotated and damped.
        rank: of L R, with the bits of Q.
    """

    def __init__(self, method: Caldera, hessian: Hessian, rank: QuantizedRank) -> None:
        self._method, self.hessian, self._rank = method, hessian, rank
        self._feedback = hessian.feedback() if method.feedback or method.right_feedback else None
        self._metric = InputMetric(hessian.matrix)
        self._factors: Codebook | None = None
        if method.lr_bits != FULL_BITS:
            self._factors = codebook_named(method.form().lr_codebook, method.lr_bits, by_row=True)

    def q_for(self, target: Tensor, pair: LowRank | None) -> Packed | None:
        """Q of a target, shape `[m, n]`; `pair` is the L R that was taken off it."""
        if not self._rank.q_bits:
            return None
        codebook = self._method.codes(self._rank.q_bits)
        hessian, feedback = self.hessian.matrix, self._feedback if self._method.feedback else None
        if self._method.downdate and self._method.feedback and pair is not None:
            reached = hessian @ pair.right.T
            less = hessian - reached @ torch.linalg.pinv(pair.right @ reached, hermitian=True) @ reached.T
            # R may span nearly everything: a trace of the whole H keeps the rest positive definite.
            floor = self._method.damping * less.diagonal().mean().clamp_min(1e-6 * hessian.diagonal().mean())
            hessian = (less + less.T) / 2 + floor * torch.eye(len(less)).to(less)
            feedback = Hessian(hessian, self._method.damping).feedback()
        return rounded(self._method, codebook, target, hessian, feedback)

    def pair_for(self, rest: Tensor) -> LowRank:
        """L R of what Q leaves, shape `[m, n]`."""
        feedback = self._feedback if self._method.right_feedback else None
        return low_rank(rest, self._metric, int(self._rank), self._factors, self._method.inner, feedback)
