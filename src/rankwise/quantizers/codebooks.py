"""Codebooks: how a matrix of numbers becomes codes of a few bits, and which scales it needs for that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from rankwise.errors import RecipeError, nearest
from rankwise.plugins import Plugins, in_file
from rankwise.quantizers.codes import (
    BYTE,
    GIVEN,
    LATTICE,
    decode,
    given_levels,
    normal_float_levels,
    pack_bits,
    tables_for,
    tile_of,
    uniform_levels,
    wide_scale,
)
from rankwise.quantizers.lattice import decode_e8p, round_e8p
from rankwise.reading import one_line

_LEAST_SCALE = 1e-30
"""Of what is all zeros."""

_GAUSSIAN_SCALE = {2: 0.965, 3: 1.02, 4: 1.12}
"""Scale of the lattice for a standard Gaussian: the least squared error (benchmarks/results/codebooks.md)."""

_CLIPS = torch.linspace(0.3, 1.0, 29)
"""Shares of a group's largest absolute value that are tried as the outermost level."""


@dataclass(frozen=True)
class Packed:
    """A matrix as codes and scales.

    Attributes:
        codes: uint8, shape `[rows, blocks, bits]`; eight columns a block, the last one padded.
        scale: shape `[1, 1]`, `[rows, 1]` or `[rows, groups]`; a group is a run of columns of equal length.
        columns: columns that count.
        codebook: what the codebook is called where codes are stored, see `Codebook.stored_name`.
        group: columns that share a scale; 0 when all columns do.
    """

    codes: Tensor
    scale: Tensor
    columns: int
    codebook: str
    group: int = 0

    @property
    def bits(self) -> int:
        return self.codes.shape[-1]

    def dense(self) -> Tensor:
        """The matrix it stands for, shape `[rows, columns]`, in the dtype of the scale."""
        tables = [table.to(self.codes.device) for table in tables_for(self.codebook, self.bits)]
        values = decode(self.codes, self.codebook, tables).to(self.scale.dtype)
        return (values * wide_scale(self.scale, self.group, values.shape[1]))[:, : self.columns]


def padded(matrix: Tensor, width: int) -> Tensor:
    """With zero columns up to a multiple of the width of a tile."""
    short = -matrix.shape[1] % width
    return torch.nn.functional.pad(matrix, (0, short)) if short else matrix


class Codebook(ABC):
    """A finite set of values for tiles of weights.

    Args:
        bits: a weight.
        group: columns that share a scale, a multiple of eight; 0 for none.
        by_row: without groups, give every row a scale of its own; else the whole matrix has one.
    """

    name: str
    known_bits: range
    feedback_scale: ClassVar[Mapping[int, float]] = {}
    """By bits, what scales are multiplied by under feedback, which makes targets larger; 1 where it is not said."""

    def __init__(self, bits: int, group: int = 0, by_row: bool = False) -> None:
        if bits not in self.known_bits:
            known = ", ".join(str(each) for each in self.known_bits)
            raise RecipeError(
                f"The codebook {self.name} has no {bits} bits.",
                where="method",
                remedy=f"{self.name} knows {known}" + others_with(bits, self.name),
            )
        self.bits, self.group, self.by_row = bits, group, by_row

    @property
    def stored_name(self) -> str:
        """The name under which `codes.decode` knows it."""
        return self.name

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of the weights that one codeword stands for."""
        return tile_of(self.name)

    def scales(self, matrix: Tensor, feedback: bool = False) -> Tensor:
        """Scales for a matrix of shape `[rows, columns]`, never zero, exact in bfloat16; see `Packed.scale`.

        Args:
            matrix: what is to be rounded.
            feedback: whether errors will be fed back.
        """
        fitted = self._fit(matrix) * (self.feedback_scale.get(self.bits, 1.0) if feedback else 1.0)
        # Where all is zero, so is what codes stand for, to any precision.
        fitted = fitted.clamp_min(_LEAST_SCALE)
        # Rounded before the codes are chosen, so that what is stored loses nothing.
        return fitted.to(torch.bfloat16).to(matrix.dtype)

    @abstractmethod
    def _fit(self, matrix: Tensor) -> Tensor:
        """Scales of least squared error."""

    @abstractmethod
    def round(self, values: Tensor) -> Tensor:
        """Codes of the nearest entries to scaled values of shape `[rows, 8 blocks]`, uint8 `[rows, blocks, bits]`."""

    def decode(self, codes: Tensor) -> Tensor:
        """Values before scaling, float32, shape `[rows, 8 blocks]`."""
        tables = [table.to(codes.device) for table in tables_for(self.stored_name, self.bits)]
        return decode(codes, self.stored_name, tables)

    def _grouped(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """What shares a scale, along the last of three dimensions, and what of it is there: a last group may be cut."""
        if not self.group:
            parts = matrix.unsqueeze(1) if self.by_row else matrix.reshape(1, 1, -1)
            return parts, torch.ones_like(parts[:1, :, :1])
        short = -matrix.shape[1] % self.group
        there = torch.nn.functional.pad(torch.ones_like(matrix[:1]), (0, short)).unflatten(1, (-1, self.group))
        return torch.nn.functional.pad(matrix, (0, short)).unflatten(1, (-1, self.group)), there

    def quantize(self, matrix: Tensor, scale: Tensor | None = None) -> Packed:
        """Every entry to the nearest, without feedback.

        Args:
            matrix: shape `[rows, columns]`.
            scale: see `Packed.scale`; None for its own.
        """
        scale = self.scales(matrix) if scale is None else scale
        wide = padded(matrix, self.tile[1])
        codes = self.round(wide / wide_scale(scale, self.group, wide.shape[1]))
        return Packed(codes, scale, matrix.shape[1], self.stored_name, self.group)


class E8P(Codebook):
    """The lattice of QuIP#: 2 bits, and 3 or 4 with a second codeword for the remainder."""

    name = "e8p"
    known_bits = range(2, 5)
    # Least error on the weights of wiki-llama-8m at 2 and 3 bits, next to it at 4 (benchmarks/results/codebooks.md).
    feedback_scale = MappingProxyType({2: 1.15, 3: 1.03, 4: 1.03})

    def _fit(self, matrix: Tensor) -> Tensor:
        parts, there = self._grouped(matrix)
        mean = parts.square().sum(-1) / there.expand(1, *parts.shape[1:]).sum(-1)
        return mean.sqrt() * _GAUSSIAN_SCALE[self.bits]

    def round(self, values: Tensor) -> Tensor:
        rows = values.shape[0]
        return round_e8p(values.reshape(-1, LATTICE), self.bits).reshape(rows, -1, self.bits)

    def decode(self, codes: Tensor) -> Tensor:
        return decode_e8p(codes)


