"""Read GGUF, the file format of llama.cpp, as far as `make_real_model.py` needs it.

Little-endian throughout: the four letters GGUF, a version, the number of tensors, the number of settings, the settings
(key, kind, value), an entry for each tensor (name, dimensions, type, offset), zeros up to the alignment, and the bytes
of the tensors. An entry gives its dimensions with the fastest first, so a matrix [m, n] is written as n, m.

Rounded weights come in blocks of 32 neighbours in a row:

    Q4_1    scale, minimum (half precision), 16 bytes   weight = scale * code + minimum; byte i has the code of weight i
                                                        in its low four bits, and of weight i + 16 in its high four
    Q8_0    scale (half precision), 32 signed bytes     weight = scale * code
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rankwise.errors import ModelError

MAGIC = b"GGUF"
VERSION = 3
_WHOLE_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 10: "<u8", 11: "<i8"}
_NUMBERS = {**_WHOLE_NUMBERS, 6: "<f4", 7: "?", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32

T = TypeVar("T")
Floats = NDArray[np.float32]


def _plain(blocks: NDArray[Any]) -> Floats:
    return blocks["weight"]


def _q4_1(blocks: NDArray[Any]) -> Floats:
    codes = np.concatenate([blocks["codes"] & 15, blocks["codes"] >> 4], axis=1).astype(np.float32)
    return codes * blocks["scale"].astype(np.float32) + blocks["minimum"].astype(np.float32)


def _q8_0(blocks: NDArray[Any]) -> Floats:
    return blocks["codes"].astype(np.float32) * blocks["scale"].astype(np.float32)


@dataclass(frozen=True)
class Format:
    """How the weights of a tensor are stored.

    Attributes:
        name: what llama.cpp calls it.
        length: weights a block.
        block: the fields of a block.
        decode: blocks `[count]` -> weights `[count, length]`.
    """

    name: str
    length: int
    block: np.dtype[Any]
    decode: Callable[[NDArray[Any]], Floats]


_HALF = ("<f2", (1,))
FORMATS = {
    0: Format("F32", 1, np.dtype([("weight", "<f4", (1,))]), _plain),
    3: Format("Q4_1", 32, np.dtype([("scale", *_HALF), ("minimum", *_HALF), ("codes", "u1", (16,))]), _q4_1),
    8: Format("Q8_0", 32, np.dtype([("scale", *_HALF), ("codes", "i1", (32,))]), _q8_0),
}


def _broken(problem: str, where: str) -> ModelError:
    return ModelError(problem, where=where, remedy="get the file again; the wheel may be damaged")


class _Cursor:
    """Takes values off the front of a file; never reads past its end."""

    def __init__(self, content: bytes, where: str) -> None:
        self.content, self.where, self.at = content, where, 0

    def take(self, size: int) -> bytes:
        if size > len(self.content) - self.at:
            problem = f"The GGUF file is cut off: it has {len(self.content):,} bytes, and goes on after them."
            raise _broken(problem, self.where)
        self.at += size
        return self.content[self.at - size : self.at]

    def whole_number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def string(self) -> str:
        taken = self.take(self.whole_number(8))
        try:
            return taken.decode()
        except UnicodeDecodeError as problem:
            raise _broken("The GGUF file has a string that is not UTF-8.", self.where) from problem

    def numbers(self, kind: int, count: int) -> list[Any]:
        if kind not in _NUMBERS:
            raise _broken(f"The GGUF file has a setting of kind {kind}, which is unknown.", self.where)
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()

    def value(self) -> Any:
        kind = self.whole_number(4)
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.numbers(kind, 1)[0]
        kind, count = self.whole_number(4), self.whole_number(8)
        return [self.string() for _ in range(count)] if kind == _STRING else self.numbers(kind, count)


@dataclass(frozen=True)
class Entry:
    """Where the weights of a tensor are.

    Attributes:
        shape: rows first, as numpy has it.
        format: how they are stored.
        start: their first byte in the file.
    """

    shape: tuple[int, ...]
    format: Format
    start: int

    @property
    def blocks(self) -> int:
        return math.prod(self.shape) // self.format.length


@dataclass(frozen=True)
class Gguf:
    """A file that has been checked: every tensor is whole and of a known type.

    Attributes:
        where: its name, for messages.
        content: all its bytes.
        settings: values by key.
        entries: tensors by name.
    """

    where: str
    content: bytes
    settings: dict[str, Any]
    entries: dict[str, Entry]

    def setting(self, key: str, kind: type[T]) -> T:
        """The value of a setting.

        Raises:
            ModelError: when the file lacks it or it is of another kind.
        """
        value = self.settings.get(key)
        if not isinstance(value, kind):
            raise _broken(f"The GGUF file has no setting {key} of the kind {kind.__name__}.", self.where)
        return value

    def tensor(self, name: str) -> Floats:
        """The weights of a tensor, in the shape of its entry."""
        entry = self.entries[name]
        blocks = np.frombuffer(self.content, entry.format.block, entry.blocks, entry.start)
        return entry.format.decode(blocks).reshape(entry.shape)


def parse(content: bytes, where: str) -> Gguf:
    """Read everything but the weights, and check that these are all there.

    Args:
        content: the file.
        where: its name, for messages.

    Raises:
        ModelError: when it is not GGUF, cut off, or holds a type of tensor that is not in `FORMATS`.
    """
    cursor = _Cursor(content, where)
    if content[: len(MAGIC)] != MAGIC:
        raise _broken("This is not a GGUF file: its first letters are not GGUF.", where)
    cursor.take(len(MAGIC))
    version = cursor.whole_number(4)
    if version != VERSION:
        raise _broken(f"The GGUF file is of version {version}; version {VERSION} is what we read.", where)
    tensors, count = cursor.whole_number(8), cursor.whole_number(8)
    settings = {cursor.string(): cursor.value() for _ in range(count)}
    heads = [_head(cursor) for _ in range(tensors)]
    alignment = settings.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise _broken(f"The GGUF file has {alignment!r} for its alignment.", where)
    first = -(-cursor.at // alignment) * alignment
    entries = {name: Entry(shape, form, first + offset) for name, shape, form, offset in heads}
    for entry in entries.values():
        cursor.at = entry.start
        cursor.take(entry.blocks * entry.format.block.itemsize)
    return Gguf(where, content, settings, entries)


def _head(cursor: _Cursor) -> tuple[str, tuple[int, ...], Format, int]:
    """Name, shape, format and offset of the next tensor."""
    name = cursor.string()
    shape = tuple(cursor.whole_number(8) for _ in range(cursor.whole_number(4)))[::-1]
    kind, offset = cursor.whole_number(4), cursor.whole_number(8)
    if kind not in FORMATS:
        known = ", ".join(f"{number} ({form.name})" for number, form in FORMATS.items())
        raise _broken(f"Tensor {name} is of type {kind}; the types we read are {known}.", cursor.where)
    if not shape or shape[-1] % FORMATS[kind].length:
        problem = f"Tensor {name} of shape {list(shape)} does not divide into blocks of {FORMATS[kind].length}."
        raise _broken(problem, cursor.where)
    return name, shape, FORMATS[kind], offset
