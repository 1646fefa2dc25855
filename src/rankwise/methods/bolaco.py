"""Bolaco's feature-based factorisation (arXiv 2405.10616, Eq. 2 and 4): principal outputs of the pooled covariance."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from rankwise.factors import Basis
from rankwise.linalg import decompose
from rankwise.methods.base import Factorisation, make_basis
from rankwise.statistics import SiteStatistics, Statistic
from rankwise.statistics.pooled_covariance import PooledCovariance


class Bolaco(Factorisation):
    """Like `afm`, with the covariance averaged over groups of calibration sequences.

    Attributes:
        groups: groups of sequences; the paper uses 32. 1 is the plain sample covariance.
        bias: add (W - L R) E[x], so that the mean output stays exact.
    """

    name: Literal["bolaco"] = "bolaco"
    groups: Annotated[int, Field(ge=1)] = 32
    bias: bool = True

    def requests(self) -> tuple[Statistic, ...]:
        return (PooledCovariance(groups=self.groups),)

    def decompose(self, weight: Tensor, statistics: SiteStatistics) -> Basis:
        seen = statistics.of(PooledCovariance(groups=self.groups))
        found = decompose(weight, inputs=seen.inputs, outputs=seen.outputs)
        return make_basis(found, seen.mean_output if self.bias else None)
