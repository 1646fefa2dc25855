"""Nearest codewords of the E8P lattice, found by its structure.

Without a bound on their length the codewords are two shifts of D8 + 1/2, and there the nearest point is every
coordinate to its nearest entry, one of them to the next where the parity of signs is wrong. Most vectors end at a short
pattern so, and the others are looked at more closely: sorted by size, the coordinates of a vector meet the entries of a
pattern in order, so of all patterns with the same entries the best is known without trying them, and seven kinds of
pattern are compared, not 227. A wrong parity of signs costs the flip of the smallest coordinate. The 29 patterns that
only fill the table are tried where they can win.

A GPU has arithmetic to spare, and waits for every launch and for every question whether there is more to do: there all
256 patterns are tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from rankwise.quantizers.codes import LATTICE, SECOND_SCALE, e8_short_values, e8p_odd, e8p_patterns, e8p_values

_CHUNK = 1 << 16
_CHUNK_OF_ALL = 1 << 13
"""Vectors at a time where all patterns are tried, which takes about 30 KB for each."""
_SHORT = 227


@dataclass(frozen=True)
class Tables:
    """What rounding looks up, on one device.

    Attributes:
        kinds: distinct multisets of entries among the short patterns, each descending, float32, shape `[7, 8]`.
        digits: their entries as digits (1/2, 3/2, 5/2 as 0, 1, 2), int64.
        half_squares: half their squared norms, shape `[7]`.
        odd: 1 where an odd number of minus signs is needed, shape `[7]`.
        number: number of a pattern by its entries read as digits, shape `[3^8]`; -1 for none.
        powers: 3^0 to 3^7.
        float_powers: the same, float32.
        shifts: -1/4 and 1/4, shape `[2, 1, 1]`.
        patterns: all, the short ones first, shape `[256, 8]`.
        patterns_odd: as `odd`, of those.
        long: patterns that are no short ones, shape `[29, 8]`.
        long_odd: as `odd`, of those.
        most: what the sorted sizes of a vector can score against a long pattern at most, as weights, shape `[8]`.
        sign_bits: 2^8 to 2^14, and 0 for the last, whose sign follows, float32.
        places: 0 to 7.
        values: all codewords, shape `[65536, 8]`.
        short_values: of E8, shape `[256, 8]`.
    """

    kinds: Tensor
    digits: Tensor
    half_squares: Tensor
    odd: Tensor
    number: Tensor
    powers: Tensor
    float_powers: Tensor
    shifts: Tensor
    patterns: Tensor
    patterns_odd: Tensor
    long: Tensor
    long_odd: Tensor
    most: Tensor
    sign_bits: Tensor
    places: Tensor
    values: Tensor
    short_values: Tensor


@cache
def known_tables(device: torch.device) -> Tables:
    """Those of a device, made once."""
    patterns = e8p_patterns()
    kinds = torch.tensor(sorted({tuple(sorted(row, reverse=True)) for row in patterns[:_SHORT].tolist()}))
    powers = 3 ** torch.arange(LATTICE, device="cpu")
    number = torch.full((3**LATTICE,), -1, device="cpu")
    number[(_as_digits(patterns) * powers).sum(-1)] = torch.arange(256, device="cpu")
    long = patterns[_SHORT:]
    found = Tables(
        kinds,
        _as_digits(kinds),
        kinds.square().sum(-1) / 2,
        e8p_odd(kinds).long(),
        number,
        powers,
        powers.float(),
        torch.tensor([-0.25, 0.25], device="cpu")[:, None, None],
        patterns,
        e8p_odd(patterns).long(),
        long,
        e8p_odd(long).long(),
        torch.tensor([1.5] * 5 + [0.5] * 3, device="cpu"),
        torch.tensor([*(2.0**bit for bit in range(8, 15)), 0.0], device="cpu"),
        torch.arange(LATTICE, device="cpu"),
        e8p_values(torch.arange(2**16, device="cpu"), patterns),
        e8_short_values(),
    )
    return Tables(**{name: part.to(device) for name, part in vars(found).items()})


def _as_digits(patterns: Tensor) -> Tensor:
    return (patterns - 0.5).round().long()


def _nearest_shifted(y: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """The nearest signed pattern to vectors of shape `[count, 8]`.

    Returns:
        Its number with the sign bits (bits 0 to 14), and the squared distance, each of shape `[count]`.
    """
    size, minus = y.abs(), y < 0
    ordered, order = size.sort(-1, descending=True)
    odd = minus.sum(-1) & 1
    # |y - v|^2 = |y|^2 - 2 (y.v - |v|^2 / 2): the score is what stands in the brackets.
    wrong = odd[:, None] != tables.odd
    # Every kind's smallest entry is 1/2, so that flipping the smallest coordinate costs its size.
    score = ordered @ tables.kinds.T - tables.half_squares - wrong * ordered[:, -1:]
    best, kind = score.max(-1)
    number = tables.number[(tables.powers[order] * tables.digits[kind]).sum(-1)]
    flipped = torch.where(_at(wrong, kind), order[:, -1], -1)
    # No vector scores more against a long pattern than its five largest coordinates allow.
    half_square = tables.long[0].square().sum() / 2
    rows = (ordered @ tables.most - half_square > best).nonzero().squeeze(-1)
    if len(rows):
        part = size[rows]
        each = part[:, None, :] * tables.long
        cost, place = each.min(-1)
        missed = odd[rows, None] != tables.long_odd
        longer = each.sum(-1) - half_square - torch.where(missed, 2 * cost, 0.0)
        top, which = longer.max(-1)
        won = top > best[rows]
        which, winners = which[won], rows[won]
        number[winners] = _SHORT + which
        best[winners] = top[won]
        flipped[winners] = torch.where(_at(missed[won], which), _at(place[won], which), -1)
    minus ^= flipped[:, None] == tables.places
    return number | (minus.float() @ tables.sign_bits).long(), y.square().sum(-1) - 2 * best


def _nearest_unbounded(x: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """The nearest codeword if there were some of any length, to vectors of shape `[count, 8]`.

    Returns:
        Its number, shape `[count]`; which vectors end at none of the short patterns, where that number means nothing.
    """
    y = x + tables.shifts
    low = y.floor()
    # Entries are low + 1/2, and their low parts have an even sum.
    beyond = y - low - 0.5
    odd = low.sum(-1) % 2
    most, place = beyond.abs().max(-1)
    # To move a coordinate to the entry after its nearest costs 1 - 2 |how far it lies beyond the nearest|.
    up, down = beyond.square().sum(-1) + odd * (1 - 2 * most)
    place = place[..., None]
    low.scatter_add_(-1, place, torch.copysign(odd[..., None], beyond.gather(-1, place)))
    shifted = down < up
    low = torch.where(shifted[:, None], low[1], low[0])
    # The squared norm of low + 1/2 is at most 10.
    longer = ((low * (low + 1)).sum(-1) > 8).nonzero().squeeze(-1)
    minus = low < 0
    pattern = ((low + 0.5).abs() - 0.5) @ tables.float_powers
    number = tables.number[pattern.long().clamp_(0, len(tables.number) - 1)]
    return number | (minus.float() @ tables.sign_bits + shifted * (1 << 15)).long(), longer


def _nearest_bounded(x: Tensor, tables: Tables) -> Tensor:
    """The number of the nearest codeword to vectors of shape `[count, 8]`, whatever their length."""
    number, far = _nearest_shifted((x + tables.shifts).flatten(0, 1), tables)
    (up, down), (far_up, far_down) = number.split(len(x)), far.split(len(x))
    return torch.where(far_up <= far_down, up, down | (1 << 15))


def nearest_by_kinds(x: Tensor, tables: Tables) -> Tensor:
    """The number of the nearest codeword to vectors of shape `[count, 8]`: few are looked at more closely."""
    number, longer = _nearest_unbounded(x, tables)
    if len(longer):
        number[longer] = _nearest_bounded(x[longer], tables)
    return number


def nearest_of_all(x: Tensor, tables: Tables) -> Tensor:
    """The number of the nearest codeword to vectors of shape `[count, 8]`: every pattern is tried, nothing is asked."""
    y = x + tables.shifts
    minus = y < 0
    each = y.abs()[..., None, :] * tables.patterns
    least, place = each.min(-1)
    wrong = (minus.sum(-1) & 1)[..., None] != tables.patterns_odd
    half_squares = tables.patterns.square().sum(-1) / 2
    best, number = (each.sum(-1) - half_squares - torch.where(wrong, 2 * least, 0.0)).max(-1)
    # A wrong parity costs the flip of the entry that matters least.
    chosen = number[..., None]
    flipped = torch.where(wrong.gather(-1, chosen), place.gather(-1, chosen), -1)
    signed = number | ((minus ^ (flipped == tables.places)).float() @ tables.sign_bits).long()
    far = y.square().sum(-1) - 2 * best
    return torch.where(far[0] <= far[1], signed[0], signed[1] | (1 << 15))


def nearest_e8p(x: Tensor) -> Tensor:
    """The number of the nearest of the 65,536 codewords to every vector.

    Args:
        x: shape `[count, 8]`.

    Returns:
        Shape `[count]`, int64; see `codes.e8p_values`.
    """
    nearest, most = (nearest_of_all, _CHUNK_OF_ALL) if x.is_cuda else (nearest_by_kinds, _CHUNK)
    tables = known_tables(x.device)
    return torch.cat([nearest(part, tables) for part in x.float().split(most)])


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


def decode_e8p(codes: Tensor) -> Tensor:
    """What `codes.decode` gives for codes of the lattice, from a table of all codewords.

    Args:
        codes: uint8, shape `[rows, blocks, bits]`.

    Returns:
        Shape `[rows, 8 blocks]`, float32.
    """
    tables, whole, bits = known_tables(codes.device), codes.long(), codes.shape[-1]
    values = tables.values
    found = values[whole[..., 0] | (whole[..., 1] << 8)]
    if bits == 3:
        found = found + SECOND_SCALE[3] * tables.short_values[whole[..., 2]]
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
        rest = (x - known_tables(x.device).values[first]) / SECOND_SCALE[bits]
        second = nearest_short(rest) if bits == 3 else nearest_e8p(rest)
        parts += [second] if bits == 3 else [second & 255, second >> 8]
    return torch.stack(parts, -1).to(torch.uint8)
