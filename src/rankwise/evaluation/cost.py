"""Size: parameters and bytes of the whole model and of the decoder's linear layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rankwise.layers import PackedMatrix, QuantizedLinear
from rankwise.models import Site


@dataclass(frozen=True)
class Cost:
    """Sizes of a model in the dtypes it is stored in; tied tensors count once.

    Attributes:
        parameters: all parameters.
        bytes: their bytes.
        linear_parameters: weights (or factors) of the decoder's linear layers, biases not counted. A quantised layer
            has those of Q, L and R.
        linear_bytes: their bytes.
        linear_biases: biases of those layers.
        linear_indices: integers of those layers that say where outputs belong (pivoted storage); they count among the
            bytes and not among the parameters.
    """

    parameters: int
    bytes: int
    linear_parameters: int
    linear_bytes: int
    linear_biases: int
    linear_indices: int


def measure_cost(model: Any, sites: Sequence[Site], stored_dtypes: Mapping[str, torch.dtype]) -> Cost:
    """Count a model as its checkpoint stores it.

    Args:
        model: dense or compressed, on any device (also `meta`).
        sites: the sites of the dense model.
        stored_dtypes: by parameter name; a parameter that is not named counts in the dtype it has.
    """
    prefixes = tuple(site.name + "." for site in sites)
    parameters = size = linear = linear_bytes = biases = indices = 0
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        width = stored_dtypes.get(name, parameter.dtype).itemsize
        parameters += count
        size += count * width
        if name.startswith(prefixes):
            if name.endswith("bias"):
                biases += count
            else:
                linear += count
                linear_bytes += count * width
    for site in sites:
        module = site.module(model)
        if isinstance(module, QuantizedLinear):
            packed = [
                part for part in (module.q, module.packed_left, module.packed_right) if isinstance(part, PackedMatrix)
            ]
            count = sum(part.codes.shape[0] * part.columns for part in packed)
            parameters, linear = parameters + count, linear + count
    for name, buffer in model.named_buffers():
        if name.startswith(prefixes):
            if not name.endswith((".codes", ".scale", ".signs_in", ".signs_out")):
                indices += buffer.numel()
            size += buffer.numel() * buffer.dtype.itemsize
            linear_bytes += buffer.numel() * buffer.dtype.itemsize
    return Cost(parameters, size, linear, linear_bytes, biases, indices)
