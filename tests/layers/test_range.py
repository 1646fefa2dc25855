"""Sixteen bits: no scale of gradients or activations reaches what is stored, and what does not fit is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_children import factors_of
from torch import nn

from rankwise.checkpoints import LoadedModel
from rankwise.errors import NotFiniteError
from rankwise.factors import Factors
from rankwise.layers import KINDS, kind_of, substitute
from rankwise.linalg import OutputMetric, balanced, decompose
from rankwise.methods.base import make_basis

CPU = torch.device("cpu")


@given(exponents=st.lists(st.integers(-12, 12), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_balancing_changes_no_bit_of_the_product(exponents: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    scale = 10.0 ** torch.tensor(exponents).double()
    left, right = torch.randn(9, len(scale)).double() * scale, torch.randn(len(scale), 7).double()
    found = balanced(left, right)
    assert torch.equal(found[0] @ found[1], left @ right)
    ratio = found[0].norm(dim=0) / found[1].norm(dim=1)
    assert ((ratio > 0.5 - 1e-9) & (ratio < 2 + 1e-9)).all()
    assert all(torch.equal(again, before) for again, before in zip(balanced(*found), found, strict=True))


def test_zero_components_stay() -> None:
    left, right = torch.zeros(3, 2), torch.ones(2, 4)
    assert all(torch.equal(*pair) for pair in zip(balanced(left, right), (left, right), strict=True))


@pytest.mark.parametrize("felt", [1e-14, 1e12])
@pytest.mark.parametrize("kind", ["two_factor", "quantized"])
def test_the_scale_of_gradients_is_not_in_half_precision_factors(kind: str, felt: float) -> None:
    torch.manual_seed(0)
    weight, root = torch.randn(24, 16).double(), torch.randn(24, 24).double()
    metric = OutputMetric.of((felt * root @ root.T)[None], 0.1)
    found = decompose(weight, metric=metric)
    # What was stored before overflows, or is lost.
    assert not torch.isfinite(found.left.half()).all() or not found.right.half().abs().max() > 0 or felt > 1
    for left, right in ((found.left, found.right), (make_basis(found).left, make_basis(found).right)):
        layer = KINDS[kind].of(Factors(left, right), torch.float16, CPU)
        assert {p.dtype for p in layer.parameters()} == {torch.float16}
        again = kind_of(layer).factors(layer).reconstruct()
        assert (again - weight).abs().max() < 5e-3 * weight.abs().max()
    basis = make_basis(found)
    assert max(float(basis.left.abs().max()), float(basis.right.abs().max())) < 100


@pytest.mark.parametrize(("form", "kind"), [("two_factor", "two_factor"), ("two_factor", "pivoted"), ("signs", "")])
@pytest.mark.parametrize(("size", "says"), [(1e11, "does not fit float16"), (float("nan"), "NaN or infinite")])
def test_what_does_not_fit_is_named(form: str, kind: str, size: float, says: str) -> None:
    model: Any = nn.Sequential(nn.Linear(16, 24))
    before = model[0]
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).double()
    factors = factors_of(weight, torch.zeros(24), form)
    assert factors.left is not None
    broken = Factors(factors.left * size, factors.right, factors.bias, factors.q, factors.packed, factors.rotation)
    with pytest.raises(NotFiniteError, match=says) as raised:
        substitute(model, "0", broken, kind or "quantized", torch.float16)
    assert raised.value.where == "0"
    assert model[0] is before


def test_scales_of_codes_are_looked_at_too() -> None:
    factors = factors_of(torch.randn(24, 16).double(), torch.zeros(24), "codes")
    assert factors.q is not None
    factors.q.scale[3, 0] = float("inf")
    with pytest.raises(NotFiniteError, match="NaN or infinite"):
        substitute(nn.Sequential(nn.Linear(16, 24)), "0", factors, "quantized", torch.float16)


def test_parameters_that_grew_beyond_their_type_are_named() -> None:
    model: Any = nn.Sequential(nn.LayerNorm(4))
    model[0].weight.data.fill_(1e6)
    loaded = LoadedModel(model, None, "x", "float32", {"0.weight": torch.float16, "0.bias": torch.float16})
    with pytest.raises(NotFiniteError, match="does not fit float16") as raised:
        loaded.to_stored_dtypes()
    assert raised.value.where == "0.weight"
