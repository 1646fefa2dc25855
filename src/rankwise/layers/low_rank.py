"""The low-rank linear layer.

This file imports torch alone: its source is also written, word for word, into the modelling file of every checkpoint,
so that a checkpoint loads where rankwise is not installed.
"""

from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """y = L (R x) + b, two plain linear layers one after the other.

    Args:
        in_features: n.
        out_features: m.
        rank: r.
        bias: whether the layer adds a bias of shape `[m]`.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.right = nn.Linear(in_features, rank, bias=False)
        self.left = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., n]` to `[..., m]`."""
        return self.left(self.right(x))

    def description(self) -> dict:
        """What a config says of it, beside its shape."""
        return {"rank": self.right.out_features, "bias": self.left.bias is not None}

    @classmethod
    def described(cls, form: dict) -> "LowRankLinear":
        """An empty layer from a config's entry."""
        m, n = form["shape"]
        return cls(n, m, form["rank"], form["bias"])

    def dense_weight(self) -> Tensor:
        """The matrix it stands for, shape `[m, n]`, float64."""
        return self.left.weight.double() @ self.right.weight.double()

    def dense_bias(self) -> Tensor | None:
        """b, shape `[m]`, or None."""
        return self.left.bias
