"""A layer that can take any cut at once: what a search runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankwise.device import computed_type
from rankwise.factors import Basis, Factors
from rankwise.models import Site
from rankwise.quantizers import Packed, Rotation
from rankwise.sizes import DENSE, Candidates, Cut

Beside = tuple[Packed | None, Rotation, Basis]
"""Codes of Q or None, its rotation, and the basis of what it leaves."""


class _Slices:
    """One basis in memory, of which any rank can be taken.

    Args:
        basis: full-rank factors.
        most: largest rank that will be asked for.
        q: codes of what stands beside L R, or None; they are decoded while a cut asks for them.
        rotation: of Q.
        own_bias: the layer's own bias, shape `[m]`, or None.
        resident: brings values to the device, through the dtype they are stored in.
    """

    def __init__(
        self,
        basis: Basis,
        most: int,
        q: Packed | None,
        rotation: Rotation,
        own_bias: Tensor | None,
        resident: Callable[[Tensor], Tensor],
    ) -> None:
        self.right = resident(basis.right[:most])
        # Transposed, so that the first r are contiguous as in R.
        self.left = resident(basis.left[:, :most].T)
        device = self.right.device
        self._q, self._rotation = q, rotation
        self._mean_output = None if basis.mean_output is None else basis.mean_output.to(device)
        self._mean_code = None if basis.mean_code is None else basis.mean_code[:most].to(device)
        self._own_bias = None if own_bias is None else own_bias.to(device)
        self._resident = resident

    def beside(self) -> Tensor | None:
        """Q as a matrix, shape `[m, n]`, in the dtype that is computed in; None without Q."""
        if self._q is None:
            return None
        alone = Factors(None, None, q=self._q, rotation=self._rotation)
        return alone.reconstruct().to(self.right.device, self.right.dtype)

    def bias_at(self, rank: int) -> Tensor | None:
        """b + (W - L_r R_r) E[x], as `Basis.truncate` makes it."""
        bias = self._own_bias
        if self._mean_output is not None and self._mean_code is not None:
            compensation = self._mean_output - self._mean_code[:rank] @ self.left[:rank].to(self._mean_code)
            bias = compensation if bias is None else bias.to(compensation) + compensation
        return None if bias is None else self._resident(bias)


class SlicedLinear(nn.Module):
    """y = (Q + L_r R_r) x + b_r, where the cut is set before a forward and L_r, R_r are views of a basis in memory.

    Of every Q there may be the codes are kept, and the matrix of the one in force alone.

    Args:
        dense: the module it stands for; a dense cut runs it unchanged.
        outlooks: by bits of Q (0 for none), what stands beside L R and the basis.
        candidates: the cuts that will be asked for.
        bias: the layer's own bias, shape `[m]`, or None.
        dtypes: what factors are stored in and what they compute in, so that a trial of factors equals the checkpoint.
    """

    def __init__(
        self,
        dense: nn.Module,
        outlooks: Mapping[int, Beside],
        candidates: Candidates,
        bias: Tensor | None,
        dtypes: tuple[torch.dtype, torch.dtype],
    ) -> None:
        super().__init__()
        self.dense = dense
        device = next(dense.parameters()).device
        stored, compute = dtypes

        def resident(values: Tensor) -> Tensor:
            return values.to(device, stored, copy=True, memory_format=torch.contiguous_format).to(compute)

        self._candidates = candidates
        self._slices = {
            q_bits: _Slices(basis, candidates.with_ranks(q_bits), q, rotation, bias, resident)
            for q_bits, (q, rotation, basis) in outlooks.items()
        }
        self._cut = DENSE
        self._beside: Tensor | None = None
        self._bias: Tensor | None = None

    @property
    def cut(self) -> Cut:
        """The cut in force."""
        return self._cut

    @property
    def left(self) -> Tensor:
        """L transposed, of the basis in force."""
        return self._slices[self._cut.q_bits].left

    @property
    def right(self) -> Tensor:
        """R of the basis in force."""
        return self._slices[self._cut.q_bits].right

    def set_cut(self, cut: Cut) -> None:
        """Take a cut: a new bias is made, and where Q is another one, its matrix.

        Raises:
            ValueError: when its rank is above the largest that was announced.
        """
        if cut == self._cut:
            return
        if cut.rank is None:
            self._beside = None
        else:
            most = self._candidates.with_ranks(cut.q_bits)
            if cut.q_bits not in self._slices or cut.rank > most:
                raise ValueError(f"rank must lie in {0 if cut.q_bits else 1}..{most}, not {cut.rank}")
            slices = self._slices[cut.q_bits]
            if self._cut.dense or cut.q_bits != self._cut.q_bits:
                self._beside = None  # Let go before the next one is made.
                self._beside = slices.beside()
            self._bias = slices.bias_at(cut.rank)
        self._cut = cut

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., n]` to `[..., m]`."""
        rank = self._cut.rank
        if rank is None:
            return self.dense(x)
        left, right = self.left[:rank], self.right[:rank]
        if self._beside is not None:
            # The product is smaller than what stands beside it, so it is added first.
            return functional.linear(x, torch.addmm(self._beside, left.T, right), self._bias)
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
    load: Callable[[Site], Mapping[int, Beside]],
    candidates: Mapping[str, Candidates],
    stored_dtypes: Mapping[str, torch.dtype],
) -> Iterator[Callable[[Mapping[str, Cut]], None]]:
    """Put sliced layers into a model for as long as the block runs; the original modules return afterwards.

    Args:
        model: changed in place.
        sites: which weights.
        load: reads a site's outlooks as `SlicedLinear` takes them, on the CPU.
        candidates: by site name, the cuts it may be asked for; a site that only stays dense is left alone.
        stored_dtypes: by parameter name, the checkpoint's dtype.

    Yields:
        A function that sets cuts by site name.
    """
    layers: dict[str, SlicedLinear] = {}
    originals = {site.name: site.module(model) for site in sites}
    computed = computed_type(model)
    try:
        for site in sites:
            if candidates[site.name].stays:
                continue
            weight = originals[site.name].weight
            # Weights that lie in files are widened with their block, which knows nothing of these.
            compute = max(weight.dtype, computed, key=lambda dtype: dtype.itemsize)
            layers[site.name] = SlicedLinear(
                originals[site.name],
                load(site),
                candidates[site.name],
                site.bias(model),
                (stored_dtypes.get(f"{site.name}.weight", weight.dtype), compute),
            )
        for name, layer in layers.items():
            model.set_submodule(name, layer)

        def set_cuts(cuts: Mapping[str, Cut]) -> None:
            for name, cut in cuts.items():
                if name in layers:
                    layers[name].set_cut(cut)
                elif not cut.dense:
                    raise ValueError(f"{name} has no cuts")

        yield set_cuts
    finally:
        for name in layers:
            model.set_submodule(name, originals[name])
