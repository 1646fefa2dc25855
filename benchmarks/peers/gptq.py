"""GPTQ as llm-compressor rounds: errors fed back along the Hessian, columns in the order of its diagonal.

Its own rounding and its own scales (from the extremes of each group, the middle shifted) on the same calibration text
as every row. The Hessian is of the original model's inputs, as in ours; its own pipeline takes those behind layers that
are rounded already.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from peers import FOLDER, Peer

GROUP = 64
"""The largest usual one that divides the model's widths."""

BITS = (2, 3, 4)


def _rounding() -> Any:
    """The module with its rounding, without the packages above it, which import what is not installed here."""
    name = "llmcompressor"
    for part in ("", ".modifiers", ".modifiers.gptq"):
        package = ModuleType(name + part)
        package.__path__ = [str(Path(FOLDER, *(name + part).split(".")))]
        sys.modules.setdefault(name + part, package)
    from llmcompressor.modifiers.gptq import gptq_quantize

    return gptq_quantize


def _round_trip(bits: int, weight: Tensor, moments: Tensor) -> Tensor:
    rounding = _rounding()
    from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    settings = QuantizationArgs(
        num_bits=bits, symmetric=False, strategy="group", group_size=GROUP, actorder=ActivationOrdering.STATIC
    )
    parts = weight.unflatten(-1, (-1, GROUP))
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), settings)
    scale = scale.to(torch.bfloat16).float()
    found, _, failed = rounding.quantize_weight(
        weight[None].clone(), moments[None].clone(), scale[None], zero[None], None, settings
    )
    if bool(failed.any()):
        raise ValueError("the Hessian is not positive definite")
    return found[0]


def peers() -> dict[str, Peer]:
    """Every width; a scale takes 16 bits and a middle `bits`."""
    return {
        f"GPTQ {bits} bits, groups of {GROUP}": Peer(
            lambda _columns, b=bits: b + (16 + b) / GROUP,  # type: ignore[misc]
            partial(_round_trip, bits),
        )
        for bits in BITS
    }
