"""Plain truncated SVD (Eckart-Young): the best low-rank weight when every input counts the same."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from rankwise.factors import Basis
from rankwise.linalg import decompose
from rankwise.methods.base import Factorisation, make_basis
from rankwise.statistics import SiteStatistics


class SVD(Factorisation):
    """Minimises ||W - L R||_F. Needs no data; energies are squared singular values."""

    name: Literal["svd"] = "svd"

    def decompose(self, weight: Tensor, statistics: SiteStatistics) -> Basis:
        return make_basis(decompose(weight))
