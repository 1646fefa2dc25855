"""Training of L and R beside a frozen Q (CALDERA, arXiv 2405.18886: low-rank adaptation)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from rankwise.errors import RecipeError
from rankwise.layers import PackedMatrix, QuantizedLinear, layer_form
from rankwise.models import Site
from rankwise.quantizers import Packed, codebook_named
from rankwise.repair.training import Training
from rankwise.sizes import FULL_BITS, BitForm, QuantizedRank


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


def open_low_rank(model: nn.Module, sites: Sequence[Site], form: BitForm, settings: LowRankFactors) -> BitForm:
    """Put in place of each quantised layer one whose trained part is float32 numbers; Q's codes are shared.

    Args:
        model: changed in place.
        sites: all sites; those that are not quantised are left alone.
        form: how the model's sites are stored.
        settings: which ranks, and whether signs.

    Returns:
        The form the model has now.

    Raises:
        RecipeError: when fewer ranks are to be trained than are numbers already.
    """
    largest = max(
        (module.rank for site in sites if isinstance(module := site.module(model), QuantizedLinear)), default=0
    )
    wanted = largest if settings.trained_rank is None else settings.trained_rank
    numbers = form.full(largest)
    if wanted < numbers:
        raise RecipeError(
            f"The first {numbers} ranks of L R are 16-bit numbers in this checkpoint, and all of them are trained.",
            where="trained_rank",
            remedy=f"leave trained_rank away, or give {numbers} or more",
        )
    opened = form.model_copy(
        update={
            "full_rank": max(form.full_rank, wanted),
            "trained_signs": form.trained_signs or (settings.signs and form.hadamard),
        }
    )
    for site in sites:
        old = site.module(model)
        if isinstance(old, QuantizedLinear):
            model.set_submodule(site.name, _opened(old, opened, form.full(old.rank)))
    return opened


def _opened(old: QuantizedLinear, form: BitForm, were_full: int) -> QuantizedLinear:
    shape = (old.out_features, old.in_features)
    device = next(t.device for t in (*old.buffers(), *old.parameters()))
    new = _shell(old, form).to(device)
    full = form.full(old.rank)
    with torch.no_grad():
        if full:
            left, right = old.factors(torch.float32)
            new.left.weight.copy_(left[:, :full])
            new.right.weight.copy_(right[:full])
        if old.rank > full:
            # What was codes after the first `were_full` ranks stays codes after the first `full`.
            for mine, its in ((new.packed_left, old.packed_left), (new.packed_right, old.packed_right)):
                mine.codes, mine.scale = its.codes[full - were_full :].clone(), its.scale[full - were_full :].clone()
        for name, size in (("signs_in", shape[1]), ("signs_out", shape[0])):
            signs = getattr(old, name)
            if form.trained_signs and signs is not None:
                getattr(new, name).copy_(old.signs(signs, size, torch.float32))
            elif signs is not None:
                setattr(new, name, signs)
    return new.requires_grad_(False)


def _shell(old: QuantizedLinear, form: BitForm) -> QuantizedLinear:
    """A layer of another form around the same Q and bias; L R and signs are still to be filled in."""
    bits = 0 if old.q is None else old.q.codes.shape[-1]
    shape, half = (old.out_features, old.in_features), getattr(torch, old.form["half"])
    new = QuantizedLinear(shape[1], shape[0], False, layer_form(form, shape, QuantizedRank(old.rank, bits), half))
    for parameter in new.parameters():
        parameter.data = parameter.data.float()
    new.q, new.bias = old.q, old.bias
    return new


def low_rank_parameters(model: nn.Module, sites: Sequence[Site], signs: bool) -> dict[str, nn.Parameter]:
    """What is trained, by name: L and R where they are numbers, and the signs if asked for."""
    found: dict[str, nn.Parameter] = {}
    for site in sites:
        layer = site.module(model)
        if isinstance(layer, QuantizedLinear):
            for name, parameter in layer.named_parameters():
                if name in ("left.weight", "right.weight") or (signs and name.startswith("signs")):
                    found[f"{site.name}.{name}"] = parameter
    return found


def store_low_rank(model: Any, sites: Sequence[Site], form: BitForm, requantize: bool) -> BitForm:
    """Bring what was trained into the form it is saved in: 16-bit numbers, or codes again.

    Args:
        model: changed in place.
        sites: all sites.
        form: the model's now.
        requantize: whether L and R become codes of `form.lr_bits` again.

    Returns:
        The form the model has then.
    """
    again = requantize and form.lr_bits != FULL_BITS
    stored = form.model_copy(update={"full_rank": 0}) if again else form
    for site in sites:
        layer = site.module(model)
        if not isinstance(layer, QuantizedLinear):
            continue
        if again and layer.left is not None:
            layer = _requantized(layer, stored)
            model.set_submodule(site.name, layer)
        for name, parameter in layer.named_parameters():
            if name != "bias":
                parameter.data = parameter.data.to(getattr(torch, layer.form["half"]))
    return stored


def _requantized(old: QuantizedLinear, form: BitForm) -> QuantizedLinear:
    """The same layer with L and R as codes; codes that were kept stay what they were."""
    new = _shell(old, form)
    new.signs_in, new.signs_out = old.signs_in, old.signs_out
    codebook = codebook_named(form.lr_codebook, form.lr_bits, by_row=True)

    def put(found: Packed, kept: PackedMatrix | None, into: PackedMatrix) -> None:
        codes, scale = [found.codes], [found.scale.to(torch.bfloat16)]
        if kept is not None:
            codes.append(kept.codes)
            scale.append(kept.scale.to(torch.bfloat16))
        into.codes, into.scale = torch.cat(codes), torch.cat(scale)

    left, right = old.left.weight.detach().double(), old.right.weight.detach().double()
    rounded = codebook.quantize(left.T)
    # R makes up for the rounding of L as far as it can.
    refitted = torch.linalg.pinv(rounded.dense().T) @ (left @ right)
    put(rounded, old.packed_left, new.packed_left)
    put(codebook.quantize(refitted), old.packed_right, new.packed_right)
    return new.requires_grad_(False)