class Levels(Codebook):
    """A scalar codebook: each weight to the nearest of 2^bits levels."""

    known_bits = range(2, 9)
    feedback_scale = MappingProxyType({2: 1.15})

    @abstractmethod
    def levels(self) -> Tensor:
        """Ascending, shape `[2^bits]`."""

    def _fit(self, matrix: Tensor) -> Tensor:
        parts, there = self._grouped(matrix)
        levels = self.levels().to(parts)
        most = parts.abs().amax(-1, keepdim=True) / levels[-1]
        most = most.clamp_min(_LEAST_SCALE)
        best = torch.full_like(most, torch.inf)
        chosen = most
        for clip in _CLIPS.tolist():
            scale = most * clip
            missed = (parts - scale * levels[self._index(parts / scale)]).square()
            error = (missed * there).sum(-1, keepdim=True)
            chosen = torch.where(error < best, scale, chosen)
            best = torch.minimum(error, best)
        return chosen.squeeze(-1)

    def _index(self, values: Tensor) -> Tensor:
        levels = self.levels().to(values)
        return torch.bucketize(values.contiguous(), (levels[1:] + levels[:-1]) / 2)

    def round(self, values: Tensor) -> Tensor:
        return pack_bits(self._index(values).unflatten(1, (-1, BYTE)), self.bits)


class Uniform(Levels):
    """Evenly spaced levels around zero."""

    name = "uniform"

    def levels(self) -> Tensor:
        return uniform_levels(self.bits)


class NormalFloat(Levels):
    """Levels at equally probable places of a Gaussian (QLoRA's NormalFloat)."""

    name = "nf"

    def levels(self) -> Tensor:
        return normal_float_levels(self.bits)


class Given(Levels):
    """Levels that its name spells out: those of a codebook of one's own, where its codes are stored."""

    known_bits = range(1, 9)

    def __init__(self, bits: int, group: int = 0, by_row: bool = False, *, name: str) -> None:
        self.name = name
        super().__init__(bits, group, by_row)

    def levels(self) -> Tensor:
        return given_levels(self.name, self.bits)


