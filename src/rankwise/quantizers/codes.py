"""What stored codes mean: eight weights are `bits` bytes, whatever the codebook.

The lattice is E8P of QuIP# (Tseng et al., 2024, arXiv 2402.04396): 16 bits for eight weights. 3 and 4 bits add a second
codeword for what the first one left. This file imports torch alone: its source is also written, word for word, into the
modelling file of every checkpoint.
"""

import itertools
from functools import cache

import torch
from torch import Tensor

LEVEL_TILE = (1, 8)
"""Rows and columns of the weights that the codes of eight levels stand for."""

TILES = {"e8p": (1, 8)}
"""By codebook, rows and columns of the weights that one codeword stands for; of any other, `LEVEL_TILE`."""

GIVEN = "levels:"
"""Before the levels themselves, joined by commas: the name of a codebook that is no other's."""

BYTE = 8
"""Integers that a plane of one bit each packs into a byte."""

LATTICE = 8
"""Dimension of E8."""

SECOND_SCALE = {3: 0.49, 4: 0.265}
"""Scale of the second codeword relative to the first, by bits: least error on a Gaussian (benchmarks/codebooks.py)."""


def tile_of(codebook: str) -> tuple:
    """Rows and columns of the weights that one codeword of this codebook stands for."""
    return TILES.get(codebook, LEVEL_TILE)


@cache
def e8p_patterns() -> Tensor:
    """Absolute values of the codewords before shift and signs, shape `[256, 8]`, in halves (1, 3, 5) of a unit.

    227 are all with odd entries and squared norm at most 40 (10 in units of one); 29 of squared norm 48 fill the table.
    """
    short = [p for p in itertools.product((1, 3, 5), repeat=LATTICE) if sum(e * e for e in p) <= 40]
    long = [
        [1 if place in ones else 3 for place in range(LATTICE)] for ones in itertools.combinations(range(LATTICE), 3)
    ]
    # Every second of the 56, and one more.
    return torch.tensor([*short, *long[::2], long[1]], dtype=torch.float32, device="cpu") / 2


def e8p_odd(patterns: Tensor) -> Tensor:
    """Whether an odd number of minus signs is needed, so that v - 1/2 has an even sum, shape `[...]`."""
    return ((patterns - 0.5).sum(-1).round().long() % 2).bool()


def e8p_values(index: Tensor, patterns: Tensor) -> Tensor:
    """Codewords, shape `[..., 8]`.

    Args:
        index: shape `[...]`, integers below 65,536: bits 0 to 7 name the pattern, 8 to 14 the signs of the first
            seven entries (the last follows from parity), 15 the shift, +1/4 or -1/4.
        patterns: from `e8p_patterns`.
    """
    chosen = patterns[index & 255]
    minus = (index.unsqueeze(-1) >> torch.arange(8, 15, device=index.device)) & 1
    last = (minus.sum(-1) + e8p_odd(chosen).long()) & 1
    signs = 1 - 2 * torch.cat([minus, last.unsqueeze(-1)], -1)
    shift = 0.25 - 0.5 * ((index >> 15) & 1)
    return chosen * signs + shift.unsqueeze(-1)


@cache
def e8_short_values() -> Tensor:
    """256 short vectors of E8, shape `[256, 8]`: zero, the 240 of squared norm 2, and 15 of the 16 that are +-2 e_i."""
    table = [[0.0] * LATTICE]
    for first, second in itertools.combinations(range(LATTICE), 2):
        for signs in itertools.product((1.0, -1.0), repeat=2):
            row = [0.0] * LATTICE
            row[first], row[second] = signs
            table.append(row)
    for signs in itertools.product((0.5, -0.5), repeat=LATTICE):
        if sum(sign < 0 for sign in signs) % 2 == 0:
            table.append(list(signs))
    for place, sign in itertools.product(range(LATTICE), (2.0, -2.0)):
        table.append([sign if place == each else 0.0 for each in range(LATTICE)])
    return torch.tensor(table[:256], dtype=torch.float32, device="cpu")


