"""Blocks whose residual stream is narrower than it was (SliceGPT, Ashkboos et al., 2024, arXiv 2401.15024).

This file imports torch alone: its source is also written, word for word, into the modelling file of every checkpoint.
"""

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

ADAPTERS = ("attention_residual", "mlp_residual")
"""Names of a block's two adapters, in the order in which the stream meets them."""

ADAPTER = ("block_residual",)
"""Name of the one adapter of a block whose attention and MLP stand side by side."""

LLAMA_FORM: dict = {
    "norms": ["input_layernorm", "post_attention_layernorm"],
    "attention": "self_attn",
    "mlp": ["mlp"],
    "parallel": False,
    "pair": False,
    "biased": [],
    "tables": [],
    "padded": False,
}
"""The form of Llama's blocks: names of the norms before attention and before the MLP (one name where one norm serves
both), of attention, and of what makes up the MLP in the order in which it runs; whether both read the same stream;
whether a block returns a tuple; paths in a block of readers that have a bias for the sake of a norm that shifted; paths
in the decoder of other embeddings whose rows are added to those of tokens; whether embeddings are followed by zeros up
to d, for code around the blocks that takes their width for that of the last block's output."""


def form_of(stream: dict) -> dict:
    """The form of the blocks of a cut stream; Llama's where it is left unsaid."""
    return {**LLAMA_FORM, **stream.get("form", {})}


def adapters_of(form: dict) -> tuple:
    """Names of the adapters of a block of this form."""
    return ADAPTER if form["parallel"] else ADAPTERS


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


class PaddedEmbedding(nn.Embedding):
    """Rows of k numbers, each followed by zeros.

    Args:
        num_embeddings: rows.
        embedding_dim: k.
        padding_idx: as of any embedding.
        width: d, of what it gives.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: Any = None, width: int = 0) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.width = width

    def forward(self, input: Tensor) -> Tensor:
        """Shape `[...]` -> `[..., d]`."""
        return nn.functional.pad(super().forward(input), (0, self.width - self.embedding_dim))


def narrow_embedding(old: Any, kept: int, width: int) -> nn.Module:
    """An embedding with rows of k numbers that are still to be filled, of the class, type and device of an old one.

    Args:
        old: changed in place where its class looks up in a way of its own.
        kept: k.
        width: d where zeros are to follow, else 0.
    """
    if type(old).forward is not nn.Embedding.forward:
        old.weight = nn.Parameter(old.weight.new_empty(old.num_embeddings, kept))
        old.embedding_dim = kept
        return old
    with old.weight.device:
        if width:
            new: Any = PaddedEmbedding(old.num_embeddings, kept, old.padding_idx, width)
        else:
            new = nn.Embedding(old.num_embeddings, kept, old.padding_idx)
    return new.to(old.weight.dtype)


class Carried:
    """A pre-norm block that carries its stream z over by adapters.

    z <- z S_attention + attention(norm(z)), z <- z S_mlp + mlp(norm(z)); where both stand side by side,
    z <- z S + attention(norm(z)) + mlp(norm(z)). Stands before the architecture's own class of a block, which says all
    the rest. Nothing is dropped out in training.
    """

    def read(self: Any, hidden_states: Tensor, half: int) -> Tensor:
        """What attention (0) or the MLP (1) reads: the stream behind its norm."""
        norms = self.rankwise_form["norms"]
        return getattr(self, norms[min(half, len(norms) - 1)])(hidden_states)

    def attended(self: Any, read: Tensor, others: tuple, named: dict) -> tuple:
        """What attention gives, its weights behind it where there are any.

        What the block is handed beside the stream goes to attention as it is, under the name that the block has for it.
        """
        given = {"attention_mask": None, **dict(zip(self.rankwise_names, others, strict=False)), **named}
        found = getattr(self, self.rankwise_form["attention"])(hidden_states=read, **given)
        return found if isinstance(found, tuple) else (found,)

    def through_mlp(self: Any, read: Tensor) -> Tensor:
        """What the MLP gives."""
        for name in self.rankwise_form["mlp"]:
            read = getattr(self, name)(read)
        return read

    def after_attention(self: Any, hidden_states: Tensor, *others: Any, **named: Any) -> tuple:
        """The stream behind attention, and what attention gives beside it."""
        found, *rest = self.attended(self.read(hidden_states, 0), others, named)
        return (self.attention_residual(hidden_states) + found, *rest)

    def after_mlp(self: Any, hidden_states: Tensor) -> Tensor:
        """The stream behind the MLP, from that behind attention."""
        return self.mlp_residual(hidden_states) + self.through_mlp(self.read(hidden_states, 1))

    def after_both(self: Any, hidden_states: Tensor, *others: Any, **named: Any) -> tuple:
        """The stream behind attention and the MLP side by side, and what attention gives beside it."""
        read = self.read(hidden_states, 0)
        found, *rest = self.attended(read, others, named)
        if len(self.rankwise_form["norms"]) > 1:
            read = self.read(hidden_states, 1)
        return (self.block_residual(hidden_states) + found + self.through_mlp(read), *rest)

    def forward(self: Any, hidden_states: Tensor, *others: Any, **named: Any) -> Any:
        """As the architecture's own block."""
        form = self.rankwise_form
        if form["padded"]:
            first = getattr(self, adapters_of(form)[0])
            hidden_states = hidden_states[..., : getattr(first, "in_features", None)]
        if form["parallel"]:
            hidden_states, *rest = self.after_both(hidden_states, *others, **named)
        else:
            hidden_states, *rest = self.after_attention(hidden_states, *others, **named)
            hidden_states = self.after_mlp(hidden_states)
        return (hidden_states, *rest) if form["pair"] else hidden_states


