"""Groups of calibration sequences: where they end, and how a batch falls into them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

BY_TOKENS = 0
"""A number of groups that stands for as many as have `GROUP_TOKENS` tokens each, within the two limits below."""

GROUP_TOKENS = 2048
FEWEST_GROUPS, MOST_GROUPS = 4, 32


def group_count(groups: int, sequences: int, length: int) -> int:
    """Groups that sequences fall into: so many as were asked for, never more than there are sequences.

    Args:
        groups: asked for, or `BY_TOKENS`. The end of a group moves float32 sums to float64, which takes several passes
            over each matrix; its length bounds what float32 loses.
        sequences: how many there are.
        length: tokens of each.
    """
    if groups == BY_TOKENS:
        groups = max(FEWEST_GROUPS, min(MOST_GROUPS, sequences * length // GROUP_TOKENS))
    return min(groups, sequences)


def group_ends(sequences: int, groups: int) -> list[int]:
    """Ends of `groups` contiguous groups, as equal as possible, that together hold every sequence."""
    return [(index + 1) * sequences // groups for index in range(groups)]


class Grouping:
    """Splits batches where groups end.

    Args:
        sequences: how many there are.
        groups: how many groups, as for `group_count`. None makes every batch a group.
        length: tokens of each sequence.
    """

    def __init__(self, sequences: int, groups: int | None, length: int) -> None:
        ends = None if groups is None else group_ends(sequences, group_count(groups, sequences, length))
        self._ends = None if ends is None else frozenset(ends)
        self._segments: list[tuple[int, int, bool]] = []

    def begin(self, start: int, stop: int) -> None:
        """A batch of the sequences `start..stop` comes next."""
        ends = {stop} if self._ends is None else self._ends
        cuts = sorted({start, stop, *(end for end in ends if start < end < stop)})
        self._segments = [(a - start, b - start, b in ends) for a, b in pairwise(cuts)]

    def parts(self, x: Tensor, inputs: Tensor) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """Parts of what was seen of the batch, each within one group, and whether the group ends there.

        Routed tokens (`[tokens, d]`) no longer know their sequence; they count to the batch's last group.

        Args:
            x: vectors of a stream, shape `[sequences, tokens, d]` or `[tokens, d]`.
            inputs: what its module read, of the same sequences or tokens.
        """
        if x.ndim < 3:
            yield x, inputs, self._segments[-1][2]
            return
        for start, stop, ends in self._segments:
            yield x[start:stop], inputs[start:stop], ends

    @property
    def ended(self) -> bool:
        """Whether a group ends with the batch that began last."""
        return self._segments[-1][2]

    def ends_at(self, stop: int) -> bool:
        """Whether a group ends after `stop` sequences."""
        return self._ends is None or stop in self._ends
