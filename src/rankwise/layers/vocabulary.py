"""Embeddings and a head of 8-bit integers, with scales beside them: decoded a row looked up, or a few rows at a time.

A head may be two factors instead, which is a layer like any other.

Apart from the import of its sibling file it imports torch alone: its source goes into the modelling file of every
checkpoint.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankwise.layers.low_rank import LowRankLinear

_NUMBERS = 2**22
"""Most numbers that a head decodes at a time."""


def decoded_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes times their scales, in the type of the scales.

    Args:
        codes: int8, shape `[..., n]`.
        scale: shape `[..., groups]`; the columns of a row are shared out among its groups in order.
    """
    groups = codes.unflatten(-1, (scale.shape[-1], -1))
    return (groups.to(scale.dtype) * scale.unsqueeze(-1)).flatten(-2)


class CodedRows:
    """What an embedding and a head of codes share: rows of `codes`, int8, and their `scale`, a number a group."""

    rankwise_codes = True

    codes: Tensor
    scale: Tensor

    def rows(self) -> tuple:
        """Codes, shape `[v, d]`, and scales, shape `[v, groups]`."""
        return self.codes, self.scale

    @property
    def weight(self) -> Tensor:
        """The whole matrix that it stands for, shape `[v, d]`, decoded anew each time."""
        return decoded_rows(*self.rows()).detach()

    @property
    def number_type(self) -> torch.dtype:
        """Of the numbers it gives."""
        return self.rows()[1].dtype

    @property
    def shape(self) -> tuple:
        """`(v, d)`."""
        return tuple(self.rows()[0].shape)


