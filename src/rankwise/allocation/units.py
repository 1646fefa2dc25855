"""Spaces a search moves in where units are taken out: how many stay in every layer, by few numbers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.allocation.box import Box
from rankwise.allocation.spaces import depths_among, parse_groups

Counts = dict[str, int]
"""By coupling, how many of its units stay."""

_REST = "rest"
_SLIGHTLY = 1e-3
_SPREAD = 0.3
_WIDEST = 2.0


@dataclass(frozen=True)
class Units:
    """The units of one coupling, as a search sees them.

    Attributes:
        name: of the coupling.
        kind: `heads` or `channels`.
        block: index of the decoder block.
        whole: how many there are.
        least: the fewest that may stay.
        step: those that stay are a multiple of it, or all.
        planned: how many the plan by estimated loss keeps.
        share: what all of them are of the linear weights, in numbers.
    """

    name: str
    kind: str
    block: int
    whole: int
    least: int
    step: int
    planned: int
    share: float

    def nearest(self, count: float) -> int:
        """The number of units nearest to one, of those that may stay."""
        below = int(count) // self.step * self.step
        known = {self.least, self.whole, below, below + self.step}
        return min((each for each in sorted(known) if self.least <= each <= self.whole), key=lambda n: abs(n - count))


class UnitSpace(Box):
    """A box whose points say how many units of each coupling stay; what is left is planned within what remains."""

    planned: Tensor

    def draw(self, count: int, source: torch.Generator) -> Tensor:
        """Points around the plan by estimated loss: far from it every plan is bad."""
        drawn = torch.randn(count, self.dimensions, generator=source, dtype=torch.float64)
        return self.project(self.planned + drawn * (self.upper - self.lower) * _SPREAD)

    @abstractmethod
    def decided(self, point: Tensor) -> Counts:
        """How many units of each coupling stay at a point of shape `[d]`."""

    @abstractmethod
    def like(self, counts: Mapping[str, int]) -> Tensor | None:
        """The point nearest to numbers of units, by coupling, all where one is not named; None where none is known."""

    def starts(
        self, coordinates: Mapping[str, float], counts: Mapping[str, int] | None = None
    ) -> list[tuple[str, Tensor]]:
        """Points worth trying first, with their names: the plan by estimated loss, and the point of a given plan.

        Args:
            coordinates: the point that the given plan was made from, by label; empty when unknown.
            counts: by coupling, how many units it keeps, all where one is not named; None for no plan.
        """
        found = [("spectral", self.planned)]
        known = self.given(coordinates)
        if known is None and counts is not None:
            known = self.like(counts)
        if known is not None:
            found.append(("plan", self.project(known)))
        return found


class UnitShares(UnitSpace):
    """The share of units that stays, a coordinate for heads and one for channels in each group of consecutive blocks.

    With w_g the numbers of a group's units among all linear weights and x_g the share that stays, what units save is
    sum_g w_g (1 - x_g). The last coordinate is 1 less what ranks and bits save, so that c . x = total is the budget. In
    a group layers keep units as the plan by estimated loss has them: from the fewest at the least share over that plan
    to all of them at 1, along two straight lines.

    Args:
        units: of all couplings that may lose some.
        grouping: `1` for one group of all units; otherwise heads and channels are groups of their own.
        depths: groups of consecutive blocks; None for one a block.
        kept: share of the bits of the linear weights that the budget allows.

    Raises:
        RecipeError: when there are more depth groups than blocks.
    """

    def __init__(self, units: Sequence[Units], grouping: str, depths: int | None, kept: float) -> None:
        self.name = f"{grouping}x{'layers' if depths is None else depths}"
        blocks = sorted({each.block for each in units})
        depths = depths_among(blocks, depths, self.name)
        self._groups: dict[str, list[Units]] = {}
        for each in units:
            label = "units" if grouping == "1" else each.kind
            depth = blocks.index(each.block) * depths // len(blocks)
            self._groups.setdefault(label if depths == 1 else f"{label}@{depth + 1}/{depths}", []).append(each)
        groups = self._groups.values()
        self.labels = [*self._groups, _REST]
        self.attention = [all(each.kind == "heads" for each in group) for group in groups] + [False]
        weights = [sum(each.share for each in group) for group in groups]
        self.weights = torch.tensor([*weights, 1.0], dtype=torch.float64)
        self.total = kept + sum(weights)
        planned = [_share(group, {each.name: each.planned for each in group}) for group in groups]
        rest = self.total - sum(weight * share for weight, share in zip(weights, planned, strict=True))
        self.planned = torch.tensor([*planned, rest], dtype=torch.float64)
        least = [_share(group, {each.name: each.least for each in group}) for group in groups]
        self.lower = torch.tensor([*least, kept], dtype=torch.float64)
        # Where the plan leaves some of the budget, its point still lies in the box.
        self.upper = torch.tensor([1.0] * len(weights) + [max(1.0, rest, kept + _SLIGHTLY)], dtype=torch.float64)

    def decided(self, point: Tensor) -> Counts:
        found = {}
        places = zip(self._groups.values(), point.tolist(), self.lower.tolist(), self.planned.tolist(), strict=False)
        for group, share, least, planned in places:
            for each in group:
                if share <= planned:
                    way = (share - least) / max(planned - least, 1e-12)
                    count = each.least + way * (each.planned - each.least)
                else:
                    way = (share - planned) / max(1 - planned, 1e-12)
                    count = each.planned + way * (each.whole - each.planned)
                found[each.name] = each.nearest(count)
        return found

    def like(self, counts: Mapping[str, int]) -> Tensor:
        shares = [
            _share(group, {each.name: counts.get(each.name, each.whole) for each in group})
            for group in self._groups.values()
        ]
        known = torch.tensor([*shares, 0.0], dtype=torch.float64)
        known[-1] = self.total - float((self.weights * known).sum())
        return known

    def starts(
        self, coordinates: Mapping[str, float], counts: Mapping[str, int] | None = None
    ) -> list[tuple[str, Tensor]]:
        """Beside those of every such space, all units with what ranks and bits save, and the other way round."""
        ranks = self.upper.clone()
        ranks[-1] = self.lower[-1]
        alone = self.planned.clone()
        alone[-1] = self.upper[-1]
        return [*super().starts(coordinates, counts), ("ranks", self.project(ranks)), ("units", self._with_rest(alone))]

    def _with_rest(self, point: Tensor) -> Tensor:
        """The point whose last coordinate stays and whose others are moved onto the equation, by one factor for all."""
        spent = float((self.weights[:-1] * point[:-1]).sum())
        shares = point[:-1] * (self.total - float(point[-1])) / spent
        return self.project(torch.cat([shares, point[-1:]]))


def _share(group: Sequence[Units], counts: Mapping[str, int]) -> float:
    """The share of a group's numbers that stays."""
    kept = sum(each.share * counts[each.name] / each.whole for each in group)
    return kept / sum(each.share for each in group)


