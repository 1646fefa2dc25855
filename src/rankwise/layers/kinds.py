"""The one table of layer kinds: how each is made of factors, read back, counted, and put in another order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.errors import IllConditionedError, NotFiniteError
from rankwise.factors import Factors
from rankwise.layers.low_rank import LowRankLinear
from rankwise.layers.pivoted import PivotedLinear
from rankwise.layers.quantized import PackedMatrix, QuantizedLinear
from rankwise.layers.replace import name_parent
from rankwise.layers.stored import finite, parameter, sixteen, store
from rankwise.layers.vocabulary import CodedHead
from rankwise.linalg import balanced, pivot
from rankwise.quantizers import Packed, Rotation, packed_signs

ILL_CONDITIONED = 100.0
"""Largest entry of a pivot map that is stored: beyond it rounding in bfloat16 would show."""

Setter = Callable[[Any, str, Any], None]
"""Sets an attribute of a module, remembering what it was."""


class Kind(ABC):
    """What the rest of the package may ask of a layer, whatever it is made of.

    Attributes:
        replaced: whether it stands for a linear layer that the original had.
        in_numbers: whether all of it is numbers of the checkpoint's own type, which it keeps where it is written.
        trains: whether its factors are parameters as they are, so that a repair can change them.
        movable: whether its inputs and outputs can be put in another order.
        transposed: whether it keeps W as `[n, m]`.
    """

    replaced: ClassVar[bool] = True
    in_numbers: ClassVar[bool] = True
    trains: ClassVar[bool] = False
    movable: ClassVar[bool] = True
    transposed = False

    def shape(self, layer: Any) -> tuple[int, int]:
        """`(m, n)`."""
        return layer.out_features, layer.in_features

    @abstractmethod
    def of(self, factors: Factors, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """A layer that holds factors.

        Args:
            factors: of one weight.
            dtype: of the numbers.
            device: where it lives.

        Raises:
            IllConditionedError: when they cannot be stored so.
            NotFiniteError: when a number is not finite in this type.
        """

    @abstractmethod
    def factors(self, layer: Any) -> Factors:
        """What a layer holds; numbers in float64, those of low rank on the CPU."""

    @abstractmethod
    def entries(self, layer: Any) -> int:
        """Numbers, or codes of numbers, that stand for the weight; the bias is not counted."""

    def indices(self, layer: Any) -> int:
        """Integers that say where outputs belong."""
        return 0

    def facts(self, layer: Any) -> dict[str, Any]:
        """What a report says of it."""
        return {}

    def move_outputs(self, layer: Any, order: Tensor, put: Setter) -> None:
        """Let output j be what output `order[j]` was, of a layer that is movable."""
        raise TypeError(f"{type(layer).__name__} has its outputs in one order only")

    def move_inputs(self, layer: Any, order: Tensor, put: Setter) -> None:
        """Let input j be what input `order[j]` was, of a layer that is movable."""
        raise TypeError(f"{type(layer).__name__} has its inputs in one order only")

    def order(self, layer: Any) -> Tensor | None:
        """Where outputs come from, if they are moved; None when they are in place."""
        return None


def dense_layer(
    weight: Tensor, bias: Tensor | None, transposed: bool, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """A plain linear layer, or GPT-2's Conv1D, with these values.

    Args:
        weight: W, shape `[m, n]`.
        bias: shape `[m]`, or None; a Conv1D then has one of zeros.
        transposed: whether it is a Conv1D, which keeps W as `[n, m]`.
        dtype: of its parameters.
        device: where it lives.
    """
    m, n = weight.shape
    with torch.device("meta"):
        dense: Any = Conv1D(m, n) if transposed else nn.Linear(n, m, bias=bias is not None)
    dense.weight = parameter(weight.T if transposed else weight, device, dtype)
    if bias is not None:
        dense.bias = parameter(bias, device, dtype)
    elif transposed:
        dense.bias = parameter(weight.new_zeros(m), device, dtype)
    return dense


def _move(inner: Any, dim: int, order: Tensor, put: Setter) -> None:
    put(inner, "weight", inner.weight.index_select(dim, order).contiguous())


def _move_bias(inner: Any, order: Tensor, put: Setter) -> None:
    if inner.bias is not None:
        put(inner, "bias", inner.bias[order].contiguous())


class _Dense(Kind):
    """W as it was: `nn.Linear`, or GPT-2's Conv1D, which keeps it transposed."""

    replaced = False

    def __init__(self, outputs: int) -> None:
        self._outputs, self.transposed = outputs, bool(outputs)

    def shape(self, layer: Any) -> tuple[int, int]:
        return layer.weight.shape[self._outputs], layer.weight.shape[1 - self._outputs]

    def of(self, factors: Factors, dtype: torch.dtype, device: torch.device) -> nn.Module:
        return dense_layer(factors.reconstruct(), factors.bias, self.transposed, dtype, device)

    def factors(self, layer: Any) -> Factors:
        raise ValueError("a dense layer has no factors")

    def entries(self, layer: Any) -> int:
        return layer.weight.numel()

    def move_outputs(self, layer: Any, order: Tensor, put: Setter) -> None:
        _move(layer, self._outputs, order, put)
        _move_bias(layer, order, put)

    def move_inputs(self, layer: Any, order: Tensor, put: Setter) -> None:
        _move(layer, 1 - self._outputs, order, put)


