"""What methods share that make the model smaller first: what is left of a weight stays as it is."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from rankwise.factors import Basis
from rankwise.linalg import decompose
from rankwise.methods.base import Factorisation, make_basis
from rankwise.sizes import Candidates, Form, dense_candidate
from rankwise.statistics import SiteStatistics


class WholeWeights(Factorisation):
    """A method after which every weight is whole: its one candidate is dense. It is looked at as `svd` does."""

    prunes: ClassVar[bool] = True
    keeps_factors: ClassVar[bool] = False

    def candidates(self, shape: tuple[int, int], form: Form, multiple: int, looks: bool) -> Candidates:
        return dense_candidate(shape, form)

    def decompose(self, weight: Tensor, statistics: SiteStatistics) -> Basis:
        return make_basis(decompose(weight))
