"""torchao's weight-only integers: rounding to nearest, one 16-bit scale a group."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peers import Peer


def _config(bits: int, group: int) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    if bits == 8:
        return Int8WeightOnlyConfig()
    return IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group))


def _round_trip(bits: int, group: int, weight: Tensor, _moments: Tensor) -> Tensor:
    from torchao.quantization import quantize_

    holder = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    holder[0].weight = nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(holder, _config(bits, group))
    return holder[0].weight.dequantize().float()


def peers() -> dict[str, Peer]:
    """Four bits in groups of 32, and eight bits a row."""
    return {
        "torchao int4, groups of 32": Peer(lambda _columns: 4 + 16 / 32, partial(_round_trip, 4, 32)),
        "torchao int8, a row": Peer(lambda columns: 8 + 16 / columns, partial(_round_trip, 8, 0)),
    }