def uniform_levels(bits: int) -> Tensor:
    """2^bits evenly spaced levels around zero, one apart, shape `[2^bits]`."""
    return torch.arange(2**bits, dtype=torch.float32, device="cpu") - (2**bits - 1) / 2


def normal_float_levels(bits: int) -> Tensor:
    """Means of 2^bits equally probable parts of a standard Gaussian's range, ends at -1 and 1, shape `[2^bits]`.

    Quantiles as in NormalFloat (Dettmers et al., 2023, arXiv 2305.14314), symmetric, without an exact zero.
    """
    middles = (torch.arange(2**bits, dtype=torch.float64, device="cpu") + 0.5) / 2**bits
    levels = torch.special.ndtri(middles)
    return (levels / levels[-1]).float()


def given_levels(codebook: str, bits: int) -> Tensor:
    """The levels that a name spells out, shape `[2^bits]`."""
    numbers = [float(level) for level in codebook[len(GIVEN) :].split(",")]
    levels = torch.tensor(numbers, dtype=torch.float32, device="cpu")
    if len(levels) != 2**bits:
        raise ValueError(f"a codebook of {bits} bits has {2**bits} levels, not {len(levels)}")
    return levels


def tables_for(codebook: str, bits: int) -> list:
    """The tensors that `decode` needs for a codebook."""
    if codebook == "e8p":
        return [e8p_patterns(), e8_short_values()] if bits == 3 else [e8p_patterns()]
    if codebook.startswith(GIVEN):
        return [given_levels(codebook, bits)]
    known = {"uniform": uniform_levels, "nf": normal_float_levels}
    return [known[codebook](bits)]


def decode(codes: Tensor, codebook: str, tables: list) -> Tensor:
    """Values before scaling, float32.

    Args:
        codes: uint8, shape `[rows, blocks, bits]`.
        codebook: `e8p`, `uniform`, `nf`, or `levels:` and 2^bits numbers joined by commas.
        tables: from `tables_for`.

    Returns:
        Shape `[rows, 8 blocks]`.
    """
    rows, _, bits = codes.shape
    if codebook == "e8p":
        whole = codes.long()
        values = e8p_values(whole[..., 0] | (whole[..., 1] << 8), tables[0])
        if bits == 3:
            values = values + SECOND_SCALE[3] * tables[1][whole[..., 2]]
        elif bits == 4:
            second = e8p_values(whole[..., 2] | (whole[..., 3] << 8), tables[0])
            values = values + SECOND_SCALE[4] * second
    else:
        values = tables[0][unpack_bits(codes)]
    return values.reshape(rows, -1)


def wide_scale(scale: Tensor, group: int, columns: int) -> Tensor:
    """Scales as they multiply values of shape `[rows, columns]`.

    Args:
        scale: shape `[1, 1]`, `[rows, 1]` or `[rows, groups]`.
        group: columns that share a scale; 0 when all columns do.
        columns: how many there are; the last group may be cut.
    """
    return scale.repeat_interleave(group, 1)[:, :columns] if group else scale


def unpack_bits(codes: Tensor) -> Tensor:
    """Integers of `bits` bits, shape `[..., 8]`, from planes of one bit each, uint8 of shape `[..., bits]`."""
    bits = codes.shape[-1]
    places = torch.arange(BYTE, device=codes.device)
    planes = (codes.unsqueeze(-1).long() >> places) & 1
    return (planes << torch.arange(bits, device=codes.device).unsqueeze(-1)).sum(-2)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack_bits`: integers of shape `[..., 8]` to uint8 of shape `[..., bits]`."""
    planes = (values.long().unsqueeze(-2) >> torch.arange(bits, device=values.device).unsqueeze(-1)) & 1
    return (planes << torch.arange(BYTE, device=values.device)).sum(-1).to(torch.uint8)
