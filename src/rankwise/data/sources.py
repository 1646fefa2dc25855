"""The grammar of text sources, one everywhere.

text:PATH                              a text file, one document
jsonl:PATH#field                       one document a line
parquet:PATH#field                     one document a row
alpaca:PATH.jsonl                      instructions in Alpaca's form; each with its output is one document
tokens:PATH.safetensors                token ids, ready made: one tensor [sequences, tokens] or [tokens]
hub:NAME[/config][:split]#field        a data set on the Hugging Face hub
named:wikitext2, named:ptb, named:c4   what published perplexities are of; the names alone will do
bundled[:train|:heldout]               text that every CPython carries
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from rankwise.data.lines import existing
from rankwise.data.named import NAMED_TEXTS
from rankwise.data.python_text import SPLITS
from rankwise.data.readers import DOCUMENTS, FORMS, read_token_ids
from rankwise.errors import DataError, nearest
from rankwise.reading import check_path, is_text, shown

FILE_KINDS = ("text", "jsonl", "parquet", "alpaca", "tokens")
"""Kinds of sources that are files."""


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

    def require(self) -> None:
        """Raise when it is a file that is not there; a hub is not asked.

        Raises:
            DataError: naming the file.
        """
        if self.kind in FILE_KINDS:
            existing(self.target)

    def documents(self) -> Iterator[str]:
        """The documents, in order.

        Raises:
            DataError: when the source cannot be read; names the first bad line or the field that is missing.
        """
        if self.kind == "tokens":
            raise ValueError("a tokens: source has no documents")
        return DOCUMENTS[self.kind](self.target, self.field)

    def token_ids(self) -> Tensor:
        """Ids of a `tokens:` source, shape `[sequences, tokens]` or `[tokens]`.

        Raises:
            DataError: when the file is no safetensors file with one integer tensor.
        """
        return read_token_ids(self.target)


def require_files(*texts: str | None) -> None:
    """Raise when a source is a file that is not there.

    Args:
        texts: sources in the grammar; None for one that is not given.

    Raises:
        DataError: naming the file.
    """
    for text in texts:
        if text is not None:
            parse_source(text).require()


def parse_source(text: str) -> Source:
    """Read a source such as `jsonl:data.jsonl#text`.

    Raises:
        DataError: when it does not follow the grammar.
    """
    if not is_text(text):
        raise DataError("The source is no valid text (UTF-8).", where=shown(text), remedy="rename the file")
    if text in NAMED_TEXTS:
        return Source("named", text)
    kind, _, rest = text.partition(":")
    if kind not in FORMS:
        remedy = f"write it as text:{text}" if os.path.exists(text) else nearest(kind[:80], FORMS)
        raise DataError(f"There is no source of kind {shown(kind)}.", where=text[:200], remedy=remedy)
    if kind == "bundled":
        split = rest or "train"
        if split not in SPLITS:
            raise DataError(
                f"The bundled text has no split {shown(split)}.", where=text, remedy=nearest(split[:80], SPLITS)
            )
        return Source(kind, split)
    if kind == "named" and rest not in NAMED_TEXTS:
        raise DataError(
            f"There is no text named {shown(rest)}.", where=text[:200], remedy=nearest(rest[:80], NAMED_TEXTS)
        )
    target, field = rest, None
    if kind in ("jsonl", "parquet", "hub"):
        target, mark, field = rest.rpartition("#")
        if not mark or not field:
            raise DataError(
                "The source does not say which field holds the text.", where=text, remedy=f"write {FORMS[kind]}"
            )
    if not target:
        raise DataError("The source names nothing.", where=text, remedy=f"write {FORMS[kind]}")
    try:
        check_path(target)
    except ValueError as problem:
        raise DataError(f"The source names no file: {problem}.", where=text[:200], remedy="check the path") from None
    return Source(kind, target, field)
