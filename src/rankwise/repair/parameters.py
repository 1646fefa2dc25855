"""What is trained: factors brought to one scale, and an optimiser whose steps fit tensors of any scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from rankwise.layers import LowRankLinear, kind_of
from rankwise.models import Site, decoder_blocks

_WARM_UP = 0.05
_FLOOR = 1e-4


@torch.no_grad()
def balance(layer: LowRankLinear) -> None:
    """Give each component's column of L and row of R the same root mean square; L R stays as it is.

    A step of one size then means the same on both sides.
    """
    left, right = layer.left.weight, layer.right.weight
    columns = left.square().mean(0).sqrt().clamp_min(torch.finfo(left.dtype).tiny)
    rows = right.square().mean(1).sqrt().clamp_min(torch.finfo(left.dtype).tiny)
    ratio = (rows / columns).sqrt()
    usable = torch.isfinite(ratio) & (ratio > 1e-6) & (ratio < 1e6)
    ratio = torch.where(usable, ratio, torch.ones_like(ratio))
    left.mul_(ratio)
    right.div_(ratio[:, None])


def trainable(model: nn.Module, sites: Sequence[Site], norms: bool) -> dict[str, nn.Parameter]:
    """Parameters of the factored sites, by name, the factors balanced.

    Args:
        model: the compressed model.
        sites: which sites; dense ones are left out.
        norms: whether to add the one-dimensional parameters that belong to no site of the sites' blocks (norms).
    """
    found: dict[str, nn.Parameter] = {}
    for site in sites:
        layer = site.module(model)
        if kind_of(layer).trains:
            balance(layer)
            found |= {f"{site.name}.{name}": parameter for name, parameter in layer.named_parameters()}
    if norms:
        prefix, _ = decoder_blocks(model)
        blocks = tuple(f"{prefix}.{index}." for index in {site.block for site in sites})
        owned = tuple(f"{site.name}." for site in sites)
        for name, parameter in model.named_parameters():
            if name.startswith(blocks) and not name.startswith(owned) and parameter.ndim == 1:
                # Like the factors in float32: a step is lost in less.
                parameter.data = parameter.data.float()
                found[name] = parameter
    return found


def relative_groups(parameters: Iterable[nn.Parameter], lr: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: each tensor with a step size of `lr` times its root mean square."""
    return [{"params": [p], "lr": lr * max(_FLOOR, float(p.detach().square().mean().sqrt()))} for p in parameters]


def optimiser(parameters: Iterable[nn.Parameter], lr: float, steps: int) -> tuple[Any, Any]:
    """Adam with a step size of `lr` times each tensor's root mean square, warmed up and then falling as a cosine.

    Args:
        parameters: what is trained.
        lr: relative step size.
        steps: how many there will be.
    """
    steering = torch.optim.Adam(relative_groups(parameters, lr), betas=(0.9, 0.95))
    warm = max(1, round(_WARM_UP * steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return steering, torch.optim.lr_scheduler.LambdaLR(steering, factor)
