"""LayerNorm and blocks side by side: every family that is taken, turned and cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankwise.layers import NarrowNorm, narrow_stream, stream_of
from rankwise.layers.narrow import PaddedEmbedding
from rankwise.layers.narrowing import fold_gain, fold_shift, slice_with_adapters
from rankwise.layers.stream_form import check_form
from rankwise.linalg import without_mean
from rankwise.models import BlockRunner, PreNorm, find_sites
from rankwise.sizes import StreamSizes
from sliced_families import FAMILIES, SIDE_BY_SIDE, of_family

IDS = torch.randint(3, 200, (6, 24), generator=torch.Generator().manual_seed(1))


def cut(model: Any, kept: int) -> Any:
    """A copy with its stream cut."""
    small = copy.deepcopy(model)
    form = PreNorm.of(model, find_sites(model))
    slice_with_adapters(small, form, kept, BlockRunner(small, IDS, 4), "normalised", {})
    return small


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@given(st.integers(2, 24), st.sampled_from([1e-6, 1e-2, 1.0]), st.integers(0, 1 << 30))
@settings(max_examples=40, deadline=None)
def test_a_layer_norm_is_that_of_a_vector_without_its_mean_gain_and_shift_folded(d: int, eps: float, seed: int) -> None:
    """W (LayerNorm(x)) + b = W' norm(x M) + b'."""
    source = torch.Generator().manual_seed(seed)
    x, weight, bias, gain, shift = (
        torch.randn(*shape, generator=source, dtype=torch.float64) for shape in ((3, d), (5, d), (5,), (d,), (d,))
    )
    goal = nn.functional.linear(nn.functional.layer_norm(x + 2, (d,), gain, shift, eps), weight, bias)
    # The cut norm computes in float32.
    read = NarrowNorm(d, eps)(without_mean(x + 2)).double()
    found = read @ fold_gain(weight, gain).T + fold_shift(weight, bias, shift)
    torch.testing.assert_close(found, goal, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fold_shift(weight, None, shift), fold_shift(weight, torch.zeros(5), shift))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_turned_and_not_cut_gives_the_same_logits(name: str) -> None:
    model = of_family(name)
    goal, form = logits(model), PreNorm.of(model, find_sites(model))
    assert (form.parallel, form.centred, form.plain) == (name in SIDE_BY_SIDE, True, False)
    check_form(model, form, IDS[:1])
    assert torch.equal(logits(model), goal)
    small = cut(model, 32)
    assert float((logits(small) - goal).abs().max()) < 1e-5 * float(goal.abs().max())
    # No token has a mean, in whatever directions: the one of the mean is the last, and holds nothing.
    rows = small.get_input_embeddings().weight
    assert float(rows[:, -1].abs().max()) < 1e-5 < float(rows[:, -2].abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_cut_has_the_size_that_was_counted_and_the_shapes_that_are_built_empty(name: str) -> None:
    model = of_family(name)
    sites = find_sites(model)
    sizes = StreamSizes.of(sites, PreNorm.of(model, sites))
    whole = sum(site.parameters for site in sites)
    assert sizes.whole == whole
    kept = sizes.largest(lambda _: 0.8 * whole, sizes.widths(1), True)
    assert kept is not None
    small = cut(model, kept)
    assert sum(site.parameters for site in find_sites(small)) == sizes.numbers(kept, True) <= 0.8 * whole
    assert sizes.numbers(kept + 1, True) > 0.8 * whole
    with torch.device("meta"):
        empty = type(small)(small.config)
        narrow_stream(empty.base_model, stream_of(small))
    shapes = {path: (p.shape, p.dtype) for path, p in small.named_parameters()}
    assert {path: (p.shape, p.dtype) for path, p in empty.named_parameters()} == shapes
    assert [type(each) for each in empty.modules()] == [type(each) for each in small.modules()]


@pytest.mark.parametrize("name", ["opt", "gpt2", "gpt-neo", "neox", "phi", "gptj", "falcon-7b", "cohere"])
def test_a_family_generates_with_a_cache_as_without(name: str) -> None:
    small = cut(of_family(name), 24)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ids = IDS[:2, :6]
    first, second = (
        small.generate(ids, attention_mask=torch.ones_like(ids), use_cache=use, **options) for use in (True, False)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["opt", "phi"])
def test_more_is_lost_where_less_is_kept(name: str) -> None:
    model = of_family(name)
    goal, lost = logits(model).log_softmax(-1), []
    for kept in (32, 31, 24, 12):
        found = logits(cut(model, kept)).log_softmax(-1)
        lost.append(float((goal.exp() * (goal - found)).sum(-1).mean()))
    # A stream without mean has one coordinate to spare.
    assert abs(lost[0]) < 1e-6
    assert abs(lost[1]) < 1e-6 < lost[2] < lost[3]


def test_readers_without_bias_get_one_from_a_norm_that_shifts_and_from_no_other() -> None:
    shifted, plain = cut(of_family("falcon-7b"), 24), cut(of_family("cohere"), 24)
    block = shifted.transformer.h[0]
    assert block.self_attention.query_key_value.bias is not None
    assert block.mlp.dense_h_to_4h.bias is not None
    assert block.self_attention.dense.bias is None
    assert not any(path.endswith("bias") for path, _ in plain.named_parameters())


def test_embeddings_are_padded_where_code_takes_their_width_for_that_of_the_stream() -> None:
    small, other = cut(of_family("gpt-neo"), 24).transformer, cut(of_family("opt"), 24).model.decoder
    assert (type(small.wte), type(small.wpe)) == (PaddedEmbedding, PaddedEmbedding)
    found = small.wte(IDS)
    assert (found.shape[-1], small.wte.weight.shape[1]) == (32, 24)
    assert not found[..., 24:].any()
    # OPT's positions start at 2 in their table, which its own class knows.
    assert (type(other.embed_tokens), type(other.embed_positions).__name__) == (
        nn.Embedding,
        "OPTLearnedPositionalEmbedding",
    )
    assert other.embed_positions.weight.shape == (66, 24)
    assert other.embed_positions.embedding_dim == 24


def test_directions_are_one_set_a_block_where_both_halves_read_the_same_stream() -> None:
    for name, points in (("phi", ["0.block_residual"]), ("opt", ["0.attention_residual", "0.mlp_residual"])):
        model, known = of_family(name), {}
        form = PreNorm.of(model, find_sites(model))
        slice_with_adapters(model, form, 24, BlockRunner(model, IDS, 4), "raw", known)
        last = [] if name == "phi" else ["1.attention_residual"]
        assert list(known) == ["embedded", *points, *last]
        again = of_family(name)
        slice_with_adapters(again, form, 24, BlockRunner(again, IDS, 4), "raw", known)
        assert torch.equal(logits(model), logits(again))