class _CodedHead(_Dense):
    """A head in 8 bits, which is no site: its matrix is decoded for whoever reads it, and not to be counted."""

    in_numbers = False
    movable = False

    def shape(self, layer: CodedHead) -> tuple[int, int]:
        return Kind.shape(self, layer)

    def entries(self, layer: CodedHead) -> int:
        return layer.in_features * layer.out_features


class _TwoFactor(Kind):
    """L and R, one after the other."""

    trains = True

    def of(self, factors: Factors, dtype: torch.dtype, device: torch.device) -> nn.Module:
        left, right = balanced(*factors.pair())
        with torch.device("meta"):
            layer = LowRankLinear(right.shape[1], left.shape[0], factors.rank, factors.bias is not None)
        layer.right.weight = parameter(right, device, dtype)
        layer.left.weight = parameter(left, device, dtype)
        if factors.bias is not None:
            layer.left.bias = parameter(factors.bias, device, dtype)
        return layer

    def factors(self, layer: LowRankLinear) -> Factors:
        return _in_double(layer.left.weight, layer.right.weight, layer.left.bias)

    def entries(self, layer: LowRankLinear) -> int:
        return layer.left.weight.numel() + layer.right.weight.numel()

    def move_outputs(self, layer: LowRankLinear, order: Tensor, put: Setter) -> None:
        _move(layer.left, 0, order, put)
        _move_bias(layer.left, order, put)

    def move_inputs(self, layer: LowRankLinear, order: Tensor, put: Setter) -> None:
        _move(layer.right, 1, order, put)


class _PivotRows(Kind):
    """Independent rows of L R and the map from them to the others."""

    def of(self, factors: Factors, dtype: torch.dtype, device: torch.device) -> nn.Module:
        left, right = (finite(part, part) for part in factors.pair())
        found = pivot(left, right)
        if not found.largest <= ILL_CONDITIONED:
            raise IllConditionedError(
                f"Its pivots are ill-conditioned (an entry of {found.largest:.3g}).", largest=found.largest
            )
        (m, n), rank, bias = (left.shape[0], right.shape[1]), factors.rank, factors.bias
        with torch.device("meta"):
            layer = PivotedLinear(n, m, rank, bias is not None)
        layer.first.weight = parameter(found.first, device, dtype)
        layer.rest.weight = parameter(found.rest, device, dtype)
        if bias is not None:
            layer.first_bias = parameter(bias[found.order[:rank].to(bias.device)], device, dtype)
            layer.rest.bias = parameter(bias[found.order[rank:].to(bias.device)], device, dtype)
        # An integer is as wide as a number, so that it counts as one.
        narrow = dtype.itemsize == 2 and m <= torch.iinfo(torch.int16).max
        layer.place = found.order.argsort().to(device, torch.int16 if narrow else torch.int32)
        return layer

    def factors(self, layer: PivotedLinear) -> Factors:
        first = layer.first.weight.detach().double().cpu()
        identity = torch.eye(first.shape[0], dtype=first.dtype)
        left = torch.cat([identity, layer.rest.weight.detach().double().cpu()])
        if layer.place is not None:
            left = left[layer.place.long().cpu()]
        return _in_double(left, first, layer.dense_bias())

    def entries(self, layer: PivotedLinear) -> int:
        return layer.first.weight.numel() + layer.rest.weight.numel()

    def facts(self, layer: PivotedLinear) -> dict[str, Any]:
        rest = layer.rest.weight
        return {"largest_pivot_entry": float(rest.detach().abs().max()) if rest.numel() else 0.0}

    def indices(self, layer: PivotedLinear) -> int:
        return 0 if layer.place is None else layer.place.numel()

    def order(self, layer: PivotedLinear) -> Tensor | None:
        return None if layer.place is None else layer.place.long().argsort()

    def move_outputs(self, layer: PivotedLinear, order: Tensor, put: Setter) -> None:
        still = torch.arange(len(order), device=order.device)
        place = still.to(torch.int32) if layer.place is None else layer.place
        moved = place[order]
        put(layer, "place", None if bool((moved == still).all()) else moved)

    def move_inputs(self, layer: PivotedLinear, order: Tensor, put: Setter) -> None:
        _move(layer.first, 1, order, put)


