"""SVD-LLM (Wang et al., 2024, arXiv 2403.07378): truncation-aware whitening by the inputs' Gram matrix."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from rankwise.factors import Basis
from rankwise.linalg import decompose
from rankwise.methods.base import Factorisation, make_basis
from rankwise.statistics import SiteStatistics, Statistic
from rankwise.statistics.moments import Moments


class SVDLLM(Factorisation):
    """Minimises E||W x - L R x||^2, inputs not centred.

    The paper takes the SVD of W C with G = C C^T and undoes C on the right factor. Written as a projection onto the
    leading outputs the same product needs no inverse, so a singular G does no harm.
    """

    name: Literal["svd_llm"] = "svd_llm"

    def requests(self) -> tuple[Statistic, ...]:
        return (Moments(),)

    def decompose(self, weight: Tensor, statistics: SiteStatistics) -> Basis:
        seen = statistics.of(Moments()).second_moment()
        return make_basis(decompose(weight, inputs=seen.inputs, outputs=seen.outputs))
