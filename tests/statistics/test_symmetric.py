"""Symmetric totals are kept as one half and come back to the bit; anything else as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from rankwise.statistics.base import Totals
from rankwise.statistics.files import load_totals, save_totals
from rankwise.statistics.symmetric import PANEL, halved, lower_numbers, whole


@dataclass(frozen=True)
class Sums(Totals):
    """A Gram matrix and what is none."""

    gram: Tensor
    other: Tensor
    count: int

    def merge(self, other: Sums) -> Sums:
        return self


def gram(n: int, *batch: int) -> Tensor:
    x = torch.randn(*batch, n, n + 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    product = x @ x.mT
    return product.tril() + product.tril(-1).mT


@given(n=st.integers(1, 3 * PANEL + 5), batch=st.lists(st.integers(1, 3), max_size=1))
def test_half_of_a_symmetric_matrix_gives_all_of_it(n: int, batch: list[int]) -> None:
    given_ = {"a": gram(n, *batch), "b": torch.randn(n, n, dtype=torch.float64), "c": torch.ones(n)}
    stored = halved(given_)
    found = whole(stored)
    assert found.keys() == given_.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in given_.items())
    if n > PANEL:
        assert stored["a.lower"].shape == (*batch, lower_numbers(n))
        assert lower_numbers(n) <= n * (n + PANEL) / 2
        assert "b" in stored


def test_files_are_half_as_large_and_older_ones_are_read(tmp_path: Path) -> None:
    n = 640
    totals = Sums(gram(n), torch.randn(n, n, dtype=torch.float64), 7)
    save_totals(tmp_path / "new.safetensors", totals)
    save_file({"gram": totals.gram, "other": totals.other, "count": torch.tensor([7])}, tmp_path / "old.safetensors")
    sizes = {name: (tmp_path / f"{name}.safetensors").stat().st_size for name in ("new", "old")}
    assert sizes["new"] == pytest.approx(8 * (n * n + lower_numbers(n)), rel=1e-3)
    assert sizes["new"] < 0.8 * sizes["old"]
    for name in sizes:
        found = load_totals(tmp_path / f"{name}.safetensors", Sums)
        assert torch.equal(found.gram, totals.gram)
        assert torch.equal(found.other, totals.other)
        assert found.count == 7


def test_what_is_not_a_number_stays_where_it_is() -> None:
    matrix = gram(PANEL + 2)
    matrix[3, 1] = float("nan")
    assert halved({"a": matrix})["a"] is matrix
