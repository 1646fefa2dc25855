"""What every method is: it looks at a weight, so that a plan can be made, and fits what the plan decides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from rankwise.factors import Basis, Factors, Fit
from rankwise.linalg import Decomposition, OutputMetric, balancing
from rankwise.quantizers import Packed, Rotation
from rankwise.sizes import Budget, Candidates, Cut, Form, low_rank_candidates
from rankwise.statistics import SiteStatistics, Statistic


@dataclass(frozen=True)
class Outlook:
    """What a method sees in one weight beside a Q of so many bits, before a rank is decided.

    Attributes:
        basis: of what Q leaves of W, or of W itself.
        q: codes of Q; None without Q.
        rotation: of Q.
        noise: by bits of L and R, the share of the energy that L R should take and a fit of it does not.
    """

    basis: Basis
    q: Packed | None = None
    rotation: Rotation = field(default_factory=Rotation)
    noise: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AtSite:
    """What a fit is given at one site.

    Attributes:
        weight: W, shape `[m, n]`, float64.
        statistics: what was collected there.
        cut: what the plan decided; not dense.
        source: for what is drawn.
        looking: the outlooks of this site.
    """

    weight: Tensor
    statistics: SiteStatistics
    cut: Cut
    source: torch.Generator
    looking: Looking


Looking = Callable[[int], Outlook | None]
"""Bits of Q -> what was seen beside it, perhaps no basis, or None; 0 -> the outlook of W itself, made at need."""


class Method(BaseModel, ABC):
    """A frozen settings object that is its own node in a recipe.

    Every method has a `name` field with one allowed value, says which cuts a site may take and which statistics it
    `requests`, looks at a weight, and fits a cut of it.

    Attributes:
        one_unit: whether losses of different sites are in one unit, so that size can be traded between sites by them.
        default_keep: kept fraction where no size is given; None where the settings may say it all.
        keeps_factors: whether what it makes is L R in numbers, which repairs know how to mend.
        rounds: whether weights become codes, by many short steps; then `fit` may be called in several threads at once.
        prunes: whether it makes the model smaller before its weights are looked at: units go, or directions.
        by_site: whether it can leave out a site and still do its work at the others.
        unseen: settings that change no outlook.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    one_unit: ClassVar[bool] = False
    default_keep: ClassVar[float | None] = 0.8
    keeps_factors: ClassVar[bool] = True
    prunes: ClassVar[bool] = False
    rounds: ClassVar[bool] = False
    by_site: ClassVar[bool] = True
    unseen: ClassVar[frozenset[str]] = frozenset()

    name: str

    @property
    def label(self) -> str:
        """The name as a part of file names: of a class in a file, the class."""
        return self.name.rpartition(":")[2]

    @property
    def adds_bias(self) -> bool:
        """Whether it makes up for the mean of what is dropped by a bias."""
        return bool(getattr(self, "bias", False))

    @classmethod
    def defaults(cls, budget: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that follow from how a recipe's budget is spelled, where they are not given."""
        return {}

    @property
    def repairable(self) -> bool:
        """Whether what it makes under its settings is L R in numbers."""
        return self.keeps_factors

    def check_size(self, asked: Budget, allocation: str) -> None:
        """Raise when a recipe's budget does not say how large the result may be, in this method's terms.

        Args:
            asked: as the recipe gives it.
            allocation: name of the allocation that spends it.

        Raises:
            ValueError: saying what is missing or too much.
        """

    def form(self, budget: Budget, number_bits: int) -> Form:
        """How its cuts are stored.

        Args:
            budget: says how low rank is stored.
            number_bits: bits of a number of the checkpoint.
        """
        return Form(storage=budget.storage, number_bits=number_bits)

    def candidates(self, shape: tuple[int, int], form: Form, multiple: int, looks: bool) -> Candidates:
        """The cuts that a site may take, without losses.

        Args:
            shape: `(m, n)`.
            form: how they are stored.
            multiple: ranks are multiples of this.
            looks: whether an allocation will look at losses, which is for cuts within reach only.
        """
        return low_rank_candidates(shape, form, multiple)

    def requests(self) -> tuple[Statistic, ...]:
        """Statistics that have to be collected first."""
        return ()

    def plan_requests(self) -> tuple[Statistic, ...]:
        """Statistics that are needed on top when an allocation looks at losses."""
        return ()

    def output_metric(self, statistics: SiteStatistics) -> OutputMetric | None:
        """What errors of a site's outputs are weighed by; None when all weigh the same.

        Args:
            statistics: what was collected at this site.
        """
        return None

    @abstractmethod
    def outlook(self, weight: Tensor, statistics: SiteStatistics, q_bits: int, source: torch.Generator) -> Outlook:
        """What each rank beside a Q of so many bits would lose.

        Args:
            weight: W, shape `[m, n]`, float64, on the model's device, or on the CPU where that failed.
            statistics: what was collected at this site, seen on the same device.
            q_bits: bits a weight of Q; 0 for no Q.
            source: for what is drawn, on the CPU.
        """

    def estimates(
        self, weight: Tensor, statistics: SiteStatistics, choices: Sequence[int], source: torch.Generator
    ) -> Mapping[int, float]:
        """Losses beside nothing but Q, estimated without making codes; in the unit of energies.

        Args:
            weight: as for `outlook`.
            statistics: as for `outlook`.
            choices: bits of Q that the plan may choose from.
            source: for what is drawn.

        Returns:
            By bits of Q, all of them; or nothing, and `outlook` is asked.
        """
        return {}

    @abstractmethod
    def fit(
        self, weight: Tensor, statistics: SiteStatistics, cut: Cut, source: torch.Generator, looking: Looking
    ) -> tuple[Factors, Fit]:
        """The factors of one weight under a cut.

        Args:
            weight: W, shape `[m, n]`, float64.
            statistics: what was collected at this site.
            cut: what the plan decided; not dense.
            source: for what is drawn.
            looking: the outlooks of this site.
        """

    @property
    def together(self) -> bool:
        """Whether `fit_together` takes less time than as many fits."""
        return False

    def fit_together(self, given: Sequence[AtSite]) -> list[tuple[Factors, Fit]]:
        """`fit` at several sites, the same as of each alone; all have as many inputs and get as many bits.

        Args:
            given: what a fit is given at each.
        """
        return [self.fit(at.weight, at.statistics, at.cut, at.source, at.looking) for at in given]


class Factorisation(Method):
    """W ~ L R by slicing one ordered basis: the rank is all there is to decide."""

    @abstractmethod
    def decompose(self, weight: Tensor, statistics: SiteStatistics) -> Basis:
        """Factor one weight.

        Args:
            weight: W, shape `[m, n]`, float64.
            statistics: what was collected at this site.

        Returns:
            Factors of full rank, most important component first.
        """

    def outlook(self, weight: Tensor, statistics: SiteStatistics, q_bits: int, source: torch.Generator) -> Outlook:
        basis = self.decompose(weight, statistics)
        return Outlook(basis if statistics.may_add else replace(basis, mean_output=None, mean_code=None))

    def fit(
        self, weight: Tensor, statistics: SiteStatistics, cut: Cut, source: torch.Generator, looking: Looking
    ) -> tuple[Factors, Fit]:
        assert cut.rank is not None
        outlook = looking(0)
        assert outlook is not None
        basis = outlook.basis
        fit = Fit(basis.damping, basis.dropped(cut.rank), fallback=not bool(basis.energy.any()))
        return basis.truncate(cut.rank, statistics.bias), fit


def make_basis(found: Decomposition, mean_output: Tensor | None = None, damping: float = 0.0) -> Basis:
    """A basis from a decomposition, the scale of each component shared evenly by L and R.

    Args:
        found: the ordered factors.
        mean_output: E[W x], shape `[m]`, when the bias is to make up for the mean of what is dropped.
        damping: what the decomposition needed.
    """
    scale = balancing(found.left, found.right)
    left, right = found.left * scale, found.right / scale[:, None]
    if mean_output is None:
        return Basis(left, right, found.energy, damping=damping)
    return Basis(left, right, found.energy, mean_output, found.encode(mean_output) / scale, damping)


def tail_losses(energy: Tensor) -> Tensor:
    """What is lost at each rank 0..k, from the energies of k components, float64."""
    energy = energy.double().cpu().clamp_min(0)
    return torch.cat([energy.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])


def estimated_losses(
    candidates: Candidates, energies: Mapping[int, Tensor], noise: Mapping[int, Mapping[int, float]]
) -> Tensor:
    """The loss of every candidate, shape `[c]`, float64: what its rank drops, and what rounding L and R gives back.

    Args:
        candidates: of one site.
        energies: by bits of Q, each component's loss, shape `[k]`.
        noise: by bits of Q, `Outlook.noise`.
    """
    tails = {q_bits: tail_losses(energy).tolist() for q_bits, energy in energies.items()}

    def loss(cut: Cut) -> float:
        if cut.rank is None:
            return 0.0
        tail = tails[cut.q_bits]
        dropped = tail[min(cut.rank, len(tail) - 1)]
        share = 0.0 if cut.lr_bits is None else noise[cut.q_bits].get(cut.lr_bits, 0.0)
        return dropped + share * (tail[0] - dropped)

    return torch.tensor([loss(cut) for cut in candidates.cuts], dtype=torch.float64)
