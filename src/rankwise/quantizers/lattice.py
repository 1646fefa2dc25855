"""Nearest codewords of the E8P lattice, found by its structure.

Sorted by size, the coordinates of a vector meet the entries of a pattern in order, so of all patterns with the same
entries the best is known without trying them: seven kinds of pattern are compared, not 227. A wrong parity of signs
costs the flip of the smallest coordinate. The 29 patterns that only fill the table are tried where they can win.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from rankwise.quantizers.codes import LATTICE, SECOND_SCALE, e8p_odd, e8p_patterns, e8p_values

_CHUNK = 1 << 16
_SHORT = 227


@cache
def _kinds() -> Tensor:
    """Distinct multisets of entries among the short patterns, each descending, shape `[7, 8]`."""
    kinds = {tuple(sorted(row, reverse=True)) for row in e8p_patterns()[:_SHORT].tolist()}
    return torch.tensor(sorted(kinds))


@cache
def _pattern_index() -> Tensor:
    """Number of a pattern by its entries read as digits (1/2, 3/2, 5/2 as 0, 1, 2), shape `[3^8]`; -1 for none."""
    index = torch.full((3**LATTICE,), -1)
    index[_digits(e8p_patterns())] = torch.arange(256)
    return index


def _digits(patterns: Tensor) -> Tensor:
    powers = 3 ** torch.arange(LATTICE, device=patterns.device)
    return ((patterns - 0.5).round().long() * powers).sum(-1)


def _nearest_shifted(y: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest signed pattern to vectors of shape `[count, 8]`.

    Returns:
        Its number with the sign bits (bits 0 to 14), and the squared distance, each of shape `[count]`.
    """
    size = y.abs()
    ordered, order = size.sort(-1, descending=True)
    odd = (y < 0).sum(-1) & 1
    kinds = _kinds().to(y)
    # |y - v|^2 = |y|^2 - 2 (y.v - |v|^2 / 2): the score is what stands in the brackets.
    wrong = odd[:, None] != e8p_odd(kinds).long()
    # Every kind's smallest entry is 1/2, so that flipping the smallest coordinate costs its size.
    score = ordered @ kinds.T - kinds.square().sum(-1) / 2 - torch.where(wrong, ordered[:, -1:], 0.0)
    best, kind = score.max(-1)
    pattern = torch.zeros_like(y).scatter_(-1, order, kinds[kind])
    number = _pattern_index().to(y.device)[_digits(pattern)]
    flipped = torch.where(wrong.gather(-1, kind[:, None]).squeeze(-1), order[:, -1], -1)
    long = e8p_patterns()[_SHORT:].to(y)
    # No vector scores more against a long pattern than its five largest coordinates allow.
    bound = 1.5 * ordered[:, :5].sum(-1) + 0.5 * ordered[:, 5:].sum(-1) - long[0].square().sum() / 2
    rows = (bound > best).nonzero().squeeze(-1)
    if len(rows):
        part = size[rows]
        each = part[:, None, :] * long
        cost, place = each.min(-1)
        missed = odd[rows, None] != e8p_odd(long).long()
        longer = each.sum(-1) - long[0].square().sum() / 2 - torch.where(missed, 2 * cost, 0.0)
        top, which = longer.max(-1)
        won = top > best[rows]
        which, winners = which[won], rows[won]
        number[winners] = _SHORT + which
        best[winners] = top[won]
        at = place[won].gather(-1, which[:, None]).squeeze(-1)
        flipped[winners] = torch.where(missed[won].gather(-1, which[:, None]).squeeze(-1), at, -1)
    minus = (y < 0) ^ (flipped[:, None] == torch.arange(LATTICE, device=y.device))
    signs = (minus[:, :7].long() << torch.arange(8, 15, device=y.device)).sum(-1)
    return number | signs, y.square().sum(-1) - 2 * best


def nearest_e8p(x: Tensor) -> Tensor:
    """The number of the nearest of the 65,536 codewords to every vector.

    Args:
        x: shape `[count, 8]`.

    Returns:
        Shape `[count]`, int64; see `codes.e8p_values`.
    """
    found = []
    for part in x.float().split(_CHUNK):
        up, far_up = _nearest_shifted(part - 0.25)
        down, far_down = _nearest_shifted(part + 0.25)
        found.append(torch.where(far_up <= far_down, up, down | (1 << 15)))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


def nearest_short(x: Tensor) -> Tensor:
    """The number of the nearest row of `codes.e8_short_values` to vectors of shape `[count, 8]`.

    Of each of the four kinds of row the best is known from the sizes and signs of the coordinates.
    """
    size = x.abs()
    ordered, order = size.sort(-1, descending=True)
    minus = x < 0
    odd = (minus.sum(-1) & 1).bool()
    top = order[:, 0]
    missing = (top == LATTICE - 1) & minus[:, -1]
    scores = torch.stack(
        [
            torch.zeros_like(ordered[:, 0]),
            ordered[:, 0] + ordered[:, 1] - 1,
            size.sum(-1) / 2 - 1 - torch.where(odd, ordered[:, -1], 0.0),
            torch.where(missing, -torch.inf, 2 * ordered[:, 0] - 2),
        ],
        -1,
    )
    first, second = order[:, :2].amin(-1), order[:, :2].amax(-1)
    pair = first * (2 * LATTICE - 1 - first) // 2 + second - first - 1
    signs = minus.long()
    pairs = 1 + 4 * pair + 2 * _at(signs, first) + _at(signs, second)
    flipped = signs ^ (odd[:, None] & (order[:, -1:] == torch.arange(LATTICE, device=x.device))).long()
    halves = 113 + (flipped[:, :7] << torch.arange(6, -1, -1, device=x.device)).sum(-1)
    singles = 241 + 2 * top + _at(signs, top)
    numbers = torch.stack([torch.zeros_like(pairs), pairs, halves, singles], -1)
    return _at(numbers, scores.argmax(-1))


def _at(values: Tensor, place: Tensor) -> Tensor:
    """Of every row the entry at its place, shape `[count]`."""
    return values.gather(-1, place[:, None]).squeeze(-1)


def round_e8p(x: Tensor, bits: int) -> Tensor:
    """Codes of the nearest codewords, uint8 of shape `[count, bits]`.

    Args:
        x: shape `[count, 8]`, scaled.
        bits: 2, 3 or 4.
    """
    x = x.float()
    first = nearest_e8p(x)
    parts = [first & 255, first >> 8]
    if bits > 2:
        rest = (x - e8p_values(first, e8p_patterns().to(x.device))) / SECOND_SCALE[bits]
        second = nearest_short(rest) if bits == 3 else nearest_e8p(rest)
        parts += [second] if bits == 3 else [second & 255, second >> 8]
    return torch.stack(parts, -1).to(torch.uint8)