class _Codes(Kind):
    """Codes of Q, and of L and R, between rotations."""

    in_numbers = False
    movable = False

    def of(self, factors: Factors, dtype: torch.dtype, device: torch.device) -> nn.Module:
        m, n = _shape_of(factors)
        signs = factors.rotation.minus_in
        trained = signs is not None and signs.is_floating_point()
        layer = QuantizedLinear(
            n,
            m,
            factors.bias is not None,
            {
                "rank": factors.rank,
                "full": factors.full,
                "half": str(sixteen(dtype)).removeprefix("torch."),
                "hadamard": signs is not None,
                "trained_signs": trained,
                "q": _described(factors.q),
                "factors": None
                if factors.packed is None
                else _described(factors.packed[0], (factors.packed[0].codes.shape[0], 1)),
            },
        )
        with torch.no_grad():
            packed = factors.packed or (None, None)
            for into, part in ((layer.q, factors.q), (layer.packed_left, packed[0]), (layer.packed_right, packed[1])):
                if into is not None and part is not None:
                    into.codes.copy_(part.codes)
                    store(into.scale, part.scale)
            if factors.left is not None and factors.right is not None:
                left, right = balanced(factors.left, factors.right)
                store(layer.left.weight, left)
                store(layer.right.weight, right)
            for name, minus in (("signs_in", signs), ("signs_out", factors.rotation.minus_out)):
                if minus is not None:
                    store(getattr(layer, name), minus if trained else packed_signs(minus))
        if factors.bias is not None:
            layer.bias = parameter(factors.bias, torch.device("cpu"), factors.bias.dtype)
        return layer.requires_grad_(False).to(device)

    def factors(self, layer: QuantizedLinear) -> Factors:
        packed = None if layer.packed_left is None else (_packed(layer.packed_left), _packed(layer.packed_right))
        sides = []
        for signs, size in ((layer.signs_in, layer.in_features), (layer.signs_out, layer.out_features)):
            if signs is not None and signs.dtype == torch.uint8:
                signs = layer.signs(signs, size, torch.float32) < 0
            sides.append(None if signs is None else signs.detach())
        return Factors(
            None if layer.left is None else layer.left.weight.detach().double(),
            None if layer.right is None else layer.right.weight.detach().double(),
            None if layer.bias is None else layer.bias.detach().double(),
            q=None if layer.q is None else _packed(layer.q),
            packed=packed,
            rotation=Rotation(*sides),
        )

    def entries(self, layer: QuantizedLinear) -> int:
        return self.factors(layer).parameters + sum(
            p.numel() for name, p in layer.named_parameters() if name.startswith("signs")
        )


def _shape_of(factors: Factors) -> tuple[int, int]:
    if factors.q is not None:
        return factors.q.codes.shape[0], factors.q.columns
    if factors.packed is not None:
        return factors.packed[0].columns, factors.packed[1].columns
    left, right = factors.pair()
    return left.shape[0], right.shape[1]


def _described(packed: Packed | None, scales: tuple[int, int] | None = None) -> dict[str, Any] | None:
    if packed is None:
        return None
    shape = list(scales or packed.scale.shape)
    return {"bits": packed.bits, "codebook": packed.codebook, "scales": shape, "group": packed.group}


def _packed(part: PackedMatrix) -> Packed:
    return Packed(part.codes, part.scale.double(), part.columns, part.codebook, part.group)


def _in_double(left: Tensor, right: Tensor, bias: Tensor | None) -> Factors:
    return Factors(
        left.detach().double().cpu(),
        right.detach().double().cpu(),
        None if bias is None else bias.detach().double().cpu(),
    )


KINDS: dict[str, Kind] = {"two_factor": _TwoFactor(), "pivoted": _PivotRows(), "quantized": _Codes()}
"""By how they store a weight; `Form.kind` names them, and `replace.LAYERS` makes them empty."""

_OF_CLASS: dict[type, Kind] = {
    LowRankLinear: KINDS["two_factor"],
    PivotedLinear: KINDS["pivoted"],
    QuantizedLinear: KINDS["quantized"],
    CodedHead: _CodedHead(0),
    nn.Linear: _Dense(0),
    Conv1D: _Dense(1),
}


def kind_of(module: nn.Module) -> Kind:
    """The kind of a layer.

    Raises:
        KeyError: when it is neither linear nor one of ours.
    """
    for each in type(module).__mro__:
        if each in _OF_CLASS:
            return _OF_CLASS[each]
    raise KeyError(f"{type(module).__name__} is no linear layer")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, dense or of ours."""
    return any(each in _OF_CLASS for each in type(module).__mro__)


def substitute(model: nn.Module, name: str, factors: Factors, kind: str, dtype: torch.dtype) -> nn.Module:
    """Replace a module by a layer that holds factors, on the device it had.

    Args:
        model: changed in place.
        name: path of the module.
        factors: of its weight.
        kind: one of `KINDS`.
        dtype: of the numbers.

    Returns:
        The new layer.

    Raises:
        IllConditionedError: when they cannot be stored so; the model is then as it was.
        NotFiniteError: naming the module, when a number is not finite in this type; likewise.
    """
    old = model.get_submodule(name)
    device = next(t.device for t in (*old.parameters(), *old.buffers()))
    try:
        layer = KINDS[kind].of(factors, dtype, device)
    except NotFiniteError as problem:
        raise NotFiniteError(problem.problem, where=name, remedy=problem.remedy) from None
    model.set_submodule(name, layer)
    name_parent(model, model.get_submodule(name.rpartition(".")[0]))
    return layer
