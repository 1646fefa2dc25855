"""HQQ: half-quadratic quantisation, without calibration; groups along the inputs, scale and zero at 16 bits each."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from peers import Peer

SETTINGS = {2: 16, 3: 64, 4: 64, 8: 64}
"""Bits -> weights a group, as its authors set them (2 bits need small groups)."""


def _round_trip(bits: int, group: int, weight: Tensor, _moments: Tensor) -> Tensor:
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(
        weight.clone(),
        nbits=bits,
        channel_wise=True,
        group_size=group,
        optimize=True,
        axis=1,
        device=str(weight.device),
        compute_dtype=torch.float32,
    )
    return Quantizer.dequantize(codes, meta).float().reshape(weight.shape)


def peers() -> dict[str, Peer]:
    """Every width."""
    return {
        f"HQQ {bits} bits, groups of {group}": Peer(
            lambda _columns, b=bits, g=group: b + 32 / g,  # type: ignore[misc]
            partial(_round_trip, bits, group),
        )
        for bits, group in SETTINGS.items()
    }
