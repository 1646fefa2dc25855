"""A multiple choice over candidates by estimated loss (a Lagrangian allocation).

Minimises sum over sites s of w_s loss_s(cut_s) subject to sum bits_s(cut_s) <= allowance. For one multiplier lambda the
sites part: each takes argmin over its candidates of w_s loss + lambda bits. Bisection finds the lambda that meets the
allowance. Staying dense loses nothing and is a jump in bits, so the choice of dense sites next to that lambda is tried
a few ways and the best whole is kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankwise.allocation.base import Cuts, Problem
from rankwise.errors import NotFiniteError

_BISECTIONS = 45
_DENSE_SETS_EITHER_SIDE = 2


class MultipleChoice:
    """Every site's candidates as two matrices. Made once, used for every plan.

    Args:
        problem: its candidates with losses.

    Raises:
        NotFiniteError: naming a site whose losses are not finite.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._candidates = [problem.candidates[site.name] for site in problem.sites]
        counts = [len(each.cuts) - each.whole for each in self._candidates]
        # The last column is the dense candidate, where there is one.
        shape = (len(self._candidates), max(counts, default=0) + 1)
        self.losses = torch.full(shape, math.inf, dtype=torch.float64)
        self.costs = torch.full(shape, math.inf, dtype=torch.float64)
        for row, (site, each, count) in enumerate(zip(problem.sites, self._candidates, counts, strict=True)):
            assert each.losses is not None
            if not torch.isfinite(each.losses).all():
                raise NotFiniteError(
                    "A component's estimated loss is NaN or infinite.",
                    where=site.name,
                    remedy="use more calibration text, or another method",
                )
            self.losses[row, :count] = each.losses[:count]
            self.costs[row, :count] = each.bits[:count].double()
            if each.whole:
                self.losses[row, -1] = each.losses[-1]
                self.costs[row, -1] = float(each.bits[-1])

    def plan(self, weights: Tensor | None = None) -> Cuts:
        """The best cuts found within the allowance.

        Args:
            weights: w_s by site, shape `[sites]`; None for 1 everywhere.

        Raises:
            BudgetError: when even the smallest candidates do not fit.
        """
        allowed = float(self._problem.allowance.bits)
        losses = self.losses if weights is None else self.losses * weights.double().unsqueeze(1)
        # inf * 0 is NaN; what is no candidate stays none.
        losses = torch.where(torch.isfinite(self.costs), losses, math.inf)
        if float(self.costs[:, -1].sum()) <= allowed:
            return self._cuts(torch.full((len(self._candidates),), self.costs.shape[1] - 1))
        self._problem.check_smallest()
        threshold = self._dense_below(losses)
        best: tuple[float, Tensor] | None = None
        order = threshold.argsort(descending=True, stable=True)
        middle = int((threshold >= self._multiplier(losses, self.costs, allowed)).sum())
        # A site without a candidate of its own has no choice.
        forced = int((~torch.isfinite(losses[:, :-1])).all(1).sum())
        for size in range(min(middle + _DENSE_SETS_EITHER_SIDE, len(order)), forced - 1, -1):
            if best is not None and size < middle - _DENSE_SETS_EITHER_SIDE:
                break
            dense = torch.zeros(len(order), dtype=torch.bool)
            dense[order[:size]] = True
            found = self._with_dense(losses, dense, allowed)
            if found is not None and (best is None or found[0] < best[0]):
                best = found
        assert best is not None
        return self._cuts(best[1])

    def _cuts(self, columns: Tensor) -> Cuts:
        last = self.costs.shape[1] - 1
        return {
            site.name: each.cuts[-1 if column == last else column]
            for site, each, column in zip(self._problem.sites, self._candidates, columns.tolist(), strict=True)
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
        # Dense wins over a cut when that loses at least lambda times what it saves.
        each = torch.where(saved > 0, losses[:, :-1] / saved, math.inf)
        return torch.where(torch.isfinite(self.costs[:, -1]), each.min(1).values, -1.0)

    def _with_dense(self, losses: Tensor, dense: Tensor, allowed: float) -> tuple[float, Tensor] | None:
        """The best cuts when exactly these sites stay dense; None when that does not fit.

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
        # What bisection leaves goes, step by step, to where it saves most loss a bit.
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
