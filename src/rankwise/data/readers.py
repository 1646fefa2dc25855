"""How a source of each kind is written, and its reader: from what the source names to documents or token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from rankwise.data import alpaca, python_text
from rankwise.errors import DataError, MissingPackageError

FORMS = {
    "text": "text:PATH",
    "jsonl": "jsonl:PATH#field",
    "parquet": "parquet:PATH#field",
    "alpaca": "alpaca:PATH.jsonl",
    "tokens": "tokens:PATH.safetensors",
    "hub": "hub:NAME[/config][:split]#field",
    "bundled": "bundled[:train|:heldout]",
}


def _existing(target: str) -> Path:
    path = Path(target)
    if not path.is_file():
        raise DataError("There is no such file.", where=target, remedy="check the path given for the data")
    return path


def _text(target: str, _field: str | None) -> Iterator[str]:
    try:
        yield _existing(target).read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise DataError(
            f"The file is not UTF-8 text (byte {problem.start}).", where=target, remedy="convert it to UTF-8"
        ) from None


def _jsonl(target: str, field: str | None) -> Iterator[str]:
    with _existing(target).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as problem:
                raise DataError("A line is not JSON.", where=f"{target}, line {number}", remedy=str(problem)) from None
            text = row.get(field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                known = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
                raise DataError(
                    f"A line has no text field {field!r}.",
                    where=f"{target}, line {number}",
                    remedy=f"this line has: {known}",
                )
            yield text


def _parquet(target: str, field: str | None) -> Iterator[str]:
    path = _existing(target)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingPackageError("Reading parquet needs pyarrow.", remedy="pip install 'rankwise[data]'") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as problem:
        raise DataError("The file is not parquet.", where=target, remedy=str(problem)) from None
    if field not in table.schema_arrow.names:
        raise DataError(
            f"The file has no column {field!r}.",
            where=target,
            remedy=f"its columns: {', '.join(table.schema_arrow.names)}",
        )
    for batch in table.iter_batches(columns=[field]):
        yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _alpaca(target: str, _field: str | None) -> Iterator[str]:
    for record in alpaca.read_instructions(Path(target)):
        yield alpaca.prompt_of(record) + record["output"]


def _hub(target: str, field: str | None) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise MissingPackageError(
            "Reading from the hub needs datasets.", remedy="pip install 'rankwise[data]'"
        ) from None
    where = f"hub:{target}#{field}"
    name, _, split = target.partition(":")
    parts = name.split("/")
    config = parts.pop() if len(parts) == 3 else None
    try:
        rows = datasets.load_dataset("/".join(parts), config, split=split or "train", streaming=True)
        for row in rows:
            yield row[field]
    except KeyError:
        raise DataError(
            f"The data set has no field {field!r}.", where=where, remedy=f"its fields: {', '.join(row)}"
        ) from None
    except Exception as problem:
        local = ", ".join(form for kind, form in FORMS.items() if kind != "hub")
        reason = f"{type(problem).__name__}: {str(problem).splitlines()[0][:200]}"
        raise DataError(
            f"The data set cannot be read from the hub ({reason}).",
            where=where,
            remedy=f"without a network use a local form: {local}",
        ) from None


def _bundled(target: str, _field: str | None) -> Iterator[str]:
    return python_text.documents(target)


DOCUMENTS: dict[str, Callable[[str, str | None], Iterator[str]]] = {
    "text": _text,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "alpaca": _alpaca,
    "hub": _hub,
    "bundled": _bundled,
}
"""Readers of documents by kind; each takes a source's target and field."""


def read_token_ids(target: str) -> Tensor:
    """Ids in a safetensors file, as `Source.token_ids` gives them."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(_existing(target))
    except SafetensorError as problem:
        raise DataError("The token file is damaged or not safetensors.", where=target, remedy=str(problem)) from None
    if len(tensors) != 1:
        raise DataError(
            f"The token file holds {len(tensors)} tensors ({', '.join(sorted(tensors)[:5])}).",
            where=target,
            remedy="keep one tensor of token ids in the file",
        )
    (ids,) = tensors.values()
    if ids.is_floating_point() or ids.ndim not in (1, 2):
        raise DataError(
            f"The token file holds {ids.dtype} of shape {list(ids.shape)}.",
            where=target,
            remedy="store integer ids of shape [sequences, tokens] or [tokens]",
        )
    return ids.to(torch.int64)
