"""The pivoted linear layer: a matrix of rank r as r of its rows and the map from them to the rest.

This file imports torch alone: its source is also written, word for word, into the modelling file of every checkpoint.
"""

import torch
from torch import Tensor, nn


class PivotedLinear(nn.Module):
    """y_p = A x, y_rest = T y_p, then every output to its place: r (m + n - r) numbers for a matrix [m, n] of rank r.

    Args:
        in_features: n.
        out_features: m.
        rank: r.
        bias: whether the layer adds a bias of shape `[m]`.
        order: name of the integer type that says where outputs belong, `int32` or `int16`; True for `int32`; False
            where outputs stay as [y_p, y_rest].
    """

    place: Tensor | None

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, order: bool | str = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.first = nn.Linear(in_features, rank, bias=False)
        self.rest = nn.Linear(rank, out_features - rank, bias=bias)
        # Kept apart from `first`, whose outputs `rest` reads without it.
        self.first_bias = nn.Parameter(torch.zeros(rank)) if bias else None
        # Where each output lies in [y_p, y_rest], shape [m].
        kind = torch.int32 if order is True or not order else getattr(torch, order)
        self.register_buffer("place", torch.arange(out_features, dtype=kind) if order else None)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., n]` to `[..., m]`."""
        code = self.first(x)
        first = code if self.first_bias is None else code + self.first_bias
        outputs = torch.cat([first, self.rest(code)], dim=-1)
        if self.place is None:
            return outputs
        # 1.4 to 3.8 times faster than indexing on a CPU (benchmarks/results/speed-cpu.md).
        return outputs.gather(-1, self.place.long().expand(outputs.shape))

    def description(self) -> dict:
        """What a config says of it, beside its shape."""
        order = False if self.place is None else str(self.place.dtype).removeprefix("torch.")
        form = {"rank": self.first.out_features, "bias": self.first_bias is not None}
        return {**form, "storage": "pivoted", "order": order}

    @classmethod
    def described(cls, form: dict) -> "PivotedLinear":
        """An empty layer from a config's entry."""
        m, n = form["shape"]
        return cls(n, m, form["rank"], form["bias"], form["order"])

    def dense_weight(self) -> Tensor:
        """The matrix it stands for, shape `[m, n]`, float64."""
        first = self.first.weight.double()
        stacked = torch.cat([first, self.rest.weight.double() @ first])
        return stacked if self.place is None else stacked.index_select(0, self.place.long())

    def dense_bias(self) -> Tensor | None:
        """b, shape `[m]`, or None."""
        if self.first_bias is None:
            return None
        stacked = torch.cat([self.first_bias, self.rest.bias])
        return stacked if self.place is None else stacked.index_select(0, self.place.long())
