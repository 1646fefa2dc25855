"""Nearest codewords of the E8P lattice, found by its structure.

Sorted by size, the coordinates of a vector meet the entries of a pattern in order, so of all patterns with the same
entries the best is known without trying them: eight kinds of pattern are compared, not 256. A wrong parity of signs
costs the flip of the smallest coordinate. Of the last kind only 29 patterns are in the table: where the best is none
of them, they are tried. Vectors lie in columns here: what is done to a coordinate is done to a row, all at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from rankwise.quantizers.codes import LATTICE, SECOND_SCALE, e8_short_values, e8p_odd, e8p_patterns, e8p_values

_CHUNK = 1 << 16
_SHORT = 227
_LARGEST = torch.iinfo(torch.int32).max

_NETWORK = (
    *((0, 2), (1, 3), (4, 6), (5, 7), (0, 4), (1, 5), (2, 6), (3, 7), (0, 1), (2, 3)),
    *((4, 5), (6, 7), (2, 4), (3, 5), (1, 4), (3, 6), (1, 2), (3, 4), (5, 6)),
)
"""Pairs of rows to be put in order, one after the other, until eight are sorted."""


@dataclass(frozen=True)
class _Tables:
    """What rounding looks up, on one device.

    Attributes:
        kinds: distinct multisets of entries among the patterns, each descending, float32, shape `[8, 8]`; the last is
            that of the patterns that only fill the table.
        half_squares: half their squared norms, shape `[8, 1]`.
        odd: whether an odd number of minus signs is needed, shape `[8, 1]`.
        from_three: how many entries are 3/2 or more, shape `[8]`.
        from_five: how many are 5/2.
        number: number of a pattern by its entries read as digits 0, 1 and 2; -1 for none.
        powers: 3^0 to 3^3 for the first four digits, and for the last four, float32, shape `[2, 8]`: their sums are
            exact in every precision that products of float32 may be taken in.
        long: patterns of the last kind, shape `[29, 8]`.
        long_odd: whether those need an odd number of minus signs.
        sign_bits: 2^8 to 2^14, and 0 for the last, whose sign follows, float32, shape `[1, 8]`.
        places: 0 to 7, int32, shape `[8, 1]`.
        values: all codewords, shape `[65536, 8]`.
    """

    kinds: Tensor
    half_squares: Tensor
    odd: Tensor
    from_three: Tensor
    from_five: Tensor
    number: Tensor
    powers: Tensor
    long: Tensor
    long_odd: Tensor
    sign_bits: Tensor
    places: Tensor
    values: Tensor


@cache
def _tables(device: torch.device) -> _Tables:
    patterns = e8p_patterns()
    entries = patterns.sort(-1, descending=True)[0].tolist()
    kinds = torch.tensor([*sorted({tuple(row) for row in entries[:_SHORT]}), entries[_SHORT]])
    powers = 3 ** torch.arange(LATTICE, device="cpu")
    number = torch.full((3**LATTICE,), -1, device="cpu")
    number[((patterns - 0.5).round().long() * powers).sum(-1)] = torch.arange(256, device="cpu")
    found = _Tables(
        kinds,
        kinds.square().sum(-1, keepdim=True) / 2,
        e8p_odd(kinds)[:, None],
        (kinds >= 1.5).sum(-1),
        (kinds >= 2.5).sum(-1),
        number,
        torch.block_diag(powers[: LATTICE // 2], powers[: LATTICE // 2]).float(),
        patterns[_SHORT:],
        e8p_odd(patterns[_SHORT:]),
        torch.tensor([[*(2.0**bit for bit in range(8, 15)), 0.0]], device="cpu"),
        torch.arange(LATTICE, dtype=torch.int32, device="cpu")[:, None],
        e8p_values(torch.arange(2**16, device="cpu"), patterns),
    )
    return _Tables(**{name: part.to(device) for name, part in vars(found).items()})


def _keys(size: Tensor, places: Tensor) -> Tensor:
    """Sizes of shape `[8, count]` as integers in the same order, none twice in a column: the last bits are the place.

    Floats that are not negative compare like the integers of the same bits; a size changes by 2^-20 of itself at most.
    """
    return (size.view(torch.int32) & ~(LATTICE - 1)) | places


def _sorted(keys: Tensor) -> Tensor:
    """Columns of shape `[8, count]` in descending order."""
    if keys.device.type != "cpu":
        return keys.sort(0, descending=True)[0]
    # Sorting many short columns is slow there; swapping rows is not.
    rows = list(keys)
    for high, low in _NETWORK:
        rows[high], rows[low] = torch.maximum(rows[high], rows[low]), torch.minimum(rows[high], rows[low])
    return torch.stack(rows)


def _numbers(keys: Tensor, ordered: Tensor, kind: Tensor, tables: _Tables) -> Tensor:
    """Numbers of the patterns of these kinds, entries in the order of the sizes, shape `[count]`; -1 for none."""
    tops = torch.cat([torch.full_like(ordered[:1], _LARGEST), ordered])
    three, five = (tops.gather(0, counts[kind][None]) for counts in (tables.from_three, tables.from_five))
    digits = (keys >= three).float() + (keys >= five).float()
    low, high = (tables.powers @ digits).long()
    return tables.number[low + 3 ** (LATTICE // 2) * high]


def _nearest_shifted(y: Tensor, tables: _Tables) -> tuple[Tensor, Tensor]:
    """The nearest signed pattern to vectors, shape `[8, count]`.

    Returns:
        Its number with the sign bits (bits 0 to 14), and the squared distance, each of shape `[count]`.
    """
    size, minus = y.abs(), y < 0
    keys = _keys(size, tables.places)
    ordered = _sorted(keys)
    sizes = ordered.view(torch.float32)
    odd = (minus.sum(0) & 1).bool()
    # |y - v|^2 = |y|^2 - 2 (y.v - |v|^2 / 2): the score is what stands in the brackets.
    wrong = odd != tables.odd
    # Every kind's smallest entry is 1/2, so that flipping the smallest coordinate costs its size.
    score = tables.kinds @ sizes - tables.half_squares - wrong * sizes[-1]
    best, kind = score.max(0)
    number = _numbers(keys, ordered, kind, tables)
    smallest = ordered[-1] & (LATTICE - 1)
    flipped = torch.where(wrong.gather(0, kind[None]).squeeze(0), smallest, -1)
    absent = (number < 0).nonzero().squeeze(-1)
    if len(absent):
        each = size[:, absent].T[:, None, :] * tables.long
        cost, place = each.min(-1)
        missed = odd[absent, None] != tables.long_odd
        longer = each.sum(-1) - tables.half_squares[-1] - torch.where(missed, 2 * cost, 0.0)
        top, which = longer.max(-1)
        short, kind = score[:-1, absent].max(0)
        won, of_short = top > short, _numbers(keys[:, absent], ordered[:, absent], kind, tables)
        number[absent] = torch.where(won, _SHORT + which, of_short)
        best[absent] = torch.where(won, top, short)
        flip = torch.where(won, _at(missed, which), wrong[:, absent].gather(0, kind[None]).squeeze(0))
        where = torch.where(won, _at(place, which).int(), smallest[absent])
        flipped[absent] = torch.where(flip, where, -1)
    minus ^= flipped == tables.places
    return number | (tables.sign_bits @ minus.float()).long().squeeze(0), y.square().sum(0) - 2 * best


def nearest_e8p(x: Tensor) -> Tensor:
    """The number of the nearest of the 65,536 codewords to every vector.

    Args:
        x: shape `[count, 8]`.

    Returns:
        Shape `[count]`, int64; see `codes.e8p_values`.
    """
    found = []
    tables = _tables(x.device)
    for part in x.float().split(_CHUNK) if len(x) else ():
        columns = part.T
        number, far = _nearest_shifted(torch.cat([columns - 0.25, columns + 0.25], 1), tables)
        (up, down), (far_up, far_down) = number.split(len(part)), far.split(len(part))
        found.append(torch.where(far_up <= far_down, up, down | (1 << 15)))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


def nearest_short(x: Tensor) -> Tensor:
    """The number of the nearest row of `codes.e8_short_values` to vectors of shape `[count, 8]`.

    Of each of the four kinds of row the best is known from the sizes and signs of the coordinates.
    """
    columns = x.float().T.contiguous()
    size, minus = columns.abs(), columns < 0
    places = _tables(x.device).places
    ordered = _sorted(_keys(size, places))
    sizes = ordered.view(torch.float32)
    odd = (minus.sum(0) & 1).bool()
    place = (ordered & (LATTICE - 1)).long()
    top = place[0]
    missing = (top == LATTICE - 1) & minus[-1]
    scores = torch.stack(
        [
            torch.zeros_like(sizes[0]),
            sizes[0] + sizes[1] - 1,
            size.sum(0) / 2 - 1 - torch.where(odd, sizes[-1], 0.0),
            torch.where(missing, -torch.inf, 2 * sizes[0] - 2),
        ]
    )
    first, second = torch.minimum(top, place[1]), torch.maximum(top, place[1])
    pair = first * (2 * LATTICE - 1 - first) // 2 + second - first - 1
    signs = minus.long()
    of_first, of_second, of_top = (signs.gather(0, each[None]).squeeze(0) for each in (first, second, top))
    flipped = minus ^ (odd & (place[-1] == places))
    # Seven signs, the first the highest bit.
    halves = (_tables(x.device).sign_bits.flip(1)[:, 1:] @ flipped[:-1].float()).long().squeeze(0) >> 8
    numbers = torch.stack(
        [torch.zeros_like(pair), 1 + 4 * pair + 2 * of_first + of_second, 113 + halves, 241 + 2 * top + of_top]
    )
    return numbers.gather(0, scores.argmax(0, keepdim=True)).squeeze(0)


def _at(values: Tensor, place: Tensor) -> Tensor:
    """Of every row the entry at its place, shape `[count]`."""
    return values.gather(-1, place[:, None]).squeeze(-1)


def decode_e8p(codes: Tensor) -> Tensor:
    """What `codes.decode` gives for codes of the lattice, from a table of all codewords.

    Args:
        codes: uint8, shape `[rows, blocks, bits]`.

    Returns:
        Shape `[rows, 8 blocks]`, float32.
    """
    values, whole, bits = _tables(codes.device).values, codes.long(), codes.shape[-1]
    found = values[whole[..., 0] | (whole[..., 1] << 8)]
    if bits == 3:
        found = found + SECOND_SCALE[3] * e8_short_values().to(codes.device)[whole[..., 2]]
    elif bits == 4:
        found = found + SECOND_SCALE[4] * values[whole[..., 2] | (whole[..., 3] << 8)]
    return found.reshape(len(codes), -1)


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
        rest = (x - _tables(x.device).values[first]) / SECOND_SCALE[bits]
        second = nearest_short(rest) if bits == 3 else nearest_e8p(rest)
        parts += [second] if bits == 3 else [second & 255, second >> 8]
    return torch.stack(parts, -1).to(torch.uint8)
