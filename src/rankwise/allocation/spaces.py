"""Spaces a search moves in: few numbers that stand for the cuts of all sites, every point exactly on the budget."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rankwise.allocation.base import Cuts, Problem
from rankwise.allocation.box import Box
from rankwise.allocation.choice import MultipleChoice
from rankwise.allocation.fill import fill
from rankwise.errors import BudgetError, RecipeError
from rankwise.sizes import DENSE, Cut

ATTENTION_ROLES = frozenset("qkvo")
_PAPER_GROUPS = (("q", "k"), ("o",), ("gate",), ("up",), ("down",))
_PAPER_DENSE = "v"
_AS_GOOD_AS_DENSE = 0.995
_SPREAD = 0.3
_WIDEST = 2.0


class Space(Box):
    """A box whose points stand for cuts of all sites."""

    problem: Problem

    @abstractmethod
    def cuts(self, point: Tensor) -> Cuts:
        """Cuts at a point of shape `[d]`, on the budget as exactly as the candidates allow."""

    def decided(self, point: Tensor) -> Mapping[str, Cut]:
        return self.cuts(point)

    @abstractmethod
    def starts(self, plan: Mapping[str, Cut] | None, coordinates: Mapping[str, float]) -> list[tuple[str, Tensor]]:
        """Points worth trying first, with their names.

        Args:
            plan: cuts of a plan given, or None.
            coordinates: the point that plan was made from, by label; empty when unknown.
        """

    def groups(self, cuts: Mapping[str, Cut]) -> dict[str, float]:
        """What cuts take of each group a weight, for a plan's record."""
        return self.problem.kept_by(self.labels_of_sites(), cuts)

    @abstractmethod
    def labels_of_sites(self) -> dict[str, str]:
        """Site name -> the group it is reported under."""


def parse_groups(text: str) -> tuple[str, int | None]:
    """Read `5x4`, `rolesx1`, `1xlayers`: role groups, and depth groups (None for one a layer).

    Raises:
        RecipeError: when it is of another form.
    """
    matched = re.fullmatch(r"(1|5|roles)x(\d+|layers)", text)
    if not matched or matched[2] == "0":
        raise RecipeError(
            f"{text!r} is no search space.",
            where="allocation",
            remedy="write bayesian:5x1, bayesian:5x4, bayesian:GxL with G one of 1, 5, roles and L a number or "
            "layers, or bayesian:spectral",
        )
    return matched[1], None if matched[2] == "layers" else int(matched[2])


def depths_among(blocks: Sequence[int], depths: int | None, space: str) -> int:
    """How many groups of consecutive blocks there are.

    Args:
        blocks: indices of the blocks.
        depths: groups asked for; None for one a block.
        space: its name.

    Raises:
        RecipeError: when they are more than the blocks.
    """
    if depths is not None and depths > len(blocks):
        raise RecipeError(
            f"{depths} depth groups are more than the model's {len(blocks)} blocks.",
            where=f"allocation: {space}",
            remedy=f"use at most {len(blocks)}, or layers",
        )
    return len(blocks) if depths is None else depths


