"""A layer that can take any rank at once: what a search for ranks runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankwise.factors import Basis
from rankwise.models import Site
from rankwise.sizes import QuantizedRank


class _Slices:
    """One basis in memory, of which any rank can be taken.

    Args:
        basis: full-rank factors.
        most: largest rank that will be asked for.
        beside: what stands beside L R, shape `[m, n]`, or None.
        own_bias: the layer's own bias, shape `[m]`, or None.
        resident: brings values to the device, through the dtype they are stored in.
    """

    def __init__(
        self,
        basis: Basis,
        most: int,
        beside: Tensor | None,
        own_bias: Tensor | None,
        resident: Callable[[Tensor], Tensor],
    ) -> None:
        self.right = resident(basis.right[:most])
        # Transposed, so that the first r are contiguous as in R.
        self.left = resident(basis.left[:, :most].T)
        device = self.right.device
        self.beside = None if beside is None else beside.to(device, self.right.dtype)
        self._mean_output = None if basis.mean_output is None else basis.mean_output.to(device)
        self._mean_code = None if basis.mean_code is None else basis.mean_code[:most].to(device)
        self._own_bias = None if own_bias is None else own_bias.to(device)
        self._resident = resident

    def bias_at(self, rank: int) -> Tensor | None:
        """b + (W - L_r R_r) E[x], as `Basis.truncate` makes it."""
        bias = self._own_bias
        if self._mean_output is not None and self._mean_code is not None:
            compensation = self._mean_output - self._mean_code[:rank] @ self.left[:rank].to(self._mean_code)
            bias = compensation if bias is None else bias.to(compensation) + compensation
        return None if bias is None else self._resident(bias)


class SlicedLinear(nn.Module):
    """y = (Q + L_r R_r) x + b_r, where r is set before a forward and L_r, R_r are views of a basis kept in memory.

    Args:
        dense: the module it stands for; rank None runs it unchanged.
        bases: by bits of Q, what stands beside L R (Q) and the full-rank factors; `{None: (None, basis)}` without Q.
        most: largest rank that will be asked for.
        bias: the layer's own bias, shape `[m]`, or None.
        dtypes: what factors are stored in and what they compute in, so that a trial of factors equals the checkpoint.
    """

    def __init__(
        self,
        dense: nn.Module,
        bases: Mapping[int | None, tuple[Tensor | None, Basis]],
        most: int,
        bias: Tensor | None,
        dtypes: tuple[torch.dtype, torch.dtype],
    ) -> None:
        super().__init__()
        self.dense = dense
        device = next(dense.parameters()).device
        stored, compute = dtypes

        def resident(values: Tensor) -> Tensor:
            return values.to(device, stored, copy=True, memory_format=torch.contiguous_format).to(compute)

        self._slices = {bits: _Slices(basis, most, beside, bias, resident) for bits, (beside, basis) in bases.items()}
        self._most = most
        self._now = next(iter(self._slices.values()))
        self._bias: Tensor | None = None
        self._rank: int | None = None

    @property
    def rank(self) -> int | None:
        """The rank in force; None for dense."""
        return self._rank

    @property
    def left(self) -> Tensor:
        """L transposed, of the basis in force."""
        return self._now.left

    @property
    def right(self) -> Tensor:
        """R of the basis in force."""
        return self._now.right

    def set_rank(self, rank: int | None) -> None:
        """Take a rank, and the Q it names: a new bias is made, nothing else.

        Raises:
            ValueError: when it is above the largest that was announced.
        """
        least = 0 if isinstance(rank, QuantizedRank) else 1
        if rank is not None and not least <= int(rank) <= self._most:
            raise ValueError(f"rank must lie in {least}..{self._most}, not {int(rank)}")
        if rank is not None and rank != self._rank:
            self._now = self._slices[rank.q_bits if isinstance(rank, QuantizedRank) else None]
            self._bias = self._now.bias_at(int(rank))
        self._rank = rank

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., n]` to `[..., m]`."""
        if self._rank is None:
            return self.dense(x)
        rank = int(self._rank)
        left, right = self.left[:rank], self.right[:rank]
        if self._now.beside is not None:
            # The product is smaller than what stands beside it, so it is added first.
            return functional.linear(x, torch.addmm(self._now.beside, left.T, right), self._bias)
        m, n = left.shape[1], right.shape[1]
        tokens = x.numel() // n
        if rank * (m + n) * tokens > m * n * (tokens + rank):
            # At the high ranks that pivoted storage affords, the product itself is the faster way.
            return functional.linear(x, left.T @ right, self._bias)
        return functional.linear(functional.linear(x, right), left.T, self._bias)


@contextmanager
def sliced(
    model: Any,
    sites: Sequence[Site],
    load_bases: Callable[[Site], Mapping[int | None, tuple[Tensor | None, Basis]]],
    largest_rank: Callable[[Site], int],
    stored_dtypes: Mapping[str, torch.dtype],
) -> Iterator[Callable[[Mapping[str, int | None]], None]]:
    """Put sliced layers into a model for as long as the block runs; the original modules return afterwards.

    Args:
        model: changed in place.
        sites: which weights.
        load_bases: reads a site's bases as `SlicedLinear` takes them, on the CPU.
        largest_rank: the largest rank a site may be asked for; 0, without a Q, for a site that only stays dense.
        stored_dtypes: by parameter name, the checkpoint's dtype.

    Yields:
        A function that sets ranks by site name; None for dense.
    """
    layers: dict[str, SlicedLinear] = {}
    originals = {site.name: site.module(model) for site in sites}
    try:
        for site in sites:
            most, bases = largest_rank(site), load_bases(site)
            if most == 0 and None in bases:
                continue
            weight = originals[site.name].weight
            bias = site.bias(model)
            layers[site.name] = SlicedLinear(
                originals[site.name],
                bases,
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
