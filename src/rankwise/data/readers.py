"""How a source of each kind is written, and its reader: from what the source names to documents or token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from rankwise.data import alpaca, python_text
from rankwise.data.columns import parquet_column
from rankwise.data.lines import cannot_read, existing, json_lines, known_keys
from rankwise.data.named import named_document
from rankwise.errors import DataError, MissingPackageError
from rankwise.reading import UnreadableError, decoded, one_line

FORMS = {
    "text": "text:PATH",
    "jsonl": "jsonl:PATH#field",
    "parquet": "parquet:PATH#field",
    "alpaca": "alpaca:PATH.jsonl",
    "tokens": "tokens:PATH.safetensors",
    "hub": "hub:NAME[/config][:split]#field",
    "named": "named:wikitext2, named:ptb or named:c4",
    "bundled": "bundled[:train|:heldout]",
}


def _text(target: str, _field: str | None) -> Iterator[str]:
    try:
        yield decoded(existing(target).read_bytes())
    except OSError as problem:
        raise cannot_read(target, problem) from None
    except UnreadableError as problem:
        raise DataError(f"The file cannot be read: {problem}.", where=target, remedy="convert it to UTF-8") from None


def _jsonl(target: str, field: str | None) -> Iterator[str]:
    for where, row in json_lines(target):
        text = row.get(str(field))
        if not isinstance(text, str):
            raise DataError(
                f"A line has no text field {field!r}.", where=where, remedy=f"this line has: {known_keys(row)}"
            )
        yield text


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
            if not isinstance(row.get(field), str):
                raise DataError(
                    f"The data set has no text field {field!r}.", where=where, remedy=f"its fields: {known_keys(row)}"
                )
            yield row[field]
    except DataError:
        raise
    except Exception as problem:
        local = ", ".join(form for kind, form in FORMS.items() if kind != "hub")
        reason = f"{type(problem).__name__}: {one_line(problem)}"
        raise DataError(
            f"The data set cannot be read from the hub ({reason}).",
            where=where,
            remedy=f"without a network use a local form: {local}",
        ) from None


def _named(target: str, _field: str | None) -> Iterator[str]:
    return named_document(target)


def _bundled(target: str, _field: str | None) -> Iterator[str]:
    return iter(python_text.documents(target))


DOCUMENTS: dict[str, Callable[[str, str | None], Iterator[str]]] = {
    "text": _text,
    "jsonl": _jsonl,
    "parquet": parquet_column,
    "alpaca": _alpaca,
    "hub": _hub,
    "named": _named,
    "bundled": _bundled,
}
"""Readers of documents by kind; each takes a source's target and field."""


_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32)


def read_token_ids(target: str) -> Tensor:
    """Ids in a safetensors file, as `Source.token_ids` gives them."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(existing(target))
    except OSError as problem:
        raise cannot_read(target, problem) from None
    # Types that torch has no values of are a KeyError, and shapes too large others.
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OverflowError) as problem:
        raise DataError(
            "The token file is damaged or not safetensors.", where=target, remedy=one_line(problem)
        ) from None
    if len(tensors) != 1:
        named = known_keys(dict.fromkeys(tensors))
        raise DataError(
            f"The token file holds {len(tensors)} tensors ({named}).",
            where=target,
            remedy="keep one tensor of token ids in the file",
        )
    (ids,) = tensors.values()
    if ids.dtype not in _WHOLE or ids.ndim not in (1, 2):
        raise DataError(
            f"The token file holds {ids.dtype} of shape {list(ids.shape)}.",
            where=target,
            remedy="store integer ids of shape [sequences, tokens] or [tokens]",
        )
    return ids.to(torch.int64)