class UnitMultipliers(UnitSpace):
    """On top of the plan by estimated loss: by how much more than estimated the loss of heads, of channels, and of
    ranks and bits weighs, as logarithms, and a slope of the first two over depth.

    Only differences matter, so the logarithms sum to zero. The point of all zeros is the plan itself.

    Args:
        units: of all couplings that may lose some.
        plan: weights of the losses of couplings, by name -> how many units stay within the budget.
    """

    def __init__(self, units: Sequence[Units], plan: Callable[[Mapping[str, float]], Counts]) -> None:
        self.name = "spectral"
        self._units, self._plan = units, plan
        self._kinds = list(dict.fromkeys(each.kind for each in units))
        self.labels = [*self._kinds, _REST, "slope"]
        self.attention = [kind == "heads" for kind in self._kinds] + [False, False]
        blocks = sorted({each.block for each in units})
        self._depth = {each.name: 2 * blocks.index(each.block) / max(1, len(blocks) - 1) - 1 for each in units}
        self.upper = torch.full((len(self.labels),), _WIDEST, dtype=torch.float64)
        self.lower = -self.upper
        self.planned = torch.zeros_like(self.upper)
        even = 1 / (len(self.labels) - 1)
        self.weights = torch.tensor([even] * (len(self.labels) - 1) + [0.0], dtype=torch.float64)
        self.total = 0.0

    def decided(self, point: Tensor) -> Counts:
        *kinds, rest, slope = point.tolist()
        of_kind = dict(zip(self._kinds, kinds, strict=True))
        exponents = {each.name: of_kind[each.kind] - rest + slope * self._depth[each.name] for each in self._units}
        weights = torch.tensor(list(exponents.values()), dtype=torch.float64).exp().tolist()
        return self._plan(dict(zip(exponents, weights, strict=True)))

    def like(self, counts: Mapping[str, int]) -> None:
        """No multipliers are known that give numbers of units."""


def unit_space_named(
    name: str, units: Sequence[Units], kept: float, plan: Callable[[Mapping[str, float]], Counts]
) -> UnitSpace:
    """`spectral`, or GxL as in `parse_groups`.

    Args:
        name: of the space.
        units: of all couplings that may lose some.
        kept: share of the bits of the linear weights that the budget allows.
        plan: see `UnitMultipliers`.

    Raises:
        RecipeError: for any other name, and as for `UnitShares`.
    """
    if name == "spectral":
        return UnitMultipliers(units, plan)
    grouping, depths = parse_groups(name)
    return UnitShares(units, grouping, depths, kept)
