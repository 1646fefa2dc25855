"""Units, ranks and bits in one budget: what goes, and what is made smaller, by one estimate of the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rankwise.factors import Factors, Fit
from rankwise.linalg import OutputMetric, compensated, damped, psd_factor, removal_losses, removal_order
from rankwise.methods.base import Looking, Method, Outlook, tail_losses
from rankwise.methods.mixed import Mixed
from rankwise.methods.pruning import Compensation, Part, Pruning
from rankwise.methods.quantize import Quantize
from rankwise.methods.quantizing import CURVATURE
from rankwise.methods.two_sided import TwoSided
from rankwise.sizes import DENSE, Budget, Candidates, Cut, Form
from rankwise.statistics import SiteStatistics, Statistic
from rankwise.statistics.curvature import DEFAULT_CURVATURE_GB, Curvature
from rankwise.statistics.input_moments import InputMoments

SHARES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Of the units of a layer, what is tried to stay."""

_RANKS = 48
"""How many ranks of a weight are tried."""

_LEAST = 1e-9
"""Of the mean of a metric's diagonal, what is added so that it can be factored."""


@dataclass(frozen=True)
class _Trial:
    """So many units of a coupling, and what its weights could then be.

    Attributes:
        count: units that stay.
        lost: what those that go are estimated to lose.
        bits: by site, what each way to store it takes, shape `[c]`.
        losses: by site, what each is estimated to lose, shape `[c]`.
    """

    count: int
    lost: float
    bits: list[Tensor]
    losses: list[Tensor]

    def best(self, price: float, weight: float = 1.0) -> tuple[float, float, int]:
        """Loss plus price times bits of the best choice at every site, its bits, and how many units stay.

        Args:
            price: of a bit.
            weight: of what the units that go lose.
        """
        value, spent = weight * self.lost, 0.0
        for bits, losses in zip(self.bits, self.losses, strict=True):
            row = int((losses + price * bits).argmin())
            value += float(losses[row]) + price * float(bits[row])
            spent += float(bits[row])
        return value, spent, self.count


