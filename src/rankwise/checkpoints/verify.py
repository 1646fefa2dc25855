"""Check a checkpoint directory before any library opens it: damaged files get an error that names them."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

from rankwise import reading
from rankwise.errors import ModelError
from rankwise.layers.narrow import LLAMA_FORM, adapters_of
from rankwise.reading import UnreadableError, shown

_INDEX = "model.safetensors.index.json"

_MOST_LAYERS = 100_000
_LARGEST = 1 << 48
_LONGEST = 200
"""Characters that the path of a block has at most."""
_MOST_AXES = 16

_WIDTHS = {
    4: ("F4",),
    6: ("F6_E2M3", "F6_E3M2"),
    8: ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    16: ("U16", "I16", "F16", "BF16"),
    32: ("U32", "I32", "F32"),
    64: ("U64", "I64", "F64", "C64"),
}
_BITS = {name: bits for bits, names in _WIDTHS.items() for name in names}
"""Bits of a number, by the name that safetensors gives its type."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint.

    Raises:
        ModelError: when the file is missing or not a JSON object.
    """
    if not path.exists():
        raise ModelError("A file of the model is missing.", where=str(path), remedy="fetch the model again")
    try:
        content = reading.read_bytes(path)
    except UnreadableError as problem:
        raise ModelError(
            "A file of the model cannot be read.", where=str(path), remedy=f"check its permissions: {problem}"
        ) from None
    try:
        value = reading.parse_json(content)
    except UnreadableError as problem:
        raise ModelError("A file of the model is not JSON.", where=str(path), remedy=str(problem)) from None
    if not isinstance(value, dict):
        raise ModelError("A file of the model holds no JSON object.", where=str(path), remedy="fetch the model again")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config, of the form that loading relies on.

    Raises:
        ModelError: naming the first key that is not of its form.
    """
    path = folder / "config.json"
    values = read_json(path)

    def wrong(key: str, form: str) -> ModelError:
        return ModelError(
            f"The config's {key!r} is no {form}: {shown(values[key])}.",
            where=str(path),
            remedy="fetch the model's config.json again",
        )

    if not isinstance(values.get("model_type", ""), str):
        raise wrong("model_type", "text")
    if not _is_texts(values.get("architectures") or []):
        raise wrong("architectures", "list of names")
    names = values.get("auto_map") or {}
    if not (isinstance(names, dict) and all(_is_class(each) for each in names.values())):
        raise wrong("auto_map", "mapping of names to classes (FILE.CLASS)")
    if isinstance(values.get("rankwise"), dict):
        _check_own(values["rankwise"], path)
    _check_counts(values, path)
    return values


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_class(value: Any) -> bool:
    """Whether an entry of `auto_map` names a class in a file, or (for tokenizers) a slow and a fast one."""
    if isinstance(value, list):
        return all(each is None or _is_class(each) for each in value) and bool(value)
    if not isinstance(value, str):
        return False
    file, dot, name = value.rpartition("--")[2].rpartition(".")
    return bool(dot) and name.isidentifier() and all(part.isidentifier() for part in file.split("."))


