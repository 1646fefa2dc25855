"""What methods share that take units out: which units stay, and what the weight that read the others makes of it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rankwise.linalg import compensated, damped
from rankwise.methods.whole import WholeWeights
from rankwise.models import Coupling, Site
from rankwise.sizes import Budget, Form
from rankwise.statistics import SiteStatistics, Statistic
from rankwise.statistics.input_moments import InputMoments
from rankwise.statistics.input_spread import InputSpread

Compensation = Literal["none", "bias", "linear"]


@dataclass(frozen=True)
class Part:
    """A coupling, with what was seen at its sites.

    Attributes:
        coupling: whose units may go.
        sites: by name.
        seen: name of a site -> W, shape `[m, n]`, float64, and its statistics.
    """

    coupling: Coupling
    sites: Mapping[str, Site]
    seen: Callable[[str], tuple[Tensor, SiteStatistics]]

    @property
    def numbers(self) -> int:
        """Numbers of one unit in all its weights."""
        coupling = self.coupling
        return coupling.numbers(self.sites[coupling.rows[0].site].n, self.sites[coupling.columns.site].m)

    def chunk(self, multiple: int) -> int:
        """Units that go together, so that what stays is a multiple."""
        return min(multiple, self.coupling.units) if self.coupling.kind == "channels" else 1


def least_numbers(parts: Sequence[Part], multiple: int, whole: Sequence[str] = ()) -> int:
    """What has to stay: one group of heads and the multiple of channels a layer, and all of some couplings."""
    return sum(
        part.numbers * (part.coupling.units if part.coupling.name in whole else part.chunk(multiple)) for part in parts
    )


def by_score(parts: Sequence[Part], scores: Mapping[str, Tensor], allowed: int, multiple: int) -> dict[str, Tensor]:
    """Units of all layers in one order, from the highest score down to what is allowed.

    Something stays everywhere. What does not fit any more is passed over, so that less than the cheapest unit is left.

    Args:
        parts: all that may lose units.
        scores: by coupling, shape `[units]`, comparable among all.
        allowed: numbers that may stay.
        multiple: of channels.

    Returns:
        By coupling, the units that stay, ascending.
    """
    queue: list[tuple[float, int, int, Tensor]] = []
    for index, part in enumerate(parts):
        score = scores[part.coupling.name]
        order = score.argsort(descending=True, stable=True)
        for number, units in enumerate(order.split(part.chunk(multiple))):
            queue.append((math.inf if not number else float(score[units].mean()), index, number, units))
    # Of equals the earlier: plans are reproducible.
    queue.sort(key=lambda each: (-each[0], each[1], each[2]))
    chosen: list[list[Tensor]] = [[] for _ in parts]
    full: set[int] = set()
    for _, index, number, units in queue:
        cost = len(units) * parts[index].numbers
        if number and (index in full or cost > allowed):
            full.add(index)
            continue
        allowed -= cost
        chosen[index].append(units)
    return {part.coupling.name: torch.cat(own).sort().values for part, own in zip(parts, chosen, strict=True)}


def alike(
    parts: Sequence[Part],
    scores: Mapping[str, Tensor],
    allowed: int,
    multiple: int,
    whole: Sequence[str] = (),
    equal: bool = False,
) -> dict[str, Tensor]:
    """The same share of units in every layer, those of the highest scores; what rounding leaves goes to the first.

    Args:
        parts: all that may lose units.
        scores: by coupling, shape `[units]`, comparable within a coupling.
        allowed: numbers that may stay.
        multiple: of channels.
        whole: names of couplings that keep all.
        equal: leave what rounding leaves, so that all layers keep as many.

    Returns:
        By coupling, the units that stay, ascending.
    """

    def kept(share: float) -> list[int]:
        found = []
        for part in parts:
            units, chunk = part.coupling.units, part.chunk(multiple)
            if part.coupling.name in whole:
                found.append(units)
            else:
                # The small excess keeps 0.7 * 10 from landing one unit low.
                found.append(max(chunk, int(units * share + 1e-9) // chunk * chunk))
        return found

    def spent(counts: Sequence[int]) -> int:
        return sum(count * part.numbers for count, part in zip(counts, parts, strict=True))

    low, high = 0.0, 1.0
    if spent(kept(1.0)) <= allowed:
        low = 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(kept(middle)) <= allowed else (low, middle)
    counts = kept(low)
    left = allowed - spent(counts)
    for index, part in enumerate(parts):
        step = part.chunk(multiple)
        if not equal and counts[index] + step <= part.coupling.units and step * part.numbers <= left:
            counts[index] += step
            left -= step * part.numbers
    return {
        part.coupling.name: scores[part.coupling.name].argsort(descending=True, stable=True)[:count].sort().values
        for part, count in zip(parts, counts, strict=True)
    }


class Pruning(WholeWeights):
    """A method that takes units out: channels of feed-forward layers, and groups of attention heads.

    It states `scores`, and how they are compared (`stays`). What is left of a weight is whole.

    Attributes:
        rests: whether what is left is made smaller by other means, so that the budget need not be met by units alone.
        at_consumers: whether statistics are wanted only where units are read, not at all sites of couplings.
        compensation: how the weight that reads what is left makes up for what went: not at all; by a `bias`, exact in
            the mean; or by a `linear` map and a bias, the best there is for the layer by itself.
        multiple: channels of a layer stay in multiples of this.
        equal: every layer keeps as many units, which the config of the original architecture can say: the result is a
            plain checkpoint, if its biases have a place in it too.
        damping: added to the covariance before it is solved with, relative to its mean diagonal.
    """

    rests: ClassVar[bool] = False
    at_consumers: ClassVar[bool] = True

    compensation: Compensation = "none"
    multiple: Annotated[int, Field(ge=1)] = 1
    equal: bool = False
    damping: Annotated[float, Field(gt=0)] = 1e-3

    def check_size(self, asked: Budget, allocation: str) -> None:
        if not asked.sized:
            raise ValueError(f"{self.name} needs a size to choose by: give keep, bits or size")
        known = ("uniform", "plan", *(("bayesian", "spectral") if self.rests else ()))
        if allocation not in known:
            raise ValueError(
                f"the allocation {allocation} is for plans of one model, and {self.name} makes it another: give "
                f"{' or '.join(known[2:]) or known[0]}"
            )

    def check_equal(self, alike: bool, how: str) -> None:
        """Raise when layers are asked to be equal and lose units in a way that makes them differ.

        Raises:
            ValueError: saying how they would be.
        """
        if self.equal and not alike:
            raise ValueError(f"layers keep different numbers of units: for equal ones give {how}")

    @property
    def adds_bias(self) -> bool:
        return self.compensation != "none"

    def pruning_requests(self) -> tuple[Statistic, ...]:
        """Statistics of the model before anything goes."""
        if self.compensation == "linear":
            return (InputMoments(),)
        return (InputSpread(),) if self.compensation == "bias" else ()

    def protected(self, parts: Sequence[Part]) -> list[str]:
        """Names of the couplings that lose nothing."""
        return []

    def least(self, parts: Sequence[Part]) -> int:
        """The fewest numbers that can stay in couplings."""
        return least_numbers(parts, self.multiple, self.protected(parts))

    @abstractmethod
    def scores(self, part: Part) -> Tensor:
        """How much each unit matters, shape `[units]`, float64."""

    @abstractmethod
    def stays(self, parts: Sequence[Part], scores: Mapping[str, Tensor], allowed: int, form: Form) -> dict[str, Tensor]:
        """By coupling, the units that stay, ascending.

        Args:
            parts: all that may lose units, the first block first.
            scores: by coupling.
            allowed: bits that the weights of couplings may take.
            form: how weights are stored.
        """

    def chooses(
        self, parts: Sequence[Part], scores: Mapping[str, Tensor], allowed: int, form: Form
    ) -> Callable[[Mapping[str, float]], dict[str, Tensor]]:
        """Weights of couplings, by name and 1 for one that is not named -> the units that stay within what is allowed.

        With no weights they are those of `stays`; the higher a weight, the more stay.

        Args:
            parts: as for `stays`.
            scores: as for `stays`.
            allowed: as for `stays`.
            form: as for `stays`.
        """

        def chosen(weights: Mapping[str, float]) -> dict[str, Tensor]:
            weighed = {name: score * weights.get(name, 1.0) for name, score in scores.items()}
            return self.stays(parts, weighed, allowed, form)

        return chosen

    def consumer(self, part: Part, units: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """W' of shape `[m, n']` and the bias of what reads the units that stay; None when its columns are taken.

        Bias (FLAP, Eq. 6): b' = b + W_P E[x_P]. Linear: W' = W_K + W_P Sigma_PK (Sigma_KK + eps I)^{-1} and
        b' = b + W E[x] - W' E[x_K].

        Args:
            part: a coupling that loses units.
            units: those that stay.
        """
        section = part.coupling.columns
        inputs = section.of(units)
        if self.compensation == "none":
            return None
        weight, statistics = part.seen(section.site)
        bias = statistics.bias
        inputs = inputs.to(weight.device)
        if self.compensation == "bias":
            mean, made = statistics.of(InputSpread()).mean, weight[:, inputs]
        else:
            moments = statistics.of(InputMoments())
            mean, made = moments.mean, compensated(weight, damped(moments.covariance(), self.damping), inputs)
        extra = weight @ mean - made @ mean[inputs]
        return made, extra if bias is None else bias.to(extra) + extra
