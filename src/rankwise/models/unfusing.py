"""Taking the fused experts of a model apart, where it is sure that they compute the same afterwards."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rankwise.models.experts import UnfusedExperts, is_fused, projections, unfuse

_TOKENS = 8
_AGREEMENT = 0.02
"""Relative difference allowed between fused and unfused experts: above the rounding of bfloat16."""


@dataclass(frozen=True)
class Unfused:
    """What became of a model's fused experts.

    Attributes:
        parts: name of each parameter that there is now -> name of the fused parameter that it is a view of.
        left: classes of experts that compute something else than is known here; they stay as they are.
    """

    parts: dict[str, str]
    left: tuple[str, ...]


def unfuse_experts(model: nn.Module) -> Unfused:
    """Make the projections of every expert plain linear layers, whose weights are views of the fused parameters.

    The first module of each class is tried on a few random tokens before, and a class that gives something else when it
    is taken apart is left as it is. Tensors without data (on `meta`) cannot be tried; there the layout alone decides.

    Args:
        model: changed in place.
    """
    fused: dict[str, Any] = {path: module for path, module in model.named_modules() if is_fused(module)}
    same: dict[type, bool] = {}
    for module in fused.values():
        if type(module) not in same:
            same[type(module)] = _computes_the_same(module)
    paths = [path for path, module in fused.items() if same[type(module)]]
    unfuse(model, paths)
    parts = {}
    for path in paths:
        first, down = projections(fused[path])
        for number in range(fused[path].num_experts):
            expert = model.get_submodule(f"{path}.{number}")
            for name, _ in expert.named_parameters():
                layer, _, leaf = name.partition(".")
                whole = down if layer == down else first
                parts[f"{path}.{number}.{name}"] = f"{path}.{whole}{'_bias' if leaf == 'bias' else ''}"
    return Unfused(parts, tuple(kind.__name__ for kind, is_same in same.items() if not is_same))


@torch.no_grad()
def _computes_the_same(module: Any) -> bool:
    """Whether a fused module, taken apart, gives what it gives as a whole; the module itself is not changed."""
    weight = module.down_proj
    if weight.is_meta:
        return True
    source = torch.Generator().manual_seed(0)
    width = weight.shape[2 if module.is_transposed else 1]
    top = min(2, module.num_experts)
    index = torch.rand(_TOKENS, module.num_experts, generator=source).topk(top).indices
    given = (
        torch.randn(_TOKENS, width, generator=source).to(weight),
        index.to(weight.device),
        torch.rand(_TOKENS, top, generator=source).to(weight),
    )
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = dict(module._parameters)
    try:
        expected = module(*given).float()
        found = UnfusedExperts(twin)(*given).float()
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, StopIteration):
        return False
    return found.shape == expected.shape and float((found - expected).norm()) <= _AGREEMENT * float(expected.norm())
