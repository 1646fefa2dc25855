"""Quantisation alone: LDLQ on a rotated weight (QuIP#, Tseng et al., 2024, arXiv 2402.04396, without fine-tuning)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rankwise.factors import Factors, Fit
from rankwise.methods.base import Looking
from rankwise.methods.quantizing import CURVATURE, QuantizingMethod, drawn_rotation, on, rounded, weighed_by_blocks
from rankwise.quantizers import Hessian, Packed, Rotation, weighed_error
from rankwise.sizes import Cut
from rankwise.statistics import SiteStatistics
from rankwise.statistics.input_moments import InputMoments

SAMPLED_ROWS = 32
"""Rows of a weight that are rounded to estimate what rounding all of them loses (benchmarks/results/estimates.md)."""


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
        """What Q loses, by rounding some rows of the rotated weight in place of all.

        A random rotation leaves rows that are alike but for their length. An error is a share rho of the row itself and
        a rest across it. With s_i^2 the mean square of row i, e_j the rest at a rounded row j weighed by M = E[x x^T],
        and tr(F) / m what a rotated output weighs on the average,

            tr(F E M E^T) ~ tr(F) / m  sum_i s_i^2  mean_j e_j / s_j^2  +  rho^2 tr(F W M W^T)
        """
        # A method made of this one rounds in its own way.
        own = type(self).alone is not Quantize.alone or type(self).outlook is not QuantizingMethod.outlook
        if own or not self.hadamard or len(choices) < 2 or len(weight) < 2 * SAMPLED_ROWS:
            return {}
        seen = statistics.of(InputMoments()).second_moment().to(weight)
        curvature = statistics.of(CURVATURE).to(weight)
        hessian = Hessian.of(seen, self.damping)
        rotation = drawn_rotation(self, weight, source)
        target, metric, measured = rotation.weight(weight), rotation.hessian(hessian.matrix), rotation.hessian(seen)
        squares = target.square().mean(1)
        rows = torch.linspace(0, len(target) - 1, SAMPLED_ROWS, device=weight.device).round().long()
        rows = rows[squares[rows] > 0]
        of_output = float(curvature.diagonal(dim1=1, dim2=2).sum()) / len(target)
        whole = float((weighed_by_blocks(curvature, weight) * (weight @ seen)).sum())
        if not len(rows) or not whole > 0:
            return {}
        part = target[rows]
        width = self.codes(choices[0]).tile[1]
        feedback = Hessian(metric, hessian.damping).feedback(width) if self.feedback else None
        found: dict[int, float] = {}
        for q_bits in choices:
            codebook = self.codes(q_bits)
            # A matrix without scales of its rows has one for all of it.
            scale = codebook.scales(target, feedback=self.feedback)
            of_rows = scale[rows] if len(scale) == len(target) else scale
            error = part - rounded(self, codebook, part, metric, feedback, of_rows).dense()
            along = float(((error @ measured) * part).sum() / ((part @ measured) * part).sum())
            across = error - along * part
            share = (((across @ measured) * across).sum(1) / squares[rows]).mean()
            found[q_bits] = of_output * float(share * squares.sum()) + along**2 * whole
        return found

    def fit(
        self, weight: Tensor, statistics: SiteStatistics, cut: Cut, source: torch.Generator, looking: Looking
    ) -> tuple[Factors, Fit]:
        hessian = Hessian.of(statistics.of(InputMoments()).second_moment().to(weight), self.damping)
        rotation = drawn_rotation(self, weight, source)
        seen = looking(cut.q_bits)
        # The same rounding, where an outlook has made it already.
        q = self.alone(weight, hessian, rotation, cut.q_bits) if seen is None or seen.q is None else on(seen.q, weight)
        target, metric = rotation.weight(weight), rotation.hessian(hessian.matrix)
        whole = weighed_error(target, metric)
        error = weighed_error(target - q.dense(), metric) / (whole if whole > 0 else 1.0)
        factors = Factors(None, None, statistics.bias, q=q, rotation=rotation)
        return factors, Fit(hessian.damping, errors=(error,), fallback=hessian.fallback or not bool(weight.any()))
