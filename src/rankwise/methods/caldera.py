"""CALDERA (Saha et al., 2024, arXiv 2405.18886): W ~ Q + L R, all three at low precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rankwise.errors import RankwiseError
from rankwise.factors import Factors, Fit
from rankwise.linalg import InputMetric
from rankwise.methods.base import Looking
from rankwise.methods.quantizing import KnownCodebook, QuantizingMethod, drawn_rotation, on, rounded
from rankwise.quantizers import (
    Codebook,
    Hessian,
    LowRank,
    OutputFeedback,
    Packed,
    Rotation,
    codebook_named,
    low_rank,
    weighed_error,
)
from rankwise.sizes import FULL_BITS, Budget, Cut, Form
from rankwise.statistics import SiteStatistics
from rankwise.statistics.input_moments import InputMoments


class Caldera(QuantizingMethod):
    """Minimises tr((W - Q - L R) H (W - Q - L R)^T), H = E[x x^T], in turns (Algorithm 1).

    Q takes what L R leaves, rounded by LDLQ; L R takes what Q leaves, by rank-constrained regression and then, when its
    factors are quantised, in turns of their own (Algorithm 2). The best triple of all iterations is kept.

    Attributes:
        rank: of L R. None lets a budget of bits choose.
        lr_bits: bits of L and R; 16 leaves them as 16-bit numbers.
        lr_codebook: of L and R, as `codebook`; None for the lattice up to 4 bits and `uniform` above.
        outer: iterations over Q and L R; the paper takes 15 to 20.
        inner: turns of L and R in each; the paper takes 10 to 50.
        right_feedback: whether R is rounded with feedback of its errors along H; the paper rounds it to the nearest.
        output_feedback: as published, no: what is minimised does not weigh outputs.
        downdate: whether Q is rounded along H less the directions that R spans, which L can still make up for.
    """

    unseen: ClassVar[frozenset[str]] = frozenset({"outer"})

    name: Literal["caldera"] = "caldera"
    rank: Annotated[int, Field(ge=0)] | None = None
    lr_bits: Annotated[int, Field(ge=2, le=16)] = 4
    lr_codebook: KnownCodebook | None = None
    outer: Annotated[int, Field(ge=1)] = 15
    inner: Annotated[int, Field(ge=1)] = 10
    right_feedback: bool = False
    output_feedback: bool = False
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
        return Form(lr_codebook=self.lr_codebook).factor_codebook(self.lr_bits)

    @property
    def _turns(self) -> int:
        return self.outer

    @property
    def given_rank(self) -> int | None:
        return self.rank

    @property
    def beside_bits(self) -> int:
        return self.lr_bits

    def form(self, budget: Budget, number_bits: int) -> Form:
        return super().form(budget, number_bits).model_copy(update={"lr_codebook": self.lr_codebook})

    def output_weights(self, statistics: SiteStatistics, rotation: Rotation, like: Tensor) -> Tensor | None:
        """What errors of the rotated outputs weigh when L and R are fitted, shape `[m, m]`; None weighs all the same.

        Args:
            statistics: what was collected at this site.
            rotation: of both sides.
            like: a tensor of the dtype and device to use.
        """
        return None

    def alone(
        self, weight: Tensor, hessian: Hessian, rotation: Rotation, q_bits: int, outputs: OutputFeedback | None
    ) -> Packed:
        turned = Hessian(rotation.hessian(hessian.matrix), hessian.damping)
        q = _Steps(self, turned, Cut(0, q_bits), None, lambda: outputs).q_for(rotation.weight(weight), None)
        assert q is not None
        return q

    def fit(
        self, weight: Tensor, statistics: SiteStatistics, cut: Cut, source: torch.Generator, looking: Looking
    ) -> tuple[Factors, Fit]:
        hessian = Hessian.of(statistics.of(InputMoments()).second_moment().to(weight), self.damping)
        rotation = drawn_rotation(self, weight, source)
        target = rotation.weight(weight)
        outputs = self.output_weights(statistics, rotation, weight) if cut.rank else None
        fed = partial(self.along_outputs, statistics, rotation)
        steps = _Steps(self, Hessian(rotation.hessian(hessian.matrix), hessian.damping), cut, outputs, fed)
        whole = weighed_error(target, steps.hessian.matrix, outputs)
        pair: LowRank | None = None
        errors: list[float] = []
        best: tuple[Packed | None, LowRank | None] = None, None
        # Without a part there is nothing to take turns with.
        seen = looking(cut.q_bits) if cut.q_bits else None
        for turn in range(self._turns if cut.rank and cut.q_bits else 1):
            if turn == 0 and seen is not None and seen.q is not None:
                # The first turn rounds W itself, which an outlook has done already.
                q: Packed | None = on(seen.q, weight)
            else:
                q = steps.q_for(target if pair is None else target - pair.product(), pair)
            rest = target if q is None else target - q.dense()
            pair = steps.pair_for(rest) if cut.rank else None
            error = weighed_error(rest if pair is None else rest - pair.product(), steps.hessian.matrix, outputs)
            errors.append(error / whole if whole > 0 else error)
            if errors.index(min(errors)) == len(errors) - 1:
                best = q, pair
        best_q, pair = best
        numbers = pair if pair is not None and pair.packed is None else None
        factors = Factors(
            None if numbers is None else numbers.left,
            None if numbers is None else numbers.right,
            statistics.bias,
            q=best_q,
            packed=None if pair is None else pair.packed,
            rotation=rotation,
        )
        fallback = hessian.fallback or not bool(weight.any())
        return factors, Fit(hessian.damping, errors=tuple(errors), fallback=fallback)


class _Steps:
    """The two steps of an outer iteration, for one rotated weight.

    Args:
        method: the settings.
        hessian: H, rotated and damped.
        cut: what is decided.
        outputs: what errors of outputs weigh when L and R are fitted; None for all the same.
        fed: gives feedback along the outputs, or None; asked where Q is rounded here.
    """

    def __init__(
        self,
        method: Caldera,
        hessian: Hessian,
        cut: Cut,
        outputs: Tensor | None,
        fed: Callable[[], OutputFeedback | None],
    ) -> None:
        self._method, self.hessian, self._cut, self._outputs = method, hessian, cut, outputs
        self._fed = cache(fed)
        self._metric = InputMetric(hessian.matrix)
        self._codebook = method.codes(cut.q_bits) if cut.q_bits else None
        self._factors: Codebook | None = None
        if cut.lr_bits is not None and cut.lr_bits != FULL_BITS:
            name = Form(lr_codebook=method.lr_codebook).factor_codebook(cut.lr_bits)
            self._factors = codebook_named(name, cut.lr_bits, by_row=True)
        self._feedback = self._along(self._codebook) if method.feedback else None

    def _along(self, codebook: Codebook | None) -> Tensor | None:
        """U of H in blocks as wide as a codebook's tiles; None without a codebook."""
        return None if codebook is None else self.hessian.feedback(codebook.tile[1])

    def q_for(self, target: Tensor, pair: LowRank | None) -> Packed | None:
        """Q of a target, shape `[m, n]`; `pair` is the L R that was taken off it."""
        codebook = self._codebook
        if codebook is None:
            return None
        hessian, feedback = self.hessian.matrix, self._feedback
        if self._method.downdate and self._method.feedback and pair is not None:
            reached = hessian @ pair.right.T
            less = hessian - reached @ torch.linalg.pinv(pair.right @ reached, hermitian=True) @ reached.T
            # R may span nearly everything: a trace of the whole H keeps the rest positive definite.
            floor = self._method.damping * less.diagonal().mean().clamp_min(1e-6 * hessian.diagonal().mean())
            hessian = (less + less.T) / 2 + floor * torch.eye(len(less)).to(less)
            feedback = Hessian(hessian, self._method.damping).feedback(codebook.tile[1])
        return rounded(self._method, codebook, target, hessian, feedback, outputs=self._fed())

    def pair_for(self, rest: Tensor) -> LowRank:
        """L R of what Q leaves, shape `[m, n]`."""
        feedback = self._along(self._factors) if self._method.right_feedback else None
        rank, turns = self._cut.rank or 0, self._method.inner
        return low_rank(rest, self._metric, rank, self._factors, turns, feedback, self._outputs)
