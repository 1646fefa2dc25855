"""Quantisation alone: LDLQ on a rotated weight (QuIP#, Tseng et al., 2024, arXiv 2402.04396, without fine-tuning)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rankwise.factors import Quantized
from rankwise.methods.quantizing import QuantizingMethod, drawn_rotation, rounded
from rankwise.quantizers import Hessian, weighed_error
from rankwise.sizes import BitForm, QuantizedRank
from rankwise.statistics import SiteStatistics
from rankwise.statistics.input_moments import InputMoments


class Quantize(QuantizingMethod):
    """W ~ Q: every weight to a codeword, errors fed back along the Hessian."""

    name: Literal["quantize"] = "quantize"
    q_bits: Annotated[int, Field(ge=1, le=8)] | None = None

    @property
    def given_rank(self) -> int:
        return 0

    def form(self) -> BitForm:
        return BitForm(codebook=self.codebook, group=self.group, row_scales=self.row_scales, hadamard=self.hadamard)

    def quantize(
        self, weight: Tensor, statistics: SiteStatistics, rank: QuantizedRank, source: torch.Generator
    ) -> Quantized:
        hessian = Hessian.of(statistics.of(InputMoments()).second_moment().to(weight), self.damping)
        rotation = drawn_rotation(self, weight, source)
        target, metric = rotation.weight(weight), rotation.hessian(hessian.matrix)
        feedback = Hessian(metric, hessian.damping).feedback() if self.feedback else None
        q = rounded(self, self.codes(rank.q_bits), target, metric, feedback)
        whole = weighed_error(target, metric)
        error = weighed_error(target - q.dense(), metric) / (whole if whole > 0 else 1.0)
        return Quantized(q, None, rotation, (error,), hessian.damping, hessian.fallback)
