"""Sums in float32 on the model's device, totals in float64 on the CPU, whatever the model computes in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from conftest import tiny_llama
from rankwise.models import find_sites, share_inputs
from rankwise.statistics import Statistic, collect
from rankwise.statistics.absolute_mean import AbsoluteMean
from rankwise.statistics.base import Sums
from rankwise.statistics.curvature import Curvature, CurvatureSums, CurvatureTotals
from rankwise.statistics.input_moments import InputMoments
from rankwise.statistics.mean import MeanTotals, MeasuredSums
from rankwise.statistics.moment_sums import MomentSums, MomentTotals
from rankwise.statistics.moments import Moments
from rankwise.statistics.pooled_covariance import PooledCovariance
from rankwise.statistics.row_fisher import RowFisher

CPU = torch.device("cpu")
D, BATCHES = 6, 300


def batches(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Vectors `[2, 8, D]` of large mean, and inputs `[2, 8, 3]`."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(BATCHES):
        x, inputs = (torch.randn(2, 8, d, generator=generator) for d in (D, 3))
        yield (x + 4).to(dtype), inputs.to(dtype)


def second(x: Tensor, _inputs: Tensor) -> Tensor:
    return x.flatten(0, 1).T @ x.flatten(0, 1)


def rows(x: Tensor, inputs: Tensor) -> Tensor:
    return (x.mT @ inputs).square().sum((0, 2))


CASES: dict[str, tuple[Callable[[], Sums], Callable[[Tensor, Tensor], Tensor], Callable[..., Tensor]]] = {
    "moments": (lambda: MomentSums(D, CPU), second, lambda t: t.second_moment() * t.count),
    "curvature": (lambda: CurvatureSums(D, D, CPU), second, lambda t: t.blocks[0]),
    "absolute_mean": (
        lambda: MeasuredSums(AbsoluteMean().measure, D, CPU),
        lambda x, _inputs: x.abs().sum((0, 1)),
        lambda t: t.total,
    ),
    "row_fisher": (lambda: MeasuredSums(RowFisher().measure, D, CPU), rows, lambda t: t.total),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_sums_of_halves_are_as_exact_as_float32(name: str, dtype: torch.dtype) -> None:
    """Against float64 sums of the same numbers. Sums in the model's own dtype would stop growing, or overflow."""
    make, exact, read = CASES[name]
    sums, expected, naive = make(), torch.zeros(()).double(), torch.zeros((), dtype=dtype)
    for x, inputs in batches(dtype):
        sums.add(x, inputs)
        expected = expected + exact(x.double(), inputs.double())
        naive = naive + exact(x, inputs)
    torch.testing.assert_close(read(sums.take()), expected, rtol=2e-5, atol=0)
    if dtype != torch.float32:
        assert not torch.allclose(naive.double(), expected, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_totals_are_float64_on_the_cpu_for_every_model(dtype: torch.dtype) -> None:
    model = tiny_llama().to(dtype)
    tokens = torch.randint(0, 2048, (5, 7), generator=torch.Generator().manual_seed(1))
    sites = share_inputs(model, find_sites(model), tokens[:1])
    asked: tuple[Statistic, ...] = (
        *(Moments(), InputMoments(), PooledCovariance(), AbsoluteMean()),
        *(RowFisher(), Curvature()),
    )
    for by_stream in collect(model, sites, tokens, asked, batch_size=2).values():
        for totals in by_stream.values():
            tensors = [getattr(totals, field.name) for field in fields(totals)]
            found = {(t.dtype, t.device.type) for t in tensors if isinstance(t, Tensor)}
            assert found == {(torch.float64, "cpu")}


@pytest.mark.parametrize(
    "make",
    [
        lambda x: MomentTotals(1, x.double(), x.outer(x)),
        lambda x: CurvatureTotals(1, x.outer(x)[None]),
        lambda x: MeanTotals(1, x),
    ],
)
def test_totals_of_another_precision_are_refused(make: Callable[[Tensor], object]) -> None:
    with pytest.raises(TypeError, match=r"Totals\.\w+ is torch\.float\d\d: totals are float64"):
        make(torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_what_is_measured_in_another_precision_is_refused(dtype: torch.dtype) -> None:
    sums = MeasuredSums(lambda x, _inputs: (len(x), x.sum(0, dtype=dtype)), D, CPU)
    with pytest.raises(TypeError, match="sums are float32"):
        sums.add(torch.ones(4, D), torch.ones(4, 3))


@given(
    parts=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    blocks=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
@examples(max_examples=25, deadline=None)
def test_curvature_added_in_place_is_the_merge_of_what_is_taken(parts: list[int], blocks: int, seed: int) -> None:
    generator, m = torch.Generator().manual_seed(seed), 300
    given_parts = [torch.randn(part, m, generator=generator) for part in parts]
    one, other = (CurvatureSums(m, m // blocks, CPU) for _ in range(2))
    merged = in_place = None
    for x in given_parts:
        one.add(x)
        other.add(x)
        taken = one.take()
        merged = taken if merged is None else merged.merge(taken)
        in_place = other.take() if in_place is None else other.add_to(in_place)
    assert merged is not None
    assert in_place is not None
    assert in_place.count == merged.count == sum(parts)
    assert torch.equal(in_place.blocks, merged.blocks)
    assert torch.equal(in_place.blocks, in_place.blocks.mT)
    whole = torch.cat(given_parts).double().unflatten(1, (blocks, -1))
    torch.testing.assert_close(in_place.blocks, torch.einsum("tki,tkj->kij", whole, whole), rtol=1e-5, atol=1e-4)
    assert other.empty