def _check_own(entry: dict[str, Any], path: Path) -> None:
    """Raise unless what rankwise wrote into a config is of its form."""
    layers = entry.get("layers", {})
    shapes = [each.get("shape") for each in layers.values() if isinstance(each, dict)] if _is_mapping(layers) else []
    whole = all(
        isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < _LARGEST for n in shape)
        for shape in shapes
    )
    if not _is_mapping(layers) or len(shapes) < len(layers) or not whole:
        raise ModelError(
            "The config's rankwise entry does not say the shape of each layer.",
            where=str(path),
            remedy="fetch the model's config.json again",
        )
    for what, key in (("experts", "experts"), ("grouped layers", "grouped")):
        named = entry.get(key, [])
        if not isinstance(named, list) or not all(isinstance(each, str) for each in named):
            raise ModelError(
                f"The config's rankwise entry does not say by name which {what} are taken apart.",
                where=str(path),
                remedy="fetch the model's config.json again",
            )
    if not _are_blocks(entry.get("blocks", {})):
        raise ModelError(
            "The config's rankwise entry does not say of blocks which sizes they have.",
            where=str(path),
            remedy="fetch the model's config.json again",
        )
    if not _is_stream(entry.get("stream", {})):
        raise ModelError(
            "The config's rankwise entry does not say how the residual stream was cut.",
            where=str(path),
            remedy="fetch the model's config.json again",
        )
    for key in ("base_model_type", "base_architecture"):
        if not isinstance(entry.get(key, ""), str):
            raise ModelError(
                f"The config's rankwise entry has no text under {key!r}.",
                where=str(path),
                remedy="fetch the model's config.json again",
            )
    if type(entry.get("format", 1)) is not int:
        raise ModelError(
            f"The config's rankwise entry is of format {shown(entry['format'])}, which is no number.",
            where=str(path),
            remedy="use the version of rankwise that wrote it",
        )


def _are_blocks(value: Any) -> bool:
    """Whether a value says of blocks, by path, how many there are of something, as `resize_blocks` takes it."""
    if not isinstance(value, dict) or not all(isinstance(sizes, dict) for sizes in value.values()):
        return False
    counts = [count for sizes in value.values() for count in sizes.values()]
    # A block is the one of some number in a list.
    numbered = all(path.rpartition(".")[2].isdecimal() and len(path) < _LONGEST for path in value)
    return numbered and all(type(count) is int and 0 < count < _LARGEST for count in counts)


def _is_stream(value: Any) -> bool:
    """Whether a value is nothing, or says of a stream what `narrow_stream` builds from."""
    if value == {}:
        return True
    try:
        shapes = [pair for block in value["adapters"] for pair in block]
        counts = [value["width"], value["kept"], *(n for pair in shapes for n in pair)]
        form = value.get("form", LLAMA_FORM)
        return (
            _is_form(form)
            and all(type(n) is int and 0 < n < _LARGEST for n in counts)
            and all(len(block) == len(adapters_of(form)) for block in value["adapters"])
            and all(len(pair) == 2 for pair in shapes)
            and bool(shapes)
            and type(value["eps"]) is float
            and isinstance(value["blocks"], str)
            and len(value["readers"]) == len(value["writers"]) == 2
            and all(_is_texts(paths) for paths in (*value["readers"], value["writers"]))
        )
    except (KeyError, TypeError):
        return False