class CodedEmbedding(CodedRows, nn.Embedding):
    """Looks up rows of codes, and decodes these."""

    _looking = False

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The whole matrix; while a forward runs, no row of it: what is looked up is decoded, and nothing else."""
        return self.scale.new_empty(0, self.codes.shape[1]) if self._looking else CodedRows.weight.__get__(self)

    def forward(self, input: Tensor) -> Tensor:
        """Map indices `[...]` to `[..., d]`."""
        return decoded_rows(self.codes[input], self.scale[input])


@cache
def coded_class(plain: type) -> type:
    """The class of an embedding of codes that does besides what another class of embeddings does, such as to scale.

    Args:
        plain: `nn.Embedding`, or a class of it that looks up by it.
    """

    def forward(self: Any, *given: Any, **named: Any) -> Any:
        self._looking = True
        try:
            return super(found, self).forward(*given, **named)
        finally:
            self._looking = False

    def reduce(self: Any, protocol: Any) -> tuple:
        return (_remade_embedding, (plain,), *super(found, self).__reduce_ex__(protocol)[2:])

    own = {"__module__": plain.__module__, "__doc__": plain.__doc__, "__reduce_ex__": reduce, "rankwise_plain": plain}
    if plain is nn.Embedding:
        found: Any = type("Embedding_coded", (CodedEmbedding,), own)
    else:
        # Where it looks up by its parent, that is the one of codes.
        found = type(f"{plain.__name__}_coded", (plain, CodedEmbedding), {**own, "forward": forward})
    return found


def _remade_embedding(plain: type) -> Any:
    """An empty module of such a class: a class that is made while running is pickled as what it was made of."""
    found: Any = coded_class(plain)
    return found.__new__(found)


class CodedHead(CodedRows, nn.Linear):  # type: ignore[override]
    """y = W x + b with W of codes, its own or those of an embedding."""

    tied: tuple = ()

    def rows(self) -> tuple:
        """Codes, shape `[v, d]`, and scales, shape `[v, groups]`."""
        return self.tied[0].rows() if self.tied else (self.codes, self.scale)

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., d]` to `[..., v]`, a few rows decoded at a time."""
        y: Any = _Product.apply(input, *self.rows())
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """x W^T of codes. No decoded row is kept for the backward pass, and codes and scales take no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.wide = x.dtype
        return torch.cat([functional.linear(x, rows.to(x.dtype)) for rows in _parts(codes, scale)], -1)

    @staticmethod
    def backward(ctx: Any, *outside: Any) -> Any:
        codes, scale = ctx.saved_tensors
        (gradient,) = outside
        start = 0
        total: Any = None
        for rows in _parts(codes, scale):
            part = gradient[..., start : start + len(rows)] @ rows.to(gradient.dtype)
            total = part if total is None else total + part
            start += len(rows)
        return total.to(ctx.wide), None, None


def _parts(codes: Tensor, scale: Tensor) -> Iterator[Tensor]:
    """The rows decoded, a few at a time."""
    count = max(1, _NUMBERS // codes.shape[1])
    for start in range(0, len(codes), count):
        yield decoded_rows(codes[start : start + count], scale[start : start + count])


def _hold(module: Any, codes: Tensor, scale: Tensor) -> None:
    del module._parameters["weight"]
    module.register_buffer("codes", codes)
    module.register_parameter("scale", nn.Parameter(scale, requires_grad=False))


def hold_embedding(module: Any, codes: Tensor, scale: Tensor) -> None:
    """Let an embedding hold codes in place of its weight.

    Args:
        module: changed in place.
        codes: int8, shape `[v, d]`.
        scale: shape `[v, groups]`, in the type it gives numbers in.
    """
    plain: Any = type(module)
    _hold(module, codes, scale)
    module.__class__ = coded_class(plain)


def hold_head(module: Any, codes: Tensor | None, scale: Tensor | None, embedding: Any = None) -> None:
    """Let a head hold codes in place of its weight, or read those of an embedding of codes.

    Args:
        module: changed in place.
        codes: int8, shape `[v, d]`; None where it is tied.
        scale: shape `[v, groups]`; None likewise.
        embedding: whose codes it reads; not a part of it, so that they are stored once.
    """
    if codes is None or scale is None:
        del module._parameters["weight"]
        module.tied = (embedding,)
    else:
        _hold(module, codes, scale)
    module.__class__ = CodedHead


def release_rows(module: Any, weight: nn.Parameter) -> None:
    """Let an embedding or a head hold a weight again in place of codes."""
    module.__class__ = getattr(type(module), "rankwise_plain", nn.Linear)
    for held in (module._buffers, module._parameters):
        for name in ("codes", "scale"):
            held.pop(name, None)
    vars(module).pop("tied", None)
    # In the order it had: the weight first.
    others = dict(module._parameters)
    module._parameters.clear()
    module.weight = weight
    module._parameters.update(others)


def _empty(weight: Tensor, groups: int) -> tuple:
    shape, place = tuple(weight.shape), weight.device
    return torch.zeros(shape, dtype=torch.int8, device=place), weight.new_ones(shape[0], groups)


def code_embedding(base: Any, entry: dict) -> None:
    """Put empty codes into the embedding of a decoder.

    Args:
        base: the decoder without head, changed in place.
        entry: a config's entry, `{"embedding": {"path", "groups"}, "head": ...}`; it may have neither key.
    """
    if "embedding" in entry:
        module = base.get_submodule(entry["embedding"]["path"])
        hold_embedding(module, *_empty(module.weight.detach(), entry["embedding"]["groups"]))


def code_head(model: Any, entry: dict) -> None:
    """Put empty codes or factors into the head of a causal language model, or let it read the embedding's codes.

    Args:
        model: changed in place, its embedding done.
        entry: as for `code_embedding`, with `"head": {"path", "groups"}`, `"head": {"path", "tied": true}`, or of
            factors `"head": {"path", "rank", "bias"}`.
    """
    if "head" in entry:
        module = model.get_submodule(entry["head"]["path"])
        if "rank" in entry["head"]:
            form = {**entry["head"], "shape": (module.out_features, module.in_features)}
            model.set_submodule(entry["head"]["path"], LowRankLinear.described(form))
        elif entry["head"].get("tied"):
            hold_head(module, None, None, model.base_model.get_submodule(entry["embedding"]["path"]))
        else:
            hold_head(module, *_empty(module.weight.detach(), entry["head"]["groups"]))


class ResizesNot:
    """What a model class here has before the class it comes from: a vocabulary of codes or factors keeps its size."""

    def resize_token_embeddings(self, *given: Any, **named: Any) -> Any:
        """As for the original, where embeddings and head are matrices of numbers.

        Raises:
            ValueError: where they are codes or factors.
        """
        model: Any = self
        ends = model.get_input_embeddings(), model.get_output_embeddings()
        if any(hasattr(each, "rankwise_codes") or isinstance(each, LowRankLinear) for each in ends):
            raise ValueError(
                "The embeddings or the head are stored in 8 bits or as factors and cannot be resized: resize the "
                "original and compress it again."
            )
        return super().resize_token_embeddings(*given, **named)  # type: ignore[misc]
