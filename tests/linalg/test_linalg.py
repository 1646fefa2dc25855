"""The decomposition against textbook formulas, for any shape and any metric, singular ones too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.linalg import InputMetric, OutputMetric, decompose, psd_factor
from rankwise.linalg.pivot import LARGEST_ENTRY, independent_rows, pivot

sizes = st.integers(2, 14)
seeds = st.integers(0, 2**31 - 1)


def random_matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_psd(n: int, rank: int, seed: int) -> Tensor:
    root = random_matrix(n, rank, seed)
    return root @ root.T


@given(n=sizes, rank=sizes, seed=seeds)
def test_psd_factor_squares_to_its_matrix_even_when_singular(n: int, rank: int, seed: int) -> None:
    matrix = random_psd(n, min(n, rank), seed)
    root = psd_factor(matrix)
    torch.testing.assert_close(root @ root.T, matrix, atol=1e-9, rtol=1e-9)


@given(m=sizes, n=sizes, rank=sizes, seed=seeds, both=st.booleans())
@settings(max_examples=60, deadline=None)
def test_full_rank_is_exact_and_error_is_the_tail_of_the_energy(
    m: int, n: int, rank: int, seed: int, both: bool
) -> None:
    weight = random_matrix(m, n, seed)
    inputs = InputMetric(random_psd(n, min(n, rank), seed + 1))
    curvature = random_psd(m, m + 2, seed + 2)
    metric = OutputMetric.of(curvature[None], 1e-9) if both else None
    found = decompose(weight, inputs=inputs, metric=metric)
    k = min(m, n)
    assert found.left.shape == (m, k)
    assert found.right.shape == (k, n)
    torch.testing.assert_close(found.left @ found.right, weight, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.encoder @ weight, found.right, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.encode(weight[:, 0]), found.right[:, 0], atol=1e-6, rtol=1e-6)
    weigh = curvature if both else torch.eye(m, dtype=torch.float64)
    before = float("inf")
    for r in range(1, k + 1):
        residual = weight - found.left[:, :r] @ found.right[:r]
        error = torch.trace(weigh @ residual @ inputs.matrix @ residual.T).item()
        scale = found.energy.sum().item() + 1e-12
        assert error == pytest.approx(found.energy[r:].sum().item(), abs=1e-6 * scale)
        assert error <= before + 1e-9 * scale
        before = error


@given(m=sizes, n=sizes, seed=seeds, damping=st.floats(1e-3, 3))
@settings(max_examples=60, deadline=None)
def test_undamped_energies_are_the_loss_of_what_is_dropped(m: int, n: int, seed: int, damping: float) -> None:
    """Directions come from the damped F, energies from F itself, and there are no cross terms."""
    weight, covariance, curvature = (
        random_matrix(m, n, seed),
        random_psd(n, n + 2, seed + 1),
        random_psd(m, 3, seed + 2),
    )
    metric = OutputMetric.of(curvature[None], damping)
    found = decompose(weight, inputs=InputMetric(covariance), metric=metric)
    energy = found.energy * metric.undamped_share(found.left)
    for r in range(min(m, n) + 1):
        residual = weight - found.left[:, :r] @ found.right[:r]
        loss = torch.trace(curvature @ residual @ covariance @ residual.T).item()
        assert loss == pytest.approx(energy[r:].sum().item(), rel=1e-6, abs=1e-7 * found.energy.sum().item())


@given(m=sizes, n=sizes, r=sizes, seed=seeds)
@settings(max_examples=60, deadline=None)
def test_equals_the_svd_of_the_whitened_weight(m: int, n: int, r: int, seed: int) -> None:
    """SVD-LLM as published: SVD of W C with G = C C^T by Cholesky, C undone on the right factor."""
    weight, gram = random_matrix(m, n, seed), random_psd(n, n + 5, seed + 1)
    r = min(r, m, n)
    root = torch.linalg.cholesky(gram)
    u, d, vt = torch.linalg.svd(weight @ root, full_matrices=False)
    published = (u[:, :r] * d[:r]) @ torch.linalg.solve_triangular(root, vt[:r], upper=False, left=False)
    found = decompose(weight, inputs=InputMetric(gram))
    torch.testing.assert_close(found.energy[: len(d)], d.square(), atol=1e-8, rtol=1e-6)
    if r == min(m, n) or d[r - 1] - d[r] > 1e-3 * d[0]:
        torch.testing.assert_close(found.left[:, :r] @ found.right[:r], published, atol=1e-5, rtol=1e-5)


def test_diagonal_metrics_agree_with_their_matrices() -> None:
    weight = random_matrix(9, 6, 0)
    scale = torch.rand(6, dtype=torch.float64) + 0.1
    as_vector = decompose(weight, inputs=InputMetric(scale))
    as_matrix = decompose(weight, inputs=InputMetric(scale.diag()))
    torch.testing.assert_close(as_vector.left[:, :3] @ as_vector.right[:3], as_matrix.left[:, :3] @ as_matrix.right[:3])
    rows = torch.rand(9, dtype=torch.float64) + 0.1
    by_ones = decompose(weight, metric=OutputMetric.of(rows[:, None, None], 0.0))
    u, d, vt = torch.linalg.svd(rows.sqrt()[:, None] * weight, full_matrices=False)
    torch.testing.assert_close(
        by_ones.left[:, :2] @ by_ones.right[:2], ((u[:, :2] * d[:2]) @ vt[:2]) / rows.sqrt()[:, None]
    )


@pytest.mark.parametrize(("m", "n"), [(5, 9), (9, 5)])
def test_identity_curvature_gives_the_one_sided_factors(m: int, n: int) -> None:
    weight, covariance = random_matrix(m, n, 1), InputMetric(random_psd(n, n, 2))
    one = decompose(weight, inputs=covariance)
    two = decompose(weight, inputs=covariance, metric=OutputMetric.of(torch.eye(m, dtype=torch.float64)[None], 0.0))
    torch.testing.assert_close(one.left[:, :3] @ one.right[:3], two.left[:, :3] @ two.right[:3])


def test_measured_outputs_replace_the_input_metric() -> None:
    weight, covariance = random_matrix(4, 9, 3), random_psd(9, 9, 4)
    metric = OutputMetric.of(random_psd(4, 6, 5)[None], 0.0)
    through_inputs = decompose(weight, inputs=InputMetric(covariance), metric=metric)
    through_outputs = decompose(weight, outputs=weight @ covariance @ weight.T, metric=metric)
    torch.testing.assert_close(through_inputs.energy, through_outputs.energy)
    torch.testing.assert_close(
        through_inputs.left[:, :2] @ through_inputs.right[:2], through_outputs.left[:, :2] @ through_outputs.right[:2]
    )


def test_no_random_pair_beats_the_two_sided_factors() -> None:
    weight, covariance, curvature = random_matrix(7, 6, 6), random_psd(6, 6, 7), random_psd(7, 7, 8)
    found = decompose(weight, inputs=InputMetric(covariance), metric=OutputMetric.of(curvature[None], 0.0))

    def error(product: Tensor) -> float:
        residual = weight - product
        return torch.trace(curvature @ residual @ covariance @ residual.T).item()

    left, right = found.left[:, :2], found.right[:2]
    best = error(left @ right)
    for seed in range(50):
        nudged = left + 1e-2 * random_matrix(7, 2, seed), right + 1e-2 * random_matrix(2, 6, seed + 99)
        assert error(nudged[0] @ nudged[1]) > best


def test_a_singular_metric_is_damped_and_says_so() -> None:
    singular = random_psd(6, 2, 9)
    metric = OutputMetric.of(singular[None], 0.0)
    assert metric.damping > 0
    x = random_matrix(6, 3, 10)
    torch.testing.assert_close(metric.undo(metric.weigh(x)), x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(metric.spread(x), metric.blocks[0] @ x)


@pytest.mark.parametrize("bad", [torch.zeros(1, 3, 3).double(), torch.full((1, 3, 3), float("nan")).double()])
def test_a_zero_or_broken_metric_is_refused(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="zero or not finite"):
        OutputMetric.of(bad, 1e-6)


@given(m=sizes, n=sizes, r=sizes, seed=seeds, flat=st.booleans())
@settings(max_examples=60, deadline=None)
def test_pivot_rows_rebuild_the_product_and_stay_tame(m: int, n: int, r: int, seed: int, flat: bool) -> None:
    r = min(r, m)
    left, right = random_matrix(m, r, seed), random_matrix(r, n, seed + 1)
    if flat:
        left[:, r // 2 :] = 0  # The product then has less rank than it is given.
    found = pivot(left, right)
    assert found.first.shape == (r, n)
    assert found.rest.shape == (m - r, r)
    assert sorted(found.order.tolist()) == list(range(m))
    assert found.largest <= LARGEST_ENTRY
    torch.testing.assert_close(found.reconstruct(), left @ right, atol=1e-9, rtol=1e-9)


def test_rows_are_exchanged_until_no_entry_is_large() -> None:
    r = 40
    left = random_matrix(120, r, 3)
    order, rest = independent_rows(left, limit=1e9)
    exchanged_order, exchanged = independent_rows(left, limit=1.01)
    assert float(exchanged.abs().max()) <= 1.01 <= float(rest.abs().max())
    for rows, ratio in ((order, rest), (exchanged_order, exchanged)):
        torch.testing.assert_close(left[rows[r:]], ratio @ left[rows[:r]])