class Pruned(Pruning):
    """Units go where that loses least, and what is left is of low rank, of few bits, or whole.

    A unit's removal, with the linear compensation of what stays, loses tr(F W_P S W_P^T), F = E[g g^T] at the output
    and S what the inputs that stay cannot say of those that go: the unit of `two_sided`'s energies. So for every layer
    a few numbers of units are tried, each with the best that its weights could then be at one price of a bit for the
    whole model. What is left is measured anew and made smaller by the method of `rest`.

    Attributes:
        rest: what makes the rest smaller: `two_sided`, or `mixed` for few bits. Where it is not given, the first for a
            kept fraction, the other for bits or a size.
        steps: how often losses are brought up to date while the order of units is found.
        curvature_damping: of the output metric, see `two_sided`.
        curvature_gb: memory for all F, see `two_sided`.
    """

    rests: ClassVar[bool] = True
    at_consumers: ClassVar[bool] = False
    one_unit: ClassVar[bool] = True
    keeps_factors: ClassVar[bool] = True

    name: Literal["pruned"] = "pruned"
    rest: Literal["two_sided", "mixed"] = "two_sided"
    compensation: Compensation = "linear"
    multiple: Annotated[int, Field(ge=1)] = 8
    steps: Annotated[int, Field(ge=1)] = 64
    curvature_damping: Annotated[float, Field(ge=0)] = 1.0
    curvature_gb: Annotated[float, Field(gt=0)] = DEFAULT_CURVATURE_GB

    @classmethod
    def defaults(cls, budget: Mapping[str, Any]) -> dict[str, Any]:
        few = budget.get("bits") is not None or budget.get("size") is not None
        return {"rest": "mixed" if few else "two_sided"}

    @cached_property
    def _rest(self) -> Method:
        if self.rest == "mixed":
            return Mixed(curvature_damping=self.curvature_damping)
        return TwoSided(damping=self.curvature_damping, curvature_gb=self.curvature_gb)

    @property
    def repairable(self) -> bool:
        return self.rest == "two_sided"

    @property
    def adds_bias(self) -> bool:
        return True

    def check_size(self, asked: Budget, allocation: str) -> None:
        super().check_size(asked, allocation)
        self.check_equal(False, "flap or llm_pruner")
        if self.compensation != "linear":
            raise ValueError("pruned estimates losses with a linear compensation: for another one use flap")
        if self.rest == "mixed" and self.curvature_gb != DEFAULT_CURVATURE_GB:
            raise ValueError("curvature_gb is for rest two_sided")

    def form(self, budget: Budget, number_bits: int) -> Form:
        return self._rest.form(budget, number_bits)

    def candidates(self, shape: tuple[int, int], form: Form, multiple: int, looks: bool) -> Candidates:
        return self._rest.candidates(shape, form, multiple, looks)

    def requests(self) -> tuple[Statistic, ...]:
        return self._rest.requests()

    def plan_requests(self) -> tuple[Statistic, ...]:
        return self._rest.plan_requests()

    def output_metric(self, statistics: SiteStatistics) -> OutputMetric | None:
        return self._rest.output_metric(statistics)

    def outlook(self, weight: Tensor, statistics: SiteStatistics, q_bits: int, source: torch.Generator) -> Outlook:
        return self._rest.outlook(weight, statistics, q_bits, source)

    def estimates(
        self, weight: Tensor, statistics: SiteStatistics, choices: Sequence[int], source: torch.Generator
    ) -> Mapping[int, float]:
        return self._rest.estimates(weight, statistics, choices, source)

    def fit(
        self, weight: Tensor, statistics: SiteStatistics, cut: Cut, source: torch.Generator, looking: Looking
    ) -> tuple[Factors, Fit]:
        return self._rest.fit(weight, statistics, cut, source, looking)

    @property
    def _curvature(self) -> Curvature:
        return CURVATURE if self.rest == "mixed" else Curvature(labels="sampled", memory_gb=self.curvature_gb)

    def pruning_requests(self) -> tuple[Statistic, ...]:
        return (InputMoments(), self._curvature)

    def scores(self, part: Part) -> Tensor:
        """The order in which units stay, as falling numbers."""
        section = part.coupling.columns
        weight, statistics = part.seen(section.site)
        covariance = damped(statistics.of(InputMoments()).covariance(), self.damping)
        order = removal_order(_felt(weight, statistics.of(self._curvature)), covariance, section.size, self.steps)
        scores = torch.empty(len(order), dtype=torch.float64)
        scores[order.cpu()] = torch.arange(len(order), 0, -1, dtype=torch.float64)
        return scores

    def stays(self, parts: Sequence[Part], scores: Mapping[str, Tensor], allowed: int, form: Form) -> dict[str, Tensor]:
        return self.chooses(parts, scores, allowed, form)({})

    def chooses(
        self, parts: Sequence[Part], scores: Mapping[str, Tensor], allowed: int, form: Form
    ) -> Callable[[Mapping[str, float]], dict[str, Tensor]]:
        """Weights are of what the removal of a coupling's units is estimated to lose."""
        orders = {name: score.argsort(descending=True, stable=True) for name, score in scores.items()}
        trials = {part.coupling.name: self._trials(part, orders[part.coupling.name], form) for part in parts}

        def chosen(weights: Mapping[str, float]) -> dict[str, Tensor]:
            def best(price: float) -> dict[str, tuple[float, float, int]]:
                return {
                    name: min(trial.best(price, weights.get(name, 1.0)) for trial in of_part)
                    for name, of_part in trials.items()
                }

            low, high = 1e-30, 1e30
            while high / low > 1 + 1e-6:
                middle = (low * high) ** 0.5
                spent = sum(bits for _, bits, _ in best(middle).values())
                low, high = (low, middle) if spent <= allowed else (middle, high)
            return {name: orders[name][:count].sort().values for name, (_, _, count) in best(high).items()}

        return chosen

    def _trials(self, part: Part, order: Tensor, form: Form) -> list[_Trial]:
        """Every number of units that is tried at a layer."""
        coupling, chunk = part.coupling, part.chunk(self.multiple)
        counts = {max(chunk, round(share * coupling.units / chunk) * chunk) for share in SHARES if share < 1}
        counts = {count for count in counts if count < coupling.units} | {coupling.units}
        consumer, statistics = part.seen(coupling.columns.site)
        felt = statistics.of(self._curvature)
        covariance = damped(statistics.of(InputMoments()).covariance(), self.damping)
        of_consumer = torch.block_diag(*felt)
        lost = removal_losses(_felt(consumer, felt), covariance, order, coupling.columns.size)
        producers = {}
        for name in coupling.sites[:-1]:
            weight, seen = part.seen(name)
            outputs = torch.block_diag(*seen.of(self._curvature))
            producers[name] = weight, seen.of(InputMoments()).covariance(), outputs
        coded = {name: self._coded(part, name) for name in coupling.sites}
        found = []
        for count in sorted(counts):
            units = order[:count].sort().values
            bits, losses = [], []
            for name, (weight, inputs, outputs) in producers.items():
                rows = torch.cat([section.of(units) for section in coupling.rows if section.site == name])
                share = float(outputs.diagonal()[rows].sum() / outputs.diagonal().sum().clamp_min(1e-300))
                cost, loss = _curve(weight[rows], inputs, outputs[rows][:, rows], form, coded[name], share)
                bits.append(cost)
                losses.append(loss)
            columns = coupling.columns.of(units)
            left = consumer if count == coupling.units else compensated(consumer, covariance, columns)
            share = float(covariance.diagonal()[columns].sum() / covariance.diagonal().sum())
            kept = covariance[columns][:, columns]
            cost, loss = _curve(left, kept, of_consumer, form, coded[coupling.columns.site], share)
            found.append(_Trial(count, float(lost[count]), [*bits, cost], [*losses, loss]))
        return found

    def _coded(self, part: Part, name: str) -> Mapping[int, float]:
        """By bits of Q, what rounding the whole weight is estimated to lose; none where bits are no choice."""
        if not isinstance(self._rest, Mixed):
            return {}
        weight, statistics = part.seen(name)
        source = torch.Generator().manual_seed(0)
        return Quantize().estimates(weight, statistics, self._rest.choices, source)


