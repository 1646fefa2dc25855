"""Atomic feature mimicking (Yu & Wu, 2023), as LoRD uses it (Kaushal et al., 2023, arXiv 2309.14021)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from rankwise.factors import Basis
from rankwise.linalg import decompose
from rankwise.methods.base import Factorisation, make_basis
from rankwise.statistics import SiteStatistics, Statistic
from rankwise.statistics.moments import Moments


class AFM(Factorisation):
    """Projects outputs onto the principal components of their sample covariance: L = U_r, R = U_r^T W.

    Attributes:
        bias: add (W - L R) E[x], so that the mean output stays exact.
    """

    name: Literal["afm"] = "afm"
    bias: bool = True

    def requests(self) -> tuple[Statistic, ...]:
        return (Moments(),)

    def decompose(self, weight: Tensor, statistics: SiteStatistics) -> Basis:
        moments = statistics.of(Moments())
        seen = moments.covariance() if statistics.may_add else moments.second_moment()
        found = decompose(weight, inputs=seen.inputs, outputs=seen.outputs)
        return make_basis(found, seen.mean_output if self.bias else None)
