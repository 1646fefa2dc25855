"""Taking fused experts and grouped layers apart, where it is sure that they compute the same afterwards."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rankwise.models.experts import Layout, UnfusedExperts, layout_of, unfuse
from rankwise.models.grouped import GroupedLinear, groups_of, is_routed, ungroup

_TOKENS = 8
_AGREEMENT = 0.02
"""Relative difference allowed between fused and unfused experts: above the rounding of bfloat16."""


@dataclass(frozen=True)
class Unfused:
    """What became of a model's fused experts and grouped layers.

    Attributes:
        parts: name of each parameter that there is now -> name of the fused parameter that it is a view of.
        left: classes that compute something else than is known here; they stay as they are.
    """

    parts: dict[str, str]
    left: tuple[str, ...]


def unfuse_experts(model: nn.Module) -> Unfused:
    """Make the projections of every expert and the layers of every group plain linear layers, whose weights are views.

    The first module of each class is tried on a few random tokens before, and a class that gives something else when it
    is taken apart is left as it is. Tensors without data (on `meta`) cannot be tried; there the layout alone decides.

    Args:
        model: changed in place.
    """
    fused: dict[str, tuple[Any, Layout]] = {}
    grouped: dict[str, Any] = {}
    for path, module in model.named_modules():
        layout = layout_of(module)
        if layout is not None:
            fused[path] = (module, layout)
        elif groups_of(module):
            grouped[path] = module
    same: dict[type, bool] = {}
    for module, layout in fused.values():
        if type(module) not in same:
            same[type(module)] = _computes_the_same(module, layout)
    for module in grouped.values():
        if type(module) not in same:
            same[type(module)] = _maps_the_same(module)
    paths = [path for path, (module, _) in fused.items() if same[type(module)]]
    unfuse(model, paths)
    parts = {}
    for path in paths:
        layout = fused[path][1]
        holder = {part: name for name, _ in layout.weights() for part in layout.parts(name)}
        for number in range(layout.experts):
            for name, _ in model.get_submodule(f"{path}.{number}").named_parameters():
                layer, _, leaf = name.partition(".")
                parts[f"{path}.{number}.{name}"] = f"{path}.{holder[layer]}{'_bias' if leaf == 'bias' else ''}"
    apart = [path for path, module in grouped.items() if same[type(module)]]
    ungroup(model, apart)
    for path in apart:
        for child, _ in model.get_submodule(path).named_children():
            parts[f"{path}.{child}.weight"] = f"{path}.weight"
    return Unfused(parts, tuple(kind.__name__ for kind, is_same in same.items() if not is_same))


@torch.no_grad()
def _computes_the_same(module: Any, layout: Layout) -> bool:
    """Whether a fused module, taken apart, gives what it gives as a whole; the module itself is not changed."""
    weight = module.get_parameter(layout.down)
    if weight.is_meta:
        return True
    given = _tokens(module, layout)
    try:
        expected = module(*given).float()
        found = UnfusedExperts(_shell(module), layout)(*given).float()
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, StopIteration):
        return False
    return found.shape == expected.shape and float((found - expected).norm()) <= _AGREEMENT * float(expected.norm())


@torch.no_grad()
def _maps_the_same(module: Any) -> bool:
    """The same of a grouped layer."""
    weight, count = module.weight, groups_of(module)
    if weight.is_meta:
        return True
    source = torch.Generator().manual_seed(0)
    if is_routed(module):
        sizes = [number % 3 for number in range(count)]
        given: tuple[Any, ...] = (torch.randn(sum(sizes), weight.shape[-1], generator=source).to(weight), sizes)
    else:
        given = (torch.randn(1, _TOKENS, count, weight.shape[-1], generator=source).to(weight),)
    try:
        expected = module(*given).float()
        found = GroupedLinear(_shell(module), count)(*given).float()
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError):
        return False
    return found.shape == expected.shape and float((found - expected).norm()) <= _AGREEMENT * float(expected.norm())


def _tokens(module: Any, layout: Layout) -> tuple[torch.Tensor, ...]:
    """Random tokens in the form that a fused module takes, with the experts that they go to."""
    source = torch.Generator().manual_seed(0)
    weight = module.get_parameter(layout.down)
    width = weight.shape[-1] if layout.transposed[1] else weight.shape[-2]
    count = layout.experts + layout.identities
    top = min(2, count)
    index = torch.rand(_TOKENS, count, generator=source).topk(top).indices
    x = torch.randn(_TOKENS, width, generator=source)
    share = torch.rand(_TOKENS, top, generator=source)
    if len(inspect.signature(module.forward).parameters) == 1:
        taken = torch.zeros(_TOKENS, count).scatter(1, index, share)
        return ((taken.T[:, :, None] * x).flatten(0, 1).to(weight),)
    # Where the rows of all experts are one matrix, a batch of sequences is read as it is.
    x = x if weight.ndim == 3 else x[None]
    return x.to(weight), index.to(weight.device), share.to(weight)


def _shell(module: Any) -> Any:
    """The same module and modules inside, so that their parameters can be taken from them."""
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = dict(module._parameters)
    twin.__dict__["_modules"] = {
        name: None if child is None else _shell(child) for name, child in module._modules.items()
    }
    return twin
