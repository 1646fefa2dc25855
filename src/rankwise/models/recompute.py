"""A backward pass in the memory of one block: what happens inside a block is made again when its gradient is due."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rankwise.models.forwards import forward_of


def _carries_gradient(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, tuple | list):
        return any(_carries_gradient(each) for each in value)
    return isinstance(value, dict) and any(_carries_gradient(each) for each in value.values())


def _recomputing(real: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*positional: Any, **named: Any) -> Any:
        if positional:
            hidden, others = positional[0], positional[1:]
        else:
            hidden, others = named.pop("hidden_states"), ()
        # Gradients into anything but hidden states would be taken once a block, through a graph that all share.
        if not torch.is_grad_enabled() or not _carries_gradient(hidden) or _carries_gradient([others, named]):
            return real(hidden, *others, **named)
        return checkpoint(lambda given: real(given, *others, **named), hidden, use_reentrant=True)

    return forward


@contextmanager
def recomputed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the `with`, blocks keep their inputs alone for the backward pass.

    A forward hook inside a block runs twice: first without gradients, then with them.
    """
    with ExitStack() as changed:
        for block in dict.fromkeys(blocks):
            changed.enter_context(forward_of(block, _recomputing(block.forward)))
        yield