def _felt(weight: Tensor, curvature: Tensor) -> Tensor:
    """P^T W with P P^T = F, the measured one, a little damped; W where F is zero."""
    metric = OutputMetric.where_felt(curvature, _LEAST)
    return weight if metric is None else metric.weigh(weight)


def _curve(
    weight: Tensor, inputs: Tensor, outputs: Tensor, form: Form, coded: Mapping[int, float], share: float
) -> tuple[Tensor, Tensor]:
    """Bits and estimated losses of every way to store a weight: each rank, each number of bits of Q, and whole.

    Energies are the eigenvalues of F W Sigma W^T, from the smaller side.

    Args:
        weight: W, shape `[m, n]`, float64.
        inputs: Sigma, shape `[n, n]`.
        outputs: F, shape `[m, m]`.
        form: how it is stored.
        coded: by bits of Q, what the weight lost before units went.
        share: of that, how much is left.
    """
    m, n = weight.shape
    inner = inputs if n < m else weight @ inputs @ weight.T
    root, failed = torch.linalg.cholesky_ex(damped(inner, _LEAST))
    root = psd_factor(inner) if failed else root
    other = weight.T @ outputs @ weight if n < m else outputs
    energy = torch.linalg.eigvalsh(root.T @ other @ root).clamp_min(0).flip(0)
    tail = tail_losses(energy)
    step = max(1, len(energy) // _RANKS)
    ranks = range(step, len(energy), step)
    whole = form.bits((m, n), DENSE)
    rows = [(form.bits((m, n), Cut(rank)), float(tail[rank])) for rank in ranks]
    rows = [row for row in rows if row[0] < whole] + [(whole, 0.0)]
    rows += [(form.bits((m, n), Cut(0, bits)), loss * share) for bits, loss in coded.items()]
    bits, losses = zip(*rows, strict=True)
    return torch.tensor(bits, dtype=torch.float64), torch.tensor(losses, dtype=torch.float64)
