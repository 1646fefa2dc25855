"""Shards of calibration sequences, so that sums over each, added, are the sums over all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rankwise.statistics.base import Statistic
from rankwise.statistics.groups import group_ends

_GRADIENTS = 3
"""What gradients of a sequence take beside its forward pass, in such passes: again, backward, and the head."""


def shards(
    sequences: int,
    length: int,
    batch_size: int,
    statistics: Sequence[Statistic],
    wanted: int,
    gradient_sequences: int | None = None,
) -> list[tuple[int, int]]:
    """Split sequences where batches and groups of sequences end, so that each is the same in a shard as in one pass.

    Args:
        sequences: how many there are.
        length: tokens of each.
        batch_size: sequences a batch.
        statistics: what is summed, in groups of sequences each.
        wanted: shards, if there are places for as many.
        gradient_sequences: how many of them, the first, gradients are taken at; None for all.

    Returns:
        First sequence of each shard and the one behind its last, of work as equal as the places allow.
    """
    gradient_sequences = sequences if gradient_sequences is None else min(gradient_sequences, sequences)
    places = set(range(batch_size, sequences, batch_size))
    for statistic in statistics:
        if statistic.groups is not None:
            count = sequences if statistic.labels is None else gradient_sequences
            ends = group_ends(count, statistic.groups, length)
            places &= {*ends, *range(count, sequences)}

    def work(place: int) -> int:
        return place + _GRADIENTS * min(place, gradient_sequences)

    ends = []
    for number in range(1, wanted):
        aim = number * work(sequences) / wanted
        free = [place for place in places if not ends or place > ends[-1]]
        if free:
            ends.append(min(free, key=lambda place: (abs(work(place) - aim), place)))
    found = [0, *ends, sequences]
    return list(pairwise(found))
