"""A dense layer with a bias that the architecture has no place for.

This file imports torch alone: its source is also written, word for word, into the modelling file of every checkpoint.
"""

from torch import Tensor, nn


class BiasedLinear(nn.Linear):
    """y = W x + b, where the original has no b; W may be smaller than the original's too."""

    def description(self) -> dict:
        """What a config says of it, beside its shape."""
        return {"storage": "dense", "bias": self.bias is not None}

    @classmethod
    def described(cls, form: dict) -> "BiasedLinear":
        """An empty layer from a config's entry."""
        m, n = form["shape"]
        return cls(n, m, bias=form["bias"])

    def dense_weight(self) -> Tensor:
        """W, shape `[m, n]`, float64."""
        return self.weight.double()

    def dense_bias(self) -> Tensor | None:
        """b, shape `[m]`, or None."""
        return self.bias
