"""Where numbers stop being finite: the first layer whose output is not, and the token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import NotFiniteError


class _FoundError(Exception):
    """Ends a forward pass at the first output that is not finite."""


@contextmanager
def _watched(model: nn.Module, place: list[str]) -> Iterator[None]:
    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _given: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or not output.is_floating_point() or output.isfinite().all():
                return
            sequence, token = 0, 0
            if output.ndim >= 3:
                bad = ~output.isfinite().flatten(2).all(-1)
                sequence, token = (int(i) for i in bad.nonzero()[0])
            place.append(f"layer {name}, sequence {sequence} of the batch, token {token}")
            raise _FoundError

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def first_not_finite(model: Any, ids: Tensor) -> str | None:
    """Run a batch again and name the first layer and token whose output is NaN or infinite.

    Args:
        model: causal language model.
        ids: shape `[sequences, tokens]`, on the model's device.

    Returns:
        The place in words, or None when every layer's output is finite.
    """
    place: list[str] = []
    with _watched(model, place):
        try:
            model(input_ids=ids, use_cache=False)
        except _FoundError:
            return place[0]
    return None


def not_finite(model: Any, ids: Tensor, what: str, where: str) -> NotFiniteError:
    """The error for logits or a loss that are not finite, with the layer and the token.

    Args:
        model: causal language model.
        ids: shape `[sequences, tokens]`: the batch that gave them.
        what: what is not finite.
        where: which part of the text it is.
    """
    place = first_not_finite(model, ids)
    return NotFiniteError(
        f"The model's {what} is NaN or infinite.",
        where=where if place is None else f"{where}: {place}",
        remedy="load it with --precision float32; if that fails too the model is damaged",
    )
