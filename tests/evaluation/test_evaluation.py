"""Perplexity by its definition."""

from __future__ import annotations

import math

import pytest
import torch

from conftest import tiny_llama
from rankwise.errors import DataError, NotFiniteError
from rankwise.evaluation import measure_cost, perplexity
from rankwise.models import find_sites


def nll(model: torch.nn.Module, window: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=window[None]).logits[0, :-1].double()
    return -logits.log_softmax(-1)[torch.arange(len(window) - 1), window[1:]]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_without_overlap_every_token_but_a_windows_first_counts_once(batch_size: int) -> None:
    model = tiny_llama()
    ids = torch.randint(0, 2048, (5, 12), generator=torch.Generator().manual_seed(1))
    found = perplexity(model, ids, batch_size=batch_size)
    expected = torch.cat([nll(model, window) for window in ids])
    assert found.tokens == 5 * 11
    assert found.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-5)


def test_with_a_stride_every_token_of_the_stream_counts_once() -> None:
    model = tiny_llama()
    stream = torch.randint(0, 2048, (40,), generator=torch.Generator().manual_seed(2))
    found = perplexity(model, stream.view(4, 10), stride=5, batch_size=2)
    windows = [stream[start : start + 10] for start in range(0, 31, 5)]
    expected = torch.cat([nll(model, windows[0]), *(nll(model, w)[-5:] for w in windows[1:])])
    assert (found.windows, found.tokens) == (7, 39) == (len(windows), len(expected))
    assert found.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabularys_perplexity() -> None:
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, torch.arange(20)[None]).perplexity == pytest.approx(2048, rel=1e-4)


def test_what_cannot_be_scored_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(DataError, match="one token"):
        perplexity(model, torch.zeros(3, 1, dtype=torch.int64))
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(NotFiniteError, match="windows 0 to 1"):
        perplexity(model, torch.zeros(2, 4, dtype=torch.int64))


def test_a_loss_beyond_any_perplexity_is_an_error_not_an_overflow() -> None:
    model = tiny_llama()
    torch.nn.init.normal_(model.lm_head.weight, std=1e5)
    with pytest.raises(NotFiniteError, match="mean loss"):
        perplexity(model, torch.arange(20)[None])


def test_tied_tensors_count_once() -> None:
    apart, tied = tiny_llama(), tiny_llama(tie_word_embeddings=True)
    cost, small = (measure_cost(m, find_sites(m), {}) for m in (apart, tied))
    assert cost.parameters - small.parameters == 2048 * 32
    assert cost.linear_parameters == small.linear_parameters == sum(s.parameters for s in find_sites(apart))
    assert small.bytes == 4 * small.parameters
