"""Quantisation alone: LDLQ on a rotated weight (QuIP#, Tseng et al., 2024, arXiv 2402.04396, without fine-tuning)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rankwise.factors import Factors, Fit
from rankwise.methods.base import AtSite, Looking
from rankwise.methods.quantizing import CURVATURE, QuantizingMethod, drawn_rotation, on, rounded, weighed_by_blocks
from rankwise.quantizers import (
    Codebook,
    Hessian,
    OutputFeedback,
    Packed,
    Rotation,
    Rounding,
    Target,
    gaussian_answer,
    improve,
    ldlq_together,
    weighed_error,
)
from rankwise.sizes import Cut
from rankwise.statistics import SiteStatistics
from rankwise.statistics.input_moments import InputMoments


class Quantize(QuantizingMethod):
    """W ~ Q: every weight to a codeword, errors fed back along the Hessian."""

    name: Literal["quantize"] = "quantize"
    q_bits: Annotated[int, Field(ge=1, le=8)] | None = None

    @property
    def given_rank(self) -> int:
        return 0

    def alone(
        self, weight: Tensor, hessian: Hessian, rotation: Rotation, q_bits: int, outputs: OutputFeedback | None
    ) -> Packed:
        target, metric = rotation.weight(weight), rotation.hessian(hessian.matrix)
        codebook = self.codes(q_bits)
        feedback = Hessian(metric, hessian.damping).feedback(codebook.tile[1]) if self.feedback else None
        return rounded(self, codebook, target, metric, feedback, outputs=outputs)

    def estimates(
        self, weight: Tensor, statistics: SiteStatistics, choices: Sequence[int], source: torch.Generator
    ) -> Mapping[int, float]:
        """What Q is expected to lose by what is known of codebook and metrics; nothing is rounded.

        Rotated at random, W looks like Gaussian numbers, and its error E like noise of variance b s^2, s^2 the mean
        square of W, and a share a of W. With F and M = E[x x^T] the metrics of both sides, what is lost is what
        `quantizers.expected` says, and without feedback

            tr(F E M E^T) ~ b s^2 tr(F) tr(M) + a^2 tr(F W M W^T)

        Feedback along the outputs leaves the share of it that it leaves of white noise.
        """
        # A method made of this one rounds in its own way, and passes change what is left.
        own = type(self).alone is not Quantize.alone or type(self).outlook is not QuantizingMethod.outlook
        if own or not self.hadamard or self.passes or len(choices) < 2:
            return {}
        seen = statistics.of(InputMoments()).second_moment().to(weight)
        curvature = statistics.of(CURVATURE).to(weight)
        felt = weighed_by_blocks(curvature, weight)
        trace, n = float(curvature.diagonal(dim1=1, dim2=2).sum()), weight.shape[1]
        found: dict[int, float] = {}
        if self.feedback:
            hessian, rotation = Hessian.of(seen, self.damping), drawn_rotation(self, weight, source)
            if hessian.fallback:
                return {}
            turned = Hessian(rotation.hessian(hessian.matrix), hessian.damping)
            # Sums of many numbers, of which a few digits count.
            plain, weighed = (rotation.inputs(each).float() for each in (weight, felt))
            rounding = Rounding.of(turned, plain, weighed, self.codes(choices[0]).tile[1])
            outputs = self.along_outputs(statistics, rotation)
            left, spread = (1.0, 0.0) if outputs is None else (outputs.left, outputs.spread)
            for q_bits in choices:
                known = gaussian_answer(self.codes(q_bits), n, feedback=True)
                found[q_bits] = left * rounding.loss(known, trace, spread)
        else:
            white, whole = float(weight.square().mean() * seen.diagonal().sum()), float((felt * (weight @ seen)).sum())
            for q_bits in choices:
                along, beside = gaussian_answer(self.codes(q_bits), n, feedback=False).at(1.0)
                found[q_bits] = beside * trace * white + along**2 * whole
        # Not where nothing is felt, or where what is expected makes no sense, as of a weight of few numbers.
        losses = [found[q_bits] for q_bits in sorted(found)]
        return found if isfinite(losses[0]) and all(more > less for more, less in pairwise([*losses, 0.0])) else {}

    def fit(
        self, weight: Tensor, statistics: SiteStatistics, cut: Cut, source: torch.Generator, looking: Looking
    ) -> tuple[Factors, Fit]:
        return self._fitted([AtSite(weight, statistics, cut, source, looking)])[0]

    @property
    def together(self) -> bool:
        """Not along both sides, and not where a method made of this one fits in its own way."""
        return type(self).fit is Quantize.fit and not self.feeds_outputs

    def fit_together(self, given: Sequence[AtSite]) -> list[tuple[Factors, Fit]]:
        return self._fitted(given) if self.together else super().fit_together(given)

    def _fitted(self, given: Sequence[AtSite]) -> list[tuple[Factors, Fit]]:
        begun = [_Begun.of(self, at) for at in given]
        missing = [each for each in begun if each.q is None]
        own = not self.feedback or type(self).alone is not Quantize.alone
        for each in missing:
            fed = self.along_outputs(each.at.statistics, each.rotation)
            if own or fed is not None:
                each.q = self.alone(each.at.weight, each.hessian, each.rotation, each.at.cut.q_bits, fed)
        missing = [each for each in missing if each.q is None]
        if missing:
            codebook = self.codes(missing[0].at.cut.q_bits)
            turned = [each.turned(codebook) for each in missing]
            for each, (target, metric), q in zip(
                missing, turned, ldlq_together([target for target, _ in turned], codebook), strict=True
            ):
                each.q = improve(target.weight, metric, q, codebook, self.passes)
        return [each.done() for each in begun]


@dataclass
class _Begun:
    """A fit at one site: what it is given, and its codes when there are some."""

    at: AtSite
    hessian: Hessian
    rotation: Rotation
    q: Packed | None

    @classmethod
    def of(cls, method: Quantize, at: AtSite) -> _Begun:
        moment = at.statistics.of(InputMoments()).second_moment().to(at.weight)
        rotation = drawn_rotation(method, at.weight, at.source)
        seen = at.looking(at.cut.q_bits)
        # The same rounding, where an outlook has made it already.
        q = None if seen is None or seen.q is None else on(seen.q, at.weight)
        return cls(at, Hessian.of(moment, method.damping), rotation, q)

    def turned(self, codebook: Codebook) -> tuple[Target, Tensor]:
        """The rotated weight as it goes into LDLQ, and the rotated H."""
        target, metric = self.rotation.weight(self.at.weight), self.rotation.hessian(self.hessian.matrix)
        feedback = Hessian(metric, self.hessian.damping).feedback(codebook.tile[1])
        return Target(target, feedback, codebook.scales(target, feedback=True)), metric

    def done(self) -> tuple[Factors, Fit]:
        assert self.q is not None
        weight, metric = self.at.weight, self.hessian.matrix
        # The same before the rotation as after it, and H is not turned once more.
        whole = weighed_error(weight, metric)
        error = weighed_error(weight - self.rotation.undo(self.q.dense()), metric) / (whole if whole > 0 else 1.0)
        factors = Factors(None, None, self.at.statistics.bias, q=self.q, rotation=self.rotation)
        fallback = self.hessian.fallback or not bool(weight.any())
        return factors, Fit(self.hessian.damping, errors=(error,), fallback=fallback)
