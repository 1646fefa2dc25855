"""Check a checkpoint directory before any library opens it: damaged files get an error that names them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from rankwise.errors import ModelError

_INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict:
    """A JSON object from a file of the checkpoint.

    Raises:
        ModelError: when the file is missing or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ModelError("A file of the model is missing.", where=str(path), remedy="fetch the model again") from None
    except ValueError as problem:
        raise ModelError("A file of the model is not JSON.", where=str(path), remedy=str(problem)) from None
    if not isinstance(value, dict):
        raise ModelError("A file of the model holds no JSON object.", where=str(path), remedy="fetch the model again")
    return value


def tensor_names(path: Path) -> set[str]:
    """Names in a safetensors file whose size agrees with its header.

    Raises:
        ModelError: when the file is missing, truncated or not safetensors.
    """
    damaged = ModelError(
        "A weight file is truncated or damaged.",
        where=str(path),
        remedy="fetch this file again; its size does not fit its header",
    )
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            if len(head) < 8:
                raise damaged
            (length,) = struct.unpack("<Q", head)
            if length > size - 8:
                raise damaged
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise ModelError("A weight file is missing.", where=str(path), remedy="fetch the missing shard") from None
    except (ValueError, UnicodeDecodeError):
        raise damaged from None
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise damaged
    return set(header)


def verify_checkpoint(folder: Path) -> None:
    """Check that every weight file is there and whole, and that the index agrees with the files.

    Raises:
        ModelError: naming the file, and the first tensor that is missing.
    """
    if not folder.is_dir():
        raise ModelError("There is no such model directory.", where=str(folder), remedy="check the path")
    read_json(folder / "config.json")
    if (folder / _INDEX).exists():
        weight_map = read_json(folder / _INDEX).get("weight_map", {})
        for name in sorted(set(weight_map.values())):
            expected = {tensor for tensor, file in weight_map.items() if file == name}
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
