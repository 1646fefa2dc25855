"""Cuts from proportions alone: every site climbs its rungs until the allowance is spent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rankwise.allocation.base import Cuts, Problem
from rankwise.models import Site
from rankwise.sizes import DENSE

_BISECTIONS = 60
_LARGEST_SCALE = 2.0**20


class _Ladders:
    """The rungs of the sites that are compressed, as one matrix.

    Args:
        problem: what is chosen from.
        wanted: by name of each such site, what it is to take relative to the others.
    """

    def __init__(self, problem: Problem, wanted: Mapping[str, float]) -> None:
        self.sites = [site for site in problem.sites if site.name in wanted]
        self._candidates = [problem.candidates[site.name] for site in self.sites]
        longest = max((len(each.rungs) for each in self._candidates), default=1)
        self.bits = torch.full((len(self.sites), longest), torch.inf, dtype=torch.float64)
        for row, each in enumerate(self._candidates):
            self.bits[row, : len(each.rungs)] = each.bits[each.rungs].double()
        self.wanted = torch.tensor(
            [wanted[site.name] * problem.units(site) for site in self.sites], dtype=torch.float64
        )

    def at(self, scale: float) -> Tensor:
        """By site, the last rung that takes no more than its share of so much a weight; at least the first."""
        # The small excess keeps a fraction such as 0.7 * 10 / 7 from landing one rung low.
        targets = scale * self.wanted * (1 + 1e-12) + 1e-6
        return torch.searchsorted(self.bits, targets.unsqueeze(1), right=True).squeeze(1).sub(1).clamp_min(0)

    def spent(self, rungs: Tensor) -> float:
        return float(self.bits.gather(1, rungs.unsqueeze(1)).sum())

    def cuts(self, rungs: Tensor) -> Cuts:
        return {
            site.name: each.cuts[int(each.rungs[rung])]
            for site, each, rung in zip(self.sites, self._candidates, rungs.tolist(), strict=True)
        }


def fill(problem: Problem, fractions: Mapping[str, float | None]) -> Cuts:
    """Cuts in the proportions asked for that spend the allowance as exactly as the rungs allow.

    All fractions are scaled by one number to the largest whose rungs, rounded down, fit; what is left goes rung by rung
    to the sites that rounding cut most. The total is never above the allowance, and what stays unspent is less than the
    cheapest step that is left.

    Args:
        problem: what is chosen from.
        fractions: by site name, what a weight takes relative to the others; None for dense.

    Raises:
        BudgetError: when even the first rungs do not fit, or no size is set and there is something to choose.
    """
    if not problem.allowance.sized and all(len(each.cuts) == 1 for each in problem.candidates.values()):
        return {site.name: problem.candidates[site.name].cuts[0] for site in problem.sites}
    wanted = {name: f for name, f in fractions.items() if f is not None}
    dense = [site for site in problem.sites if site.name not in wanted]
    problem.check_smallest(lambda site: site.name in wanted)
    left = problem.allowance.bits - sum(problem.cost(site, DENSE) for site in dense)
    ladders = _Ladders(problem, wanted)
    low, high = 0.0, 1.0
    while ladders.spent(ladders.at(high)) <= left and high < _LARGEST_SCALE:
        low, high = high, 2 * high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if ladders.spent(ladders.at(middle)) <= left else (low, middle)
    rungs = ladders.at(low)
    left -= int(ladders.spent(rungs))
    rungs = _spend_rest(ladders, rungs, left, high * ladders.wanted)
    return {**ladders.cuts(rungs), **{site.name: DENSE for site in dense}}


def _spend_rest(ladders: _Ladders, rungs: Tensor, left: float, targets: Tensor) -> Tensor:
    """Go up one rung at a time where the shortfall from the targets is largest, as long as that fits."""
    padded = torch.nn.functional.pad(ladders.bits, (0, 1), value=torch.inf)
    rungs = rungs.clone()
    while len(rungs):
        now = padded.gather(1, rungs.unsqueeze(1)).squeeze(1)
        step = padded.gather(1, rungs.unsqueeze(1) + 1).squeeze(1) - now
        shortfall = torch.where(step <= left, (targets - now) / targets, -torch.inf)
        # Of equals the earlier site: plans are reproducible.
        row = int(shortfall.argmax())
        if shortfall[row] == -torch.inf:
            break
        left -= float(step[row])
        rungs[row] += 1
    return rungs


def nearest_cuts(problem: Problem, fractions: Mapping[str, float | None]) -> Cuts:
    """Every site's rung that is nearest to its fraction, whatever they take together.

    Args:
        problem: what is chosen from.
        fractions: by site name, of the dense weight; None for dense.
    """

    def nearest(site: Site, fraction: float) -> int:
        each = problem.candidates[site.name]
        away = (each.bits[each.rungs] - fraction * problem.cost(site, DENSE)).abs()
        # Of two that are as near, the larger.
        best = (away <= away.min() + 0.5).nonzero().max()
        return int(each.rungs[best])

    return {
        site.name: DENSE
        if (f := fractions[site.name]) is None
        else problem.candidates[site.name].cuts[nearest(site, f)]
        for site in problem.sites
    }
