"""Codebooks, rotations, rounding with feedback, CALDERA and the packed layer, against brute force and exact algebra."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from rankwise.errors import RecipeError
from rankwise.factors import Factors, Fit
from rankwise.layers import QuantizedLinear, cache_dense, substitute
from rankwise.layers.quantized import PackedMatrix
from rankwise.linalg import InputMetric
from rankwise.methods.caldera import Caldera
from rankwise.methods.quantize import Quantize
from rankwise.quantizers import (
    CODEBOOKS,
    Codebook,
    Hessian,
    Rotation,
    codebook_named,
    improve,
    ldlq,
    low_rank,
    weighed_error,
)
from rankwise.quantizers.codes import (
    decode,
    e8_short_values,
    e8p_patterns,
    e8p_values,
    normal_float_levels,
    pack_bits,
    tables_for,
    uniform_levels,
    unpack_bits,
    wide_scale,
)
from rankwise.quantizers.lattice import known_tables, nearest_e8p, nearest_of_all, nearest_short, round_e8p
from rankwise.quantizers.rotation import rotate, rotation_parts
from rankwise.sizes import Budget, Cut, Form
from rankwise.statistics import Statistic
from rankwise.statistics.curvature import Curvature
from rankwise.statistics.input_moments import InputMoments

Nearest = Callable[[Tensor], Tensor]
"""Vectors, shape `[count, 8]` -> numbers of codewords, shape `[count]`."""

seeds = st.integers(0, 2**31 - 1)
KNOWN = [(name, bits) for name, kind in CODEBOOKS.items() for bits in kind.known_bits]
FEW = [("e8p", 2), ("e8p", 3), ("e8p", 4), ("uniform", 2), ("uniform", 4), ("nf", 2), ("nf", 3)]
SCALINGS = [(0, False), (0, True), (8, False), (16, True)]


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=drawn(seed))


def second_moment(n: int, samples: int, seed: int) -> Tensor:
    root = random_matrix(n, samples, seed)
    return root @ root.T / samples


def toeplitz(n: int, correlation: float) -> Tensor:
    places = torch.arange(n, dtype=torch.float64)
    return correlation ** (places[:, None] - places).abs()


def decaying(n: int, seed: int) -> Tensor:
    basis, _ = torch.linalg.qr(random_matrix(n, n, seed))
    return (basis * torch.exp(-torch.arange(n, dtype=torch.float64) / (n / 8))) @ basis.T


def whole_blocks(hessian: Tensor, width: int = 8) -> Tensor:
    """H with the mean of its diagonal for the columns that pad it to whole blocks."""
    short = -len(hessian) % width
    return torch.block_diag(hessian, hessian.diagonal().mean() * torch.eye(short, dtype=hessian.dtype))


def error_by_row(error: Tensor, hessian: Tensor) -> Tensor:
    return ((error @ hessian) * error).sum(1)


@dataclass
class Seen:
    """Stands in for a site's statistics; without `outputs` nothing is felt of it."""

    moment: Tensor
    outputs: int = 0
    bias: Tensor | None = None

    def of(self, statistic: Statistic) -> Any:
        if isinstance(statistic, Curvature):
            m = self.outputs
            return second_moment(m, m + 3, 5)[None] if m else torch.zeros(1, 1, 1)
        assert isinstance(statistic, InputMoments)
        return SimpleNamespace(second_moment=lambda: self.moment)


@cache
def lattice() -> Tensor:
    """All 65,536 codewords."""
    return e8p_values(torch.arange(1 << 16), e8p_patterns())


@cache
def shifts() -> Tensor:
    return torch.where(torch.arange(1 << 16) < 1 << 15, 0.25, -0.25)[:, None]


def test_the_lattice_has_65536_codewords() -> None:
    assert len(lattice().unique(dim=0)) == 1 << 16


def test_codewords_less_their_shift_are_half_integers_of_even_sum() -> None:
    whole = lattice() - shifts() - 0.5
    assert torch.equal(whole, whole.round())
    assert not (whole.sum(1) % 2).any()


def test_codewords_lie_in_e8_moved_by_a_quarter() -> None:
    twice = 2 * (lattice() - 0.25)
    assert torch.equal(twice, twice.round())
    odd = twice % 2
    assert torch.equal(odd, odd[:, :1].expand(-1, 8))
    assert not (twice.sum(1) % 4).any()


@pytest.mark.parametrize("place", range(7))
def test_a_sign_bit_flips_its_entry_and_the_last(place: int) -> None:
    flip = torch.ones(8)
    flip[[place, 7]] = -1
    flipped = lattice()[torch.arange(1 << 16) ^ (1 << (8 + place))]
    torch.testing.assert_close(flipped - shifts(), (lattice() - shifts()) * flip, atol=0, rtol=0)


def test_the_shift_bit_moves_a_codeword_by_a_half() -> None:
    torch.testing.assert_close(lattice()[: 1 << 15] - 0.5, lattice()[1 << 15 :], atol=0, rtol=0)


def test_patterns_are_256_of_which_227_are_short() -> None:
    patterns = e8p_patterns()
    norms = patterns.square().sum(1)
    assert len(patterns.unique(dim=0)) == 256
    assert set(patterns.unique().tolist()) == {0.5, 1.5, 2.5}
    assert int((norms <= 10).sum()) == 227
    assert int((norms == 12).sum()) == 29


def by_trying(x: torch.Tensor) -> torch.Tensor:
    """As on a GPU."""
    return torch.cat([nearest_of_all(part, known_tables(x.device)) for part in x.split(4096)])


EITHER = pytest.mark.parametrize("nearest", [nearest_e8p, by_trying])