class OwnLevels(Levels):
    """What a scalar codebook of one's own derives from: say `known_bits` and `levels`, and it is stored with codes.

    Its class is named `FILE.py:Class`, or by an entry point of `rankwise.codebooks`; in settings and plans the version
    of its code stands behind an `@`. A checkpoint holds the levels, and neither the name nor the class.
    """

    @property
    def stored_name(self) -> str:
        """The levels, spelled out.

        Raises:
            RecipeError: when they are not 2^bits ascending finite numbers, the last of them positive.
        """
        levels = self.levels().detach().to("cpu", torch.float32)
        rising = levels.shape == (2**self.bits,) and bool((levels[1:] > levels[:-1]).all())
        if not rising or not levels.isfinite().all() or levels[-1] <= 0:
            raise RecipeError(
                f"levels() of {self.bits} bits gives no {2**self.bits} ascending finite numbers, the last above zero.",
                where=self.name,
                remedy=f"return a float tensor of shape [{2**self.bits}]",
            )
        return GIVEN + ",".join(f"{level:.9g}" for level in levels.tolist())


CODEBOOKS: dict[str, type[Codebook]] = {"e8p": E8P, "uniform": Uniform, "nf": NormalFloat}

PLUGINS = Plugins("codebook", OwnLevels, "derive it from rankwise.quantizers.OwnLevels")

_VERSION = "@"
"""Between the name of a codebook of one's own and what says the version of its code."""


def _without_version(name: str) -> tuple[str, str]:
    """A name, and the version behind it; a path may hold the sign between them."""
    inside = name.rindex(".py:") if in_file(name) else 0
    plain, _, version = name[inside:].partition(_VERSION)
    return name[:inside] + plain, version


def is_codebook(name: str) -> bool:
    """Whether a name is one of a codebook, of this package or of one's own; no file is opened."""
    return name in CODEBOOKS or PLUGINS.has(_without_version(name)[0])


def codebook_class(name: str) -> type[Codebook]:
    """The class of a codebook.

    Args:
        name: of this package's, or `FILE.py:Class` or that of an entry point, with or without its version.

    Raises:
        RecipeError: when there is none, it is no whole class, or its code is of another version.
    """
    if name in CODEBOOKS:
        return CODEBOOKS[name]
    plain, version = _without_version(name)
    if not PLUGINS.has(plain):
        raise RecipeError(f"There is no codebook {name!r}.", where="method", remedy=nearest(name, CODEBOOKS))
    found, code = PLUGINS.found(plain)
    if version not in ("", code):
        raise RecipeError(
            "The code of the codebook has changed since this was written.",
            where=name,
            remedy=f"write {plain} for the codebook as it is now",
        )
    return type(found.__name__, (found,), {"name": f"{plain}{_VERSION}{code}"})


def full_codebook_name(name: str) -> str:
    """The name of a codebook with the version of its code where it is one's own, whose levels are looked at.

    Raises:
        RecipeError: as `codebook_class` does, and when its bits or levels are none.
    """
    kind = codebook_class(name)
    if name in CODEBOOKS:
        return name
    known = kind.known_bits
    if not isinstance(known, range | tuple) or not known or sorted(set(known) & set(range(1, 9))) != list(known):
        raise RecipeError(
            f"known_bits is {known!r}, no ascending whole numbers from 1 to 8.",
            where=kind.name,
            remedy="write known_bits = range(2, 5) for 2 to 4 bits",
        )
    for bits in known:
        try:
            kind(bits).stored_name  # noqa: B018
        except RecipeError:
            raise
        except Exception as problem:
            raise RecipeError(
                f"levels() of {bits} bits fails ({type(problem).__name__}: {one_line(problem)[:200]}).",
                where=kind.name,
                remedy=f"return a float tensor of shape [{2**bits}]",
            ) from None
    return kind.name


def stored_codebook(name: str, bits: int) -> str:
    """What a codebook of so many bits is called where codes are stored.

    Raises:
        RecipeError: as `codebook_named` does.
    """
    return name if name in CODEBOOKS else codebook_named(name, bits).stored_name


def others_with(bits: int, name: str) -> str:
    """A hint which other codebooks know this many bits; empty for none."""
    found = [each for each, kind in CODEBOOKS.items() if each != name and bits in kind.known_bits]
    return f"; {' and '.join(found)} know {bits}" if found else ""


def codebook_named(name: str, bits: int, group: int = 0, by_row: bool = False) -> Codebook:
    """A codebook of so many bits a weight.

    Args:
        name: as in settings, or as codes are stored with.
        bits: a weight.
        group: see `Codebook`.
        by_row: see `Codebook`.

    Raises:
        RecipeError: when there is no such codebook, or it has no such number of bits.
    """
    if name.startswith(GIVEN):
        return Given(bits, group, by_row, name=name)
    return codebook_class(name)(bits, group, by_row)
