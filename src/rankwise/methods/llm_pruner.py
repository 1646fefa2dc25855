"""LLM-Pruner: units go by a Taylor estimate of what the loss does without them (arXiv 2305.11627)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rankwise.methods.pruning import Part, Pruning, alike, by_score
from rankwise.sizes import Form
from rankwise.statistics import Statistic
from rankwise.statistics.weight_gradient import WeightGradient

FIRST, LAST = 4 / 32, 2 / 32
"""Of all layers, the share that is protected at either end, as published for 32 of them (4..29 are pruned)."""


class LLMPruner(Pruning):
    """Importance of a row or a column c of one matrix, g the gradient of the mean loss at it, a the mean of the squares
    of each sequence's:

        vectorize  |sum_c w g|
        first      sum_c |w g|
        second     sum_c |w^2 a|
        mixed      sum_c |w g - w^2 a / 2|

    That of a unit is taken over its rows and columns in all weights of the coupling; a head's is summed over its
    channels.

    Attributes:
        importance: which of these.
        reduction: how the members of a unit come together. Where query heads share a key-value head, those of one
            weight are summed first.
        share: `local`: the same share of every layer that is pruned. `global`: one order over all of them.
        first: layers at the start that keep all; None for the published share of them.
        last: layers at the end that keep all; None for the published share.
    """

    at_consumers: ClassVar[bool] = False

    name: Literal["llm_pruner"] = "llm_pruner"
    importance: Literal["vectorize", "first", "second", "mixed"] = "first"
    reduction: Literal["sum", "mean", "max", "product", "first"] = "sum"
    share: Literal["local", "global"] = "local"
    first: Annotated[int, Field(ge=0)] | None = None
    last: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _equal(self) -> LLMPruner:
        self.check_equal(self.share == "local" and self.first == self.last == 0, "share local, first 0 and last 0")
        return self

    @property
    def _gradient(self) -> WeightGradient:
        return WeightGradient(squares=self.importance in ("second", "mixed"))

    def pruning_requests(self) -> tuple[Statistic, ...]:
        return (self._gradient, *super().pruning_requests())

    def protected(self, parts: Sequence[Part]) -> list[str]:
        blocks = sorted({part.coupling.block for part in parts})
        first = round(FIRST * len(blocks)) if self.first is None else self.first
        last = round(LAST * len(blocks)) if self.last is None else self.last
        kept = set(blocks[:first]) | set(blocks[max(0, len(blocks) - last) :])
        return [part.coupling.name for part in parts if part.coupling.block in kept]

    def _of(self, part: Part, site: str, side: int) -> Tensor:
        """Importance of each row (side 1) or column (side 0) of a site's weight."""
        weight, statistics = part.seen(site)
        found = statistics.of(self._gradient).to(weight)
        first = weight * found[0]
        if self.importance == "vectorize":
            return first.sum(side).abs()
        if self.importance == "first":
            return first.abs().sum(side)
        second = weight.square() * found[1]
        return (second if self.importance == "second" else first - second / 2).abs().sum(side)

    def scores(self, part: Part) -> Tensor:
        coupling = part.coupling
        members = []
        for section in coupling.rows:
            values = self._of(part, section.site, 1)
            members.append(values[section.start : section.start + coupling.units * section.size])
        members.append(self._of(part, coupling.columns.site, 0))
        members = [values.reshape(coupling.units, -1).cpu() for values in members]
        if len({values.shape[1] for values in members}) > 1:
            members = [values.sum(1, keepdim=True) for values in members]
        stacked = torch.stack(members)
        reduce = {
            "sum": lambda x: x.sum(0),
            "mean": lambda x: x.mean(0),
            "max": lambda x: x.amax(0),
            "product": lambda x: x.prod(0),
            "first": lambda x: x[0],
        }[self.reduction]
        return reduce(stacked).sum(1)

    def stays(self, parts: Sequence[Part], scores: Mapping[str, Tensor], allowed: int, form: Form) -> dict[str, Tensor]:
        allowed //= form.number_bits
        whole = self.protected(parts)
        if self.share == "local":
            return alike(parts, scores, allowed, self.multiple, whole, self.equal)
        pruned = [part for part in parts if part.coupling.name not in whole]
        kept = {part.coupling.name: torch.arange(part.coupling.units) for part in parts if part not in pruned}
        used = sum(part.numbers * part.coupling.units for part in parts if part not in pruned)
        return kept | by_score(pruned, scores, allowed - used, self.multiple)