@cache
def carrying(plain: Any) -> type:
    """The class of a block that carries its stream over by adapters, made of the architecture's own.

    Args:
        plain: the architecture's.
    """
    names = tuple(inspect.signature(plain.forward).parameters)[2:]
    where = {"__module__": plain.__module__, "__doc__": plain.__doc__, "rankwise_names": names}
    return type(f"Carried{plain.__name__}", (Carried, plain), where)


def carry(model: Any, block: Any, form: dict) -> None:
    """Let a block carry its stream over; its adapters change nothing until others take their place.

    Args:
        model: that it belongs to; where it lists classes that must not be split over devices, the new one is listed.
        block: changed in place.
        form: as `LLAMA_FORM` says one.
    """
    plain: Any = type(block)
    block.__class__ = carrying(plain)
    block.rankwise_form = form
    for name in adapters_of(form):
        setattr(block, name, nn.Identity())
    whole = getattr(model, "_no_split_modules", None) or []
    if plain.__name__ in whole and type(block).__name__ not in whole:
        model._no_split_modules = type(whole)([*whole, type(block).__name__])


def resized(old: Any, m: Any, n: Any, biased: bool = False) -> nn.Module:
    """An empty linear layer of another shape in place of one, which may be GPT-2's Conv1D.

    Args:
        old: with W of shape `[m, n]`.
        m: outputs; None for as many.
        n: inputs; None for as many.
        biased: whether it has a bias though the old one has none.
    """
    if isinstance(old, nn.Linear):
        biased = biased or old.bias is not None
        return nn.Linear(n or old.in_features, m or old.out_features, bias=biased)
    return type(old)(m or old.nf, n or old.nx)


def stream_of(model: Any) -> dict:
    """How the stream of a causal language model was cut, as `narrow_stream` takes it; empty where it was not."""
    return getattr(model.base_model, "rankwise_stream", {})


def narrow_stream(base: Any, stream: dict) -> None:
    """Empty layers of the right shapes where a stream of full width stood.

    Args:
        base: a decoder without head, changed in place.
        stream: `{"width": d, "eps": of the norms, "blocks": path of the blocks, "readers": [of attention, of the MLP],
            "writers": [one of each], "kept": k, "adapters": [[[out, in] of each adapter] of each block]}`; readers and
            writers are paths of linear layers in a block. `"form"` says of which form blocks are, where they are not
            of Llama's. Empty leaves all as it is.
    """
    if not stream:
        return
    base.rankwise_stream = stream
    form = form_of(stream)
    kept, width = stream["adapters"][0][0][1], stream["width"] if form["padded"] else 0
    base.set_input_embeddings(narrow_embedding(base.get_input_embeddings(), kept, width))
    for path in form["tables"]:
        base.set_submodule(path, narrow_embedding(base.get_submodule(path), kept, width))
    for block, shapes in zip(base.get_submodule(stream["blocks"]), stream["adapters"], strict=True):
        carry(base, block, form)
        for name, (after, before) in zip(adapters_of(form), shapes, strict=True):
            setattr(block, name, nn.Linear(before, after, bias=False))
        for norm in form["norms"]:
            setattr(block, norm, NarrowNorm(stream["width"], stream["eps"]))
        for half in (0, 1):
            after, before = shapes[min(half, len(shapes) - 1)]
            for path in stream["readers"][half]:
                old = block.get_submodule(path)
                block.set_submodule(path, resized(old, None, before, path in form["biased"]))
            old = block.get_submodule(stream["writers"][half])
            block.set_submodule(stream["writers"][half], resized(old, after, None))
