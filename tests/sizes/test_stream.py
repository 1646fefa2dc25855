"""What a cut residual stream takes, counted: Llama-2-7B by the published shapes, and models as they are built."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import LLAMA_2_7B, tiny_llama
from rankwise.layers.narrowing import slice_by_one_rotation, slice_with_adapters
from rankwise.models import BlockRunner, PreNorm, find_sites
from rankwise.sizes import StreamSizes

LLAMA = StreamSizes(width=4096, blocks=32, read=32 * (3 * 4096 + 2 * 11008), written=32 * (4096 + 11008), last=11008)


def test_the_sizes_are_read_off_a_model() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{**LLAMA_2_7B, "num_hidden_layers": 2}))
    two = StreamSizes(4096, 2, LLAMA.read // 16, LLAMA.written // 16, 11008)
    halves = PreNorm.of(tiny_llama(), find_sites(tiny_llama())).halves
    assert StreamSizes.of(find_sites(model), PreNorm("layers", halves, 4096, 1e-5)) == two
    assert LLAMA.whole == 6_476_005_376


@pytest.mark.parametrize(
    ("sliced", "kept"),
    [(10, 1.033), (15, 0.971), (20, 0.906), (25, 0.846), (30, 0.783), (35, 0.721), (40, 0.663), (50, 0.546)],
)
def test_the_share_that_slicing_keeps_of_llama_2_7b(sliced: int, kept: float) -> None:
    """k = floor((1 - s) d) to a multiple of 8, adapters counted."""
    k = (4096 - 4096 * sliced // 100) // 8 * 8
    assert LLAMA.numbers(k, True) / LLAMA.whole == pytest.approx(kept, abs=1e-3)
    assert LLAMA.numbers(k, False) / LLAMA.whole == k / 4096


@pytest.mark.parametrize(("keep", "kept"), [(0.9, 3248), (0.8, 2920), (0.7, 2576), (0.6, 2232), (0.5, 1880)])
def test_the_width_that_keeps_a_share_of_llama_2_7b(keep: float, kept: int) -> None:
    allowed = int(keep * LLAMA.whole)
    assert LLAMA.largest(lambda _k: allowed, LLAMA.widths(8), True) == kept
    assert LLAMA.numbers(kept, True) <= allowed < LLAMA.numbers(kept + 8, True)


def test_nothing_fits_what_is_too_little() -> None:
    assert LLAMA.largest(lambda _k: LLAMA.numbers(8, True), LLAMA.widths(8), True) == 8
    assert LLAMA.largest(lambda _k: LLAMA.numbers(8, True) - 1, LLAMA.widths(8), True) is None


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("kept", [12, 25, 32])
def test_the_count_is_that_of_the_model_that_is_made(adapters: bool, kept: int) -> None:
    model = tiny_llama()
    form, small = PreNorm.of(model, find_sites(model)), copy.deepcopy(model)
    runner = BlockRunner(small, torch.randint(3, 2000, (4, 16)), 4)
    (slice_with_adapters if adapters else slice_by_one_rotation)(small, form, kept, runner, "normalised", {})
    linears = sum(site.parameters for site in find_sites(small))
    assert linears == StreamSizes.of(find_sites(model), form).numbers(kept, adapters)
