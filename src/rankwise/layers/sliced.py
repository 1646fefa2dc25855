"""A layer that can take any rank at once: what a search for ranks runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankwise.factors import Basis
from rankwise.sites import Site


class SlicedLinear(nn.Module):
    """y = L_r (R_r x) + b_r, where r is set before a forward and L_r, R_r are views of a basis that stays in memory.

    Args:
        dense: the module it stands for; rank None runs it unchanged.
        basis: full-rank factors.
        most: largest rank that will be asked for.
        bias: the layer's own bias, shape `[m]`, or None.
        dtypes: what factors are stored in and what they compute in, so that a trial equals the checkpoint.
    """

    def __init__(
        self, dense: nn.Module, basis: Basis, most: int, bias: Tensor | None, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> None:
        super().__init__()
        self.dense = dense
        device = next(dense.parameters()).device
        stored, compute = dtypes

        def resident(values: Tensor) -> Tensor:
            return values.to(device, stored, copy=True, memory_format=torch.contiguous_format).to(compute)

        self.right = resident(basis.right[:most])
        # Transposed, so that the first r are contiguous as in R.
        self.left = resident(basis.left[:, :most].T)
        self._mean_output = None if basis.mean_output is None else basis.mean_output.to(device)
        self._mean_code = None if basis.mean_code is None else basis.mean_code[:most].to(device)
        self._own_bias = None if bias is None else bias.to(device)
        self._resident = resident
        self._bias: Tensor | None = None
        self._rank: int | None = None

    @property
    def rank(self) -> int | None:
        """The rank in force; None for dense."""
        return self._rank

    def set_rank(self, rank: int | None) -> None:
        """Take a rank: a new bias is made, nothing else.

        Raises:
            ValueError: when it is above the largest that was announced.
        """
        if rank is not None and not 1 <= rank <= self.right.shape[0]:
            raise ValueError(f"rank must lie in 1..{self.right.shape[0]}, not {rank}")
        if rank is not None and rank != self._rank:
            self._bias = self._bias_at(rank)
        self._rank = rank

    def _bias_at(self, rank: int) -> Tensor | None:
        """b + (W - L_r R_r) E[x], as `Basis.truncate` makes it."""
        bias = self._own_bias
        if self._mean_output is not None and self._mean_code is not None:
            compensation = self._mean_output - self._mean_code[:rank] @ self.left[:rank].to(self._mean_code)
            bias = compensation if bias is None else bias.to(compensation) + compensation
        return None if bias is None else self._resident(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., n]` to `[..., m]`."""
        if self._rank is None:
            return self.dense(x)
        left, right = self.left[: self._rank], self.right[: self._rank]
        (rank, m), n = left.shape, right.shape[1]
        tokens = x.numel() // n
        if rank * (m + n) * tokens > m * n * (tokens + rank):
            # At the high ranks that pivoted storage affords, the product itself is the faster way.
            return functional.linear(x, left.T @ right, self._bias)
        return functional.linear(functional.linear(x, right), left.T, self._bias)


@contextmanager
def sliced(
    model: Any,
    sites: Sequence[Site],
    load_basis: Callable[[Site], Basis],
    largest_rank: Callable[[Site], int],
    stored_dtypes: Mapping[str, torch.dtype],
) -> Iterator[Callable[[Mapping[str, int | None]], None]]:
    """Put sliced layers into a model for as long as the block runs; the original modules return afterwards.

    Args:
        model: changed in place.
        sites: which weights.
        load_basis: reads a site's basis, on the CPU.
        largest_rank: the largest rank a site may be asked for; 0 for a site that only stays dense.
        stored_dtypes: by parameter name, the checkpoint's dtype.

    Yields:
        A function that sets ranks by site name; None for dense.
    """
    layers: dict[str, SlicedLinear] = {}
    originals = {site.name: site.module(model) for site in sites}
    try:
        for site in sites:
            most = largest_rank(site)
            if most == 0:
                continue
            weight = originals[site.name].weight
            bias = site.bias(model)
            layers[site.name] = SlicedLinear(
                originals[site.name],
                load_basis(site),
                most,
                bias,
                (stored_dtypes.get(f"{site.name}.weight", weight.dtype), weight.dtype),
            )
        for name, layer in layers.items():
            model.set_submodule(name, layer)

        def set_ranks(ranks: Mapping[str, int | None]) -> None:
            for name, rank in ranks.items():
                if name in layers:
                    layers[name].set_rank(rank)
                elif rank is not None:
                    raise ValueError(f"{name} has no ranks")

        yield set_ranks
    finally:
        for name in layers:
            model.set_submodule(name, originals[name])
