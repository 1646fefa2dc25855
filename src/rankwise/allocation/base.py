"""What every allocation is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

from pydantic import BaseModel, ConfigDict

from rankwise.budget import Budget, Rank
from rankwise.sites import Site


class Allocation(BaseModel, ABC):
    """A frozen settings object that is its own node in a recipe and turns a budget into ranks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Self:
        """Read the part behind the colon of the command line's form.

        Raises:
            RecipeError: when it cannot be read.
        """

    @abstractmethod
    def ranks(self, sites: Sequence[Site], budget: Budget) -> dict[str, Rank]:
        """Choose.

        Returns:
            Site name -> rank, None for dense.

        Raises:
            BudgetError: when nothing fits.
            RecipeError: when the settings do not fit these sites.
        """