def _is_form(value: Any) -> bool:
    """Whether a value says all that `LLAMA_FORM` says, of whatever blocks."""
    if not isinstance(value, dict) or value.keys() != LLAMA_FORM.keys():
        return False
    alike = all(type(value[key]) is type(known) for key, known in LLAMA_FORM.items())
    texts = all(_is_texts(each) for each in value.values() if isinstance(each, list))
    return alike and texts and len(value["norms"]) in (1, 2) and bool(value["attention"]) and bool(value["mlp"])


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _check_counts(values: Any, path: Path) -> None:
    """Raise when a number in a config is larger than any model's: it would be taken as a size of memory or of time."""
    waiting = [("", values)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(value.items())
        elif isinstance(value, list):
            waiting.extend((name, each) for each in value)
        elif isinstance(value, int | float):
            most = _MOST_LAYERS if "layers" in name or name == "n_layer" else _LARGEST
            # What stands for "no limit" is as large as a float can say.
            if abs(value) > most and not ("length" in name or "position" in name or isinstance(value, float)):
                raise ModelError(
                    f"The config's {name!r} is {shown(value)}, more than any model has.",
                    where=str(path),
                    remedy="fetch the model's config.json again",
                )


def _damaged(path: Path, why: str = "its size does not fit its header") -> ModelError:
    return ModelError("A weight file is truncated or damaged.", where=str(path), remedy=f"fetch this file again; {why}")


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """What a safetensors file's header says of each tensor: `dtype`, `shape` and `data_offsets`.

    Raises:
        ModelError: when the file is missing or cannot be read, or its header does not describe it from end to end.
    """
    if not path.exists():
        raise ModelError("A weight file is missing.", where=str(path), remedy="fetch the missing shard")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if length > size - 8:
                raise _damaged(path)
            header = reading.parse_json(file.read(length))
    except OSError as problem:
        raise ModelError(
            f"A weight file cannot be read ({problem.strerror}).", where=str(path), remedy="check its permissions"
        ) from None
    except UnreadableError as problem:
        raise _damaged(path, f"its header is not JSON ({problem})") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    notes = header.pop("__metadata__", {})
    if not (isinstance(notes, dict) and all(isinstance(each, str) for each in notes.values())):
        raise _damaged(path, "its notes are not text")
    end = 0
    for name, entry in sorted(header.items(), key=_offset):
        if not _describes(entry):
            raise _damaged(path, f"its header does not describe tensor {shown(name)}")
        start, stop = entry["data_offsets"]
        if start != end or 8 * (stop - start) != math.prod(entry["shape"]) * _BITS[entry["dtype"]]:
            raise _damaged(path, f"tensor {shown(name)} does not lie where the header says")
        end = stop
    if 8 + length + end != size:
        raise _damaged(path)
    return header


def _offset(item: tuple[str, Any]) -> tuple[int, int]:
    return tuple(item[1]["data_offsets"]) if _describes(item[1]) else (-1, -1)


def _describes(entry: Any) -> bool:
    """Whether an entry of a header has a known type, a shape and two offsets."""
    if not isinstance(entry, dict) or entry.get("dtype") not in list(_BITS):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(shape) <= _MOST_AXES and len(offsets) == 2):
        return False
    return all(type(n) is int and 0 <= n < _LARGEST for n in (*shape, *offsets)) and offsets[0] <= offsets[1]


def tensor_names(path: Path) -> set[str]:
    """Names in a safetensors file that its header describes from end to end; errors as for `read_header`."""
    return set(read_header(path))


def read_index(path: Path) -> dict[str, str]:
    """Which file holds each tensor, from the index of a checkpoint in shards.

    Raises:
        ModelError: when the index cannot be read, or places a tensor anywhere but in a file beside it.
    """
    placed = read_json(path).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ModelError("The index places no tensor.", where=str(path), remedy="fetch the index again")
    for tensor, file in placed.items():
        if not isinstance(file, str) or not file or Path(file).name != file or "\0" in file or len(file.encode()) > 255:
            raise ModelError(
                f"The index places tensor {shown(tensor)} in {shown(file)}, which is no file beside it.",
                where=str(path),
                remedy="fetch the index again",
            )
    return placed


def verify_checkpoint(folder: Path) -> None:
    """Check that every weight file is there and whole, and that the index agrees with the files.

    Raises:
        ModelError: naming the file, and the first tensor that is missing.
    """
    if not folder.is_dir():
        raise ModelError("There is no such model directory.", where=str(folder), remedy="check the path")
    read_config(folder)
    if (folder / _INDEX).exists():
        weight_map = read_index(folder / _INDEX)
        by_file: dict[str, set[str]] = {}
        for tensor, name in weight_map.items():
            by_file.setdefault(name, set()).add(tensor)
        for name, expected in sorted(by_file.items()):
            absent = expected - tensor_names(folder / name)
            if absent:
                raise ModelError(
                    f"A weight file lacks tensor {min(absent)!r}, which the index places there.",
                    where=str(folder / name),
                    remedy="fetch this file again",
                )
        return
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        tensor_names(file)
    if not files and not list(folder.glob("*.bin")):
        raise ModelError("The directory holds no weights.", where=str(folder), remedy="expected model.safetensors")
