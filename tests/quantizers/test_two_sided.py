"""Two-sided rounding beside what it says it does: block by block as written down, and LDLQ where outputs are alike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankwise.quantizers import Hessian, OutputFeedback, Target, codebook_named, ldlq, round_along_both
from rankwise.quantizers.codebooks import Codebook
from rankwise.quantizers.two_sided import OUTPUT_BLOCK

BOOKS = st.sampled_from([("e8p", 2), ("e8p", 3), ("e8p", 4), ("uniform", 3), ("nf", 2)])


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment(n: int, seed: int, decades: float = 1.0) -> Tensor:
    mixed = drawn(2 * n + 3, n, seed=seed) * torch.logspace(0, -decades, n).double()
    mixed = mixed @ drawn(n, n, seed=seed + 1)
    return mixed.T @ mixed / len(mixed)


def target(m: int, n: int, seed: int, codebook: Codebook) -> tuple[Target, Hessian]:
    hessian = Hessian.of(moment(n, seed + 10), 0.01)
    weight = drawn(m, n, seed=seed)
    return Target(weight, hessian.feedback(8), codebook.scales(weight, feedback=True)), hessian


def one_by_one(asked: Target, feedback: Tensor, codebook: Codebook) -> Tensor:
    """What codes stand for when blocks are rounded by rows, each at W + A^T E + E B + A^T E B with E of those done."""
    m, n = asked.weight.shape
    high, wide = -m % OUTPUT_BLOCK, -n % 8
    weight = torch.nn.functional.pad(asked.weight, (0, wide, 0, high))
    unit = torch.nn.functional.pad(asked.scale.expand(m, 1), (0, 0, 0, high), value=1.0).expand_as(weight)
    missed = torch.zeros_like(weight)
    for top in range(0, m + high, OUTPUT_BLOCK):
        rows = slice(top, top + OUTPUT_BLOCK)
        for left in range(0, n + wide, 8):
            block = rows, slice(left, left + 8)
            moved = feedback.double().T @ missed
            wanted = weight + moved + missed @ asked.feedback + moved @ asked.feedback
            values = codebook.decode(codebook.round(wanted[block] / unit[block])).double() * unit[block]
            missed[block] = weight[block] - values
    return (weight - missed)[:m, :n]


@given(m=st.integers(1, 60), n=st.integers(1, 40), seed=st.integers(0, 99), book=BOOKS)
def test_blocks_are_rounded_where_the_errors_of_those_before_put_them(
    m: int, n: int, seed: int, book: tuple[str, int]
) -> None:
    codebook = codebook_named(*book, by_row=True)
    asked, _ = target(m, n, seed, codebook)
    outputs = OutputFeedback.of(moment(m, seed + 20), 0.3)
    found = round_along_both(asked, outputs.feedback, codebook).dense()
    expected = one_by_one(asked, outputs.feedback, codebook)
    # In float32 a tie may fall the other way, and what comes after it; not from the first block on.
    assert found.shape == asked.weight.shape
    same = torch.isclose(found, expected)
    assert same[:OUTPUT_BLOCK, :8].all()
    assert same.double().mean() > 0.95


@given(m=st.integers(1, 40), n=st.integers(1, 40), seed=st.integers(0, 99), book=BOOKS)
def test_outputs_that_are_felt_alike_are_rounded_by_ldlq(m: int, n: int, seed: int, book: tuple[str, int]) -> None:
    codebook = codebook_named(*book, by_row=True)
    asked, _ = target(m, n, seed, codebook)
    outputs = OutputFeedback.of(3 * torch.eye(m), 0.5)
    assert not outputs.feedback.any()
    assert outputs.left == pytest.approx(1.0)
    assert outputs.spread == pytest.approx(0.0)
    found = round_along_both(asked, outputs.feedback, codebook)
    alone = ldlq(asked.weight.float(), asked.feedback.float(), codebook, asked.scale.float())
    assert (found.codes == alone.codes).double().mean() > 0.99
    assert found.columns == alone.columns == n


@given(m=st.integers(2, 50), n=st.integers(2, 40), seed=st.integers(0, 99))
def test_the_loss_is_what_the_roundings_themselves_miss(m: int, n: int, seed: int) -> None:
    """tr(F E H E^T) is the sum over blocks of tr(D_F N D_H N^T), N = (I + A)^T E (I + B), for any E."""
    curvature, hessian = moment(m, seed), Hessian.of(moment(n, seed + 1), 0.01)
    metric = Hessian.of(curvature, 0.1)
    outputs = OutputFeedback.of(curvature, 0.1)
    error = drawn(m, n, seed=seed + 2)
    unit, roots = hessian.split(8)
    high, wide = len(outputs.feedback) - m, len(unit) - n
    padded = torch.nn.functional.pad(error, (0, wide, 0, high))
    left = (torch.eye(m + high) + outputs.feedback.double()).T
    missed = left @ padded @ (torch.eye(n + wide) + unit)
    by_root = torch.block_diag(*outputs.roots.double()).T @ missed @ torch.block_diag(*roots)
    loss = float(((metric.matrix @ error) * (error @ hessian.matrix)).sum())
    assert float(by_root.square().sum()) == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("m", [64, 100])
def test_it_loses_the_share_of_ldlq_that_it_says(m: int, bits: int) -> None:
    codebook = codebook_named("e8p", bits, by_row=True)
    asked, hessian = target(m, 96, 5, codebook)
    curvature = moment(m, 7, decades=2.0)
    outputs = OutputFeedback.of(curvature, 0.5)
    assert outputs.left < 0.5

    def loss(values: Tensor) -> float:
        error = asked.weight - values
        return float(((curvature @ error) * (error @ hessian.matrix)).sum())

    found = loss(round_along_both(asked, outputs.feedback, codebook).dense())
    alone = loss(ldlq(asked.weight, asked.feedback, codebook, asked.scale).dense())
    assert found / alone == pytest.approx(outputs.left, rel=0.25)


def test_a_curvature_that_is_not_finite_is_refused() -> None:
    curvature = torch.eye(8)
    curvature[3, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        OutputFeedback.of(curvature, 0.5)
