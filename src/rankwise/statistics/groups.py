"""Groups of calibration sequences: where they end, and how a batch falls into them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

BY_TOKENS = 0
"""A number of groups that stands for groups of about `GROUP_TOKENS` tokens, within the two limits below.

Keys of stages hold this number: raise the format of stages where one of the three changes.
"""

GROUP_TOKENS = 2048
FEWEST_GROUPS, MOST_GROUPS = 3, 32


def group_ends(sequences: int, groups: int, length: int) -> list[int]:
    """Ends of contiguous groups that together hold every sequence.

    The end of a group moves float32 sums to float64, which takes several passes over each matrix; its length bounds
    what float32 loses.

    Args:
        sequences: how many there are.
        groups: as many, as equal as possible, but no more than there are sequences. `BY_TOKENS` for groups of 1, 2, 4,
            ... sequences, which end where batches do.
        length: tokens of each.
    """
    if groups != BY_TOKENS:
        groups = min(groups, sequences)
        return [(index + 1) * sequences // groups for index in range(groups)]
    size = 1
    while (size * length < GROUP_TOKENS and sequences >= 2 * size * FEWEST_GROUPS) or sequences > size * MOST_GROUPS:
        size *= 2
    return [*range(size, sequences, size), sequences]


class Grouping:
    """Splits batches where groups end.

    Args:
        sequences: how many there are.
        groups: how many groups, as for `group_ends`. None makes every batch a group.
        length: tokens of each sequence.
    """

    def __init__(self, sequences: int, groups: int | None, length: int) -> None:
        self._ends = None if groups is None else frozenset(group_ends(sequences, groups, length))
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
