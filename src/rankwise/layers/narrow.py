"""Blocks whose residual stream is narrower than it was (SliceGPT, Ashkboos et al., 2024, arXiv 2401.15024).

This file imports torch alone: its source is also written, word for word, into the modelling file of every checkpoint.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

ADAPTERS = ("attention_residual", "mlp_residual")
"""Names of a block's two adapters, in the order in which the stream meets them."""

NORMS = ("input_layernorm", "post_attention_layernorm")
"""Names of the norms before attention and before the MLP."""


class NarrowNorm(nn.Module):
    """RMSNorm without gain of what is left of a vector: x / sqrt(sum_(i <= k) x_i^2 / d + eps).

    Args:
        width: d, of the vector before it was cut.
        eps: the original norm's own.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Shape `[..., k]` -> the same."""
        wide = hidden_states.float()
        scale = torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.width + self.eps)
        return (wide * scale).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"of {self.width}, eps={self.eps}"


class Carried:
    """A pre-norm block that carries its stream z over by two adapters.

    z <- z S_attention + attention(norm(z)), z <- z S_mlp + mlp(norm(z)). Stands before the architecture's own class of
    a block, which says all the rest.
    """

    def after_attention(self: Any, hidden_states: Tensor, **others: Any) -> Tensor:
        """The stream behind attention; what the block is handed beside it goes to attention as it is."""
        found = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **others)
        return self.attention_residual(hidden_states) + (found[0] if isinstance(found, tuple) else found)

    def after_mlp(self: Any, hidden_states: Tensor) -> Tensor:
        """The stream behind the MLP, from that behind attention."""
        return self.mlp_residual(hidden_states) + self.mlp(self.post_attention_layernorm(hidden_states))

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **others: Any) -> Tensor:
        """As the architecture's own block."""
        return self.after_mlp(self.after_attention(hidden_states, attention_mask=attention_mask, **others))


@cache
def carrying(plain: type) -> type:
    """The class of a block that carries its stream over by adapters, made of the architecture's own.

    Args:
        plain: the architecture's.
    """
    where = {"__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(f"Carried{plain.__name__}", (Carried, plain), where)


def carry(model: Any, block: nn.Module) -> None:
    """Let a block carry its stream over; its adapters change nothing until others take their place.

    Args:
        model: that it belongs to; where it lists classes that must not be split over devices, the new one is listed.
        block: changed in place.
    """
    plain: Any = type(block)
    block.__class__ = carrying(plain)
    for name in ADAPTERS:
        setattr(block, name, nn.Identity())
    whole = getattr(model, "_no_split_modules", None) or []
    if plain.__name__ in whole and type(block).__name__ not in whole:
        model._no_split_modules = type(whole)([*whole, type(block).__name__])


def stream_of(model: Any) -> dict:
    """How the stream of a causal language model was cut, as `narrow_stream` takes it; empty where it was not."""
    return getattr(model.base_model, "rankwise_stream", {})


def narrow_stream(base: Any, stream: dict) -> None:
    """Empty layers of the right shapes where a stream of full width stood.

    Args:
        base: a decoder without head, changed in place.
        stream: `{"width": d, "eps": of the norms, "blocks": path of the blocks, "readers": [of attention, of the MLP],
            "writers": [one of each], "kept": k, "adapters": [[[out, in] of attention, [out, in] of the MLP] of each
            block]}`; readers and writers are paths of linear layers in a block. Empty leaves all as it is.
    """
    if not stream:
        return
    base.rankwise_stream = stream
    old = base.get_input_embeddings()
    base.set_input_embeddings(nn.Embedding(old.num_embeddings, stream["adapters"][0][0][1], old.padding_idx))
    for block, shapes in zip(base.get_submodule(stream["blocks"]), stream["adapters"], strict=True):
        carry(base, block)
        for half, (after, before) in enumerate(shapes):
            setattr(block, ADAPTERS[half], nn.Linear(before, after, bias=False))
            setattr(block, NORMS[half], NarrowNorm(stream["width"], stream["eps"]))
            for path in stream["readers"][half]:
                old = block.get_submodule(path)
                block.set_submodule(path, nn.Linear(before, old.out_features, bias=old.bias is not None))
            old = block.get_submodule(stream["writers"][half])
            new = nn.Linear(old.in_features, after, bias=old.bias is not None)
            block.set_submodule(stream["writers"][half], new)