class GroupSpace(Space):
    """What each group of roles in each group of consecutive blocks takes a weight (Bolaco, section 3.2).

    A coordinate is in the unit of the budget: the fraction that is kept, or bits a weight.

    Args:
        problem: what is chosen from; with losses, the plan by estimated loss is a start.
        grouping: `5` for the paper's {q, k}, o, gate, up, down with v dense; `roles` for every role; `1` for one group.
        depths: groups of consecutive blocks; None for one a block.
        lowest: smallest fraction of a group's bits.

    Raises:
        BudgetError: when the smallest coordinates, with what has to stay dense, exceed the budget.
        RecipeError: when there are more depth groups than blocks, or nothing in any group may be compressed.
    """

    def __init__(self, problem: Problem, grouping: str, depths: int | None, lowest: float) -> None:
        self.name = f"{grouping}x{'layers' if depths is None else depths}"
        self.problem = problem
        sites, unit = problem.sites, problem.allowance.unit_bits
        self._units = problem.form.number_bits / unit
        blocks = sorted({site.block for site in sites})
        depths = depths_among(blocks, depths, self.name)
        self._roles = _role_groups(grouping, {site.role: None for site in sites})
        self._group_of: dict[str, str] = {}
        for site in sites:
            label = self._roles[site.role]
            if label is not None and not problem.candidates[site.name].stays:
                depth = blocks.index(site.block) * depths // len(blocks)
                self._group_of[site.name] = label if depths == 1 else f"{label}@{depth + 1}/{depths}"
        self.labels = list(dict.fromkeys(self._group_of.values()))
        if not self.labels:
            raise RecipeError(
                f"The space {self.name} has nothing to vary: all that it compresses is left out.",
                where="allocation",
                remedy="use bayesian:rolesx1 or bayesian:spectral, which compress every role, or leave out less",
            )
        parameters = dict.fromkeys(self.labels, 0)
        roles_of: dict[str, set[str]] = {label: set() for label in self.labels}
        least, most = dict.fromkeys(self.labels, math.inf), dict.fromkeys(self.labels, 0.0)
        for site in sites:
            label = self._group_of.get(site.name)
            if label is not None:
                parameters[label] += site.parameters
                roles_of[label].add(site.role)
                reach = problem.candidates[site.name].reach
                least[label] = min(least[label], (reach[0] or lowest * problem.form.number_bits) / unit)
                most[label] = max(most[label], reach[1] / unit)
        whole = sum(site.parameters for site in sites)
        dense = sum(problem.cost(site, DENSE) for site in sites if site.name not in self._group_of) / unit
        self.weights = torch.tensor([parameters[label] / whole for label in self.labels], dtype=torch.float64)
        self.total = problem.allowance.bits / unit / whole - dense / whole
        self.lower = torch.tensor([least[label] for label in self.labels], dtype=torch.float64)
        self.upper = torch.tensor([most[label] for label in self.labels], dtype=torch.float64)
        self.attention = [roles_of[label] <= ATTENTION_ROLES for label in self.labels]
        if self.total < float((self.lower * self.weights).sum()) - 1e-12:
            self._refuse(float((self.lower * self.weights).sum()) + dense / whole, dense / whole)
        # The smallest candidates have to fit too.
        problem.check_smallest(lambda site: site.name in self._group_of)

    def _refuse(self, least: float, dense: float) -> None:
        allowance = self.problem.allowance
        bits = allowance.unit_bits * allowance.weights
        staying = sorted({site.role for site in self.problem.sites if site.name not in self._group_of})
        held = f"{', '.join(staying)} stays dense ({allowance.in_words(dense * bits)}) and " if staying else ""
        raise BudgetError(
            f"No plan of {self.name} meets {allowance.asked}: {held}no group may take less than "
            f"{float(self.lower.min()):g} a weight, together at least {allowance.in_words(least * bits)}.",
            where="allocation",
            remedy=f"raise {allowance.option}, use spectral or bayesian:spectral or bayesian:rolesx1 (which compress "
            "every role), or lower allocation.lowest",
        )

    def cuts(self, point: Tensor) -> Cuts:
        at = dict(zip(self.labels, point.tolist(), strict=True))
        fractions: dict[str, float | None] = {}
        for site in self.problem.sites:
            label = self._group_of.get(site.name)
            kept = None if label is None else at[label]
            as_dense = self.problem.candidates[site.name].whole and kept is not None
            if as_dense and kept is not None and kept >= _AS_GOOD_AS_DENSE * self._units:
                kept = None
            fractions[site.name] = kept
        return fill(self.problem, fractions)

    def labels_of_sites(self) -> dict[str, str]:
        return {site.name: self._group_of.get(site.name, f"{site.role} (dense)") for site in self.problem.sites}

    def _averages(self, cuts: Mapping[str, Cut]) -> Tensor:
        """What cuts take of each group a weight, moved onto the budget."""
        kept = self.groups(cuts)
        return self.project(torch.tensor([kept[label] for label in self.labels], dtype=torch.float64))

    def starts(self, plan: Mapping[str, Cut] | None, coordinates: Mapping[str, float]) -> list[tuple[str, Tensor]]:
        found = []
        if plan is not None:
            known = self.given(coordinates)
            found.append(("plan", self._averages(plan) if known is None else self.project(known)))
        middle = self.total / float(self.weights.sum())
        found.append(("uniform", self.project(torch.full_like(self.lower, middle))))
        # LoRD's manual plans: q and k lose half as much again as the rest.
        roles = [set(label.split("@")[0].split("+")) for label in self.labels]
        loss = torch.tensor([1.5 if group & {"q", "k"} else 1.0 for group in roles], dtype=torch.float64)
        found.append(("manual", self.project(self.upper - (self.upper - middle) * loss)))
        if all(each.losses is not None for each in self.problem.candidates.values()):
            found.append(("spectral", self._averages(MultipleChoice(self.problem).plan())))
        return found


