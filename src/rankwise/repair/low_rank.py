"""Training of L and R beside a frozen Q (CALDERA, arXiv 2405.18886: low-rank adaptation)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from rankwise.errors import RecipeError
from rankwise.factors import Factors
from rankwise.layers import KINDS, kind_of
from rankwise.models import Site
from rankwise.quantizers import Packed, Rotation, codebook_named
from rankwise.repair.training import Training

_TRAINED = ("left.weight", "right.weight")
_SIGNS = ("signs_in", "signs_out")


class LowRankFactors(Training):
    """How L and R of a quantised model are trained.

    Attributes:
        trained_rank: so many of the first ranks are trained, the others stay codes; None for all.
        requantize: bring L and R back to the bits they had. Without, what was trained stays at 16 bits.
        signs: train the signs of the rotation too, as numbers; they stay at 16 bits.
    """

    lr: Annotated[float, Field(gt=0)] = 0.005
    trained_rank: Annotated[int, Field(ge=1)] | None = None
    requantize: bool = False
    signs: bool = False

    def open(self, model: Any, sites: Sequence[Site]) -> None:
        """Make the trained part of L R float32 numbers in each quantised layer.

        Raises:
            RecipeError: when there is no such layer, nothing to train in them, or fewer ranks are to be trained than
                are numbers already.
        """
        held = {site.name: kind_of(site.module(model)).factors(site.module(model)) for site in _coded(model, sites)}
        if not held:
            raise RecipeError(
                "The checkpoint is not quantised.",
                where="finetune",
                remedy="use --method full-factors, subspace or lora",
            )
        largest, numbers = max(f.rank for f in held.values()), max(f.full for f in held.values())
        wanted = largest if self.trained_rank is None else self.trained_rank
        if wanted < numbers:
            raise RecipeError(
                f"The first {numbers} ranks of L R are 16-bit numbers in this checkpoint, and all of them are trained.",
                where="trained_rank",
                remedy=f"leave trained_rank away, or give {numbers} or more",
            )
        turned = any(factors.rotation.minus_in is not None for factors in held.values())
        if not largest and not (self.signs and turned):
            raise RecipeError(
                "There is nothing to train: no site has L R.",
                where="finetune",
                remedy="compress with --method caldera and a rank, or train the rotation: --set signs=true",
            )
        for name, factors in held.items():
            _put(model, name, _opened(factors, max(wanted, factors.full), self.signs))

    def attach(self, model: Any, sites: Sequence[Site], seed: int) -> dict[str, nn.Parameter]:
        wanted = (*_TRAINED, *_SIGNS) if self.signs else _TRAINED
        return {
            f"{site.name}.{name}": parameter
            for site in _coded(model, sites)
            for name, parameter in site.module(model).named_parameters()
            if name in wanted
        }

    def fold_in(self, model: Any, sites: Sequence[Site], limits: Mapping[str, int]) -> dict[str, Any]:
        # Before the training is judged: what is judged is what will be stored.
        for site in _coded(model, sites) if self.requantize else ():
            layer = site.module(model)
            factors, bits = kind_of(layer).factors(layer), layer.was_packed
            if factors.full and bits is not None:
                _put(model, site.name, _requantized(factors, *bits))
        return {}

    def settle(self, model: Any, sites: Sequence[Site]) -> None:
        for site in _coded(model, sites):
            layer = site.module(model)
            for name, parameter in layer.named_parameters():
                if name != "bias":
                    parameter.data = parameter.data.to(getattr(torch, layer.form["half"]))


def _coded(model: nn.Module, sites: Sequence[Site]) -> Iterator[Site]:
    """The sites whose layers are codes."""
    return (site for site in sites if not kind_of(site.module(model)).in_numbers)


def _put(model: nn.Module, name: str, factors: Factors) -> None:
    """Put a quantised layer around new factors, whose numbers stay in float32 while they are trained."""
    old: Any = model.get_submodule(name)
    device = next(t.device for t in (*old.buffers(), *old.parameters()))
    new: Any = KINDS["quantized"].of(factors, getattr(torch, old.form["half"]), device)
    for part, values in (("left", factors.left), ("right", factors.right)):
        if values is not None:
            getattr(new, part).weight.data = values.to(device, torch.float32)
    signs = (factors.rotation.minus_in, factors.rotation.minus_out)
    for part, values in zip(_SIGNS, signs, strict=True):
        if values is not None and values.is_floating_point():
            getattr(new, part).data = values.to(device, torch.float32)
    # What L and R were before they were opened, to which they may be brought back.
    packed = kind_of(old).factors(old).packed
    new.was_packed = getattr(old, "was_packed", None) if packed is None else (packed[0].codebook, packed[0].bits)
    new.bias = old.bias
    model.set_submodule(name, new)


def _opened(factors: Factors, full: int, signs: bool) -> Factors:
    """The same with the first ranks as float32 numbers; what are codes after them stay codes."""
    full, minus = min(full, factors.rank), factors.rotation
    rotation = minus
    if signs and minus.minus_in is not None and minus.minus_out is not None:
        rotation = Rotation(_as_numbers(minus.minus_in), _as_numbers(minus.minus_out))
    if not full:
        return replace(factors, rotation=rotation)
    left, right = factors.pair()
    rest = None
    if factors.packed is not None and factors.rank > full:
        rest = _after(factors.packed[0], full - factors.full), _after(factors.packed[1], full - factors.full)
    return replace(factors, left=left[:, :full].float(), right=right[:full].float(), packed=rest, rotation=rotation)


def _as_numbers(minus: Tensor) -> Tensor:
    return minus if minus.is_floating_point() else 1 - 2 * minus.float()


def _after(packed: Packed, first: int) -> Packed:
    return replace(packed, codes=packed.codes[first:], scale=packed.scale[first:])


def _requantized(factors: Factors, codebook_name: str, bits: int) -> Factors:
    """The same with L and R as codes; codes that were kept stay what they were."""
    assert factors.left is not None
    assert factors.right is not None
    codebook = codebook_named(codebook_name, bits, by_row=True)
    left, right = factors.left.double(), factors.right.double()
    rounded = codebook.quantize(left.T)
    # R makes up for the rounding of L as far as it can.
    refitted = codebook.quantize(torch.linalg.pinv(rounded.dense().T) @ (left @ right))
    kept = factors.packed or (None, None)
    packed = _joined(rounded, kept[0]), _joined(refitted, kept[1])
    return replace(factors, left=None, right=None, packed=packed)


def _joined(first: Packed, then: Packed | None) -> Packed:
    if then is None:
        return first
    codes, scale = torch.cat([first.codes, then.codes]), torch.cat([first.scale, then.scale.to(first.scale)])
    return replace(first, codes=codes, scale=scale)
