"""`Watched`: what a pass of a few tokens shows of the blocks and of the embeddings of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_TOKENS = 8

_ROWS = 4096
"""Rows of an embedding that are compared at a time."""

_AGREEMENT = 1e-2
"""Relative difference that is rounding in 16 bits."""


@dataclass
class Watched:
    """Tensors of one pass, by path.

    Attributes:
        first: what the first block read, shape `[1, tokens, d]`.
        inputs: what modules of that block read.
        outputs: what they gave.
        embedded: what embeddings of the decoder gave, and those.
        pair: whether the block returned a tuple.
        narrowed: whether the model gives the same where all that stands between embeddings and the first block sees
            less than d numbers a token.
    """

    first: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    embedded: dict[str, tuple[Tensor, nn.Embedding]] = field(default_factory=dict)
    pair: bool = False
    narrowed: bool = False

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, blocks: nn.ModuleList, paths: Sequence[str]) -> Watched:
        """Two short passes, one of them with embeddings cut before the first block.

        Args:
            model: the causal language model.
            blocks: its blocks.
            paths: modules of the first block to be watched.
        """
        found, block = cls(torch.empty(0)), blocks[0]
        inside = {id(module) for module in blocks.modules()}
        embeddings = {
            path: module
            for path, module in model.base_model.named_modules()
            if isinstance(module, nn.Embedding) and id(module) not in inside
        }

        def keep(path: str) -> Any:
            def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
                read = given[0] if given else named.get("hidden_states")
                found.outputs[path] = _first(out)
                if isinstance(read, Tensor):
                    found.inputs[path] = read

            return hook

        def keep_block(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
            found.first = given[0] if given else named["hidden_states"]
            found.pair = isinstance(out, tuple)

        def keep_rows(path: str) -> Any:
            def hook(module: Any, _: Any, out: Tensor) -> None:
                found.embedded[path] = (out, module)

            return hook

        handles = [block.get_submodule(path).register_forward_hook(keep(path), with_kwargs=True) for path in paths]
        handles += [module.register_forward_hook(keep_rows(path)) for path, module in embeddings.items()]
        handles.append(block.register_forward_hook(keep_block, with_kwargs=True))
        with _released(handles):
            goal = _logits(model)
        handles = [module.register_forward_hook(lambda _, __, out: out[..., :-1]) for module in embeddings.values()]
        handles.append(block.register_forward_pre_hook(_instead(found.first), with_kwargs=True))
        with _released(handles):
            try:
                again = _logits(model)
                alike = again.shape == goal.shape
                found.narrowed = alike and bool((again - goal).norm() <= _AGREEMENT * goal.norm())
            except (RuntimeError, ValueError, IndexError):  # code that takes their width for that of all
                found.narrowed = False
        return found

    def read(self, path: str, what: Tensor) -> bool:
        """Whether a module read this tensor, shape `[..., n]`, in whatever shape."""
        given = self.inputs.get(path)
        return given is not None and given.numel() == what.numel() and torch.equal(given.flatten(), what.flatten())

    @property
    def summed(self) -> bool:
        """Whether the first block reads the sum of rows of embeddings, but for one factor."""
        if not all(_looked_up(out, embedding) for out, embedding in self.embedded.values()):
            return False
        rows: Any = sum(out.float() for out, _ in self.embedded.values())
        first = self.first.float()
        if rows.shape[-1] != first.shape[-1]:
            return False
        factor = (first * rows).sum() / rows.expand_as(first).square().sum()
        return bool((first - factor * rows).norm() <= _AGREEMENT * first.norm())


def _looked_up(out: Tensor, embedding: nn.Embedding) -> bool:
    """Whether vectors, shape `[..., d]`, are rows of the embedding's weight, whatever its class does."""
    if type(embedding).forward is nn.Embedding.forward:
        return True
    flat = out.reshape(-1, out.shape[-1]).float()
    parts = embedding.weight.split(_ROWS)
    nearest = torch.stack([torch.cdist(flat, part.float()).amin(-1) for part in parts]).amin(0)
    return bool((nearest <= _AGREEMENT * flat.norm(dim=-1)).all())


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


def _logits(model: Any) -> Tensor:
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(3, 3 + _TOKENS, device=embedding.device) % len(embedding)
    return model(input_ids=ids[None], use_cache=False).logits


def _instead(hidden: Tensor) -> Any:
    def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if given:
            return (hidden, *given[1:]), named
        return given, {**named, "hidden_states": hidden}

    return hook


@contextmanager
def _released(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
