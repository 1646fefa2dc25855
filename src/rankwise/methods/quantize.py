"""Quantisation alone: LDLQ on a rotated weight (QuIP#, Tseng et al., 2024, arXiv 2402.04396, without fine-tuning)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rankwise.factors import Factors, Fit
from rankwise.methods.base import Looking
from rankwise.methods.quantizing import QuantizingMethod, drawn_rotation, on, rounded
from rankwise.quantizers import Hessian, Packed, Rotation, weighed_error
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
