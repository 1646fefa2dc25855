"""What every factorisation method is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from rankwise.factors import Basis
from rankwise.linalg import Decomposition, OutputMetric
from rankwise.sizes import Budget
from rankwise.statistics import SiteStatistics, Statistic


class Method(BaseModel, ABC):
    """A frozen settings object that is its own node in a recipe.

    Every method has a `name` field with one allowed value, states what it `requests`, and turns a weight and its
    statistics into a `Basis`.

    Attributes:
        one_unit: whether energies of different sites are in one unit, so that rank can be traded between sites by them.
        quantizes: whether it gives codes instead of a basis.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    one_unit: ClassVar[bool] = False
    quantizes: ClassVar[bool] = False

    name: str

    def budget(self, asked: Budget) -> Budget:
        """The budget its ranks are chosen on.

        Args:
            asked: as the recipe gives it.
        """
        return asked

    def check_size(self, asked: Budget, allocation: str) -> None:
        """Raise when a recipe's budget does not say how large the result may be, in this method's terms.

        Args:
            asked: as the recipe gives it.
            allocation: name of the allocation that spends it.

        Raises:
            ValueError: saying what is missing or too much.
        """
        if asked.bits is not None:
            raise ValueError(f"{self.name} counts parameters, not bits: give keep, or the method caldera")

    def requests(self) -> tuple[Statistic, ...]:
        """Statistics that have to be collected first."""
        return ()

    def plan_requests(self) -> tuple[Statistic, ...]:
        """Statistics that are needed on top when an allocation looks at energies."""
        return ()

    def output_metric(self, statistics: SiteStatistics) -> OutputMetric | None:
        """What errors of a site's outputs are weighed by; None when all weigh the same.

        Args:
            statistics: what was collected at this site.
        """
        return None

    @abstractmethod
    def decompose(self, weight: Tensor, statistics: SiteStatistics) -> Basis:
        """Factor one weight.

        Args:
            weight: W, shape `[m, n]`, float64.
            statistics: what was collected at this site.

        Returns:
            Factors of full rank, most important component first.
        """


def make_basis(found: Decomposition, mean_output: Tensor | None = None, damping: float = 0.0) -> Basis:
    """A basis from a decomposition.

    Args:
        found: the ordered factors.
        mean_output: E[W x], shape `[m]`, when the bias is to make up for the mean of what is dropped.
        damping: what the decomposition needed.
    """
    if mean_output is None:
        return Basis(found.left, found.right, found.energy, damping=damping)
    return Basis(found.left, found.right, found.energy, mean_output, found.encoder @ mean_output, damping)
