"""Size: parameters and bytes of the whole model and of the decoder's linear layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rankwise.layers import coded_buffers, kind_of
from rankwise.models import Site


@dataclass(frozen=True)
class Cost:
    """Sizes of a model in the dtypes it is stored in; tied tensors count once.

    Attributes:
        parameters: all parameters; of embeddings and a head in 8 bits, their codes.
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
    own = tuple(f"{site.name}." for site in sites)
    coded = coded_buffers(model)
    scales = {f"{name.removesuffix('codes')}scale" for name in coded}
    parameters = size = linear_bytes = biases = 0
    for name, parameter in model.named_parameters():
        count, width = parameter.numel(), stored_dtypes.get(name, parameter.dtype).itemsize
        size += count * width
        if not name.startswith(own):
            parameters += 0 if name in scales else count
        elif name.endswith("bias"):
            parameters += count
            biases += count
        else:
            linear_bytes += count * width
    for name, buffer in model.named_buffers():
        if name.startswith(own):
            size += buffer.numel() * buffer.dtype.itemsize
            linear_bytes += buffer.numel() * buffer.dtype.itemsize
        elif name in coded:
            size += buffer.numel() * buffer.dtype.itemsize
            parameters += buffer.numel()
    layers = [site.module(model) for site in sites]
    linear = sum(kind_of(layer).entries(layer) for layer in layers)
    indices = sum(kind_of(layer).indices(layer) for layer in layers)
    return Cost(parameters + linear, size, linear, linear_bytes, biases, indices)
