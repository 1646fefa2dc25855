"""Quantisation alone: LDLQ on a rotated weight (QuIP#, Tseng et al., 2024, arXiv 2402.04396, without fine-tuning)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import isfinite
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rankwise.factors import Factors, Fit
from rankwise.methods.base import Looking
from rankwise.methods.quantizing import CURVATURE, QuantizingMethod, drawn_rotation, on, rounded, weighed_by_blocks
from rankwise.quantizers import Hessian, Packed, Rotation, Rounding, gaussian_answer, weighed_error
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

    def alone(self, weight: Tensor, hessian: Hessian, rotation: Rotation, q_bits: int) -> Packed:
        target, metric = rotation.weight(weight), rotation.hessian(hessian.matrix)
        codebook = self.codes(q_bits)
        feedback = Hessian(metric, hessian.damping).feedback(codebook.tile[1]) if self.feedback else None
        return rounded(self, codebook, target, metric, feedback)

    def estimates(
        self, weight: Tensor, statistics: SiteStatistics, choices: Sequence[int], source: torch.Generator
    ) -> Mapping[int, float]:
        """What Q is expected to lose by what is known of codebook and metrics; nothing is rounded.

        Rotated at random, W looks like Gaussian numbers, and its error E like noise of variance b s^2, s^2 the mean
        square of W, and a share a of W. With F and M = E[x x^T] the metrics of both sides, what is lost is what
        `quantizers.expected` says, and without feedback

            tr(F E M E^T) ~ b s^2 tr(F) tr(M) + a^2 tr(F W M W^T)
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
            for q_bits in choices:
                found[q_bits] = rounding.loss(gaussian_answer(self.codes(q_bits), n, feedback=True), trace)
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
        hessian = Hessian.of(statistics.of(InputMoments()).second_moment().to(weight), self.damping)
        rotation = drawn_rotation(self, weight, source)
        seen = looking(cut.q_bits)
        # The same rounding, where an outlook has made it already.
        q = self.alone(weight, hessian, rotation, cut.q_bits) if seen is None or seen.q is None else on(seen.q, weight)
        # The same before the rotation as after it, and H is not turned once more.
        whole = weighed_error(weight, hessian.matrix)
        error = weighed_error(weight - rotation.undo(q.dense()), hessian.matrix) / (whole if whole > 0 else 1.0)
        factors = Factors(None, None, statistics.bias, q=q, rotation=rotation)
        return factors, Fit(hessian.damping, errors=(error,), fallback=hessian.fallback or not bool(weight.any()))
