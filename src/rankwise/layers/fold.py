"""Orders of outputs that need not be undone: a gated feed-forward layer takes its inner channels in any order.

In down(act(gate x) * up x) the rows of `up` and `gate` and the columns of `down` may be permuted together. So of two
pivoted layers `up` and `gate` one keeps the order of its storage, and the other is moved to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.layers.low_rank import LowRankLinear
from rankwise.layers.pivoted import PivotedLinear
from rankwise.models import Site

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_COARSE_TOLERANCE = 0.05
"""Above what another order of summation changes in that dtype, below what wrongly paired channels do."""


def _set(changes: list[tuple[Any, str, Any]], owner: Any, name: str, value: Any) -> None:
    """Set an attribute, remembering what it was."""
    changes.append((owner, name, getattr(owner, name)))
    setattr(
        owner, name, nn.Parameter(value, requires_grad=False) if isinstance(changes[-1][2], nn.Parameter) else value
    )


def _permute_outputs(changes: list[tuple[Any, str, Any]], module: Any, order: Tensor) -> None:
    """Let output j be what output `order[j]` was."""
    if isinstance(module, PivotedLinear):
        place = torch.arange(len(order), device=order.device) if module.place is None else module.place
        moved = place[order].to(torch.int32)
        unmoved = bool((moved == torch.arange(len(order), device=order.device)).all())
        _set(changes, module, "place", None if unmoved else moved)
        return
    inner = module.left if isinstance(module, LowRankLinear) else module
    columns = isinstance(inner, Conv1D)
    _set(changes, inner, "weight", (inner.weight[:, order] if columns else inner.weight[order]).contiguous())
    if inner.bias is not None:
        _set(changes, inner, "bias", inner.bias[order].contiguous())


def _permute_inputs(changes: list[tuple[Any, str, Any]], module: Any, order: Tensor) -> None:
    """Let input j be what input `order[j]` was."""
    inner = {LowRankLinear: "right", PivotedLinear: "first"}.get(type(module))
    inner = module if inner is None else getattr(module, inner)
    rows = isinstance(inner, Conv1D)
    _set(changes, inner, "weight", (inner.weight[order] if rows else inner.weight[:, order]).contiguous())


@torch.no_grad()
def fold_orders(model: Any, sites: Sequence[Site], probe: Tensor) -> int:
    """Spare one of the two reorderings in every gated feed-forward layer.

    A model in which the inner channels are not interchangeable (a norm with weights of its own lies between, for one)
    is recognised by its logits on the probe and left as it was.

    Args:
        model: changed in place; layers that compute in its own dtype.
        sites: all sites.
        probe: a short sequence, shape `[1, tokens]`.

    Returns:
        How many layers were changed.
    """
    parents: dict[str, dict[str, Site]] = {}
    for site in sites:
        if site.role in ("up", "gate", "down"):
            parents.setdefault(site.name.rpartition(".")[0], {})[site.role] = site
    gated = [
        {role: site.module(model) for role, site in roles.items()} for roles in parents.values() if len(roles) == 3
    ]
    leaders = [(next((r for r in ("up", "gate") if _moves(modules[r])), None), modules) for modules in gated]
    if all(leader is None for leader, _ in leaders):
        return 0
    changes: list[tuple[Any, str, Any]] = []
    folded = 0
    before = model(input_ids=probe, use_cache=False).logits.float()
    for leader, modules in leaders:
        if leader is None:
            continue
        order = modules[leader].place.argsort()
        for role in ("up", "gate"):
            _permute_outputs(changes, modules[role], order)
        _permute_inputs(changes, modules["down"], order)
        folded += 1
    after = model(input_ids=probe, use_cache=False).logits.float()
    tolerance = _TOLERANCE.get(model.get_input_embeddings().weight.dtype, _COARSE_TOLERANCE)
    if float((after - before).norm()) <= tolerance * float(before.norm()):
        return folded
    for owner, name, value in reversed(changes):
        setattr(owner, name, value)
    return 0


def _moves(module: Any) -> bool:
    return isinstance(module, PivotedLinear) and module.place is not None
