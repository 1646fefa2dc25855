"""Whether the quantised layers of a model keep their weights decoded: chosen, or where memory allows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rankwise.device import computed_type
from rankwise.layers.quantized import KeptWhereItFits, cache_dense, quantized_layers


def keep_decoded(model: Any, wanted: bool | None = None) -> str | None:
    """Let quantised layers decode their weights once and keep them, or not.

    Args:
        model: changed in place.
        wanted: which; None for where memory allows, on a CPU.

    Returns:
        What became of it, for a person; None without quantised layers.
    """
    layers = quantized_layers(model)
    if not layers:
        return None
    width = computed_type(model).itemsize
    room = KeptWhereItFits(sum(layer.in_features * layer.out_features for layer in layers))
    kept = (model.device.type == "cpu" and room.fits(width)) if wanted is None else wanted
    cache_dense(model, kept)
    return f"quantised weights {room.in_words(kept, width)}"


@contextmanager
def decoded_once(model: Any) -> Iterator[bool]:
    """For the block, what a model that was just loaded does; whether weights are kept decoded, False without codes."""
    said = keep_decoded(model)
    try:
        yield said is not None and any(getattr(module, "cache", False) is True for module in model.modules())
    finally:
        if said is not None:
            cache_dense(model, False)
