"""Shards of sequences: where they may end, and that their sums, added, are those of one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import tiny_llama
from rankwise.models import find_sites, share_inputs
from rankwise.statistics import collect, shards
from rankwise.statistics.curvature import Curvature
from rankwise.statistics.groups import BY_TOKENS, FEWEST_GROUPS, GROUP_TOKENS, MOST_GROUPS, group_ends
from rankwise.statistics.input_moments import InputMoments
from rankwise.statistics.moments import Moments
from rankwise.statistics.pooled_covariance import PooledCovariance


@given(st.integers(1, 300), st.integers(1, 16), st.integers(1, 40), st.integers(1, 9))
def test_shards_hold_every_sequence_once_and_cut_no_batch_and_no_group(
    sequences: int, batch: int, groups: int, wanted: int
) -> None:
    found = shards(sequences, 16, batch, [Moments(groups=groups)], wanted)
    assert [first for first, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == sequences
    assert 1 <= len(found) <= wanted
    for first, stop in found:
        assert first < stop
        assert first % batch == 0
        assert first in (0, *group_ends(sequences, groups, 16))


@pytest.mark.parametrize(
    ("groups", "sequences", "length", "expected"),
    [
        (5, 64, 512, [12, 25, 38, 51, 64]),
        (32, 3, 512, [1, 2, 3]),
        (BY_TOKENS, 24, 512, [4, 8, 12, 16, 20, 24]),
        (BY_TOKENS, 6, 512, [2, 4, 6]),
        (BY_TOKENS, 22, 300, [4, 8, 12, 16, 20, 22]),
        (BY_TOKENS, 1024, 512, [*range(32, 1025, 32)]),
        (BY_TOKENS, 1000, 2048, [*range(32, 1000, 32), 1000]),
        (BY_TOKENS, 2, 8, [1, 2]),
    ],
)
def test_groups_end_by_number_or_by_tokens(groups: int, sequences: int, length: int, expected: list[int]) -> None:
    assert group_ends(sequences, groups, length) == expected


@given(st.integers(1, 3000), st.integers(1, 4096))
def test_groups_by_tokens_are_few_long_or_the_fewest(sequences: int, length: int) -> None:
    ends = group_ends(sequences, BY_TOKENS, length)
    assert ends[-1] == sequences
    assert len(ends) <= MOST_GROUPS
    assert ends[0] * length >= GROUP_TOKENS or len(ends) <= 2 * FEWEST_GROUPS


def test_places_are_used() -> None:
    assert shards(64, 16, 4, [Moments(groups=16)], 4) == [(0, 16), (16, 32), (32, 48), (48, 64)]
    assert shards(48, 512, 8, [Moments()], 2) == [(0, 24), (24, 48)]


def test_shards_have_equal_work_where_gradients_are_taken_at_few_sequences() -> None:
    asked = [Moments(groups=32), Curvature(groups=8, labels="sampled")]
    # 32 forward passes, and 8 sequences that take three more: 28 of 56.
    assert shards(32, 16, 1, asked, 2, gradient_sequences=8) == [(0, 7), (7, 32)]
    assert shards(32, 16, 1, asked, 2) == [(0, 16), (16, 32)]


@pytest.mark.parametrize("gradient_sequences", [None, 7])
@pytest.mark.parametrize("by_block", [True, False])
def test_sums_of_shards_are_those_of_one_pass(
    by_block: bool, gradient_sequences: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float32 sums of a group are the same to the bit; adding groups in another order moves the last bit of float64."""
    if not by_block:
        monkeypatch.setattr("rankwise.statistics.passes.BlockRunner.alone", lambda _self: False)
    model = tiny_llama()
    ids = torch.randint(3, 2000, (24, 16), generator=torch.Generator().manual_seed(1))
    sites = share_inputs(model, find_sites(model), ids[:1])
    monkeypatch.setattr("rankwise.statistics.groups.GROUP_TOKENS", 32)
    asked = [Moments(), InputMoments(groups=12), PooledCovariance(groups=6), Curvature(labels="sampled")]
    how: dict[str, Any] = {"batch_size": 2, "seed": 3, "gradient_sequences": gradient_sequences}
    whole = collect(model, sites, ids, asked, **how)
    parts = shards(len(ids), 16, 2, asked, 3, gradient_sequences)
    assert len(parts) == 3
    found = [collect(model, sites, ids[a:b], asked, first=a, of=len(ids), **how) for a, b in parts]
    for statistic, by_stream in whole.items():
        assert by_stream
        for key, totals in by_stream.items():
            # Of a shard without gradients there is nothing.
            added, *others = [each[statistic][key] for each in found if key in each[statistic]]
            for other in others:
                added = added.merge(other)
            for name, tensor in totals.tensors().items():
                torch.testing.assert_close(added.tensors()[name], tensor, rtol=1e-12, atol=1e-12)