@EITHER
@pytest.mark.parametrize("scale", [1e-3, 0.3, 0.965, 1.5, 4.0, 100.0])
def test_the_nearest_codeword_is_the_nearest_of_all(scale: float, nearest: Nearest) -> None:
    x = torch.randn(300, 8, generator=drawn(int(1000 * scale))) * scale
    found = (x - lattice()[nearest(x)]).double().norm(dim=1)
    each = torch.cdist(x.double(), lattice().double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(found, each.amin(1), atol=1e-6 * max(1, scale), rtol=1e-6)


@EITHER
def test_the_nearest_codeword_is_found_for_single_large_coordinates(nearest: Nearest) -> None:
    x = torch.cat([torch.randn(300, 8, generator=drawn(1)), torch.zeros(9, 8)])
    x[torch.arange(300), torch.arange(300) % 8] *= 20
    x[300:308] = torch.eye(8) * 3
    found = (x - lattice()[nearest(x)]).double().norm(dim=1)
    each = torch.cdist(x.double(), lattice().double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(found, each.amin(1), atol=1e-5, rtol=1e-6)


@EITHER
def test_between_codewords_one_of_the_nearest_is_found(nearest: Nearest) -> None:
    """Points of the grid whose signs are of the wrong parity lie equally far from many codewords."""
    grid = torch.randint(-3, 3, (2000, 8), generator=drawn(5)).float()
    for shift in (0.25, 0.5, 0.75):
        x = (grid + shift) * (torch.arange(2000) % 3 > 0)[:, None]
        found = (x - lattice()[nearest(x)]).double().norm(dim=1)
        each = torch.cdist(x.double(), lattice().double(), compute_mode="donot_use_mm_for_euclid_dist")
        torch.testing.assert_close(found, each.amin(1), atol=1e-6, rtol=1e-6)


@EITHER
def test_every_codeword_is_nearest_to_itself(nearest: Nearest) -> None:
    assert torch.equal(lattice()[nearest(lattice())], lattice())


def test_rounding_no_vectors_gives_no_codes() -> None:
    assert round_e8p(torch.zeros(0, 8), 2).shape == (0, 2)


def test_short_vectors_are_256_of_e8_of_squared_norm_up_to_four() -> None:
    short = e8_short_values()
    assert len(short.unique(dim=0)) == 256
    twice = 2 * short
    assert torch.equal(twice % 2, (twice % 2)[:, :1].expand(-1, 8))
    assert not (twice.sum(1) % 4).any()
    norms = short.square().sum(1)
    assert [int((norms == norm).sum()) for norm in (0, 2, 4)] == [1, 240, 15]


@pytest.mark.parametrize("scale", [1e-3, 0.3, 0.7, 1.5, 10.0])
def test_the_nearest_short_vector_is_the_nearest_of_all(scale: float) -> None:
    x = torch.randn(2000, 8, generator=drawn(int(1000 * scale))) * scale
    x[::10, 7] = -3 * scale  # The one vector that is left out points there.
    found = (x - e8_short_values()[nearest_short(x)]).double().norm(dim=1)
    each = torch.cdist(x.double(), e8_short_values().double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(found, each.amin(1), atol=1e-6 * max(1, scale), rtol=1e-6)


def test_every_short_vector_is_nearest_to_itself() -> None:
    assert torch.equal(nearest_short(e8_short_values()), torch.arange(256))


def test_two_bits_on_a_gaussian_cost_what_is_published() -> None:
    """The best scalar quantiser (Lloyd-Max) of 2 bits has 0.1175."""
    x, scale = torch.randn(10**6, 8, generator=drawn(0)), 0.965
    error = float((x - scale * lattice()[nearest_e8p(x / scale)]).square().mean())
    assert error == pytest.approx(0.0912, rel=0.01)
    assert error < 0.1175


def test_each_further_bit_of_the_lattice_costs_less_than_a_scalar_quantiser() -> None:
    """Lloyd-Max at 2, 3 and 4 bits: 0.1175, 0.03454, 0.009497."""
    x = torch.randn(200, 2000, generator=drawn(1))
    errors = [float((codebook_named("e8p", bits).quantize(x).dense() - x).square().mean()) for bits in (2, 3, 4)]
    assert all(error < scalar for error, scalar in zip(errors, (0.1175, 0.03454, 0.009497), strict=True))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_scale_of_the_lattice_is_within_a_hundredth_of_the_best_for_a_gaussian(bits: int) -> None:
    x, codebook = torch.randn(50, 2000, generator=drawn(1)), codebook_named("e8p", bits)
    scale = codebook.scales(x)
    errors = [float((codebook.quantize(x, scale * by).dense() - x).square().mean()) for by in (1, 0.96, 1.04)]
    assert errors[0] <= 1.01 * min(errors)


@pytest.mark.parametrize("codebook", ["e8p", "uniform", "nf", "levels:-1,-0.1,0.1,1,2,3,4,5.3"])
def test_tables_are_numbers_of_32_bits_whatever_a_model_is_loaded_in(codebook: str) -> None:
    """Loading makes layers while its own type is the usual one, and what is kept of that time would stay rounded."""
    for table in (e8p_patterns, e8_short_values):
        table.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        PackedMatrix(8, 16, 3, codebook, [1, 1], 0)
        during = tables_for(codebook, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    for table in (e8p_patterns, e8_short_values):
        table.cache_clear()
    assert all(table.dtype == torch.float32 for table in during)
    assert all(torch.equal(one, other) for one, other in zip(during, tables_for(codebook, 3), strict=True))


def test_what_stored_codes_mean_never_changes() -> None:
    """Another table, order or rotation would garble every checkpoint there is."""
    tables = (2 * e8p_patterns()).char(), (2 * e8_short_values()).char()
    digests = [hashlib.sha256(table.numpy().tobytes()).hexdigest()[:16] for table in tables]
    assert digests == ["18da63c1fbe98b5f", "f4ad2a70bacce230"]
    ones = torch.full((1, 1, 4), 1, dtype=torch.uint8)
    assert decode(ones[..., :3], "e8p", tables_for("e8p", 3))[0, :2].tolist() == pytest.approx([0.24, 1.24])
    assert decode(ones, "e8p", tables_for("e8p", 4))[0, :2].tolist() == pytest.approx([-0.31625, 0.94875])
    assert unpack_bits(torch.tensor([[1, 2]], dtype=torch.uint8)).tolist() == [[1, 2, 0, 0, 0, 0, 0, 0]]
    turn = 2 * torch.pi * torch.arange(3, dtype=torch.float64) / 3
    first, second = rotate(torch.eye(6, dtype=torch.float64))[1].unflatten(0, (2, 3))
    torch.testing.assert_close(first, (turn.cos() + turn.sin()) / 6**0.5)
    torch.testing.assert_close(second, first)
    fourth = rotate(torch.eye(6, dtype=torch.float64))[4]
    torch.testing.assert_close(fourth, torch.cat([first, -first]))


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_integers_are_read_back(bits: int) -> None:
    values = torch.arange(2**bits).repeat(8).reshape(-1, 8)
    values = torch.cat([values, values[:, torch.randperm(8, generator=drawn(bits))]])
    packed = pack_bits(values, bits)
    assert packed.shape == (len(values), bits)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_bits(packed), values)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_byte_is_the_packing_of_what_it_is_read_as(bits: int) -> None:
    codes = torch.randint(256, (500, bits), generator=drawn(bits)).to(torch.uint8)
    assert torch.equal(pack_bits(unpack_bits(codes), bits), codes)


def test_every_code_of_the_lattice_is_read_as_its_codeword() -> None:
    index = torch.arange(1 << 16)
    codes = torch.stack([index & 255, index >> 8], -1).to(torch.uint8).unsqueeze(0)
    assert torch.equal(decode(codes, "e8p", tables_for("e8p", 2)).reshape(-1, 8), lattice())


@pytest.mark.parametrize(("name", "bits"), [each for each in KNOWN if each[0] != "e8p"])
def test_every_code_is_read_as_its_level_and_levels_are_their_own_codes(name: str, bits: int) -> None:
    levels = uniform_levels(bits) if name == "uniform" else normal_float_levels(bits)
    assert torch.equal(levels, levels.unique())
    torch.testing.assert_close(levels, -levels.flip(0))
    index = torch.arange(2**bits).repeat(8).reshape(1, -1, 8)
    codes = pack_bits(index, bits)
    values = decode(codes, name, tables_for(name, bits))
    assert torch.equal(values.flatten(), levels[index.flatten()])
    assert torch.equal(codebook_named(name, bits).round(values), codes)


@pytest.mark.parametrize(("name", "bits"), [each for each in KNOWN if each[0] != "e8p"])
def test_values_go_to_the_nearest_level(name: str, bits: int) -> None:
    codebook = codebook_named(name, bits)
    values = random_matrix(20, 40, bits) * (2**bits if name == "uniform" else 1) / 3
    found = codebook.decode(codebook.round(values))
    levels = uniform_levels(bits) if name == "uniform" else normal_float_levels(bits)
    nearest = (values.unsqueeze(-1) - levels).abs().amin(-1)
    torch.testing.assert_close((values - found).abs(), nearest, atol=1e-6, rtol=0)


def test_normal_float_levels_share_a_gaussian_evenly() -> None:
    levels = normal_float_levels(4).double()
    assert float(levels[-1]) == 1
    shares = torch.special.ndtr(levels * torch.special.ndtri(torch.tensor(31 / 32, dtype=torch.float64)))
    torch.testing.assert_close(shares.diff(), torch.full((15,), 1 / 16, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "bits"), KNOWN)
def test_any_number_of_columns_is_rounded(name: str, bits: int) -> None:
    for columns, (group, by_row) in itertools.product((1, 7, 8, 13, 40), SCALINGS):
        matrix = random_matrix(6, columns, columns)
        packed = codebook_named(name, bits, group, by_row).quantize(matrix)
        assert packed.codes.shape == (6, -(-columns // 8), bits)
        assert packed.dense().shape == (6, columns)
        assert float((packed.dense() - matrix).square().mean()) < 0.5 * float(matrix.square().mean())


@pytest.mark.parametrize(("name", "bits"), KNOWN)
def test_a_zero_matrix_has_finite_codes(name: str, bits: int) -> None:
    for group, by_row in SCALINGS:
        packed = codebook_named(name, bits, group, by_row).quantize(torch.zeros(5, 13, dtype=torch.float64))
        assert bool((packed.scale > 0).all())
        assert bool(torch.isfinite(packed.dense()).all())


@pytest.mark.parametrize("group", [0, 8])
@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_row_of_zeros_costs_no_more_than_another_row(name: str, group: int) -> None:
    matrix = 0.02 * random_matrix(8, 16, 0)
    matrix[3] = 0
    errors = (codebook_named(name, 2, group, by_row=True).quantize(matrix).dense() - matrix).square().sum(1)
    assert float(errors[3]) <= float(errors.median())


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_group_cut_by_the_edge_is_rounded_as_well_as_its_columns_alone(name: str, group: int) -> None:
    matrix = random_matrix(400, 40, 1)
    edge = matrix[:, 32:]
    alone = (codebook_named(name, 2, by_row=True).quantize(edge).dense() - edge).square().mean()
    cut = (codebook_named(name, 2, group).quantize(matrix).dense() - matrix)[:, 32:].square().mean()
    assert float(cut) <= 1.05 * float(alone)


@given(seed=seeds, columns=st.integers(1, 40), size=st.floats(1e-6, 1e6), feedback=st.booleans(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_scales_are_positive_and_exact_in_16_bits(
    seed: int, columns: int, size: float, feedback: bool, data: st.DataObject
) -> None:
    name, bits = data.draw(st.sampled_from(KNOWN))
    group, by_row = data.draw(st.sampled_from(SCALINGS))
    codebook = codebook_named(name, bits, group, by_row)
    scale = codebook.scales(size * random_matrix(4, columns, seed), feedback)
    assert bool((scale > 0).all())
    assert torch.equal(scale.to(torch.bfloat16).double(), scale)


@given(seed=seeds, scaling=st.sampled_from(SCALINGS))
@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("name", CODEBOOKS)
def test_more_bits_never_cost_more(name: str, seed: int, scaling: tuple[int, bool]) -> None:
    matrix = random_matrix(16, 40, seed)
    errors = [
        float((codebook_named(name, bits, *scaling).quantize(matrix).dense() - matrix).square().sum())
        for bits in CODEBOOKS[name].known_bits
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(("name", "bits"), [("e8p", 5), ("e8p", 1), ("uniform", 1), ("uniform", 9), ("nf", 0)])
def test_unknown_bits_are_refused_with_those_known(name: str, bits: int) -> None:
    with pytest.raises(RecipeError, match=f"{name} has no {bits} bits") as caught:
        codebook_named(name, bits)
    known = CODEBOOKS[name].known_bits
    assert caught.value.remedy is not None
    assert f"{name} knows {known[0]}, {known[1]}" in caught.value.remedy


def test_bits_that_another_codebook_knows_name_it() -> None:
    with pytest.raises(RecipeError) as caught:
        codebook_named("e8p", 5)
    assert caught.value.remedy == "e8p knows 2, 3, 4; uniform and nf know 5"
    with pytest.raises(ValidationError, match="uniform and nf know 5"):
        Quantize(q_bits=5)
    with pytest.raises(ValidationError, match="uniform and nf know 6"):
        Caldera(lr_codebook="e8p", lr_bits=6)


@pytest.mark.parametrize(("name", "says"), [("uniforme", "uniform"), ("zzz", "e8p, nf, uniform")])
def test_an_unknown_codebook_is_refused_with_those_known(name: str, says: str) -> None:
    with pytest.raises(RecipeError, match=f"no codebook '{name}'") as caught:
        codebook_named(name, 2)
    assert caught.value.remedy is not None
    assert says in caught.value.remedy


@pytest.mark.parametrize("size", [1, 2, 7, 12, 86, 128, 257, 688])
def test_a_rotation_is_its_own_inverse_and_keeps_norms(size: int) -> None:
    x = random_matrix(5, size, size)
    turned = rotate(x)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(rotate(turned), x, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("size", [2, 7, 12, 86, 128, 257, 688])
def test_a_rotation_is_the_kronecker_product_of_its_parts_and_spreads_a_unit_vector(size: int) -> None:
    whole = torch.ones(1, 1, dtype=torch.float64)
    for part in rotation_parts(size):
        whole = torch.kron(whole, part)
    matrix = rotate(torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix, whole.T, atol=1e-12, rtol=0)
    assert float(matrix.abs().max()) <= (2 / size) ** 0.5 + 1e-12


@given(m=st.integers(1, 40), n=st.integers(1, 40), seed=seeds)
@settings(max_examples=40, deadline=None)
def test_a_rotated_weight_is_undone(m: int, n: int, seed: int) -> None:
    rotation, weight = Rotation.drawn(m, n, drawn(seed)), random_matrix(m, n, seed)
    torch.testing.assert_close(rotation.undo(rotation.weight(weight)), weight, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(rotation.weight(rotation.undo(weight)), weight, atol=1e-10, rtol=1e-10)


@given(m=st.integers(1, 40), n=st.integers(1, 40), seed=seeds)
@settings(max_examples=40, deadline=None)
def test_a_rotation_leaves_the_weighed_error_as_it_is(m: int, n: int, seed: int) -> None:
    rotation, error, hessian = (
        Rotation.drawn(m, n, drawn(seed)),
        random_matrix(m, n, seed),
        second_moment(n, n + 2, seed + 1),
    )
    turned = weighed_error(rotation.weight(error), rotation.hessian(hessian))
    assert turned == pytest.approx(weighed_error(error, hessian), rel=1e-9)


@pytest.mark.parametrize(("m", "n"), [(24, 40), (13, 7), (1, 12), (86, 257)])
def test_a_rotated_layer_gives_the_outputs_of_the_layer(m: int, n: int) -> None:
    rotation, weight, x = Rotation.drawn(m, n, drawn(m)), random_matrix(m, n, m), random_matrix(n, 3, n)
    unit_out = torch.eye(m, dtype=torch.float64)
    u = torch.stack([rotate(row * (1 - 2 * rotation.minus_out.double())) for row in unit_out], 1)
    v_x = rotate(x.T * (1 - 2 * rotation.minus_in.double())).T
    torch.testing.assert_close(u.T @ (rotation.weight(weight) @ v_x), weight @ x, atol=1e-10, rtol=1e-10)


def test_no_rotation_changes_nothing() -> None:
    rotation, weight, hessian = Rotation(None, None), random_matrix(5, 7, 0), second_moment(7, 9, 1)
    assert torch.equal(rotation.weight(weight), weight)
    assert torch.equal(rotation.undo(weight), weight)
    assert torch.equal(rotation.hessian(hessian), hessian)


@given(n=st.integers(1, 40), seed=seeds, width=st.sampled_from([8, 1, 4, 16]))
@settings(max_examples=40, deadline=None)
def test_the_feedback_factors_the_hessian_in_blocks(n: int, seed: int, width: int) -> None:
    hessian = Hessian.of(second_moment(n, n + 4, seed), 0.01)
    feedback = hessian.feedback(width)
    wide = whole_blocks(hessian.matrix, width)
    assert feedback.shape == wide.shape
    block = torch.arange(len(wide)) // width
    assert not feedback[block[:, None] >= block].abs().gt(1e-9).any()
    unit = feedback + torch.eye(len(wide), dtype=torch.float64)
    half = torch.linalg.solve(unit, wide)
    middle = torch.linalg.solve(unit, half.T)
    scale = float(wide.diagonal().max())
    assert float(middle[block[:, None] != block].abs().max() if len(wide) > width else 0) <= 1e-9 * scale
    diagonal = torch.where(block[:, None] == block, middle, 0.0)
    torch.testing.assert_close(unit @ diagonal @ unit.T, wide, atol=1e-9 * scale, rtol=1e-9)
    assert float(torch.linalg.eigvalsh(diagonal).min()) > 0


def test_damping_is_raised_until_the_hessian_factors_and_is_reported() -> None:
    singular = second_moment(12, 3, 0)
    mean = singular.diagonal().mean()
    broken = singular - 1e-4 * mean * torch.eye(12, dtype=torch.float64)
    found = Hessian.of(broken, 1e-8)
    assert found.damping == pytest.approx(1e-3)
    assert not found.fallback
    added = found.damping * broken.diagonal().mean()
    torch.testing.assert_close(found.matrix, broken + added * torch.eye(12, dtype=torch.float64))
    assert not torch.linalg.cholesky_ex(found.matrix)[1]
    assert torch.linalg.cholesky_ex(broken + added / 10 * torch.eye(12, dtype=torch.float64))[1]


def test_damping_that_suffices_is_kept() -> None:
    assert Hessian.of(second_moment(12, 3, 0), 0.01).damping == 0.01


def test_a_zero_hessian_falls_back_to_the_identity_and_says_so() -> None:
    found = Hessian.of(torch.zeros(5, 5, dtype=torch.float64), 0.01)
    assert found.fallback
    assert torch.equal(found.matrix, torch.eye(5, dtype=torch.float64))


def test_a_hessian_that_is_not_finite_or_not_semi_definite_is_refused() -> None:
    broken = second_moment(5, 8, 0)
    broken[1, 2] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        Hessian.of(broken, 0.01)
    with pytest.raises(ValueError, match="not positive semi-definite"):
        Hessian.of(torch.tensor([9.0, 9.0, -8.0]).double().diag(), 0.01)


def fed_back(weight: Tensor, hessian: Hessian, codebook: Codebook) -> float:
    packed = ldlq(weight, hessian.feedback(codebook.tile[1]), codebook, codebook.scales(weight, feedback=True))
    return weighed_error(weight - packed.dense(), hessian.matrix)


@given(n=st.integers(40, 64), seed=seeds)
@settings(max_examples=8, deadline=None)
@pytest.mark.parametrize(("name", "bits"), FEW)
def test_feedback_beats_rounding_to_the_nearest(name: str, bits: int, n: int, seed: int) -> None:
    hessian = Hessian.of(second_moment(n, n // 3, seed), 0.01)
    weight, codebook = random_matrix(32, n, seed + 1), codebook_named(name, bits, by_row=True)
    nearest = weighed_error(weight - codebook.quantize(weight).dense(), hessian.matrix)
    assert fed_back(weight, hessian, codebook) < nearest


@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(second_moment(144, 18, 3), id="low rank"),
        pytest.param(decaying(144, 4), id="decaying spectrum"),
        pytest.param(toeplitz(144, 0.9), id="toeplitz"),
    ],
)
@pytest.mark.parametrize(("name", "bits"), [("e8p", 2), ("e8p", 4), ("uniform", 3), ("nf", 2)])
def test_feedback_beats_rounding_to_the_nearest_across_panels(name: str, bits: int, moment: Tensor, group: int) -> None:
    hessian = Hessian.of(moment, 0.01)
    weight, codebook = random_matrix(32, 144, 7), codebook_named(name, bits, group, by_row=True)
    nearest = weighed_error(weight - codebook.quantize(weight).dense(), hessian.matrix)
    assert fed_back(weight, hessian, codebook) < 0.9 * nearest


@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize(("name", "bits"), KNOWN)
def test_feedback_along_the_identity_is_rounding_to_the_nearest(name: str, bits: int, group: int) -> None:
    weight, codebook = random_matrix(10, 150, 2), codebook_named(name, bits, group)
    scale = codebook.scales(weight)
    feedback = Hessian.of(torch.eye(150, dtype=torch.float64), 0.01).feedback(codebook.tile[1])
    fed = ldlq(weight, feedback, codebook, scale)
    assert torch.equal(fed.codes, codebook.quantize(weight, scale).codes)
    assert torch.equal(fed.dense(), codebook.quantize(weight).dense())


@pytest.mark.parametrize("n", [24, 37, 150])
@pytest.mark.parametrize(("name", "bits"), FEW)
def test_feedback_leaves_only_what_each_rounding_misses(name: str, bits: int, n: int) -> None:
    """tr(E H E^T) = sum of tr(N_k D_k N_k^T), N_k what is missed when the k-th target is rounded to the nearest."""
    hessian = Hessian.of(second_moment(n, n + 9, n), 0.01)
    wide = whole_blocks(hessian.matrix)
    weight, codebook = random_matrix(6, n, n + 1), codebook_named(name, bits, by_row=True)
    feedback = hessian.feedback(codebook.tile[1])
    packed = ldlq(weight, feedback, codebook, codebook.scales(weight, feedback=True))
    unit = wide_scale(packed.scale, 0, len(wide)).expand(6, len(wide))
    values = codebook.decode(packed.codes) * unit
    error = functional.pad(weight, (0, len(wide) - n)) - values
    missed, summed = torch.zeros_like(error), 0.0
    diagonal = torch.linalg.solve(torch.eye(len(wide), dtype=torch.float64) + feedback, wide)
    diagonal = torch.linalg.solve(torch.eye(len(wide), dtype=torch.float64) + feedback, diagonal.T)
    for start in range(0, len(wide), 8):
        block = slice(start, start + 8)
        target = values[:, block] + error[:, block] + error[:, :start] @ feedback[:start, block]
        rounded = codebook.decode(codebook.round(target / unit[:, block])) * unit[:, block]
        torch.testing.assert_close(rounded, values[:, block], atol=1e-12, rtol=0)
        missed[:, block] = target - rounded
        summed += weighed_error(missed[:, block], diagonal[block, block])
    assert weighed_error(error, wide) == pytest.approx(summed, rel=1e-9)


@given(blocks=st.integers(1, 5), seed=seeds, passes=st.integers(1, 3), book=st.sampled_from(FEW))
@settings(max_examples=40, deadline=None)
def test_improving_never_raises_the_error_of_a_row(blocks: int, seed: int, passes: int, book: tuple[str, int]) -> None:
    n = 8 * blocks
    hessian = Hessian.of(second_moment(n, max(2, n // 2), seed), 0.01)
    weight, codebook = random_matrix(6, n, seed + 1), codebook_named(*book, by_row=True)
    packed = ldlq(weight, hessian.feedback(codebook.tile[1]), codebook, codebook.scales(weight, feedback=True))
    before = error_by_row(weight - packed.dense(), hessian.matrix)
    codes = packed.codes.clone()
    after = error_by_row(weight - improve(weight, hessian.matrix, packed, codebook, passes).dense(), hessian.matrix)
    assert bool((after <= before * (1 + 1e-9)).all())
    assert torch.equal(packed.codes, codes)


@pytest.mark.parametrize(("name", "bits"), [("e8p", 2), ("e8p", 3), ("uniform", 2)])
def test_improving_never_raises_the_error_where_the_last_block_is_cut(name: str, bits: int) -> None:
    codebook = codebook_named(name, bits, by_row=True)
    for n, seed in itertools.product((9, 10, 12), range(13)):
        hessian = Hessian.of(second_moment(n, n // 2, seed + 1), 0.01)
        weight = random_matrix(6, n, seed)
        packed = ldlq(weight, hessian.feedback(codebook.tile[1]), codebook, codebook.scales(weight, feedback=True))
        better = improve(weight, hessian.matrix, packed, codebook, 1)
        before = weighed_error(weight - packed.dense(), hessian.matrix)
        assert weighed_error(weight - better.dense(), hessian.matrix) <= before * (1 + 1e-9)


def test_improving_lowers_the_error_of_rounding_to_the_nearest() -> None:
    hessian, weight = Hessian.of(toeplitz(40, 0.9), 0.01), random_matrix(24, 40, 0)
    codebook = codebook_named("e8p", 2, by_row=True)
    packed = codebook.quantize(weight)
    better = improve(weight, hessian.matrix, packed, codebook, 2)
    before = weighed_error(weight - packed.dense(), hessian.matrix)
    assert weighed_error(weight - better.dense(), hessian.matrix) < 0.9 * before


def test_no_passes_change_nothing() -> None:
    weight, codebook = random_matrix(6, 20, 0), codebook_named("e8p", 2)
    packed = codebook.quantize(weight)
    assert improve(weight, second_moment(20, 30, 1), packed, codebook, 0) is packed


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@given(m=st.integers(2, 16), n=st.integers(2, 16), rank=st.integers(1, 16), seed=seeds)
@settings(max_examples=40, deadline=None)
def test_along_the_identity_the_low_rank_part_is_the_truncated_svd(m: int, n: int, rank: int, seed: int) -> None:
    rank = min(m, n, rank)
    residual = random_matrix(m, n, seed)
    found = low_rank(residual, InputMetric(torch.eye(n, dtype=torch.float64)), rank, None, 1)
    assert found.left.shape == (m, rank)
    values = torch.linalg.svdvals(residual)
    missed = float((residual - found.product()).square().sum())
    assert missed == pytest.approx(float(values[rank:].square().sum()), abs=1e-9 * float(values.square().sum()))
    if rank == min(m, n) or values[rank - 1] - values[rank] > 1e-3 * values[0]:
        torch.testing.assert_close(found.product(), truncated(residual, rank), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("m", "n"), [(9, 14), (14, 9)])
def test_no_pair_nearby_beats_the_low_rank_part(m: int, n: int) -> None:
    residual, hessian = random_matrix(m, n, 0), second_moment(n, n + 3, 1)
    found = low_rank(residual, InputMetric(hessian), 3, None, 1)
    best = weighed_error(residual - found.product(), hessian)
    for seed in range(50):
        size = 10.0 ** -(seed % 4)
        left = found.left + size * random_matrix(m, 3, seed)
        right = found.right + size * random_matrix(3, n, seed + 99)
        assert weighed_error(residual - left @ right, hessian) >= best


@given(m=st.integers(2, 12), n=st.integers(2, 12), seed=seeds)
@settings(max_examples=30, deadline=None)
def test_more_rank_never_costs_more(m: int, n: int, seed: int) -> None:
    residual, hessian = random_matrix(m, n, seed), second_moment(n, n + 3, seed + 1)
    pairs = [low_rank(residual, InputMetric(hessian), rank, None, 1) for rank in range(1, min(m, n) + 1)]
    errors = [weighed_error(residual - pair.product(), hessian) for pair in pairs]
    slack = 1e-9 * weighed_error(residual, hessian)
    assert all(after <= before + slack for before, after in itertools.pairwise(errors))
    assert errors[-1] <= slack


@pytest.mark.parametrize("right_feedback", [False, True])
@pytest.mark.parametrize(("name", "bits"), FEW)
def test_the_low_rank_part_is_what_its_codes_say(name: str, bits: int, right_feedback: bool) -> None:
    residual, hessian = random_matrix(13, 21, 0), Hessian.of(second_moment(21, 30, 1), 0.01)
    codebook = codebook_named(name, bits, by_row=True)
    feedback = hessian.feedback(codebook.tile[1]) if right_feedback else None
    found = low_rank(residual, InputMetric(hessian.matrix), 5, codebook, 3, feedback)
    assert found.packed is not None
    packed_left, packed_right = found.packed
    assert packed_left.codes.shape == (5, 2, bits)
    assert packed_right.codes.shape == (5, 3, bits)
    torch.testing.assert_close(packed_left.dense().T @ packed_right.dense(), found.product(), atol=0, rtol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fitting_factors_to_each_other_beats_rounding_both(bits: int) -> None:
    residual, hessian = random_matrix(20, 24, 0), second_moment(24, 30, 1)
    codebook = codebook_named("e8p", bits, by_row=True)
    whole = low_rank(residual, InputMetric(hessian), 4, None, 1)
    rounded = codebook.quantize(whole.left.T.contiguous()).dense().T @ codebook.quantize(whole.right).dense()
    found = low_rank(residual, InputMetric(hessian), 4, codebook, 1)
    assert weighed_error(residual - found.product(), hessian) < weighed_error(residual - rounded, hessian)


def test_factors_of_eight_bits_are_nearly_the_best_of_their_rank() -> None:
    residual, hessian = random_matrix(20, 24, 0), decaying(24, 1)
    best = weighed_error(residual - low_rank(residual, InputMetric(hessian), 4, None, 1).product(), hessian)
    found = low_rank(residual, InputMetric(hessian), 4, codebook_named("uniform", 8), 3)
    assert best <= weighed_error(residual - found.product(), hessian) < 1.01 * best


@pytest.mark.parametrize("bits", [2, 4])
def test_more_turns_of_quantised_factors_never_cost_more(bits: int) -> None:
    residual, hessian = random_matrix(20, 24, 0), second_moment(24, 30, 1)
    codebook = codebook_named("e8p", bits, by_row=True)
    errors = [
        weighed_error(residual - low_rank(residual, InputMetric(hessian), 4, codebook, turns).product(), hessian)
        for turns in (1, 2, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < weighed_error(residual, hessian)


def not_looking(_q_bits: int) -> None:
    """Nothing was seen before."""


def fitted(method: Caldera | Quantize, weight: Tensor, seen: Seen, cut: Cut, seed: int) -> tuple[Factors, Fit]:
    return method.fit(weight, seen, cut, drawn(seed), not_looking)


def run(
    method: Caldera | Quantize, weight: Tensor, moment: Tensor, rank: int = 0, q_bits: int = 2
) -> tuple[Factors, Fit]:
    return fitted(method, weight, Seen(moment), Cut(rank, q_bits, method.beside_bits), 11)


def product(found: Factors) -> Tensor:
    """L R of what is rotated."""
    left, right = found.pair()
    return left @ right


def kept_error(fit: Fit) -> float:
    return fit.errors[fit.kept]


@pytest.mark.parametrize("book", FEW)
def test_caldera_along_the_identity_takes_the_svd_of_what_q_leaves(book: tuple[str, int]) -> None:
    weight = random_matrix(18, 24, 0)
    method = Caldera(codebook=book[0], damping=1e-12, hadamard=False, lr_bits=16, outer=4)
    found, _ = run(method, weight, torch.eye(24, dtype=torch.float64), rank=5, q_bits=book[1])
    assert found.q is not None
    assert (found.rank, found.full) == (5, 5)
    wanted = truncated(weight - found.q.dense(), 5)
    torch.testing.assert_close(product(found), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("choices", [{}, {"feedback": False}, {"passes": 2}, {"group": 8, "hadamard": False}])
def test_caldera_without_rank_is_quantisation_alone(choices: dict) -> None:
    weight, moment = random_matrix(18, 24, 0), second_moment(24, 30, 1)
    (alone, of_alone), (found, fit) = run(Quantize(**choices), weight, moment), run(Caldera(**choices), weight, moment)
    assert alone.q is not None
    assert found.q is not None
    assert found.rank == 0
    assert (found.left, found.right, found.packed) == (None, None, None)
    assert torch.equal(found.q.codes, alone.q.codes)
    assert torch.equal(found.q.scale, alone.q.scale)
    assert torch.equal(found.reconstruct(), alone.reconstruct())
    assert fit.errors == pytest.approx(of_alone.errors, rel=1e-9)


@given(
    m=st.integers(2, 24),
    n=st.integers(2, 24),
    seed=seeds,
    hadamard=st.booleans(),
    lr_bits=st.sampled_from([2, 4, 8, 16]),
    q_bits=st.sampled_from([0, 2, 3]),
    passes=st.integers(0, 1),
)
@settings(max_examples=25, deadline=None)
def test_the_best_iteration_is_kept_and_its_error_is_that_of_the_weight(
    m: int, n: int, seed: int, hadamard: bool, lr_bits: int, q_bits: int, passes: int
) -> None:
    weight, moment = random_matrix(m, n, seed), second_moment(n, max(1, n // 2), seed + 1)
    method = Caldera(hadamard=hadamard, lr_bits=lr_bits, outer=5, inner=3, passes=passes)
    found, fit = run(method, weight, moment, rank=max(1, min(m, n) // 3), q_bits=q_bits)
    assert kept_error(fit) == min(fit.errors)
    damped = moment + fit.damping * moment.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    error = weighed_error(weight - found.reconstruct(), damped) / weighed_error(weight, damped)
    assert kept_error(fit) == pytest.approx(error, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize(("m", "n"), [(18, 24), (24, 18)])
def test_caldera_without_q_is_the_best_approximation_of_its_rank(m: int, n: int, hadamard: bool) -> None:
    weight, moment = random_matrix(m, n, 0), second_moment(n, n + 9, 1)
    found, fit = run(Caldera(q_bits=0, lr_bits=16, hadamard=hadamard), weight, moment, rank=5, q_bits=0)
    damped = moment + fit.damping * moment.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    root = torch.linalg.cholesky(damped)
    best = torch.linalg.solve_triangular(root, truncated(weight @ root, 5), upper=False, left=False)
    assert found.q is None
    torch.testing.assert_close(found.reconstruct(), best, atol=1e-6, rtol=1e-6)
    values = torch.linalg.svdvals(weight @ root).square()
    assert kept_error(fit) == pytest.approx(float(values[5:].sum() / values.sum()), rel=1e-9)


@pytest.mark.parametrize("choices", [{}, {"lr_bits": 16}, {"downdate": True}, {"right_feedback": True}])
def test_more_outer_iterations_never_cost_more(choices: dict) -> None:
    weight, moment = random_matrix(24, 40, 0), second_moment(40, 20, 1)
    runs = [run(Caldera(outer=outer, inner=3, **choices), weight, moment, rank=6)[1] for outer in (1, 2, 5)]
    for fewer, more in itertools.pairwise(runs):
        assert more.errors[: len(fewer.errors)] == fewer.errors
        assert kept_error(more) <= kept_error(fewer)


@pytest.mark.parametrize("lr_bits", [4, 16])
def test_more_bits_of_q_never_cost_more(lr_bits: int) -> None:
    weight, moment = random_matrix(24, 40, 0), second_moment(40, 60, 1)
    method = Caldera(lr_bits=lr_bits, outer=4, inner=3)
    errors = [kept_error(run(method, weight, moment, rank=4, q_bits=bits)[1]) for bits in (2, 3, 4)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("lr_bits", [4, 16])
def test_more_rank_beside_q_never_costs_more(lr_bits: int) -> None:
    weight, moment = random_matrix(24, 40, 0), second_moment(40, 60, 1)
    method = Caldera(lr_bits=lr_bits, outer=4, inner=3)
    errors = [kept_error(run(method, weight, moment, rank=rank)[1]) for rank in (0, 2, 6, 16)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("lr_bits", [4, 16])
@pytest.mark.parametrize("rank", [1, 3, 7, 8])
def test_a_downdated_hessian_gives_finite_errors_at_every_rank(rank: int, lr_bits: int) -> None:
    weight, moment = random_matrix(20, 8, 0), second_moment(8, 12, 1)
    _, fit = run(Caldera(downdate=True, lr_bits=lr_bits, outer=4, inner=3), weight, moment, rank=rank)
    assert len(fit.errors) == 4
    assert all(abs(error) < 1 for error in fit.errors)


@pytest.mark.parametrize("hadamard", [False, True])
def test_a_site_that_was_never_activated_is_quantised_along_the_identity(hadamard: bool) -> None:
    weight = random_matrix(12, 20, 0)
    for method, rank in ((Caldera(outer=3, hadamard=hadamard), 3), (Quantize(hadamard=hadamard), 0)):
        found, fit = run(method, weight, torch.zeros(20, 20, dtype=torch.float64), rank=rank)
        _, of_same = run(method, weight, torch.eye(20, dtype=torch.float64), rank=rank)
        assert fit.fallback
        assert not of_same.fallback
        assert kept_error(fit) == pytest.approx(
            float((weight - found.reconstruct()).square().sum() / weight.square().sum())
        )


@pytest.mark.parametrize("n", [24, 13])
@pytest.mark.parametrize("hadamard", [False, True])
def test_quantising_leaves_the_weight_and_the_statistics_alone(hadamard: bool, n: int) -> None:
    weight, moment = random_matrix(16, n, 0), second_moment(n, 30, 1)
    before = weight.clone(), moment.clone()
    run(Caldera(outer=2, inner=2, hadamard=hadamard, passes=1, downdate=True), weight, moment, rank=3)
    run(Quantize(hadamard=hadamard, passes=1), weight, moment)
    assert torch.equal(weight, before[0])
    assert torch.equal(moment, before[1])


def test_the_same_source_gives_the_same_codes_and_another_does_not() -> None:
    weight, seen = random_matrix(16, 24, 0), Seen(second_moment(24, 30, 1))
    found = [fitted(Quantize(), weight, seen, Cut(0, 2), seed)[0] for seed in (1, 1, 2)]
    codes = [each.q.codes for each in found if each.q is not None]
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


def test_the_outlook_is_of_what_q_leaves() -> None:
    weight, seen = random_matrix(12, 20, 0), Seen(second_moment(20, 30, 1), 12)
    method = Caldera(outer=2)
    outlook = method.outlook(weight, seen, 2, drawn(11))
    coarse = Factors(None, None, q=outlook.q, rotation=outlook.rotation).reconstruct()
    torch.testing.assert_close(coarse, run(method, weight, seen.moment)[0].reconstruct())
    torch.testing.assert_close(outlook.basis.left @ outlook.basis.right, weight - coarse, atol=1e-8, rtol=1e-8)
    assert float(outlook.basis.energy.min()) >= 0


def quantised_site(m: int, n: int, dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    model = nn.ModuleDict({"block": nn.Linear(n, m, dtype=dtype)})
    with torch.no_grad():
        model["block"].weight.copy_(random_matrix(m, n, m))
        model["block"].bias.copy_(random_matrix(1, m, n)[0])
    return model


def cut_for(method: Caldera | Quantize, rank: int, q_bits: int) -> Cut:
    return Cut(rank, q_bits, method.beside_bits)


@cache
def codes_of(m: int, n: int, method: Caldera | Quantize, cut: Cut) -> Factors:
    """Do not change them."""
    return fitted(method, random_matrix(m, n, 0), Seen(second_moment(n, n + 5, 1)), cut, 3)[0]


@cache
def filled(
    m: int, n: int, method: Caldera | Quantize, cut: Cut, dtype: torch.dtype = torch.float32
) -> tuple[QuantizedLinear, Factors]:
    """A layer with codes, and what they stand for, 16-bit factors rounded as the layer holds them. Do not change it."""
    model = quantised_site(m, n, dtype)
    found = replace(codes_of(m, n, method, cut), bias=model["block"].bias.detach())
    layer = substitute(model, "block", found, "quantized", dtype)
    assert isinstance(layer, QuantizedLinear)
    assert model["block"] is layer
    if found.left is not None and found.right is not None:
        found = replace(found, left=found.left.bfloat16().double(), right=found.right.bfloat16().double())
    return layer, found


def form_of(method: Caldera | Quantize) -> Form:
    return method.form(Budget(), 16)


def stored_bits(layer: QuantizedLinear) -> int:
    """Of everything a layer holds but its bias."""
    return sum(8 * t.numel() * t.itemsize for name, t in layer.state_dict().items() if name != "bias")


LAYERS = pytest.mark.parametrize(
    ("method", "sizes"),
    [
        pytest.param(Caldera(outer=2, inner=2), (5, 2), id="caldera-rotated-4"),
        pytest.param(Caldera(outer=2, lr_bits=16), (5, 2), id="caldera-rotated-16"),
        pytest.param(Caldera(outer=2, inner=2, hadamard=False), (5, 3), id="caldera-4"),
        pytest.param(Caldera(outer=2, lr_bits=16, hadamard=False), (5, 4), id="caldera-16"),
        pytest.param(Caldera(inner=2), (5, 0), id="no-q-rotated-4"),
        pytest.param(Caldera(lr_bits=16, hadamard=False), (5, 0), id="no-q-16"),
        pytest.param(Caldera(outer=2, row_scales=False, group=16), (3, 2), id="grouped"),
        pytest.param(Caldera(outer=2, inner=2, codebook="nf", lr_bits=6), (4, 5), id="nf-6"),
        pytest.param(Quantize(row_scales=False), (0, 2), id="one-scale"),
        pytest.param(Quantize(codebook="uniform", hadamard=False), (0, 3), id="uniform"),
        pytest.param(Quantize(codebook="nf", row_scales=False, group=8), (0, 3), id="nf-grouped"),
    ],
)
SHAPES = pytest.mark.parametrize(("m", "n"), [(24, 40), (13, 7), (172, 64)])


@SHAPES
@LAYERS
def test_a_quantised_layer_gives_the_outputs_of_its_weight(
    m: int, n: int, method: Caldera | Quantize, sizes: tuple[int, int]
) -> None:
    layer, found = filled(m, n, method, cut_for(method, *sizes))
    x = random_matrix(6, n, 8).reshape(2, 3, n)
    wanted = x @ found.reconstruct().T + layer.bias.double()
    size = float(wanted.abs().max())
    torch.testing.assert_close(layer(x), wanted, atol=1e-10 * size, rtol=1e-10)
    torch.testing.assert_close(layer(x.float()), wanted.float(), atol=1e-5 * size, rtol=1e-5)
    kept = deepcopy(layer)
    cache_dense(kept, True)
    torch.testing.assert_close(kept(x.float()), wanted.float(), atol=1e-5 * size, rtol=1e-5)


@SHAPES
@LAYERS
def test_the_dense_weight_of_a_quantised_layer_is_the_one_meant(
    m: int, n: int, method: Caldera | Quantize, sizes: tuple[int, int]
) -> None:
    layer, found = filled(m, n, method, cut_for(method, *sizes))
    torch.testing.assert_close(layer.dense_weight(), found.reconstruct(), atol=1e-10, rtol=1e-10)


@SHAPES
@LAYERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_layer_takes_exactly_the_bits_of_its_form(
    m: int, n: int, method: Caldera | Quantize, sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    cut = cut_for(method, *sizes)
    layer, _ = filled(m, n, method, cut, dtype)
    assert stored_bits(layer) == form_of(method).bits((m, n), cut)


@torch.no_grad()
def test_turning_the_cache_off_decodes_the_codes_again() -> None:
    layer = deepcopy(filled(24, 40, Quantize(), Cut(0, 2))[0])
    x = random_matrix(3, 40, 0).float()
    cache_dense(layer, True)
    before = layer(x)
    layer.q.codes.zero_()
    torch.testing.assert_close(layer(x), before)
    cache_dense(layer, False)
    after = layer(x)
    assert not torch.allclose(after, before)
    cache_dense(layer, True)
    torch.testing.assert_close(layer(x), after)


def test_a_cached_layer_still_learns() -> None:
    """Where a gradient is taken, codes are decoded and the factors used, cache or not."""
    layer = deepcopy(filled(24, 40, Caldera(lr_bits=16, outer=1), Cut(3, 2, 16))[0])
    cache_dense(layer, True)
    x = random_matrix(3, 40, 0).float()
    with torch.inference_mode():
        layer(x)
    layer.left.weight.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.left.weight.grad is not None
    assert layer.left.weight.grad.abs().sum() > 0


def test_a_quantised_layer_keeps_the_bias_it_found() -> None:
    model = quantised_site(13, 7)
    bias = model["block"].bias.detach().clone()
    seen = Seen(second_moment(7, 12, 1), bias=model["block"].bias.detach())
    found, _ = fitted(Caldera(outer=1, inner=1), random_matrix(13, 7, 0), seen, Cut(2, 2, 4), 3)
    layer = substitute(model, "block", found, "quantized", torch.float32)
    assert layer.bias is not None
    assert torch.equal(layer.bias, bias)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_a_layer_without_row_scales_has_room_for_the_scales_of_its_codebook(codebook: str) -> None:
    method = Quantize(codebook=codebook, row_scales=False)
    layer, found = filled(13, 24, method, Cut(0, 3))
    assert found.q is not None
    assert layer.q.scale.shape == found.q.scale.shape == form_of(method).scales((13, 24))
