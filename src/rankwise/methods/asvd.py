"""Activation-aware SVD (Yuan et al., 2023, arXiv 2312.05821): columns weigh by the size of their input."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from rankwise.factors import Basis
from rankwise.linalg import InputMetric, decompose
from rankwise.methods.base import Factorisation, make_basis
from rankwise.statistics import SiteStatistics, Statistic
from rankwise.statistics.absolute_mean import AbsoluteMean


class ASVD(Factorisation):
    """Minimises ||(W - L R) diag(s)||_F with s_j = E|x_j|^alpha.

    Attributes:
        alpha: 0 is plain SVD; the paper uses 0.5.
    """

    name: Literal["asvd"] = "asvd"
    alpha: Annotated[float, Field(ge=0, le=2)] = 0.5

    def requests(self) -> tuple[Statistic, ...]:
        return (AbsoluteMean(),)

    def decompose(self, weight: Tensor, statistics: SiteStatistics) -> Basis:
        scale = statistics.of(AbsoluteMean()) ** self.alpha
        return make_basis(decompose(weight, inputs=InputMetric(scale.square())))
