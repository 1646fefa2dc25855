"""Two-sided factorisation: inputs weigh by covariance, outputs by the loss's curvature (the geometry of K-FAC)."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rankwise.factors import Basis
from rankwise.linalg import OutputMetric, decompose
from rankwise.methods.base import Factorisation, make_basis
from rankwise.statistics import SiteStatistics, Statistic
from rankwise.statistics.curvature import DEFAULT_CURVATURE_GB, Curvature
from rankwise.statistics.moments import Moments


class TwoSided(Factorisation):
    """Minimises tr(F (W - L R) Sigma (W - L R)^T): F = E[g g^T] at the output, Sigma = Cov(x) at the input.

    Energies estimate twice the loss increase per token of dropping a component, in one unit at every site: since
    R Sigma R^T = D^2 is diagonal, tr(F E Sigma E^T) of what is dropped is the sum of D_i^2 l_i^T F l_i, with no cross
    terms. F there is the measured one, without damping, which only steers the directions.

    Attributes:
        labels: the loss gradient is taken at tokens `sampled` from the model (the Fisher information) or at the `text`.
        damping: added to F relative to its mean diagonal, a hedge against an F estimated from few tokens. Of 1e-6 to 3,
            1 is within 0.5% of the best in every column of benchmarks/results/defaults.md. Raised tenfold if F is
            still not positive definite. Reported for each site.
        curvature_gb: memory for all F together, in 10^9 bytes. What does not fit is cut to diagonal blocks.
        bias: add (W - L R) E[x], so that the mean output stays exact; not where padding has to stay zero, and there
            Sigma is E[x x^T].
    """

    one_unit: ClassVar[bool] = True

    name: Literal["two_sided"] = "two_sided"
    labels: Literal["sampled", "text"] = "sampled"
    damping: Annotated[float, Field(ge=0)] = 1.0
    curvature_gb: Annotated[float, Field(gt=0)] = DEFAULT_CURVATURE_GB
    bias: bool = True

    def _curvature(self) -> Curvature:
        return Curvature(labels=self.labels, memory_gb=self.curvature_gb)

    def requests(self) -> tuple[Statistic, ...]:
        return (Moments(), self._curvature())

    def output_metric(self, statistics: SiteStatistics) -> OutputMetric | None:
        return OutputMetric.where_felt(statistics.of(self._curvature()), self.damping)

    def decompose(self, weight: Tensor, statistics: SiteStatistics) -> Basis:
        moments, biased = statistics.of(Moments()), self.bias and statistics.may_add
        seen = moments.covariance() if statistics.may_add else moments.second_moment()
        metric = self.output_metric(statistics)
        found = decompose(weight, inputs=seen.inputs, outputs=seen.outputs, metric=metric)
        # Without a gradient nothing that is dropped costs loss, and the inputs alone say what is kept.
        share = torch.zeros_like(found.energy) if metric is None else metric.undamped_share(found.left)
        damping = 0.0 if metric is None else metric.damping
        return make_basis(replace(found, energy=found.energy * share), seen.mean_output if biased else None, damping)
