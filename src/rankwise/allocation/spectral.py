"""A plan from estimated loss over the whole model, without a search (a Lagrangian allocation).

Minimises sum over sites s of w_s * sum_{i > r_s} energy_{s,i} subject to sum cost_s(r_s) <= budget. For one multiplier
lambda the sites part: each takes argmin over r of w_s tail_s(r) + lambda cost_s(r), staying dense (tail 0, cost m n)
being one of the candidates. Bisection finds the lambda that meets the budget; because staying dense is a jump, the
choice of dense sites next to that lambda is tried a few ways and the best whole is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from rankwise.allocation.base import Allocation, Choice, Evidence, Looks
from rankwise.errors import NotFiniteError, RecipeError
from rankwise.models import Site
from rankwise.sizes import BitBudget, Budget, QuantizedRank, Rank

_BISECTIONS = 45
_DENSE_SETS_EITHER_SIDE = 2


class Tails:
    """Every site's candidates: what each rank costs and what it drops. Made once, used for every plan.

    Args:
        sites: the sites.
        energies: by site name, the loss of each component, shape `[k]`, not negative.
        budget: says which ranks there are.

    Raises:
        NotFiniteError: naming a site whose energies are not finite.
    """

    def __init__(self, sites: Sequence[Site], energies: Mapping[str, Tensor], budget: Budget) -> None:
        self.sites = list(sites)
        self.budget = budget
        counts = [budget.largest_rank(site) // budget.rank_multiple for site in sites]
        # The last column is the dense candidate, the others are ranks in steps of the multiple.
        shape = (len(self.sites), max(counts, default=0) + 1)
        self.losses = torch.full(shape, math.inf, dtype=torch.float64)
        self.costs = torch.full(shape, math.inf, dtype=torch.float64)
        for row, (site, count) in enumerate(zip(self.sites, counts, strict=True)):
            ranks = torch.arange(1, count + 1) * budget.rank_multiple
            tail = tail_losses(energies[site.name], site)
            self.losses[row, :count] = tail[ranks.clamp_max(len(tail) - 1)]
            self.costs[row, :count] = torch.tensor(
                [float(budget.cost(site, int(r))) for r in ranks], dtype=torch.float64
            )
            self.losses[row, -1] = 0.0
            self.costs[row, -1] = site.parameters

    def plan(self, weights: Tensor | None = None) -> dict[str, Rank]:
        """The best ranks found on the budget.

        Args:
            weights: w_s by site, shape `[sites]`; None for 1 everywhere.

        Raises:
            BudgetError: when even the smallest ranks do not fit.
        """
        allowed = float(self.budget.allowed(self.sites))
        losses = self.losses if weights is None else self.losses * weights.double().unsqueeze(1)
        # inf * 0 is NaN; what is no candidate stays none.
        losses = torch.where(torch.isfinite(self.costs), losses, math.inf)
        if float(self.costs[:, -1].sum()) <= allowed:
            return {site.name: None for site in self.sites}
        check_smallest(self.sites, self.budget)
        threshold = self._dense_below(losses)
        best: tuple[float, Tensor] | None = None
        order = threshold.argsort(descending=True, stable=True)
        middle = int((threshold >= self._multiplier(losses, self.costs, allowed)).sum())
        # A site without a rank of its own has no choice.
        forced = int((~torch.isfinite(losses[:, :-1])).all(1).sum())
        for size in range(min(middle + _DENSE_SETS_EITHER_SIDE, len(self.sites)), forced - 1, -1):
            if best is not None and size < middle - _DENSE_SETS_EITHER_SIDE:
                break
            dense = torch.zeros(len(self.sites), dtype=torch.bool)
            dense[order[:size]] = True
            found = self._with_dense(losses, dense, allowed)
            if found is not None and (best is None or found[0] < best[0]):
                best = found
        assert best is not None
        return {
            site.name: None if choice == self.costs.shape[1] - 1 else (choice + 1) * self.budget.rank_multiple
            for site, choice in zip(self.sites, best[1].tolist(), strict=True)
        }

    def _multiplier(self, losses: Tensor, costs: Tensor, allowed: float) -> float:
        """The smallest lambda (to bisection's precision) whose choice fits."""
        low, high = self._range(losses)
        for _ in range(_BISECTIONS):
            middle = math.sqrt(low * high)
            chosen = (losses + middle * costs.nan_to_num(posinf=0.0)).argmin(1, keepdim=True)
            low, high = (low, middle) if float(costs.gather(1, chosen).sum()) <= allowed else (middle, high)
        return high

    def _range(self, losses: Tensor) -> tuple[float, float]:
        finite = losses[torch.isfinite(losses) & (losses > 0)]
        if not len(finite):
            return 1e-30, 1.0
        most = float(self.costs[torch.isfinite(self.costs)].max())
        return float(finite.min()) / most * 1e-6, float(finite.max()) * 1e3

    def _dense_below(self, losses: Tensor) -> Tensor:
        """For each site, the lambda under which staying dense is its best choice, shape `[sites]`."""
        saved = self.costs[:, -1:] - self.costs[:, :-1]
        # Dense wins over a rank when its loss is at least lambda times what the rank saves.
        each = torch.where(saved > 0, losses[:, :-1] / saved, math.inf)
        return each.min(1).values

    def _with_dense(self, losses: Tensor, dense: Tensor, allowed: float) -> tuple[float, Tensor] | None:
        """The best ranks when exactly these sites stay dense; None when that does not fit.

        Returns:
            The loss, and the chosen column of each site, shape `[sites]`.
        """
        losses = losses.clone()
        losses[dense, :-1] = math.inf
        losses[~dense, -1] = math.inf
        if not torch.isfinite(losses).any(1).all():
            return None
        costs = torch.where(torch.isfinite(losses), self.costs, math.inf)
        if float(costs.min(1).values.sum()) > allowed:
            return None
        known = costs.nan_to_num(posinf=0.0)
        multiplier = self._multiplier(losses, costs, allowed)
        chosen = (losses + multiplier * known).argmin(1)
        rows = torch.arange(len(chosen))
        if float(costs[rows, chosen].sum()) > allowed:
            chosen = costs.argmin(1)
        left = allowed - float(costs[rows, chosen].sum())
        # What bisection leaves goes, step by step, to where it saves most loss a parameter.
        while True:
            extra = costs - costs[rows, chosen].unsqueeze(1)
            gain = losses[rows, chosen].unsqueeze(1) - losses
            rate = torch.where((extra > 0) & (extra <= left) & (gain > 0), gain / extra, -1.0)
            best = int(rate.argmax())
            row, column = divmod(best, rate.shape[1])
            if float(rate[row, column]) <= 0:
                return float(losses[rows, chosen].sum()), chosen
            left -= float(extra[row, column])
            chosen[row] = column


class BitTails(Tails):
    """Candidates of a budget of bits: every number of bits of Q with every rank beside it; none stays dense.

    Args and errors as for `Tails`; energies have a row for each number of bits, shape `[choices, k]`.
    """

    def __init__(self, sites: Sequence[Site], energies: Mapping[str, Tensor], budget: BitBudget) -> None:
        self.sites, self.budget = list(sites), budget
        # A rank that is given leaves Q alone to be chosen.
        least = 0 if budget.choices[0] else budget.rank_multiple
        first = [least if budget.rank is None else budget.largest_rank(site) for site in sites]
        ranks_of = [
            range(r, budget.largest_rank(s) + 1, budget.rank_multiple) for r, s in zip(first, sites, strict=True)
        ]
        self._ranks = ranks_of
        self._steps, choices = max(len(ranks) for ranks in ranks_of), len(budget.choices)
        # The last column, which stands for dense elsewhere, stays no candidate.
        shape = (len(self.sites), self._steps * choices + 1)
        self.losses = torch.full(shape, math.inf, dtype=torch.float64)
        self.costs = torch.full(shape, math.inf, dtype=torch.float64)
        for row, (site, ranks) in enumerate(zip(self.sites, ranks_of, strict=True)):
            for choice, bits in enumerate(budget.choices):
                tail = tail_losses(energies[site.name][choice], site)
                place = slice(choice * self._steps, choice * self._steps + len(ranks))
                self.losses[row, place] = tail[torch.tensor(ranks).clamp_max(len(tail) - 1)]
                self.costs[row, place] = torch.tensor(
                    [float(budget.cost(site, QuantizedRank(r, bits))) for r in ranks], dtype=torch.float64
                )

    def plan(self, weights: Tensor | None = None) -> dict[str, Rank]:
        assert isinstance(self.budget, BitBudget)
        allowed = float(self.budget.allowed(self.sites))
        self.budget.check_smallest(self.sites, int(self.costs.min(1).values.sum()))
        losses = self.losses if weights is None else self.losses * weights.double().unsqueeze(1)
        losses = torch.where(torch.isfinite(self.costs), losses, math.inf)
        found = self._with_dense(losses, torch.zeros(len(self.sites), dtype=torch.bool), allowed)
        assert found is not None
        ranks: dict[str, Rank] = {}
        for site, of_site, column in zip(self.sites, self._ranks, found[1].tolist(), strict=True):
            choice, step = divmod(column, self._steps)
            ranks[site.name] = QuantizedRank(of_site[step], self.budget.choices[choice])
        return ranks


def tails_for(sites: Sequence[Site], energies: Mapping[str, Tensor], budget: Budget) -> Tails:
    """The candidates of a budget; errors as for `Tails`."""
    return BitTails(sites, energies, budget) if isinstance(budget, BitBudget) else Tails(sites, energies, budget)


def tail_losses(energy: Tensor, site: Site) -> Tensor:
    """What is lost at each rank 0..k, from the energies of k components.

    Raises:
        NotFiniteError: naming a site whose energies are not finite.
    """
    energy = energy.double().cpu().clamp_min(0)
    if not torch.isfinite(energy).all():
        raise NotFiniteError(
            "A component's estimated loss is NaN or infinite.",
            where=site.name,
            remedy="use more calibration text, or another method",
        )
    return torch.cat([energy.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])


def check_smallest(sites: Sequence[Site], budget: Budget) -> None:
    """Raise when one step of rank everywhere is already too much.

    Raises:
        BudgetError: saying what is kept at least.
    """
    budget.fill(sites, {site.name: 1.0 for site in sites})


class Spectral(Allocation):
    """Ranks that minimise the sum of dropped component losses, as the method's bases estimate them.

    Meant for `two_sided`, whose energies estimate the loss itself in one unit at every site. Other methods' energies
    have a scale of their own at each site; the plan is then only as good as that scale.
    """

    looks: ClassVar[Looks] = Looks.ENERGIES

    name: Literal["spectral"] = "spectral"

    @classmethod
    def parse(cls, text: str) -> Self:
        if text:
            raise RecipeError("spectral takes no settings.", where=f"spectral:{text}", remedy="write spectral")
        return cls()

    def check(self, sites: Sequence[Site], budget: Budget) -> None:
        check_smallest(sites, budget)

    def choose(self, sites: Sequence[Site], budget: Budget, evidence: Evidence) -> Choice:
        return Choice.by_role(sites, tails_for(sites, evidence.energies, budget).plan(), budget)
