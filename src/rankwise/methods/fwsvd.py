"""Fisher-weighted SVD (Hsu et al., 2022, arXiv 2207.00112): rows weigh as much as the loss feels them."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rankwise.factors import Basis
from rankwise.linalg import OutputMetric, decompose
from rankwise.methods.base import Factorisation, make_basis
from rankwise.statistics import SiteStatistics, Statistic
from rankwise.statistics.row_fisher import RowFisher


class FWSVD(Factorisation):
    """Minimises sum_i f_i ||W_i - (L R)_i||^2 with f_i the squared loss gradient summed over row i.

    Attributes:
        labels: `text` takes the gradient at the token that follows, `sampled` at one drawn from the model.
        damping: added to f, relative to its mean, so that a row without gradient can be undone.
    """

    name: Literal["fwsvd"] = "fwsvd"
    labels: Literal["text", "sampled"] = "text"
    damping: Annotated[float, Field(ge=0)] = 1e-6

    def requests(self) -> tuple[Statistic, ...]:
        return (RowFisher(labels=self.labels),)

    def decompose(self, weight: Tensor, statistics: SiteStatistics) -> Basis:
        rows = OutputMetric.where_felt(statistics.of(RowFisher(labels=self.labels))[:, None, None], self.damping)
        found = decompose(weight, metric=rows)
        if rows is None:
            return make_basis(replace(found, energy=torch.zeros_like(found.energy)))
        return make_basis(found, damping=rows.damping)
