"""FLAP: units whose input to the next layer varies least go, and a bias stands for their mean (arXiv 2312.11983)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor

from rankwise.methods.pruning import Compensation, Part, Pruning, alike, by_score
from rankwise.sizes import Form
from rankwise.statistics import Statistic
from rankwise.statistics.input_spread import InputSpread

Structure = Literal["AL-AM", "UL-UM", "UL-MM", "AL-MM"]


class FLAP(Pruning):
    """Scores of the inputs x_j of o and of down, W their weight:

        WIFV  Var(x_j) ||W_:j||^2,  what a bias leaves of an input that goes: E||w_j (x_j - E x_j)||^2
        IFV   Var(x_j)
        WIFN  mean_i |W_ij| ||x_j||, over all tokens

    Where layers are compared they are standardised in each layer, z = (S - mean S) / std S, and a group of heads has
    the mean over its inputs; else a group has their sum.

    Attributes:
        metric: which score.
        structure: `AL-AM` compares units of all layers, heads and channels together; `UL-UM` takes the same share
            everywhere; `AL-MM` and `UL-MM` are told the share of the heads, and channels take the rest.
        heads: that share, kept, for the last two; the share that is kept of all where it is not given.
        squared_attention: square the scores of heads before they are standardised, as the released code does with
            WIFV and the paper does not. For comparison with that code alone.
    """

    name: Literal["flap"] = "flap"
    metric: Literal["WIFV", "IFV", "WIFN"] = "WIFV"
    structure: Structure = "AL-AM"
    heads: Annotated[float, Field(gt=0, le=1)] | None = None
    squared_attention: bool = False
    compensation: Compensation = "bias"

    @model_validator(mode="after")
    def _equal(self) -> FLAP:
        self.check_equal(self.structure.startswith("UL"), "structure UL-UM or UL-MM")
        return self

    def pruning_requests(self) -> tuple[Statistic, ...]:
        return tuple(dict.fromkeys((InputSpread(), *super().pruning_requests())))

    def scores(self, part: Part) -> Tensor:
        coupling = part.coupling
        weight, statistics = part.seen(coupling.columns.site)
        seen = statistics.of(InputSpread())
        if self.metric == "WIFN":
            score = weight.abs().mean(0) * (seen.mean_square() * seen.count).sqrt()
        else:
            score = seen.variance() * (weight.square().sum(0) if self.metric == "WIFV" else 1.0)
        if self.squared_attention and coupling.kind == "heads":
            score = score.square()
        if self.structure.startswith("UL"):
            return score.reshape(coupling.units, -1).sum(1).cpu()
        spread = score.std()
        score = (score - score.mean()) / spread if float(spread) > 0 else score * 0
        return score.reshape(coupling.units, -1).mean(1).cpu()

    def stays(self, parts: Sequence[Part], scores: Mapping[str, Tensor], allowed: int, form: Form) -> dict[str, Tensor]:
        allowed //= form.number_bits
        choose = by_score if self.structure.startswith("AL") else partial(alike, equal=self.equal)
        if self.structure.endswith("AM") or self.structure.endswith("UM"):
            return choose(parts, scores, allowed, self.multiple)
        of_heads = [part for part in parts if part.coupling.kind == "heads"]
        of_channels = [part for part in parts if part.coupling.kind == "channels"]
        whole = sum(part.numbers * part.coupling.units for part in parts)
        in_heads = sum(part.numbers * part.coupling.units for part in of_heads)
        share = allowed / whole if self.heads is None else self.heads
        # What has to stay of the others is theirs.
        least = sum(part.numbers * part.chunk(self.multiple) for part in of_channels)
        for_heads = min(max(round(share * in_heads), sum(part.numbers for part in of_heads)), allowed - least)
        found = choose(of_heads, scores, for_heads, self.multiple)
        used = sum(len(found[part.coupling.name]) * part.numbers for part in of_heads)
        return found | choose(of_channels, scores, allowed - used, self.multiple)
