"""The grammar of text sources, one everywhere.

text:PATH                              a text file, one document
jsonl:PATH#field                       one document a line
parquet:PATH#field                     one document a row
alpaca:PATH.jsonl                      instructions in Alpaca's form; each with its output is one document
tokens:PATH.safetensors                token ids, ready made: one tensor [sequences, tokens] or [tokens]
hub:NAME[/config][:split]#field        a data set on the Hugging Face hub
bundled[:train|:heldout]               text that every CPython carries
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rankwise.data import python_text
from rankwise.errors import DataError, MissingPackageError, nearest

FORMS = {
    "text": "text:PATH",
    "jsonl": "jsonl:PATH#field",
    "parquet": "parquet:PATH#field",
    "alpaca": "alpaca:PATH.jsonl",
    "tokens": "tokens:PATH.safetensors",
    "hub": "hub:NAME[/config][:split]#field",
    "bundled": "bundled[:train|:heldout]",
}


@dataclass(frozen=True)
class Source:
    """A parsed source.

    Attributes:
        kind: one of the keys of `FORMS`.
        target: path, hub name, or split of the bundled text.
        field: the field that holds the text, for kinds with fields.
    """

    kind: str
    target: str
    field: str | None = None

    def __str__(self) -> str:
        return f"{self.kind}:{self.target}" + (f"#{self.field}" if self.field else "")

    def documents(self) -> Iterator[str]:
        """The documents, in order.

        Raises:
            DataError: when the source cannot be read; names the first bad line or the field that is missing.
        """
        if self.kind == "tokens":
            raise ValueError("a tokens: source has no documents")
        readers = {
            "text": _text,
            "jsonl": _jsonl,
            "parquet": _parquet,
            "alpaca": _alpaca,
            "hub": _hub,
            "bundled": _bundled,
        }
        return readers[self.kind](self)

    def token_ids(self) -> Tensor:
        """Ids of a `tokens:` source, shape `[sequences, tokens]` or `[tokens]`.

        Raises:
            DataError: when the file is no safetensors file with one integer tensor.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(_existing(self))
        except SafetensorError as problem:
            raise DataError(
                "The token file is damaged or not safetensors.", where=self.target, remedy=str(problem)
            ) from None
        if len(tensors) != 1:
            raise DataError(
                f"The token file holds {len(tensors)} tensors ({', '.join(sorted(tensors)[:5])}).",
                where=self.target,
                remedy="keep one tensor of token ids in the file",
            )
        (ids,) = tensors.values()
        if ids.is_floating_point() or ids.ndim not in (1, 2):
            raise DataError(
                f"The token file holds {ids.dtype} of shape {list(ids.shape)}.",
                where=self.target,
                remedy="store integer ids of shape [sequences, tokens] or [tokens]",
            )
        return ids.to(torch.int64)


def parse_source(text: str) -> Source:
    """Read a source such as `jsonl:data.jsonl#text`.

    Raises:
        DataError: when it does not follow the grammar.
    """
    kind, _, rest = text.partition(":")
    if kind not in FORMS:
        remedy = f"write it as text:{text}" if Path(text).exists() else nearest(kind, FORMS)
        raise DataError(f"There is no source of kind {kind!r}.", where=text, remedy=remedy)
    if kind == "bundled":
        split = rest or "train"
        if split not in python_text.SPLITS:
            raise DataError(
                f"The bundled text has no split {split!r}.", where=text, remedy=nearest(split, python_text.SPLITS)
            )
        return Source(kind, split)
    target, field = rest, None
    if kind in ("jsonl", "parquet", "hub"):
        target, mark, field = rest.rpartition("#")
        if not mark or not field:
            raise DataError(
                "The source does not say which field holds the text.", where=text, remedy=f"write {FORMS[kind]}"
            )
    if not target:
        raise DataError("The source names nothing.", where=text, remedy=f"write {FORMS[kind]}")
    return Source(kind, target, field)


def _existing(source: Source) -> Path:
    path = Path(source.target)
    if not path.is_file():
        raise DataError("There is no such file.", where=source.target, remedy="check the path given for the data")
    return path


def _text(source: Source) -> Iterator[str]:
    try:
        yield _existing(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise DataError(
            f"The file is not UTF-8 text (byte {problem.start}).", where=source.target, remedy="convert it to UTF-8"
        ) from None


def _jsonl(source: Source) -> Iterator[str]:
    with _existing(source).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as problem:
                raise DataError(
                    "A line is not JSON.", where=f"{source.target}, line {number}", remedy=str(problem)
                ) from None
            text = row.get(source.field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                known = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
                raise DataError(
                    f"A line has no text field {source.field!r}.",
                    where=f"{source.target}, line {number}",
                    remedy=f"this line has: {known}",
                )
            yield text


def _parquet(source: Source) -> Iterator[str]:
    path = _existing(source)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingPackageError("Reading parquet needs pyarrow.", remedy="pip install 'rankwise[data]'") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as problem:
        raise DataError("The file is not parquet.", where=source.target, remedy=str(problem)) from None
    if source.field not in table.schema_arrow.names:
        raise DataError(
            f"The file has no column {source.field!r}.",
            where=source.target,
            remedy=f"its columns: {', '.join(table.schema_arrow.names)}",
        )
    for batch in table.iter_batches(columns=[source.field]):
        yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _alpaca(source: Source) -> Iterator[str]:
    from rankwise.data.instructions import prompt_of, read_instructions

    for record in read_instructions(Path(source.target)):
        yield prompt_of(record) + record["output"]


def _hub(source: Source) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise MissingPackageError(
            "Reading from the hub needs datasets.", remedy="pip install 'rankwise[data]'"
        ) from None
    name, _, split = source.target.partition(":")
    parts = name.split("/")
    config = parts.pop() if len(parts) == 3 else None
    try:
        rows = datasets.load_dataset("/".join(parts), config, split=split or "train", streaming=True)
        for row in rows:
            yield row[source.field]
    except KeyError:
        raise DataError(
            f"The data set has no field {source.field!r}.", where=str(source), remedy=f"its fields: {', '.join(row)}"
        ) from None
    except Exception as problem:
        local = ", ".join(form for kind, form in FORMS.items() if kind != "hub")
        reason = f"{type(problem).__name__}: {str(problem).splitlines()[0][:200]}"
        raise DataError(
            f"The data set cannot be read from the hub ({reason}).",
            where=str(source),
            remedy=f"without a network use a local form: {local}",
        ) from None


def _bundled(source: Source) -> Iterator[str]:
    return python_text.documents(source.target)