def _role_groups(grouping: str, roles: Mapping[str, None]) -> dict[str, str | None]:
    """Role -> label of its group, None for dense."""
    if grouping == "1":
        return dict.fromkeys(roles, "all")
    if grouping == "roles":
        return {role: role for role in roles}
    labels: dict[str, str | None] = {role: "+".join(group) for group in _PAPER_GROUPS for role in group}
    labels[_PAPER_DENSE] = None
    return {role: labels.get(role, role) for role in roles}


class MultiplierSpace(Space):
    """On top of the spectral plan: a weight exp(a) for every role's loss, and a slope over depth.

    w_s = exp(a_role + slope * depth), depth from -1 at the first block to 1 at the last. Only differences between roles
    matter, so the a sum to zero. The point of all zeros is the spectral plan itself.

    Args:
        problem: what is chosen from; without losses the space can be asked for its shape alone.

    Raises:
        BudgetError: when nothing fits.
    """

    def __init__(self, problem: Problem) -> None:
        self.name = "spectral"
        self.problem, sites = problem, problem.sites
        problem.check_smallest()
        seen = all(each.losses is not None for each in problem.candidates.values())
        self._choice = MultipleChoice(problem) if seen else None
        # What stays as it is has nothing that a coordinate of its own would steer.
        roles = list(dict.fromkeys(site.role for site in sites if not problem.candidates[site.name].stays))
        self.labels = [*roles, "slope"]
        self._role = torch.tensor([roles.index(site.role) if site.role in roles else 0 for site in sites])
        blocks = sorted({site.block for site in sites})
        self._depth = torch.tensor([2 * blocks.index(s.block) / max(1, len(blocks) - 1) - 1 for s in sites]).double()
        self.upper = torch.full((len(roles) + 1,), _WIDEST, dtype=torch.float64)
        self.lower = -self.upper
        self.weights = torch.tensor([1 / len(roles)] * len(roles) + [0.0], dtype=torch.float64)
        self.total = 0.0
        self.attention = [role in ATTENTION_ROLES for role in roles] + [False]

    def cuts(self, point: Tensor) -> Cuts:
        assert self._choice is not None
        return self._choice.plan((point[:-1][self._role] + point[-1] * self._depth).exp())

    def draw(self, count: int, source: torch.Generator) -> Tensor:
        """Points around the spectral plan: far from it every plan is bad."""
        drawn = torch.randn(count, self.dimensions, generator=source, dtype=torch.float64)
        return self.project(drawn * self.upper * _SPREAD)

    def labels_of_sites(self) -> dict[str, str]:
        return {site.name: site.role for site in self.problem.sites}

    def starts(self, plan: Mapping[str, Cut] | None, coordinates: Mapping[str, float]) -> list[tuple[str, Tensor]]:
        found = [("spectral", torch.zeros_like(self.lower))]
        known = self.given(coordinates)
        if plan is not None and known is not None:
            found.append(("plan", self.project(known)))
        return found


def space_named(name: str, problem: Problem, lowest: float) -> Space:
    """`spectral`, or GxL as in `parse_groups`.

    Raises:
        RecipeError: for any other name.
        BudgetError: when no point of it meets the budget.
    """
    if name == "spectral":
        return MultiplierSpace(problem)
    grouping, depths = parse_groups(name)
    return GroupSpace(problem, grouping, depths, lowest)
