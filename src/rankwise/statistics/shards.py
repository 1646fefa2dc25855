"""Shards of calibration sequences, so that sums over each, added, are the sums over all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rankwise.statistics.base import Statistic
from rankwise.statistics.groups import group_ends


def shards(sequences: int, batch_size: int, statistics: Sequence[Statistic], wanted: int) -> list[tuple[int, int]]:
    """Split sequences where batches and groups of sequences end, so that each is the same in a shard as in one pass.

    Args:
        sequences: how many there are.
        batch_size: sequences a batch.
        statistics: what is summed, in groups of sequences each.
        wanted: shards, if there are places for as many.

    Returns:
        First sequence of each shard and the one behind its last, as equal as the places allow.
    """
    places = set(range(batch_size, sequences, batch_size))
    for statistic in statistics:
        if statistic.groups is not None:
            places &= set(group_ends(sequences, min(statistic.groups, sequences)))
    ends: list[int] = []
    for number in range(1, wanted):
        aim = number * sequences / wanted
        free = [place for place in places if not ends or place > ends[-1]]
        if free:
            ends.append(min(free, key=lambda place: (abs(place - aim), place)))
    found = [0, *ends, sequences]
    return list(pairwise(found))
