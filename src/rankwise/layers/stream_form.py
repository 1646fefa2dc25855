"""The form of the blocks of a stream as a config says it, and whether a model is of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import ModelError
from rankwise.layers.narrow import adapters_of, carry
from rankwise.linalg import without_mean
from rankwise.models import PreNorm

_AGREEMENT = 1e-3
"""Difference of logits that is rounding, relative to the largest; above that of float32, far below any other form's."""


def said_form(form: PreNorm) -> dict[str, Any]:
    """The form of blocks as a config says it and `carry` takes it."""
    attention, mlp = form.halves
    return {
        "norms": list(dict.fromkeys((attention.norm, mlp.norm))),
        "attention": attention.parts[0],
        "mlp": list(mlp.parts),
        "parallel": form.parallel,
        "pair": form.pair,
        "biased": list(form.biased),
        "tables": list(form.tables),
        "padded": form.padded,
    }


def check_form(model: Any, form: PreNorm, probe: Tensor) -> None:
    """Find out whether blocks with adapters that change nothing give what the model gives.

    Where norms subtract a mean, it is taken out of the stream between all blocks too, which has to change nothing.

    Args:
        model: the dense model; as it was afterwards.
        form: what it seems to be made of.
        probe: token ids, shape `[1, tokens]`.

    Raises:
        ModelError: naming the architecture, when they do not.
    """
    blocks, said = list(model.base_model.get_submodule(form.blocks)), said_form(form)
    plain, listed = [type(block) for block in blocks], getattr(model, "_no_split_modules", None)
    problem, agree, handles = "", False, []
    with torch.no_grad():
        goal = model(input_ids=probe, use_cache=False).logits.float()
        try:
            for block in blocks:
                carry(model, block, said)
                if form.centred:
                    handles.append(block.register_forward_pre_hook(_take_mean, with_kwargs=True))
            if form.centred:
                norm = model.base_model.get_submodule(form.final)
                handles.append(norm.register_forward_pre_hook(_take_mean, with_kwargs=True))
            found = model(input_ids=probe, use_cache=False).logits.float()
            allowed = max(_AGREEMENT, 16 * torch.finfo(model.dtype).eps) * goal.abs().max()
            agree = found.shape == goal.shape and bool((found - goal).abs().max() <= allowed)
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError) as raised:
            problem = f" ({raised})"
        finally:
            for handle in handles:
                handle.remove()
            for block, kind in zip(blocks, plain, strict=True):
                block.__class__ = kind
                for name in (*adapters_of(said), "rankwise_form"):
                    delattr(block, name)
            if listed is not None:
                model._no_split_modules = listed
    if not agree:
        name = type(model).__name__
        does = (
            "z + attention(norm(z)) + mlp(norm(z))"
            if form.parallel
            else "z + attention(norm(z)), then z + mlp(norm(z))"
        )
        raise ModelError(
            f"{name} cannot be sliced: its blocks do more than {does}{problem}.",
            where=name,
            remedy="take a method of low rank",
        )


def _take_mean(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if given:
        return (without_mean(given[0]), *given[1:]), named
    return given, {**named, "hidden_states": without_mean(named["hidden_states"])}
