"""Orders of outputs that need not be undone: a gated feed-forward layer takes its inner channels in any order.

In down(act(gate x) * up x) the rows of `up` and `gate` and the columns of `down` may be permuted together. So of two
pivoted layers `up` and `gate` one keeps the order of its storage, and the other is moved to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.device import summing_tolerance
from rankwise.layers.kinds import kind_of
from rankwise.models import Site


@torch.no_grad()
def fold_orders(
    model: Any, sites: Sequence[Site], probe: Tensor, settle: Callable[[str], None] = lambda _name: None
) -> int:
    """Spare one of the two reorderings in every gated feed-forward layer.

    A model in which the inner channels are not interchangeable (a norm with weights of its own lies between, for one)
    is recognised by its logits on the probe and left as it was.

    Args:
        model: changed in place; layers that compute in its own dtype.
        sites: all sites.
        probe: a short sequence, shape `[1, tokens]`.
        settle: called with the name of every site that was changed, before the next layer is.

    Returns:
        How many layers were changed.
    """
    parents: dict[str, dict[str, Site]] = {}
    for site in sites:
        if site.role in ("up", "gate", "down"):
            parents.setdefault(site.name.rpartition(".")[0], {})[site.role] = site
    gated = [
        ({role: site.module(model) for role, site in roles.items()}, [site.name for site in roles.values()])
        for roles in parents.values()
        if len(roles) == 3
    ]
    movable = [each for each in gated if all(kind_of(module).movable for module in each[0].values())]
    orders = [(_order_of(modules), modules, names) for modules, names in movable]
    if all(order is None for order, *_ in orders):
        return 0
    changes: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        changes.append((owner, name, getattr(owner, name)))
        is_parameter = isinstance(changes[-1][2], nn.Parameter)
        setattr(owner, name, nn.Parameter(value, requires_grad=False) if is_parameter else value)

    folded = 0
    before = model(input_ids=probe, use_cache=False).logits.float()
    for order, modules, names in orders:
        if order is None:
            continue
        for role in ("up", "gate"):
            kind_of(modules[role]).move_outputs(modules[role], order, put)
        kind_of(modules["down"]).move_inputs(modules["down"], order, put)
        folded += 1
        for name in names:
            settle(name)
    after = model(input_ids=probe, use_cache=False).logits.float()
    tolerance = summing_tolerance(model)
    if float((after - before).norm()) <= tolerance * float(before.norm()):
        return folded
    for owner, name, value in reversed(changes):
        setattr(owner, name, value)
    return 0


def _order_of(modules: dict[str, Any]) -> Tensor | None:
    """The order of the first of the two layers that moves its outputs."""
    found = (kind_of(modules[role]).order(modules[role]) for role in ("up", "gate"))
    return next((order for order in found if order is not None), None)
